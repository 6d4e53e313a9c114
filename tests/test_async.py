"""async_grpo.py: pacing on a simulated clock, equality with grpo.py, faults, and real vLLM servers on CPU."""

import heapq
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ASSETS, ROOT, assert_same_curve, kill, read_metrics, run, start, wait_for_step, weights
from test_vllm import server_processes

import async_grpo
from async_grpo import EngineError, Pacer, RolloutProcess, UserError, epoch_order

FLAGS = ["--wandb", "disabled", "--batch-size", "32", "--num-generations", "4"]
SHORT = [*FLAGS, "--eval-dataset", "--max-steps", "6"]
# What depends on the clock, and what grpo.py has no word for.
OURS = ("perf/", "rollout/", "utilisation/", "sample/", "staleness/")
CLOCK = ("generate_seconds", "train_seconds", "step_seconds", "tokens_per_second")
CLOCK += ("generate_tokens_per_second", "train_tokens_per_second")


def lasting(rows):
    """Metrics without those."""
    return [{k: v for k, v in row.items() if not k.startswith(OURS) and k not in CLOCK} for row in rows]


# ---- Pacing, on a simulated clock --------------------------------------------------------------------------


def simulate(latency, per_step, max_staleness, in_order, num_steps, train_seconds):
    """An engine in which every group takes `latency()` seconds, however many others it has, and a trainer that takes
    `train_seconds` a step -> slots trained at each step, the age of each, the seconds that all took."""
    pacer, now, running, trained = Pacer(per_step, max_staleness, num_steps, 0, in_order), 0.0, [], []
    version = 0
    while version < num_steps:
        for slot in pacer.open(version):
            heapq.heappush(running, (now + latency(), slot, version))
        while (groups := pacer.take(version)) is None:
            assert running, "the step waits for groups, and none is sampled"
            now, slot, began = heapq.heappop(running)
            pacer.finished[slot] = (slot, began)
        assert len(groups) == per_step
        trained.append([(slot, version - began) for slot, began in groups])
        now += train_seconds
        while running and running[0][0] <= now:
            _, slot, began = heapq.heappop(running)
            pacer.finished[slot] = (slot, began)
        version += 1
    return trained, now


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("per_step", [1, 4, 32])
def test_no_group_is_too_old_lost_or_trained_twice(per_step, max_staleness, in_order):
    """10,000 groups whose latencies have no mean (Pareto, 0.9)."""
    draw = random.Random(per_step * 100 + max_staleness)
    num_steps = 10_000 // per_step
    trained, _ = simulate(lambda: draw.paretovariate(0.9), per_step, max_staleness, in_order, num_steps, 1.0)
    ages = [age for groups in trained for _, age in groups]
    assert max(ages) <= max_staleness
    if max_staleness and (per_step > 1 or in_order):
        assert max(ages) > 0, "generation ran ahead"
    assert sorted(slot for groups in trained for slot, _ in groups) == list(range(num_steps * per_step))
    if in_order:
        assert [slot for groups in trained for slot, _ in groups] == list(range(num_steps * per_step))


def test_waiting_for_what_is_due_now_is_not_enough():
    """Two slow groups of version 0 and quick newer ones, K = 2, a group a step: were the newer one trained first, both
    slow ones would be due at once."""
    pacer = Pacer(1, 2, total_steps=9)
    a, _, c = pacer.open(0)
    pacer.finished[a] = a
    assert pacer.take(0) == [a]
    [d] = pacer.open(1)
    pacer.finished[d] = d
    assert pacer.take(1) is None, "b and c are due at step 2: one of them must come now"
    pacer.finished[c] = c
    assert pacer.take(1) == [c]


