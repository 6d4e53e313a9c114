"""sft.py beside TRL's SFTTrainer on a CPU: the same model, rows, batch and precision, each in a process of its own.

    python tests/benchmarks/sft_vs_trl.py [--rounds 2] [--steps 6]

A randomly initialised Qwen3 of 26M parameters (hidden 384, 8 layers, vocabulary 32,768), conversations of 30 to 1,400
tokens, half of each trained, 8 a step, float32, AdamW, no gradient checkpointing. The systems alternate. Reported for
each: tokens/s (real tokens, padding not counted, over all steps), peak resident memory, everything that is not a step
(start-up and export), and model FLOPs a second as a share of this machine's GEMM peak, measured between the rounds.
Writes tests/benchmarks/results/sft_vs_trl_cpu.json and prints Markdown rows.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HIDDEN, LAYERS, VOCABULARY, BATCH = 384, 8, 32768, 8


def make_inputs(directory, steps):
    """A model and rows of input_ids and labels -> the rows' lengths."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory / "model")
    AutoTokenizer.from_pretrained(ROOT / "tests" / "assets" / "model").save_pretrained(directory / "model")
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(30), np.log(1400), size=BATCH * steps)).astype(int)
    with open(directory / "rows.jsonl", "w") as file:
        for length in lengths:
            ids = rng.integers(0, VOCABULARY, length).tolist()
            file.write(
                json.dumps({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]}) + "\n"
            )
    return lengths


def run_trl(directory, packed):
    """The worker of a TRL run: prints its step times as JSON."""
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seconds = []

    class StepTimes(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.began)

    config = SFTConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=3
        if packed
        else BATCH,  # packed: rows of 1,400 tokens, about as many tokens a step
        num_train_epochs=1,
        learning_rate=1e-4,
        max_length=1400,
        packing=packed,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    rows = load_dataset("json", data_files=str(directory / "rows.jsonl"), split="train")
    trainer = SFTTrainer(str(directory / "model"), args=config, train_dataset=rows, callbacks=[StepTimes()])
    trainer.train()
    trainer.save_model()
    print(json.dumps({"step_seconds": seconds}))


def run(name, directory, output):
    """Run one system -> (step seconds, wall seconds, peak MiB)."""
    command = [sys.executable, __file__, "--worker", name, "--directory", directory]
    if name == "ours":
        command = [
            sys.executable,
            ROOT / "sft.py",
            "--model",
            directory / "model",
            "--dataset",
            directory / "rows.jsonl",
        ]
        command += [
            "--batch-size",
            BATCH,
            "--epochs",
            1,
            "--learning-rate",
            1e-4,
            "--micro-batch-tokens",
            2048,
        ]
        command += ["--eval-dataset", "--wandb", "disabled", "--output-dir", output]
    began = time.perf_counter()
    with open(directory / "log", "w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    wall, text = time.perf_counter() - began, (directory / "log").read_text()
    if status:
        sys.exit(f"{name} failed:\n{text[-3000:]}")
    if name == "ours":
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        seconds = [row["step_seconds"] for row in rows]
    else:
        seconds = json.loads(text.splitlines()[-1])["step_seconds"]
    return seconds, wall, usage.ru_maxrss / 1024


def gemm_peak():
    """Best GFLOP/s of a float32 matrix product of 2048^3."""
    a_MM, best = torch.randn(2048, 2048), 0
    for _ in range(10):
        began = time.perf_counter()
        a_MM @ a_MM
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began) / 1e9)
    return best


def useful_flops(lengths):
    """Of one epoch: weights (head at trained positions only) and causal attention, forward and backward, no recompute."""
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN
    trained = (lengths - lengths // 2).sum()
    attention = 6 * LAYERS * HIDDEN * (lengths.astype(float) ** 2).sum()
    return 6 * LAYERS * layer * lengths.sum() + 6 * VOCABULARY * HIDDEN * trained + attention


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", choices=["ours", "trl-padded", "trl-packed"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return run_trl(args.directory, packed=args.worker == "trl-packed")

    systems, results, peaks = [args.only] if args.only else ["trl-padded", "trl-packed", "ours"], {}, []
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        lengths = make_inputs(directory, args.steps)
        for number in range(args.rounds):
            for name in systems:
                peaks.append(gemm_peak())
                seconds, wall, memory = run(name, directory, directory / f"run-{number}")
                speed = lengths.sum() / sum(seconds)
                share = useful_flops(lengths) / sum(seconds) / 1e9
                print(f"round {number + 1} {name}: {speed:.0f} tokens/s, {memory:.0f} MiB, "
                      f"{wall - sum(seconds):.1f} s not in steps, {share:.0f} of {peaks[-1]:.0f} GFLOP/s", flush=True)  # fmt: skip
                results.setdefault(name, []).append((speed, memory, wall - sum(seconds), share))
    peak = max(peaks)
    rows = {}
    for name, measured in results.items():
        speed, memory, other, flops = (statistics.median(values) for values in zip(*measured, strict=True))
        rows[name] = {
            "tokens_per_second": round(speed, 1),
            "peak_memory_mib": round(memory),
            "other_seconds": round(other, 1),
            "gemm_share": round(flops / peak, 3),
        }
    print("\n| system | tokens/s | peak memory | outside steps | share of GEMM peak |\n|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        print(f"| {name} | {row['tokens_per_second']:.0f} | {row['peak_memory_mib'] / 1024:.1f} GiB | "
              f"{row['other_seconds']:.0f} s | {row['gemm_share']:.0%} |")  # fmt: skip
    if not args.only:
        packages = {name: version(name) for name in ("torch", "transformers", "trl")}
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gemm_gflops": round(peak),
        }
        record = {"command": " ".join(sys.argv), "packages": packages, "machine": machine, "rows": rows}
        (HERE / "results" / "sft_vs_trl_cpu.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
