"""What the comparisons with TRL share: the model, processes of their own that alternate, the measures, the report.

Every comparison trains a randomly initialised Qwen3 of 26M parameters (hidden 384, 8 layers, vocabulary 32,768) in
float32 with AdamW, no gradient checkpointing, on a CPU. Reported for each system: units a second (of all steps), peak
resident memory, everything that is not a step (start-up and export), and useful FLOPs a second as a share of this
machine's GEMM peak, the best matrix product seen between the runs. Writes results/<name>_cpu.json, prints Markdown.
"""

import argparse
import importlib
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
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HIDDEN, LAYERS, VOCABULARY = 384, 8, 32768
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN  # weights of a layer that multiply


def make_model(directory, seed=0):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
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
    Qwen3ForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(ROOT / "tests" / "assets" / "model").save_pretrained(directory)


def forward_flops(lengths, heads):
    """Of one forward of documents: weights, causal attention, and the head at `heads` positions."""
    attention = 2 * LAYERS * HIDDEN * (lengths.astype(float) ** 2).sum()
    return 2 * LAYERS * LAYER * lengths.sum() + 2 * VOCABULARY * HIDDEN * heads + attention


def make_pairs(directory, pairs):
    """rows.jsonl of pairs in tokens of one digit, prompts of about 150 and completions of about 75 (half to one and a
    half as many) -> the FLOPs of one forward's layers and of the head at all completions, each prompt counted once."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "assets" / "model")
    rng, digits = np.random.default_rng(0), np.array(list("0123456789"))
    layers = heads = 0
    with open(directory / "rows.jsonl", "w") as file:
        for _ in range(pairs):
            prompt, *sides = (int(rng.integers(mean // 2, mean * 3 // 2)) for mean in (150, 75, 75))
            texts = ["".join(rng.choice(digits, size)) for size in (prompt, *sides)]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))) + "\n")
            assert len(tokenizer(texts[0])["input_ids"]) == prompt
            layers += sum(forward_flops(np.array([prompt + side + 1]), 0) for side in sides)
            layers -= forward_flops(np.array([prompt]), 0)
            heads += sum(forward_flops(np.array([0]), side + 1) for side in sides)
    return layers, heads


def train_with_trl(trainer_class, directory, rows, arguments=None, module="trl", **options):
    """The worker of a TRL run: prints its step times as JSON."""
    from datasets import load_dataset
    from transformers import TrainerCallback

    seconds = []

    class StepTimes(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.began)

    options |= {
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    options |= {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trl = importlib.import_module(module)
    config = getattr(trl, trainer_class.replace("Trainer", "Config"))
    config = config(output_dir=str(directory / "trl"), model_init_kwargs={"dtype": "float32"}, **options)
    data = load_dataset("json", data_files=str(directory / rows), split="train")
    trainer = getattr(trl, trainer_class)(
        str(directory / "model"),
        args=config,
        train_dataset=data,
        callbacks=[StepTimes()],
        **(arguments or {}),
    )
    trainer.train()
    trainer.save_model()
    print(json.dumps({"step_seconds": seconds}))


def run(command, directory, output):
    """Run one system -> (step seconds, wall seconds, peak MiB)."""
    began = time.perf_counter()
    with open(directory / "log", "w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    wall, text = time.perf_counter() - began, (directory / "log").read_text()
    if status:
        sys.exit(f"{command} failed:\n{text[-3000:]}")
    if output.exists():
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


def compare(script, doc, workers, make_rows, flags, unit, steps):
    """The command of a comparison.

    workers: system -> what a TRL worker does with a directory. make_rows: (directory, steps) -> units and useful
    FLOPs of a run. flags: directory -> those of `script`. Where the script runs in several ways, flags and FLOPs are
    dicts, system -> the same.
    """
    ours = flags if isinstance(flags, dict) else {"ours": flags}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--only", choices=[*ours, *workers])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return workers[args.worker](args.directory)

    systems, results, peaks = [args.only] if args.only else [*workers, *ours], {}, []
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        make_model(directory / "model")
        units, flops = make_rows(directory, args.steps)
        for number in range(args.rounds):
            for name in systems:
                peaks.append(gemm_peak())
                output = directory / f"{name}-{number}"
                command = [sys.executable, sys.argv[0], "--worker", name, "--directory", directory]
                if name in ours:
                    command = [
                        sys.executable,
                        ROOT / script,
                        "--model",
                        directory / "model",
                        *ours[name](directory),
                    ]
                    command += [
                        "--epochs",
                        1,
                        "--learning-rate",
                        1e-4,
                        "--eval-dataset",
                        "--wandb",
                        "disabled",
                    ]
                    command += ["--output-dir", output]
                seconds, wall, memory = run(command, directory, output)
                useful = flops[name] if isinstance(flops, dict) else flops
                speed, share = units / sum(seconds), useful / sum(seconds) / 1e9
                print(f"round {number + 1} {name}: {speed:.3g} {unit}/s, {memory:.0f} MiB, "
                      f"{wall - sum(seconds):.1f} s not in steps, {share:.0f} of {peaks[-1]:.0f} GFLOP/s", flush=True)  # fmt: skip
                results.setdefault(name, []).append((speed, memory, wall - sum(seconds), share))
    peak, rows = max(peaks), {}
    for name, measured in results.items():
        speed, memory, other, share = (statistics.median(values) for values in zip(*measured, strict=True))
        rows[name] = {f"{unit}_per_second": round(speed, 3), "peak_memory_mib": round(memory)}
        rows[name] |= {"other_seconds": round(other, 1), "gemm_share": round(share / peak, 3)}
    print(
        f"\n| system | {unit}/s | peak memory | outside steps | share of GEMM peak |\n|---|--:|--:|--:|--:|"
    )
    for name, row in rows.items():
        print(f"| {name} | {row[f'{unit}_per_second']:.3g} | {row['peak_memory_mib'] / 1024:.1f} GiB | "
              f"{row['other_seconds']:.0f} s | {row['gemm_share']:.0%} |")  # fmt: skip
    if not args.only:
        packages = {name: version(name) for name in ("torch", "transformers", "trl")}
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        record = {"command": " ".join(sys.argv), "packages": packages, "rows": rows}
        record["machine"] = {**machine, "gemm_gflops": round(peak)}
        path = HERE / "results" / f"{Path(sys.argv[0]).stem}_cpu.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
