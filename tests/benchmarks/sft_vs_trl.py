"""sft.py beside TRL's SFTTrainer, padded and packed, on a CPU: see harness.py.

    python tests/benchmarks/sft_vs_trl.py [--rounds 2] [--steps 6]

Conversations of 30 to 1,400 tokens, half of each trained, 8 a step; tokens are real ones, padding not counted.
"""

import json

import numpy as np
from harness import VOCABULARY, compare, forward_flops, train_with_trl

BATCH = 8


def make_rows(directory, steps):
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(30), np.log(1400), size=BATCH * steps)).astype(int)
    with open(directory / "rows.jsonl", "w") as file:
        for length in lengths:
            ids = rng.integers(0, VOCABULARY, length).tolist()
            labels = [-100] * (length // 2) + ids[length // 2 :]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    return lengths.sum(), 3 * forward_flops(lengths, (lengths - lengths // 2).sum())


def padded(directory):
    train_with_trl(
        "SFTTrainer",
        directory,
        "rows.jsonl",
        per_device_train_batch_size=BATCH,
        max_length=1400,
        packing=False,
    )


def packed(directory):  # rows of 1,400 tokens: about as many tokens a step
    train_with_trl(
        "SFTTrainer", directory, "rows.jsonl", per_device_train_batch_size=3, max_length=1400, packing=True
    )


def flags(directory):
    return ["--dataset", directory / "rows.jsonl", "--batch-size", BATCH, "--micro-batch-tokens", 2048]


if __name__ == "__main__":
    workers = {"trl-padded": padded, "trl-packed": packed}
    compare("sft.py", __doc__, workers, make_rows, flags, unit="tokens", steps=6)
