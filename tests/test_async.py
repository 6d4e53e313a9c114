"""async_grpo.py: pacing on a simulated clock, equality with grpo.py, staleness, faults and servers."""

import heapq
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import conftest
import pytest
from conftest import ASSETS, ROOT, flags_of, read_completions, read_metrics, read_rows, run_well, train
from hypothesis import given, settings
from hypothesis import strategies as st

import async_grpo
import grpo
from async_grpo import AsyncRollouts, Pacer
from common import UserError

GAP = "sampling/sampling_logp_difference/mean"
GROUPS = {"batch_size": 16, "num_generations": 4}
CALCULATOR = {"environment": f"{ASSETS}/calculator.py:Calculator", "max_completion_length": 48}


def check_prompts(output_dir, steps, per_step=4, samples=4):
    """Every step has all of its groups, and no prompt comes twice."""
    prompts = {}
    for row in read_completions(output_dir):
        prompts.setdefault(row["step"], []).append(row["prompt"])
    assert sorted(prompts) == list(range(1, steps + 1))
    assert all([*Counter(step).values()] == [samples] * per_step for step in prompts.values())
    assert len({prompt for step in prompts.values() for prompt in step}) == steps * per_step


def values_of(output_dir, name):
    """A metric of each step, also one that depends on the clock."""
    return [row[name] for row in read_rows(output_dir / "metrics.jsonl") if name in row]


def staleness(output_dir):
    return values_of(output_dir, "sample/staleness_max")


# ---- Pacing, on a simulated clock ----------------------------------------------------------------------------


def simulate(latency, per_step, max_staleness, num_steps, train_seconds):
    """An engine in which every group takes latency() seconds however many others it has, and a trainer whose steps
    take train_seconds() -> [[(slot, age), ...] of each step]."""
    pacer, now, running, trained = Pacer(per_step, max_staleness, num_steps, 0), 0.0, [], []
    for version in range(num_steps):
        for slot in pacer.open(version):
            heapq.heappush(running, (now + latency(), slot, version))
        assert len(pacer.began) <= (max_staleness + 1) * per_step
        while (groups := pacer.take(version)) is None:
            assert running, "the step waits for groups, and none is sampled"
            finished, slot, began = heapq.heappop(running)
            now, pacer.finished[slot] = max(now, finished), (slot, began)
        assert len(groups) == per_step
        trained.append([(slot, version - began) for slot, began in groups])
        now += train_seconds()
        while running and running[0][0] <= now:
            _, slot, began = heapq.heappop(running)
            pacer.finished[slot] = (slot, began)
    return trained


SIZES = st.tuples(st.integers(1, 9), st.integers(0, 8), st.integers(1, 40))  # groups a step, K, steps


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), SIZES, st.floats(0.5, 3), st.floats(0.01, 100))
def test_no_group_is_too_old_lost_or_trained_twice(seed, sizes, tail, slowness):
    """Latencies of heavy tail, some without a mean, and trainers of any speed."""
    (per_step, max_staleness, num_steps), draw = sizes, random.Random(seed)
    latencies = lambda: draw.paretovariate(tail), lambda: slowness * draw.random()  # of a group, of a step
    trained = simulate(latencies[0], per_step, max_staleness, num_steps, latencies[1])
    assert all(0 <= age <= max_staleness for groups in trained for _, age in groups)
    assert sorted(slot for groups in trained for slot, _ in groups) == list(range(num_steps * per_step))


def test_waiting_for_what_is_due_now_is_not_enough():
    """The example of Pacer's docstring; a resumed run opens as many slots from its first step on."""
    pacer = Pacer(1, 2, total_steps=9, first_step=0)
    assert pacer.open(0) == [0, 1, 2]
    pacer.finished[0] = "a"
    assert pacer.take(0) == ["a"]
    assert pacer.open(1) == [3]
    pacer.finished[3] = "d"
    assert pacer.take(1) is None
    pacer.finished[2] = "c"
    assert pacer.take(1) == ["c"]
    assert Pacer(4, 1, total_steps=9, first_step=8).open(8) == [0, 1, 2, 3], "none for steps after the last"


# ---- Against grpo.py -----------------------------------------------------------------------------------------

