"""gkd.py beside TRL's GKDTrainer on a CPU, off policy and on, both with the transformers model as engine: see harness.py.

    python tests/benchmarks/gkd_vs_trl.py [--rounds 2] [--steps 2]

8 prompts of about 150 tokens and completions of 64 a step, the data's or the student's own samples; beta 0.5. Student and
teacher are of the same size. The student is random, so that its samples have 64 tokens too. Useful FLOPs are three
forwards of the student and one of the teacher, and one more of the student to generate.
"""

import json

import numpy as np
from harness import ROOT, compare, forward_flops, make_model, train_with_trl
from transformers import AutoTokenizer

BATCH, NEW = 8, 64


def make_rows(directory, steps):
    make_model(directory / "teacher", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "assets" / "model")
    rng, digits, forward = np.random.default_rng(0), list("0123456789"), 0
    with open(directory / "rows.jsonl", "w") as file:
        for _ in range(BATCH * steps):
            prompt, answer = ("".join(rng.choice(digits, n)) for n in (int(rng.integers(75, 225)), NEW - 1))
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
            ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
            forward += forward_flops(np.array([len(ids)]), NEW)
    off, on = (
        {"trl-off": 4 * forward, "ours-off": 4 * forward},
        {"trl-on": 5 * forward, "ours-on": 5 * forward},
    )
    return BATCH * steps, off | on


def trl(lmbda):
    def train(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory / "model")
        models = {"teacher_model": str(directory / "teacher"), "processing_class": tokenizer}
        train_with_trl(
            "GKDTrainer", directory, "rows.jsonl", models,
            module="trl.experimental.gkd", teacher_model_init_kwargs={"dtype": "float32"}, lmbda=lmbda, beta=0.5,
            temperature=1.0, max_new_tokens=NEW, per_device_train_batch_size=BATCH,
        )  # fmt: skip

    return train


def ours(*more):
    def flags(directory):
        return [
            "--teacher", directory / "teacher", "--dataset", directory / "rows.jsonl", "--batch-size", BATCH,
            "--micro-batch-tokens", 2048, *more,
        ]  # fmt: skip

    return flags


if __name__ == "__main__":
    systems = {"ours-off": ours("--lmbda", 0), "ours-on": ours("--lmbda", 1, "--max-completion-length", NEW)}
    workers = {"trl-off": trl(0.0), "trl-on": trl(1.0)}
    compare("gkd.py", __doc__, workers, make_rows, systems, unit="completions", steps=2)
