"""sft.py on one GPU beside TRL: python tests/benchmarks/gpu.py [--steps 12]

A randomly initialised Qwen3-0.6B, rows of 2,048 and of 8,192 random tokens (all trained), 65,536 tokens a step, bf16
compute on float32 weights, gradient checkpointing in both. Each system runs in a process of its own. Reported: tokens/s
(median step after three), model-FLOP utilisation against --peak-tflops (H100 and H200: 989 dense bf16), and peak memory.
Writes tests/benchmarks/results/gpu_<device>.json. Without TRL installed it measures sft.py alone, and says so.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOKENS_A_STEP, HIDDEN, LAYERS, VOCABULARY, ATTENTION_DIM = 65536, 1024, 28, 151936, 2048


def make_inputs(directory, length, steps):
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    if not (directory / "model").exists():
        config = Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=3072, num_hidden_layers=LAYERS,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
            tie_word_embeddings=True,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(directory / "model")
        AutoTokenizer.from_pretrained(ROOT / "tests" / "assets" / "model").save_pretrained(
            directory / "model"
        )
    rng = np.random.default_rng(0)
    with open(directory / "rows.jsonl", "w") as file:
        for _ in range(TOKENS_A_STEP // length * steps):
            file.write(json.dumps({"input_ids": rng.integers(0, VOCABULARY, length).tolist()}) + "\n")


def flops_per_token(length):
    """Forward and backward, weights and causal attention, without recomputation."""
    layer = HIDDEN * (2 * ATTENTION_DIM + 2 * ATTENTION_DIM // 2) + 3 * HIDDEN * 3072
    return 6 * (LAYERS * layer + VOCABULARY * HIDDEN) + 6 * LAYERS * ATTENTION_DIM * length


def run_ours(directory, length, flags):
    sys.argv = [str(ROOT / "sft.py")]
    sys.path.insert(0, str(ROOT))
    import sft

    output_dir = tempfile.mkdtemp(dir=directory)
    sft.main(
        sft.Args(
            model=str(directory / "model"), dataset=(str(directory / "rows.jsonl"),), eval_dataset=(), output_dir=output_dir + "/run",
            batch_size=TOKENS_A_STEP // length, micro_batch_tokens=16384, epochs=1, learning_rate=1e-5, wandb="disabled",
            gradient_checkpointing=True, compile="compile" in flags,
        )
    )  # fmt: skip
    rows = [json.loads(line) for line in Path(output_dir, "run", "metrics.jsonl").read_text().splitlines()]
    return [row["step_seconds"] for row in rows]


def run_trl(directory, length, _):
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seconds = []

    class StepTimes(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    per_device = 16384 // length
    config = SFTConfig(
        output_dir=str(directory / "trl"), per_device_train_batch_size=per_device, num_train_epochs=1, max_length=length,
        gradient_accumulation_steps=TOKENS_A_STEP // length // per_device, learning_rate=1e-5, bf16=True,
        gradient_checkpointing=True, save_strategy="no", report_to="none",
    )  # fmt: skip
    rows = load_dataset("json", data_files=str(directory / "rows.jsonl"), split="train")
    SFTTrainer(str(directory / "model"), args=config, train_dataset=rows, callbacks=[StepTimes()]).train()
    return seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--peak-tflops", type=float, default=989)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, directory, length, *flags = args.worker
        seconds = (run_trl if name == "trl" else run_ours)(Path(directory), int(length), flags)
        print(json.dumps({"step_seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}))
        return
    systems = [("ours",), ("ours", "compile")] + ([("trl",)] if find_spec("trl") else [])
    if not find_spec("trl"):
        print("trl is not installed: measuring sft.py alone")
    table = []
    with tempfile.TemporaryDirectory() as directory:
        for length in (2048, 8192):
            make_inputs(Path(directory), length, args.steps)
            for name, *flags in systems:
                command = [sys.executable, __file__, "--worker", name, directory, str(length), *flags]
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                if result.returncode:
                    print(f"{name} {flags} {length} failed:\n{result.stderr[-1500:]}", flush=True)
                    continue
                measured = json.loads(result.stdout.strip().splitlines()[-1])
                speed = TOKENS_A_STEP / statistics.median(measured["step_seconds"][3:])
                table.append({
                    "system": " ".join([name, *flags]), "length": length, "tokens_per_second": round(speed),
                    "mfu": round(speed * flops_per_token(length) / args.peak_tflops / 1e12, 3),
                    "peak_gib": round(measured["peak_gib"], 1),
                })  # fmt: skip
                print(table[-1], flush=True)
    device = torch.cuda.get_device_name().replace(" ", "-").lower()
    (HERE / "results" / f"gpu_{device}.json").write_text(
        json.dumps({"command": " ".join(sys.argv), "rows": table}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
