"""grpo.py beside TRL's GRPOTrainer on a CPU, both with the transformers model as engine: see harness.py.

    python tests/benchmarks/grpo_vs_trl.py [--rounds 2] [--steps 2]

4 prompts of about 150 tokens x 8 completions of 64 tokens a step. The model is random, so that all completions have
64 tokens; useful FLOPs are one forward to generate and three to train.
"""

import json

import numpy as np
from harness import compare, forward_flops, train_with_trl

PROMPTS, GENERATIONS, NEW = 4, 8, 64
REWARD = (
    "def digits(completions, **_):\n    return [float(sum(map(str.isdigit, text))) for text in completions]\n"
)


def make_rows(directory, steps):
    rng, flops = np.random.default_rng(0), 0
    (directory / "rewards.py").write_text(REWARD)
    with open(directory / "rows.jsonl", "w") as file:
        for _ in range(PROMPTS * steps):
            size = int(rng.integers(75, 225))
            file.write(json.dumps({"prompt": "".join(rng.choice(list("0123456789"), size))}) + "\n")
            whole = GENERATIONS * forward_flops(np.array([size + NEW]), NEW)
            flops += 4 * (whole - (GENERATIONS - 1) * forward_flops(np.array([size]), 0))
    return PROMPTS * GENERATIONS * steps, flops


def trl(directory):
    space = {}
    exec(REWARD, space)
    train_with_trl(
        "GRPOTrainer", directory, "rows.jsonl", {"reward_funcs": space["digits"]}, num_generations=GENERATIONS,
        per_device_train_batch_size=PROMPTS * GENERATIONS, max_completion_length=NEW, shuffle_dataset=False,
    )  # fmt: skip


def flags(directory):
    return [
        "--dataset", directory / "rows.jsonl", "--batch-size", PROMPTS * GENERATIONS, "--num-generations", GENERATIONS,
        "--max-completion-length", NEW, "--rewards", f"{directory}/rewards.py:digits", "--micro-batch-tokens", 2048,
    ]  # fmt: skip


if __name__ == "__main__":
    compare("grpo.py", __doc__, {"trl": trl}, make_rows, flags, unit="completions", steps=2)