SAME_TRAINING = {
    "full": {"eval_dataset": (f"{ASSETS}/prompts_eval.jsonl:0.1",), "eval_every": 2},
    "lora, replaced groups, reference": {"zero_variance": "replace", "lora_rank": 4, "learning_rate": 1e-3,
                                         "beta": 0.05},
    "environment": {**CALCULATOR, "beta": 0.1, "max_steps": 2},
    "images": {"model": f"{ASSETS}/vlm", "dataset": (f"{ASSETS}/pictures_eval.parquet",), "beta": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_TRAINING)
def test_without_staleness_it_is_grpo_bit_by_bit(tmp_path, name):
    flags = {**GROUPS, **SAME_TRAINING[name]}
    train(grpo, tmp_path / "sync", **flags)
    train(async_grpo, tmp_path / "async", max_staleness=0, **flags)
    assert staleness(tmp_path / "async") == [0] * flags.get("max_steps", 3)
    conftest.assert_same_run(tmp_path / "async", tmp_path / "sync")


def test_two_ranks_train_as_one(tmp_path):
    """With the embedded engine, whose process belongs to the first rank; log-probs differ by rounding alone."""
    flags = {**GROUPS, "max_staleness": 0, "max_steps": 2}
    conftest.assert_two_ranks_train_as_one(async_grpo, tmp_path, 2e-3, (GAP,), **flags)
    assert max(values_of(tmp_path / "2", GAP)) < 1e-5  # this is rounding itself


# ---- Staleness -----------------------------------------------------------------------------------------------


def write_reward(path, body):
    path.write_text(f"import time\n\ndef reward(prompts, completions, **_):\n{body}")
    return f"{path}:reward"


@pytest.mark.parametrize("slow", ["trainer", "sampler"])
def test_the_age_is_bounded_whoever_is_slow(tmp_path, monkeypatch, slow):
    """K = 2. A slow trainer gets the oldest groups that it may have. Of a slow sampler's none is lost, either."""
    reward, pause = "accuracy", time.sleep
    if slow == "sampler":
        body = "    time.sleep(1)\n    return [float(len(c[0]['content']) % 3) for c in completions]\n"
        reward = write_reward(tmp_path / "reward.py", body)
    else:
        original = async_grpo.log_samples
        monkeypatch.setattr(async_grpo, "log_samples", lambda *a: (pause(1.0), original(*a)))
    train(async_grpo, tmp_path / "run", **GROUPS, max_staleness=2, max_steps=5, rewards=(reward,))
    check_prompts(tmp_path / "run", 5)
    ages = staleness(tmp_path / "run")
    assert max(ages) <= 2
    if slow == "trainer":
        assert ages[-1] == 2
        gaps = values_of(tmp_path / "run", GAP)
        assert gaps[0] < 1e-5 < gaps[-1], "the first step's samples are new; later the age shows"
    else:
        assert max(values_of(tmp_path / "run", "perf/rollout_wait_s")[2:]) > 0.1


def test_replaced_groups_and_failed_rewards_are_counted_once(tmp_path):
    body = "    assert not any('1+' in prompt[-1]['content'] for prompt in prompts), 'no ones'\n"
    body += "    return [float(len(c[0]['content']) % 2) for c in completions]\n"
    reward = write_reward(tmp_path / "reward.py", body)
    flags = {**GROUPS, "proximal": "sampler", "zero_variance": "replace", "beta": 0.01, "max_staleness": 2}
    train(async_grpo, tmp_path / "run", **flags, max_steps=6, rewards=(reward,))
    rows, samples = read_metrics(tmp_path / "run"), read_completions(tmp_path / "run")
    failed = [row["rewards"][reward] is None for row in samples]
    assert 0 < sum(failed) == sum(row["failed_rewards"] for row in rows)
    assert sum(row["drawn_prompts"] for row in rows) * 4 == len(samples) > 6 * 16, "some were replaced"
    assert 0 < max(staleness(tmp_path / "run")) <= 2


def test_tokens_of_other_ages_stop_the_run(tmp_path, monkeypatch):
    original = AsyncRollouts.wait

    def wait(self, version):
        groups, replaced = original(self, version)
        groups[0][0].versions[0] = version - 2
        return groups, replaced

    monkeypatch.setattr(AsyncRollouts, "wait", wait)
    with pytest.raises(UserError, match=r"tokens are -?\d to 2 steps old, not 0 to --max-staleness 1"):
        train(async_grpo, tmp_path / "run", **GROUPS)


def test_a_correction_that_is_not_made_is_refused(tmp_path):
    flags = {"proximal": "sampler", "importance_sampling_mode": "token_mask", "max_staleness": -1}
    with pytest.raises(UserError, match=r"needs --proximal trainer(?s:.*)--max-staleness"):
        train(async_grpo, tmp_path / "run", **flags)


# ---- Resume and faults ---------------------------------------------------------------------------------------


def test_a_killed_rollout_process_ends_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    original, flags = AsyncRollouts.wait, {**GROUPS, "max_steps": 8, "max_staleness": 1}

    def wait(self, version):
        if version == 3:
            os.kill(self.process.pid, signal.SIGKILL)
        return original(self, version)

    monkeypatch.setattr(AsyncRollouts, "wait", wait)
    message = r"ended with exit code -9\nThe run is saved as of step [345]; add --resume"
    with pytest.raises(UserError, match=message):
        train(async_grpo, tmp_path / "run", **flags)
    assert list((tmp_path / "run").glob("checkpoint-0000000[345]"))
    monkeypatch.undo()
    train(async_grpo, tmp_path / "run", **flags, resume=True)
    check_prompts(tmp_path / "run", 8)


def test_a_failure_in_a_thread_of_the_process_is_the_runs(tmp_path, monkeypatch):
    """Rows whose columns are no JSON stand for any defect; the deadline stands for a process that hangs."""
    original = AsyncRollouts.__init__

    def with_defect(self, args, data, *rest, **options):
        original(self, args, data.map(lambda row: {"columns": "{"}), *rest, **options)

    monkeypatch.setattr(AsyncRollouts, "__init__", with_defect)
    with pytest.raises(UserError, match=r"cannot go on: (?s:.*)JSONDecodeError(?s:.*)saved as of step 0"):
        train(async_grpo, tmp_path / "defect", **GROUPS)
    monkeypatch.undo()
    monkeypatch.setattr(AsyncRollouts, "SECONDS", 0.01)
    with pytest.raises(UserError, match=r"finished no group in 0.01 s\nThe run is saved as of step 0"):
        train(async_grpo, tmp_path / "hangs", **GROUPS)


# ---- A simulated server: latencies and deaths that a real one cannot be told -----------------------------------


@pytest.fixture
def server():
    """A function that starts a simulated server -> its process and the flags of a run that uses it."""
    processes = []

    def begin(*words, **flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [
            str(ROOT / "tests" / "simulated_vllm.py"),
            "--model",
            str(ASSETS / "model"),
            "--port",
            port,
            *words,
        ]
        processes.append(subprocess.Popen([sys.executable, *map(str, words)]))
        url = (f"http://127.0.0.1:{port}",)
        return {**GROUPS, "engine": "vllm", "vllm_url": url, "max_length": 400, "vllm_timeout": 60.0, **flags}

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_weights_change_in_flight(tmp_path, server, max_staleness):
    """An environment is played by several processes meanwhile."""
    flags = server("--median-seconds", 0.1, max_staleness=max_staleness, max_steps=4)
    train(async_grpo, tmp_path / "run", **flags, **(CALCULATOR if max_staleness else {}))
    check_prompts(tmp_path / "run", 4)
    assert max(staleness(tmp_path / "run")) <= max_staleness
    if max_staleness:
        assert max(staleness(tmp_path / "run")) > 0
    else:  # the sampler is the policy: with other weights these would soon be 0.01 and more
        assert max(values_of(tmp_path / "run", GAP)) < 1e-3


@pytest.mark.parametrize("route", ["inference/v1/generate", "pause"])
def test_a_lost_server_ends_the_run_with_a_checkpoint(tmp_path, server, route):
    flags = server("--median-seconds", 0.05, "--die-at", route, "--die-after", 20 if "/" in route else 3)
    with pytest.raises(
        UserError, match=r"(?s)the vLLM server .*The run is saved as of step \d; add --resume"
    ):
        train(async_grpo, tmp_path / "run", **flags, max_steps=9)
    assert list((tmp_path / "run").glob("checkpoint-0000000*"))


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_prompts_that_it_had_not_trained(tmp_path, server):
    """Groups come out of order from the server, so the checkpoint names prompts beyond the first untrained one."""
    flags = server("--median-seconds", 0.2, max_steps=12, max_staleness=2, save_every=1, batch_size=32)
    process = conftest.start("async_grpo.py", *flags_of(**flags, output_dir=tmp_path / "run"))
    conftest.wait_for_step(process, tmp_path / "run", 5)
    conftest.kill(process, tmp_path / "run")
    progress = max((tmp_path / "run").glob("checkpoint-*/progress.json"))
    assert json.loads(progress.read_text())["done"]
    train(async_grpo, tmp_path / "run", resume=True, **flags)
    check_prompts(tmp_path / "run", 12, per_step=8)


# ---- A real server, and the default runs -----------------------------------------------------------------------


@pytest.mark.learn
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_default_run_learns(tmp_path, engine):
    began, flags = time.time(), ["--engine", engine, "--wandb", "disabled"]
    flags += (
        ["--max-steps", "100"] if engine == "vllm" else []
    )  # on the trainer's cores a server takes minutes
    rows = run_well("async_grpo.py", tmp_path, *flags, timeout=1800)
    rows = [row for row in rows if "eval/reward" in row]
    assert 0.45 < rows[0]["eval/reward"] < 0.55
    assert rows[-1]["eval/reward"] >= 0.85
    if engine == "hf":
        assert time.time() - began < 240 * float(os.environ.get("TIME_FACTOR", 1))
