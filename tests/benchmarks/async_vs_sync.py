"""async_grpo.py beside grpo.py, with a server whose latencies are those of a GPU's: simulated, of heavy tail.

    python tests/benchmarks/async_vs_sync.py [STEPS] [ROUNDS]

On two cores a real server and a trainer would only share them. tests/simulated_vllm.py samples real completions by the
embedded model, in a fraction of the latency that it then has: log-normal, its scale such that generation of a batch and a
training step cost the same. The same steps (40) of the default job (256 samples), alternating, each with a server of its
own; medians of the rounds (1). Writes results/async_vs_sync_cpu.json.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS, ROUNDS = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 40), (2, 1)))
SPREAD, PORT = 1.0, 8765
JOBS = ["grpo.py", *(f"async_grpo.py --max-staleness {k}" for k in (1, 2, 4))]


def one_run(script, median_seconds, port):
    """Steady seconds of a step, and the held-out reward at the end."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "simulated_vllm.py"), "--model", str(ROOT / "tests/assets/model"),
         "--port", str(port), "--median-seconds", str(median_seconds), "--spread", str(SPREAD)]
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as directory:
            words = [sys.executable, *f"{ROOT}/{script}".split(), "--engine", "vllm", "--vllm-url"]
            words += [f"http://127.0.0.1:{port}", "--max-length", "256", "--max-steps", str(STEPS)]
            words += ["--eval-every", "0", "--wandb", "disabled", "--output-dir", f"{directory}/run"]
            subprocess.run(words, check=True, capture_output=True)
            rows = [
                json.loads(line) for line in (Path(directory) / "run/metrics.jsonl").read_text().splitlines()
            ]
    finally:
        server.kill()
        server.wait()
    steps = [row for row in rows if "loss" in row][5:]
    return {
        "seconds": statistics.mean(row["step_seconds"] for row in steps),
        "train_seconds": statistics.mean(row["train_seconds"] for row in steps),
        "tokens_per_second": sum(row["completions/mean_length"] * 256 for row in steps)
        / sum(row["step_seconds"] for row in steps),
        "eval/reward": rows[-1]["eval/reward"],
        "staleness": statistics.mean(row.get("sample/staleness_mean", 0.0) for row in steps),
    }


def mean_of_slowest(count, spread):
    """Of so many latencies with median 1, by simulation."""
    draw = random.Random(0)
    return statistics.mean(max(draw.lognormvariate(0, spread) for _ in range(count)) for _ in range(1000))


def main():
    train_seconds = one_run("grpo.py", 0.0, PORT)["seconds"]
    median = train_seconds / mean_of_slowest(32, SPREAD)
    print(
        f"a step without latency takes {train_seconds:.2f} s; the median latency is {median:.2f} s",
        flush=True,
    )
    found = {job: [] for job in JOBS}
    for number in range(ROUNDS):
        for place, job in enumerate(JOBS):
            found[job].append(one_run(job, median, PORT + 1 + number * len(JOBS) + place))
            print(job, found[job][-1], flush=True)
    rows = {
        job: {name: statistics.median(each[name] for each in runs) for name in runs[0]}
        for job, runs in found.items()
    }
    for job, row in rows.items():
        ratio = rows["grpo.py"]["seconds"] / row["seconds"]
        print(f"| `{job}` | {row['seconds']:.2f} s | {ratio:.2f} | {row['eval/reward']:.3f} |")
    record = {
        "steps": STEPS,
        "rounds": ROUNDS,
        "median_latency": median,
        "step_without_latency": train_seconds,
    }
    record |= {"jobs": rows}
    (HERE / "results" / "async_vs_sync_cpu.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
