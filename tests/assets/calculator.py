"""A calculator as an environment, and what teaches its form: python tests/assets/calculator.py chats.jsonl

The embedded model has never seen a tool call. After some steps of sft.py on the chats that this writes, it makes some
right ones, and grpo.py --environment tests/assets/calculator.py:Calculator can teach it the rest.
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
