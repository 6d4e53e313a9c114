"""Helpers that tests share: running scripts in this process or as commands, reading what they wrote."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "tests" / "assets"
sys.path[:0] = [str(ROOT), str(ASSETS)]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
SHORT = {"eval_dataset": (), "wandb": "disabled", "batch_size": 8, "max_steps": 3}  # a run for a test
TIMES = ("tokens_per_second", "step_seconds", "generate_seconds")
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2 on two cores: a thread each, here and in the scripts
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With several workers, one has all tests with a real vLLM server, which takes a core while it waits."""
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.xdist_group("vllm"))


@pytest.fixture(autouse=True)
def no_process_group_left():
    """A script that ends with an error in this process leaves its process group behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def train(script, output_dir, **flags):
    """Run `main` of a script's module in this process, with SHORT where no flag says otherwise -> its metrics."""
    script.main(script.Args(**{**SHORT, "output_dir": str(output_dir), **flags}))
    return read_metrics(output_dir)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_metrics(output_dir):
    """The rows of metrics.jsonl without what depends on the clock."""
    path = Path(output_dir) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
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


def flags_of(**flags):
    """Fields of Args as a command line, those of SHORT where none are given."""
    words = []
    for name, value in {**SHORT, **flags}.items():
        words += [f"--{name.replace('_', '-')}"] if value is not False else []
        words += [] if isinstance(value, bool) else list(value) if isinstance(value, tuple) else [value]
    return [str(word) for word in words]


def weights(path):
    return load_file(Path(path) / "final" / "model.safetensors")


def assert_same_curve(found, expected, rtol=1e-4):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=rtol, abs=1e-6), (key, a, b)


def start(script, *flags, ranks=1):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(script, *flags, ranks=ranks), env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip


def wait_for_step(process, output_dir, step, timeout=120):
    """Wait until metrics.jsonl has that step, or the process has ended."""
    deadline = time.time() + timeout
    while process.poll() is None:
        assert time.time() < deadline, "no such step in time"
        path = Path(output_dir) / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)


def kill(process, output_dir):
    """SIGKILL to a run and, as torchrun's workers have sessions of their own, to all that have its directory as a flag
    -> what it had printed."""
    assert process.poll() is None, (
        f"the run ended before it could be killed: {process.communicate()[0][-2000:]}"
    )
    subprocess.run(["pkill", "-9", "-f", str(output_dir)], check=True)
    return process.communicate()[0]
