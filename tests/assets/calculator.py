r"""A calculator as an environment, and what teaches its form: python tests/assets/calculator.py chats.jsonl

The embedded model has never seen a tool call. 150 small steps of sft.py on the chats that this writes teach it the
form, not yet to copy both numbers: 22.8 % of the held-out calls are right, greedily. 20 steps of grpo.py on the
reward alone take that to 58.4 % (45 and 86 seconds of CPU time, one thread):

    python sft.py --dataset chats.jsonl --batch-size 32 --learning-rate 3e-3 --lr-schedule constant --max-steps 150 \
        --output-dir runs/form
    python grpo.py --model runs/form/final --environment tests/assets/calculator.py:Calculator \
        --max-completion-length 100 --temperature 0.7 --max-steps 20

The start matters: after 165 such steps of sft.py nothing is left to learn (100 %), and where hardly any sample is right
(3 % after 140 with a linear schedule), ten steps of grpo.py at 3e-5 learn nothing.
"""

import json
import sys
from pathlib import Path


class Calculator:
    """The reward is 1 if the newest sum is the answer of the row."""

    def reset(self, answer="", **_):
        self.answer, self.sum = answer, None

    def add(self, a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their sum.
        """
        self.sum = a + b
        return self.sum

    def get_reward(self):
        return float(str(self.sum) == self.answer)


def chat(a, b):
    """A conversation in which the tool is used as the embedded ChatML template writes it."""
    call = json.dumps({"name": "add", "arguments": {"a": a, "b": b}})
    return [
        {"role": "user", "content": f"What is {a}+{b}?"},
        {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
        {"role": "tool", "content": str(a + b)},
        {"role": "assistant", "content": str(a + b)},
    ]


if __name__ == "__main__":
    problems = (Path(__file__).parent / "messages.jsonl").read_text().splitlines()
    with open(sys.argv[1], "w") as file:
        for problem in problems:
            question = json.loads(problem)["messages"][0]["content"]
            a, b = question.removeprefix("What is ").removesuffix("?").split("+")
            file.write(json.dumps({"messages": chat(int(a), int(b))}) + "\n")
