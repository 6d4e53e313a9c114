"""async_grpo.py beside grpo.py, with a server whose latencies are those of a GPU's: simulated, of heavy tail.

    python tests/benchmarks/async_vs_sync.py [STEPS] [ROUNDS]

On two cores a real server and a trainer would only share them. tests/simulated_vllm.py samples real completions by the
embedded model, and answers a request after a log-normal latency, scaled such that a step of grpo.py spends as long on
rollouts (sync, sampling, rewards) as on training. The same steps (80) of the default job (256 samples, in small
micro-batches, one thread a process), alternating, each with a server of its own; medians of the rounds (1). Writes
results/async_vs_sync_cpu.json.
"""

import itertools
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS, ROUNDS = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 80), (2, 1)))
SPREAD, REWARD, WARM = 1.0, 0.5, 5
JOBS = ["grpo.py", *(f"async_grpo.py --max-staleness {k}" for k in (1, 2, 4))]


def one_run(script, median_seconds, num_steps=STEPS):
    """Steady seconds of a step and its parts, and how soon after the first step, which has the start of processes
    in it, the mean reward of five steps is REWARD."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "simulated_vllm.py"), "--model", str(ROOT / "tests/assets/model"),
         "--port", str(port), "--median-seconds", str(median_seconds), "--spread", str(SPREAD)]
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as directory:
            words = [sys.executable, *f"{ROOT}/{script}".split(), "--engine", "vllm", "--vllm-url"]
            words += [f"http://127.0.0.1:{port}", "--max-length", "128", "--micro-batch-tokens", "128"]
            words += ["--max-steps", str(num_steps), "--eval-every", "0", "--wandb", "disabled"]
            words += ["--output-dir", f"{directory}/run"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(words, check=True, capture_output=True, env=environment)
            lines = (Path(directory) / "run/metrics.jsonl").read_text().splitlines()
    finally:
        server.kill()
        server.wait()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "loss" in row]
    rewards = [row["reward"] for row in steps]
    clock = [0.0, *itertools.accumulate(row["step_seconds"] for row in steps[1:])]
    good = [i for i in range(4, len(steps)) if statistics.mean(rewards[i - 4 : i + 1]) >= REWARD]
    print(
        f"{script}: sampled reward {statistics.mean(rewards[:5]):.3f} -> {statistics.mean(rewards[-5:]):.3f}",
        flush=True,
    )
    steady = steps[WARM:]
    found = {"step_seconds": statistics.mean(row["step_seconds"] for row in steady)}
    waits = ("generate_seconds", "perf/rollout_wait_s", "perf/weight_sync_s")  # what is not training
    idle = [sum(row.get(name, 0.0) for name in waits) for row in steady]
    found["train_seconds"] = found["step_seconds"] - statistics.mean(idle)
    tokens = sum(row["completions/mean_length"] * 256 for row in steady)
    found |= {"tokens_per_second": tokens / sum(row["step_seconds"] for row in steady)}
    found |= {
        "seconds_to_reward": clock[good[0]] if good else math.nan,
        "eval/reward": rows[-1]["eval/reward"],
    }
    found |= {"staleness": statistics.mean(row.get("sample/staleness_mean", 0.0) for row in steady)}
    return found


def mean_of_slowest(count):
    """Of so many latencies with median 1, by simulation."""
    draw = random.Random(0)
    return statistics.mean(max(draw.lognormvariate(0, SPREAD) for _ in range(count)) for _ in range(1000))


def main():
    slowest, guess = mean_of_slowest(32), 0.05
    found = one_run("grpo.py", guess, 25)
    rest = found["step_seconds"] - found["train_seconds"] - guess * slowest
    median = max(0.0, found["train_seconds"] - rest) / slowest
    print(
        f"training takes {found['train_seconds']:.2f} s a step; the median latency is {median:.3f} s",
        flush=True,
    )
    runs = {job: [] for job in JOBS}
    for _, job in itertools.product(range(ROUNDS), JOBS):
        runs[job].append(one_run(job, median))
        print(job, runs[job][-1], flush=True)
    rows = {
        job: {name: statistics.median(each[name] for each in some) for name in some[0]}
        for job, some in runs.items()
    }
    print(
        "| job | step | of it training | tokens/s | to a reward of 0.5 | held-out reward |\n|---|--:|--:|--:|--:|--:|"
    )
    for job, row in rows.items():
        ratio, soon = (rows["grpo.py"][name] / row[name] for name in ("step_seconds", "seconds_to_reward"))
        print(f"| `{job}` | {row['step_seconds']:.2f} s ({ratio:.2f}x) | {row['train_seconds']:.2f} s | "
              f"{row['tokens_per_second']:,.0f} | {row['seconds_to_reward']:.0f} s ({soon:.2f}x) | "
              f"{row['eval/reward']:.3f} |")  # fmt: skip
    record = {"steps": STEPS, "rounds": ROUNDS, "median_latency": median, "jobs": rows}
    (HERE / "results" / "async_vs_sync_cpu.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
