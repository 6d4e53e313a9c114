"""Helpers that tests share: running scripts in this process or as commands, reading what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "tests" / "assets"
sys.path[:0] = [str(ROOT), str(ASSETS)]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
TIMES = ("tokens_per_second", "step_seconds")


@pytest.fixture(autouse=True)
def no_process_group_left():
    """A script that ends with an error in this process leaves its process group behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_metrics(output_dir):
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def command(script, *flags, ranks=1):
    """The command line of a script, under torchrun where it has several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def run(script, *flags, ranks=1, timeout=300):
    """Run a script to its end, one thread a rank -> CompletedProcess with its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(script, *flags, ranks=ranks),
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
