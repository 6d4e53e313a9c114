"""What every script promises: exact resume, a signal, a loss that is not finite."""

import functools
import json
import math
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from conftest import ASSETS, assert_same_run, read_completions, read_metrics, train

import async_grpo
import dpo
import gkd
import grpo
import reward_model
import sft
from common import UserError

CHATS, PAIRS, RANKINGS, PROMPTS = (  # about 24 rows, so that an epoch has three steps of 8
    {"dataset": (f"{ASSETS}/{name}.jsonl:{share}",), "eval_dataset": (f"{ASSETS}/{name}_eval.jsonl:0.02",)}
    for name, share in (("messages", 0.0032), ("preferences", 0.006), ("comparisons", 0.0032), ("prompts", 1))
)
LORA = {"lora_rank": 4, "save_every": 3}
RL = {**PROMPTS, "batch_size": 16, "num_generations": 4, "beta": 0.1}
FIRST = {
    "sft": (sft, CHATS),
    "dpo": (dpo, {**PAIRS, "loss_type": ("aot", "sft")}),
    "reward_model": (reward_model, RANKINGS),
    "gkd": (gkd, {**CHATS, "lmbda": 0.6}),
    "grpo": (grpo, {**RL, "steps_per_generation": 2, "num_iterations": 2, "save_every": 3, "max_steps": 5}),
    "async_grpo": (async_grpo, {**RL, "max_staleness": 0}),
}
MODES = FIRST | {
    "sft, LoRA": (sft, {**CHATS, **LORA, "neftune_alpha": 5.0, "lr_schedule": "cosine"}),
    "dpo, LoRA": (dpo, {**PAIRS, **LORA, "precompute_ref_log_probs": True}),
    "reward_model, LoRA": (reward_model, {**RANKINGS, **LORA}),
    "gkd, LoRA": (gkd, {**CHATS, **LORA, "seq_kd": True}),
}


def checkpoints(output_dir):
    return sorted(int(path.parent.name[-8:]) for path in output_dir.glob("checkpoint-*/progress.json"))


def cut_back(output_dir):
    """Make of a run that ended with a checkpoint what it was when killed before that."""
    newest = max(output_dir.glob("checkpoint-*"))
    for path in (newest, output_dir / "final"):
        shutil.rmtree(path)
    (output_dir / f".{newest.name}.partial").mkdir()
    with open(output_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a line


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    """A function that trains in a mode, the first time that it is asked -> script, flags, output directory."""

    def run(name):
        script, flags = MODES[name]
        flags = {"max_steps": 4, "save_every": 2, "eval_every": 2, **flags}
        train(script, path := tmp_path_factory.mktemp("straight") / "run", **flags)
        assert checkpoints(path) == [flags["save_every"], flags["max_steps"]]
        return script, flags, path

    return functools.cache(run)


@pytest.mark.parametrize("name", MODES)
def test_resume_is_exact(tmp_path, straight_run, name):
    """In the middle of an epoch, at its end, and within a generation batch. A second time nothing is left to do."""
    script, flags, straight = straight_run(name)
    shutil.copytree(straight, tmp_path / "run")
    cut_back(tmp_path / "run")
    for _ in range(2):
        train(script, tmp_path / "run", resume=True, **flags)
        assert_same_run(tmp_path / "run", straight)


def test_resume_keeps_the_samples_of_steps_before_it(tmp_path):
    """Of checkpoints the newest two stay."""
    flags = {**CHATS, "save_every": 1}
    train(sft, tmp_path, **flags)
    assert checkpoints(tmp_path) == [2, 3]
    cut_back(tmp_path)
    rows = [{"step": 2, "completion": "a\u2028b\x85c"}, {"step": 3, "completion": "later"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "completions.jsonl").write_text(text, encoding="utf-8")
    train(sft, tmp_path, resume=True, **flags)
    assert read_completions(tmp_path) == rows[:1]


@pytest.mark.parametrize("name", FIRST)
def test_a_signal_finishes_the_step_saves_it_and_says_how_to_go_on(
    tmp_path, monkeypatch, capsys, straight_run, name
):
    script, flags, straight = straight_run(name)
    steps, step, before = [], torch.optim.AdamW.step, {*multiprocessing.active_children()}

    def signalled(*args, **options):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", signalled)
        rows = train(script, tmp_path, **flags)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert checkpoints(tmp_path)[-1] == 3
    assert not (tmp_path / "final").exists()
    assert f"--output-dir {tmp_path} --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a second signal ends the run at once"
    assert not {*multiprocessing.active_children()} - before
    train(script, tmp_path, resume=True, **flags)
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("name", FIRST)
def test_what_is_not_finite_stops_the_run_before_the_update(tmp_path, monkeypatch, name):
    script, flags = FIRST[name]
    updates, step, clip = [], torch.optim.AdamW.step, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: updates.append(1) or step(*args))
    norms = iter([1, math.nan])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * next(norms))
    message = r"step 2: the loss is .*, the gradient norm nan; nothing was updated.*(row \d+ of|completions.jsonl)"  # fmt: skip
    with pytest.raises(UserError, match=message):
        train(script, tmp_path, **{**flags, "save_every": 1})
    assert len(updates) == 1
    assert checkpoints(tmp_path) == [1]
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [1]
