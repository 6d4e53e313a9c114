"""A vLLM server on a CPU beside the embedded engine, on the same work, and the time to send it weights by model size.

    python tests/benchmarks/vllm_cpu.py

Generation: 32 prompts of about 150 tokens x 8 completions of 64 tokens by harness.py's model of 26M parameters, medians of
three after one that is not counted. Weights: medians of five for models of three sizes. Writes results/vllm_cpu.json.
"""

import json
import statistics
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from harness import HERE, ROOT, make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(ROOT))
from common import HFEngine, make_engine

PROMPTS, SAMPLES, NEW = 32, 8, 64


def timed(repeats, function, *given):
    """Median seconds of function(*given), after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function(*given)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def make_larger(directory):
    """112M parameters: twice as wide and deep as harness.py's."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory / "26M")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 768, 3072, 9
    config.num_attention_heads = config.num_key_value_heads = 12
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "large")
    AutoTokenizer.from_pretrained(directory / "26M").save_pretrained(directory / "large")


def main():
    rng, rows = np.random.default_rng(0), {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    prompts = [rng.integers(10, 500, int(rng.integers(75, 225))).tolist() for _ in range(PROMPTS)]
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        make_model(directory / "26M")
        make_larger(directory)
        for path in (ROOT / "tests" / "assets" / "model", directory / "26M", directory / "large"):
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="varlen"
            )
            size = sum(weight.numel() for weight in model.parameters()) / 1e6
            args = SimpleNamespace(
                model=str(path), engine="vllm", vllm_url=(), vllm_args="", vllm_timeout=600.0
            )
            output_dir = directory / f"{path.name}-run"
            engine = make_engine(args, model, torch.device("cpu"), torch.float32, 1024, output_dir)
            versions, weights = count(1), dict(model.named_parameters())
            try:
                send = lambda: engine.load_weights(weights.items(), next(versions))  # noqa: B023, E731
                rows[f"send {size:.1f}M weights"] = timed(5, send)
                if path.name == "26M":
                    keys = [(number,) for number in range(PROMPTS)]
                    work = prompts, keys, SAMPLES, NEW, 1.0, []
                    rows["generate, vllm"] = timed(3, engine.generate, *work)
                    rows["generate, hf"] = timed(3, HFEngine(model).generate, *work)
            finally:
                engine.stop()
    for name, seconds in rows.items():
        print(f"| {name} | {seconds:.2f} s |")
    record = {name: round(seconds, 3) for name, seconds in rows.items()}
    (HERE / "results" / "vllm_cpu.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