def test_asynchrony_pays_where_generation_and_training_cost_the_same():
    """Synchronously the slowest completion and the step add up; reported by the benchmark, bounded here."""
    seconds = {}
    for max_staleness in (0, 1, 2, 4):
        draw = random.Random(0)
        _, seconds[max_staleness] = simulate(
            lambda draw=draw: draw.lognormvariate(0, 1), 32, max_staleness, False, 300, 8.0
        )
    speed = [seconds[0] / seconds[k] for k in (1, 2, 4)]
    assert speed[0] > 1.5
    assert speed == sorted(speed), "more staleness is never slower"
    assert speed[-1] > 1.8


# ---- Against grpo.py ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--eval-every", "2"],
        [
            "--zero-variance",
            "replace",
            "--eval-dataset",
            "--lora-rank",
            "4",
            "--learning-rate",
            "1e-3",
            "--beta",
            "0.05",
        ],
        [
            "--environment",
            f"{ASSETS}/calculator.py:Calculator",
            "--max-completion-length",
            "48",
            "--eval-generations",
            "2",
            "--rewards",
            "accuracy",
            "--beta",
            "0.1",
            "--kl-in-reward",
        ],
    ],
    ids=["full", "lora, replaced groups, reference", "environment, samples in evaluation, KL in the reward"],
)
def test_without_staleness_it_is_grpo_bit_by_bit(tmp_path, flags):
    flags = [*FLAGS, "--max-steps", "4", *flags]
    for name, script, more in (("sync", "grpo.py", []), ("async", "async_grpo.py", ["--max-staleness", "0"])):
        done = run(script, *flags, *more, "--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, two = (lasting(read_metrics(tmp_path / name)) for name in ("sync", "async"))
    assert one == two
    assert len(one) >= 4
    texts = [(tmp_path / name / "completions.jsonl").read_text() for name in ("sync", "async")]
    assert texts[0] == texts[1]
    if "--lora-rank" not in flags:
        one, two = weights(tmp_path / "sync"), weights(tmp_path / "async")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    for ranks in (1, 2):
        done = run(
            "async_grpo.py",
            *SHORT,
            "--max-staleness",
            "0",
            "--output-dir",
            tmp_path / str(ranks),
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr
    curves = [lasting(read_metrics(tmp_path / name)) for name in "21"]
    for row in itertools.chain(*curves):  # this is rounding itself
        assert row.pop("sampling/sampling_logp_difference/max") < 1e-4
        assert row.pop("sampling/sampling_logp_difference/mean") < 1e-5
    assert_same_curve(*curves, rtol=2e-3)


# ---- Resume and faults -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_order_against_the_sampler_with_groups_replaced(tmp_path):
    """Groups that are replaced, and rewards that fail, are counted once each, whenever their group comes."""
    (tmp_path / "reward.py").write_text(
        "def odd(prompts, completions, **_):\n"
        "    assert not any('1+' in prompt[-1]['content'] for prompt in prompts)\n"
        "    return [float(len(text[0]['content']) % 2) for text in completions]\n"
    )
    flags = [
        *SHORT,
        "--in-order",
        "--proximal",
        "sampler",
        "--zero-variance",
        "replace",
        "--max-staleness",
        "2",
        "--beta",
        "0.01",
        "--kl-in-reward",
    ]
    flags += ["--rewards", f"{tmp_path}/reward.py:odd"]
    done = run("async_grpo.py", *flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    failed = [row["rewards"][f"{tmp_path}/reward.py:odd"] is None for row in samples]
    assert 0 < sum(failed) == sum(row["failed_rewards"] for row in rows)
    assert sum(row["drawn_prompts"] for row in rows) * 4 == len(samples)
    assert max(row["sample/staleness_max"] for row in rows) <= 2
    assert rows[-1]["rollout/dropped/zero variance"] > 0
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) > 0.01, "the age shows"
    assert all(0 <= row["utilisation/generation"] <= 1 for row in rows)


@pytest.mark.slow
def test_a_first_step_without_signal_is_no_error(tmp_path):
    (tmp_path / "reward.py").write_text("def same(completions, **_):\n    return [1.0] * len(completions)\n")
    flags = [*SHORT[:-1], "2", "--zero-variance", "skip", "--rewards", f"{tmp_path}/reward.py:same"]
    done = run("async_grpo.py", *flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in read_metrics(tmp_path / "run")] == [0.0, 0.0]


BAD_FLAGS = {
    "a correction that is not made": (
        {"proximal": "sampler", "importance_sampling_mode": "none"},
        "--importance-sampling-mode does not apply .* needs --proximal trainer",
    ),
    "the bound of a correction that is not made": (
        {"proximal": "sampler", "importance_sampling_clip_max": 0.5},
        "--importance-sampling-clip-max does not apply .* --proximal trainer",
    ),
    "caches of no server": ({"keep_kv": True}, "--keep-kv does not apply"),
    "an order that is always": ({"in_order": True, "max_staleness": 0}, "--in-order does not apply"),
    "staleness": ({"max_staleness": -1}, "it must be 0 or more"),
    "reward": ({"rewards": ("nonsense",)}, "--rewards nonsense"),
    "micro-batch": (
        {"micro_batch_tokens": 30},
        r"more than --micro-batch-tokens 30; the smallest value .* \d\d\.",
    ),
    "micro-batch with an environment": (
        {
            "environment": f"{ASSETS / 'calculator.py'}:Calculator",
            "max_length": 400,
            "max_completion_length": 60,
            "micro_batch_tokens": 399,
        },
        "may have 400 tokens, more than --micro-batch-tokens 399; the smallest value that works is 400",
    ),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path, name):
    flags, message = BAD_FLAGS[name]
    with pytest.raises(UserError, match=message):
        async_grpo.main(async_grpo.Args(output_dir=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


def test_vespo_needs_no_correction_by_the_sampler_itself():
    async_grpo.check_args(async_grpo.Args(loss_type="vespo", proximal="sampler"))


def trained_prompts(path):
    """Step -> prompts of completions.jsonl."""
    found = {}
    for line in (Path(path) / "completions.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], []).append(row["prompt"])
    return found


def check_prompts(path, steps, per_step=8, samples=4):
    """Every step has its groups, and no prompt comes twice (those of the embedded data differ). A step that a signal cut
    short may have been written."""
    found = {step: prompts for step, prompts in trained_prompts(path).items() if step <= steps}
    assert sorted(found) == list(range(1, steps + 1))
    groups = [prompt for prompts in found.values() for prompt in set(prompts)]
    assert all([*Counter(prompts).values()] == [samples] * per_step for prompts in found.values())
    data = [json.loads(line)["prompt"] for line in (ASSETS / "prompts.jsonl").read_text().splitlines()]
    assert len(set(groups)) >= len(groups) - (len(data) - len({json.dumps(prompt) for prompt in data}))


@pytest.mark.slow
def test_resume_without_staleness_is_exact_and_nothing_is_trained_twice(tmp_path):
    flags = [*SHORT, "--max-staleness", "0", "--save-every", "2"]
    assert run("async_grpo.py", *flags, "--output-dir", tmp_path / "straight").returncode == 0
    process = start("async_grpo.py", *flags, "--output-dir", tmp_path / "killed")
    wait_for_step(process, tmp_path / "killed", 3)
    kill(process, tmp_path / "killed")
    done = run("async_grpo.py", *flags, "--output-dir", tmp_path / "killed", "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    one, two = (lasting(read_metrics(tmp_path / name)) for name in ("straight", "killed"))
    assert one == two
    check_prompts(tmp_path / "killed", 6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_killed_run_with_staleness_goes_on_with_what_it_had_not_trained(tmp_path, engine):
    """A server goes on meanwhile, with what it was asked, and perhaps in the midst of an update. It refuses some prompts;
    the embedded engine gets them in order."""
    flags = [*FLAGS, "--eval-dataset", "--max-steps", "16", "--max-staleness", "2", "--save-every", "2"]
    server, port = None, free_port()
    flags += ["--in-order"] if engine == "hf" else []
    if engine == "vllm":
        server = simulated_server(port, "--median-seconds", 0.1, "--refuse-every", 9, "--refuse-with", 400)
        flags += ["--engine", "vllm", "--vllm-url", f"http://127.0.0.1:{port}", "--max-length", "256"]
    try:
        process = start("async_grpo.py", *flags, "--output-dir", tmp_path)
        wait_for_step(process, tmp_path, 5)
        output = kill(process, tmp_path)
        done = run("async_grpo.py", *flags, "--output-dir", tmp_path, "--resume")
    finally:
        if server:
            server.kill()
    assert done.returncode == 0, done.stderr
    check_prompts(tmp_path, 16)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert max(row["sample/staleness_max"] for row in rows) <= 2
    assert max(row["sample/staleness_max"] for row in rows) >= 1, "generation ran ahead of training"
    last = json.loads((tmp_path / "checkpoint-00000016" / "progress.json").read_text())
    refused = set(re.findall(r"prompt (\d+) is left out: row", output + done.stdout))
    assert bool(refused) == (engine == "vllm")
    if engine == "hf":
        data = [json.loads(line) for line in (ASSETS / "prompts.jsonl").read_text().splitlines()]
        order = iter(epoch_order(len(data), 0, 0))
        for _, prompts in sorted(trained_prompts(tmp_path).items()):
            asked = [data[row]["prompt"][0]["content"] for row in itertools.islice(order, 8)]
            assert [any(f"user\n{question}<" in prompt for prompt in prompts) for question in asked] == [
                True
            ] * 8
    assert last["consumed"] == []
    assert 16 * 8 <= last["cursor"] <= 16 * 8 + len(refused), (
        "up to there every prompt was trained or refused"
    )


def rollout_process(process):
    """The id of the rollout process that a run names next on its standard output."""
    for line in process.stdout:
        if line.startswith("rollouts  process"):
            return int(line.split()[2])
    raise AssertionError("the run ended")


def wrapper(directory, changes):
    """A script that is async_grpo.py, in all its processes, after these changes to it."""
    begin = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport os, signal, async_grpo, tyro\n"
    end = """
if __name__ == "__main__":
    try:
        async_grpo.main(tyro.cli(async_grpo.Args))
    except async_grpo.UserError as error:
        sys.exit(f"error: {error}")
"""
    (directory / "wrapper.py").write_text(begin + changes + end)
    return directory / "wrapper.py"


@pytest.mark.slow
def test_a_silent_or_killed_rollout_process_is_started_again_once(tmp_path):
    """The first is frozen in an evaluation, which is made again; the second is killed."""
    script = wrapper(
        tmp_path,
        """
evaluate = async_grpo.RolloutProcess.evaluate

def freeze(self, version):
    evaluate(self, version)
    if version == 2 and self.may_restart:
        os.kill(self.process.pid, signal.SIGSTOP)
        self.LONGEST_SILENCE = 3
    else:
        self.LONGEST_SILENCE = 120

async_grpo.RolloutProcess.evaluate = freeze
""",
    )
    flags = [*FLAGS, "--eval-every", "2", "--max-steps", "400", "--output-dir", tmp_path]
    process = start(script, *flags)
    rollout_process(process)
    second = rollout_process(process)
    wait_for_step(process, tmp_path, 4)
    os.kill(second, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "the rollout process failed again: it ended with exit code -9" in output
    assert "which is saved; mend it, then --resume" in output
    assert "Traceback" not in output
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "eval/reward" in row][:2] == [0, 2]
    check_prompts(tmp_path, max(row["step"] for row in rows))


@pytest.mark.slow
def test_weights_that_a_dead_rollout_process_holds_and_an_error_in_one(tmp_path):
    """One that ended while it read them is started again, and so are the weights written. What it raises is shown."""
    script = wrapper(
        tmp_path,
        """
write, judge = async_grpo.SharedWeights.write, async_grpo.RolloutLoop.judge
failing = [3]

def write_late(self, weights, version):
    if version in failing:
        list(weights)
        raise async_grpo.EngineError(f"held at {failing.pop()}")
    write(self, weights, version)

async def judge_for_a_time(self, *given):
    if self.version >= 5:
        raise RuntimeError("it is late")
    return await judge(self, *given)

async_grpo.SharedWeights.write = write_late
async_grpo.RolloutLoop.judge = judge_for_a_time
""",
    )
    done = run(script, *SHORT[:-1], "9", "--output-dir", tmp_path / "run")
    assert done.returncode == 1
    assert "the rollout process failed and is started again: held at 3" in done.stdout
    assert "the rollout process failed again: " in done.stderr
    assert "in judge_for_a_time\n" in done.stderr
    assert "RuntimeError: it is late" in done.stderr
    steps = max(row["step"] for row in read_metrics(tmp_path / "run"))
    assert steps >= 5
    assert (tmp_path / "run" / f"checkpoint-{steps:08}").exists()
    check_prompts(tmp_path / "run", steps)


def test_more_refused_prompts_than_a_step_has_end_the_run():
    process = object.__new__(RolloutProcess)
    process.pacer, process.consumed, process.passed_over = Pacer(2, 1, 9), set(), []
    process.failures, process.judged, process.dropped, process.refused = Counter(), 0, Counter(), 0
    process.pacer.open(0)
    for cursor in range(2):
        process.take_in(("again", cursor, 1, cursor, [], Counter(), "row 1: too long"))
    process.take_in(("group", 2, ["a sample"], Counter()))  # the count begins anew
    for cursor in range(2, 4):
        process.take_in(("again", 0, 2, cursor, [], Counter(), "row 1: too long"))
    with pytest.raises(EngineError, match=r"3 prompts in a row were refused\. The last: row 1: too long"):
        process.take_in(("again", 0, 2, 4, [], Counter(), "row 1: too long"))
    assert process.consumed == set(range(5))
    assert process.dropped == {"refused": 5}


@pytest.mark.slow
def test_a_reward_that_hangs_costs_its_samples_only(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import time\n"
        "def slow(prompts, completions, **_):\n"
        "    if any('6+' in prompt[-1]['content'] for prompt in prompts):\n"
        "        time.sleep(60)\n"
        "    return [float(len(text[0]['content']) % 3) for text in completions]\n"
    )
    flags = [
        *SHORT[:-1],
        "3",
        "--rewards",
        f"{reward}:slow",
        "--reward-timeout",
        "1",
        "--max-failed-rewards",
        "0.9",
    ]
    done = run("async_grpo.py", *flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert sum(row["failed_rewards"] for row in rows) > 0


@pytest.mark.slow
def test_a_run_whose_groups_do_not_come_stops_in_time(tmp_path):
    (tmp_path / "reward.py").write_text(
        "import itertools, time\n"
        "calls = itertools.count()\n"
        "def slower(completions, **_):\n"
        "    time.sleep(300 if next(calls) == 3 else 0)\n"
        "    return [float(len(text[0]['content']) % 3) for text in completions]\n"
    )
    flags = [*SHORT, "--rewards", f"{tmp_path}/reward.py:slower", "--rollout-timeout", "25"]
    done = run("async_grpo.py", *flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 1
    assert re.search(r"no group was finished in 2\d s \(--rollout-timeout\); \d+ prompts are in", done.stderr)
    assert "Stopped after step 3, which is saved; mend it, then --resume" in done.stderr


@pytest.mark.slow
def test_a_signal_saves_and_leaves_no_process(tmp_path):
    process = start(
        "async_grpo.py", *FLAGS, "--eval-dataset", "--max-steps", "4000", "--output-dir", tmp_path
    )
    rollouts = rollout_process(process)
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "which is saved" in output
    assert list(tmp_path.glob("checkpoint-*"))
    assert not Path(f"/proc/{rollouts}").exists()


# ---- A simulated server: faults at a point that a real one cannot be told ------------------------------------


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def simulated_server(port, *flags):
    words = [sys.executable, str(ROOT / "tests" / "simulated_vllm.py"), "--model", str(ASSETS / "model")]
    return subprocess.Popen([*words, "--port", str(port), *map(str, flags)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_staleness", "deaths"),
    [(0, {"inference/v1/generate": 30, "update_weights": 3}), (2, {"pause": 3, "resume": 3})],
)
def test_a_server_that_dies_anywhere_gets_its_weights_again(tmp_path, max_staleness, deaths):
    """It is started again, with the weights that it had at first, and the run goes on: no token of those is trained."""
    port = free_port()
    flags = [*FLAGS, "--eval-dataset", "--engine", "vllm", "--vllm-url", f"http://127.0.0.1:{port}"]
    flags += ["--max-length", "256", "--max-steps", "10", "--max-staleness", max_staleness]
    process = start("async_grpo.py", *flags, "--vllm-timeout", "120", "--output-dir", tmp_path)
    try:
        for route, after in deaths.items():
            server = simulated_server(
                port, "--median-seconds", "0.05", "--die-at", route, "--die-after", after
            )
            assert server.wait(timeout=120) == -signal.SIGKILL
        server = simulated_server(port, "--median-seconds", "0.05")
        output, _ = process.communicate(timeout=200)
    finally:
        server.kill()
        process.kill()
    assert process.returncode == 0, output
    check_prompts(tmp_path, 10)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert max(row["sample/staleness_max"] for row in rows) <= max_staleness
    if not max_staleness:  # the sampler is the policy: with other weights these would soon be 0.01 and more
        assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "num_servers", "more", "later"), [(2, 3, [], 503), (1, 2, ["--keep-kv"], 429)]
)
def test_servers_that_refuse(tmp_path, ranks, num_servers, more, later):
    """What one says with `later` is asked again, what the others say with 400 costs its prompt, and all get the
    weights, from one rank, or from two of which one has two servers."""
    ports = [free_port() for _ in range(num_servers)]
    servers = [
        simulated_server(port, "--median-seconds", 0.05, "--refuse-every", 9, "--refuse-with", status)
        for port, status in zip(ports, (later, 400, 400), strict=False)
    ]
    flags = [*SHORT, "--engine", "vllm", "--vllm-url", *(f"http://127.0.0.1:{port}" for port in ports), *more]
    flags += ["--max-length", "256", "--max-staleness", "2", "--max-failed-rewards", "0.9"]
    try:
        done = run("async_grpo.py", *flags, "--output-dir", tmp_path, ranks=ranks)
        last = [httpx.get(f"http://127.0.0.1:{port}/weight_info").json()["weight_version"] for port in ports]
    finally:
        for server in servers:
            server.kill()
    assert done.returncode == 0, done.stderr
    check_prompts(tmp_path, 6)
    rows = read_metrics(tmp_path)
    assert rows[-1][f"rollout/retried/{later}"] > 0
    assert rows[-1]["rollout/dropped/refused"] > 0
    assert last == ["5"] * num_servers, "no weights are sent for nothing at the end"
    assert 1 <= max(row["sample/staleness_max"] for row in rows) <= 2


@pytest.mark.slow
def test_a_held_out_prompt_that_is_refused(tmp_path):
    """It would be again: nothing is restarted for it."""
    port = free_port()
    server = simulated_server(port, "--median-seconds", 0.05, "--refuse-every", 99, "--refuse-with", 400)
    flags = [*FLAGS, "--engine", "vllm", "--vllm-url", f"http://127.0.0.1:{port}", "--max-length", "256"]
    try:
        done = run("async_grpo.py", *flags, "--output-dir", tmp_path)
    finally:
        server.kill()
    assert done.returncode == 1
    assert "refuses a prompt with 400" in done.stderr
    assert "nothing to save yet; mend it, then --resume" in done.stderr
    assert "started again" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_step_whose_weights_cannot_be_published_is_kept(tmp_path):
    """Its row, too: the checkpoint that is resumed from comes after it."""
    port = free_port()
    server = simulated_server(port, "--median-seconds", 0.05, "--die-at", "update_weights", "--die-after", 4)
    flags = [*FLAGS, "--eval-every", "0", "--max-length", "256", "--max-staleness", "1", "--max-steps", "9"]
    flags += ["--engine", "vllm", "--vllm-url", f"http://127.0.0.1:{port}", "--vllm-timeout", "10"]
    try:
        done = run("async_grpo.py", *flags, "--output-dir", tmp_path)
    finally:
        server.kill()
    assert done.returncode == 1
    assert "Stopped after step 3, which is saved; mend it, then --resume" in done.stderr
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [1, 2, 3]
    assert (tmp_path / "checkpoint-00000003").is_dir()


@pytest.mark.slow
def test_an_environment_plays_on_a_server(tmp_path, monkeypatch):
    """Episodes of which each has a process, while weights change. Its rewards may compute on a GPU, which the rollout
    process gives up."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    (tmp_path / "reward.py").write_text(
        "import os\n\ndef gpu(completions, **_):\n"
        "    return [float(os.environ['CUDA_VISIBLE_DEVICES'])] * len(completions)\n"
    )
    port = free_port()
    server = simulated_server(port, "--median-seconds", 0.05, "--max-model-len", 512)
    flags = [*FLAGS, "--eval-dataset", "--max-steps", "3", "--max-staleness", "1", "--engine", "vllm"]
    flags += ["--vllm-url", f"http://127.0.0.1:{port}", "--max-length", "400"]
    flags += ["--environment", f"{ASSETS / 'calculator.py'}:Calculator", "--max-completion-length", "60"]
    flags += ["--rewards", "environment", f"{tmp_path}/reward.py:gpu"]
    try:
        done = run("async_grpo.py", *flags, "--output-dir", tmp_path)
    finally:
        server.kill()
    assert done.returncode == 0, done.stderr
    check_prompts(tmp_path, 3)
    assert {row["rewards/gpu/mean"] for row in read_metrics(tmp_path) if "loss" in row} == {7.0}
    assert {row["failed_rewards"] for row in read_metrics(tmp_path)} == {0}


# ---- Real servers ------------------------------------------------------------------------------------------

needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM: see the README's first lines")


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_a_run_with_a_real_server_survives_its_death_and_takes_it_along(tmp_path):
    """The server that the script started is killed, and started again; the run, stopped by a signal, leaves none."""
    flags = [*FLAGS, "--engine", "vllm", "--max-steps", "4000", "--max-staleness", "2", "--eval-every", "0"]
    process = start("async_grpo.py", *flags, "--output-dir", tmp_path)
    try:
        wait_for_step(process, tmp_path, 3, timeout=240)
        servers = server_processes(tmp_path)
        assert servers
        for pid in servers:
            os.kill(pid, signal.SIGKILL)
        wait_for_step(process, tmp_path, max(row["step"] for row in read_metrics(tmp_path)) + 5, timeout=240)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert not server_processes(tmp_path)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert max(row["sample/staleness_max"] for row in rows) <= 2
    check_prompts(tmp_path, rows[-1]["step"])


# ---- The default runs --------------------------------------------------------------------------------------


@pytest.mark.learn
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=[needs_vllm, pytest.mark.vllm])])
def test_default_run_learns(tmp_path, engine):
    began = time.time()
    flags = ["--engine", engine, "--output-dir", tmp_path, "--wandb", "disabled"]
    flags += (
        ["--max-steps", "100"] if engine == "vllm" else []
    )  # a server on the trainer's cores takes minutes
    done = run("async_grpo.py", *flags, timeout=1800)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_metrics(tmp_path) if "eval/reward" in row]
    assert 0.45 < rows[0]["eval/reward"] < 0.55
    assert rows[-1]["eval/reward"] >= 0.85
    if engine == "hf":
        assert time.time() - began < 240 * float(os.environ.get("TIME_FACTOR", 1))
