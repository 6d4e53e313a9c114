"""Helpers that tests share: running scripts in this process or as commands, reading what they wrote."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "tests" / "assets"
sys.path[:0] = [str(ROOT), str(ASSETS)]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
os.environ["OMP_NUM_THREADS"] = "1"
SHORT = {"eval_dataset": (), "wandb": "disabled", "batch_size": 8, "max_steps": 3}  # a run for a test
# How the names of metrics begin that depend on the clock.
TIMES = ("tokens_per_second", "step_seconds", "generate_seconds", "perf/", "sample/", "utilisation/")
torch.set_num_threads(1)  # here as in the commands: numbers are the same, and pytest -n 2 has a core for each


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With several workers, one has all tests with a real vLLM server, which takes a core while it waits."""
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.xdist_group("vllm"))


def leave_process_group():
    """A script that ends with an error in this process leaves its process group behind."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_process_group_left():
    yield
    leave_process_group()


def embedded_model(script, window=None):
    """The embedded model with the script's token_stats, and attention that keeps packed documents apart."""
    import common  # only here: it imports transformers, which reads the environment

    common.register_attention()
    options = {"attn_implementation": "varlen"}
    model = common.transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "model", **options)
    model.token_stats = MethodType(script.token_stats, model)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    return model


def train(script, output_dir, **flags):
    """Run `main` of a script's module in this process, with SHORT where no flag says otherwise -> its metrics."""
    leave_process_group()
    script.main(script.Args(**{**SHORT, "output_dir": str(output_dir), **flags}))
    return read_metrics(output_dir)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ragged_pairs():
    """21 rows of preferences: conversations, and answers of 1 to 12 tokens on each side."""
    questions, rng, rows = read_rows(ASSETS / "preferences.jsonl")[:400], random.Random(0), []
    for _ in range(21):
        some = rng.sample(questions, rng.randint(1, 3))
        prompt = sum((row["prompt"] + row["chosen"] for row in some[1:]), []) + some[0]["prompt"]
        others = rng.choices(questions, k=rng.randint(1, 3))
        rejected = " or ".join(row["rejected"][0]["content"] for row in others)
        chosen = some[0]["chosen"][0]["content"] + rng.choice(["", ".", " it is", " of course it is"])
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def read_rows(path):
    """Of a file of JSON lines, in which other characters may end lines, too."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def read_metrics(output_dir):
    """The rows of metrics.jsonl without what depends on the clock."""
    path = Path(output_dir) / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def read_completions(output_dir):
    return read_rows(Path(output_dir) / "completions.jsonl")


def command(script, *flags, ranks=1):
    """The command line of a script, under torchrun where it has several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def run(script, *flags, ranks=1, timeout=300):
    """Run a script to its end -> CompletedProcess with its output as text."""
    words = command(script, *flags, ranks=ranks)
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout)


def run_well(script, output_dir, *flags, **options):
    """Run a script, which must end well -> its metrics."""
    result = run(script, "--output-dir", output_dir, *flags, **options)
    assert result.returncode == 0, result.stderr[-6000:]
    return read_metrics(output_dir)


def flags_of(**flags):
    """Fields of Args as a command line, those of SHORT where none are given."""
    words = []
    for name, value in {**SHORT, **flags}.items():
        words += [f"--{name.replace('_', '-')}"] if value is not False else []
        words += [] if isinstance(value, bool) else list(value) if isinstance(value, tuple) else [value]
    return [str(word) for word in words]


def weights(path):
    return load_file(Path(path) / "final" / "model.safetensors")


def train_on(ranks, script, output_dir, **flags):
    """Train in this process, or with several ranks under torchrun -> metrics."""
    if ranks == 1:
        return train(script, output_dir, **flags)
    return run_well(f"{script.__name__}.py", output_dir, *flags_of(**flags), ranks=ranks)


def assert_same_curve(found, expected, rtol=1e-4, but=()):
    """but: how the names of metrics end that may differ."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in (key for key in a if not key.endswith(but)):
            assert a[key] == pytest.approx(b[key], rel=rtol, abs=1e-6), (key, a, b)


def assert_same_run(found, expected):
    """Bit for bit: metrics (times aside), samples and weights."""
    assert read_metrics(found) == read_metrics(expected) != []
    if (expected / "completions.jsonl").exists():
        assert read_completions(found) == read_completions(expected)
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in b)


def assert_two_ranks_train_as_one(script, output_dir, rtol, but=(), elsewhere=None, **flags):
    """elsewhere: flags that the two ranks have and the one has not."""
    one = train_on(1, script, output_dir / "1", **flags)
    two = train_on(2, script, output_dir / "2", **{**flags, **(elsewhere or {})})
    assert_same_curve(two, one, rtol, but)


def assert_steps_equal_trls(script, kind, names, output_dir, model, rows, **flags):
    """TRL's DPOTrainer or RewardTrainer as a whole, three steps of all rows: its metrics of these names are ours."""
    import trl  # takes seconds
    from datasets import Dataset

    own = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(output_dir / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        per_device_train_batch_size=len(rows), num_train_epochs=3, learning_rate=1e-3, lr_scheduler_type="constant",
        logging_steps=1, max_grad_norm=1.0, gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}, **own,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(model, args=config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    expected = [row for row in trainer.state.log_history if "loss" in row]
    flags |= {"lr_schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-3, "micro_batch_tokens": 128}
    dataset = (write_rows(output_dir / "rows.jsonl", rows),)
    found = train(script, output_dir / "ours", model=model, dataset=dataset, batch_size=len(rows), **flags)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for name in names:
            assert ours[name] == pytest.approx(float(theirs[name]), rel=1e-3, abs=2e-4), (name, ours, theirs)


def start(script, *flags, ranks=1):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(script, *flags, ranks=ranks), **pipes, start_new_session=True)


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
    assert process.poll() is None, f"it ended before it was killed: {process.communicate()[0][-2000:]}"
    subprocess.run(["pkill", "-9", "-f", str(output_dir)], check=True)
    return process.communicate()[0]
