"""reward_model.py beside TRL's RewardTrainer on a CPU: see harness.py.

    python tests/benchmarks/reward_vs_trl.py [--rounds 2] [--steps 4]

8 pairs a step, prompts of about 150 tokens and completions of about 75 on each side.
"""

from harness import compare, make_pairs, train_with_trl

BATCH = 8


def make_rows(directory, steps):
    layers, _ = make_pairs(directory, BATCH * steps)
    return BATCH * steps, 3 * layers  # a score needs no language model head


def trl(directory):
    train_with_trl(
        "RewardTrainer", directory, "rows.jsonl", per_device_train_batch_size=BATCH, max_length=1024
    )


def flags(directory):
    return ["--dataset", directory / "rows.jsonl", "--batch-size", BATCH, "--micro-batch-tokens", 2048]


if __name__ == "__main__":
    compare("reward_model.py", __doc__, {"trl": trl}, make_rows, flags, unit="pairs", steps=4)
