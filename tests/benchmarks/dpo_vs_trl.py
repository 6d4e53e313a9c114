"""dpo.py beside TRL's DPOTrainer on a CPU: see harness.py.

    python tests/benchmarks/dpo_vs_trl.py [--rounds 2] [--steps 4]

8 pairs a step, prompts of about 150 tokens and completions of about 75 on each side.
"""

from harness import compare, make_pairs, train_with_trl

BATCH = 8


def make_rows(directory, steps):
    layers, heads = make_pairs(directory, BATCH * steps)
    return BATCH * steps, 4 * (
        layers + heads
    )  # a policy is trained for three forwards, a reference needs one


def trl(directory):
    train_with_trl("DPOTrainer", directory, "rows.jsonl", per_device_train_batch_size=BATCH, max_length=1024)


def flags(directory):
    return ["--dataset", directory / "rows.jsonl", "--batch-size", BATCH, "--micro-batch-tokens", 2048]


if __name__ == "__main__":
    compare("dpo.py", __doc__, {"trl": trl}, make_rows, flags, unit="pairs", steps=4)
