"""Compare two versions of the six scripts: python tests/benchmarks/before_after.py OLD_DIR NEW_DIR [REGEX] [WORK_DIR]

The command lines of before_after.txt (whose name matches REGEX), a few steps each, run in both directories on the same
slices of OLD_DIR's embedded data. A Markdown table tells for each the largest relative difference in metrics.jsonl
(times aside) and in the weights of final/ (and adapter/), and how many completions are the same. "equal" is bit for bit;
numbers below 1e-4 in size count as 1e-4. What the runs write is kept in WORK_DIR; OLD_DIR's side is not run again there.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch.distributed as dist
import tyro
from safetensors.torch import load_file

STEPS = (
    "--max-steps 4 --batch-size 32 --micro-batch-tokens 1024 --eval-every 2 --warmup-steps 1 --wandb disabled"
)
DATA = {"sft": "messages", "gkd": "messages", "dpo": "preferences", "reward_model": "comparisons"}
DATA |= {"grpo": "prompts", "async_grpo": "prompts"}


def run_here(root, variants):
    """A worker: `main` of the scripts in `root` runs {(variant, folder): flags} in this process."""
    sys.path.insert(0, root)
    for variant, folder, flags in variants:
        folder, words = Path(folder), [*flags, "--output-dir", f"{folder}/out"]
        try:
            script = importlib.import_module(variant.split(":")[0])
            script.main(tyro.cli(script.Args, args=words))
            if variant.endswith("resumed"):
                shutil.rmtree(folder / "out" / "checkpoint-00000004")
                shutil.rmtree(folder / "out" / "final")
                script.main(tyro.cli(script.Args, args=[*words, "--resume"]))
            (folder / "flags").write_text(shlex.join(flags))
        except (Exception, SystemExit):
            print(variant, "failed", file=sys.stderr)
            traceback.print_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
    os._exit(0)


def run_variants(root, work, commands):
    """Run {variant: flags}: one process runs all of a script, but two ranks have their own processes."""
    groups = {}
    for variant, flags in commands.items():
        folder = work / re.sub(r"\W+", "_", variant)
        made = folder / "flags"
        if work.name == "old" and made.exists() and made.read_text() == shlex.join(flags):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        group = variant if variant.endswith("2 ranks") else variant.split(":")[0]
        groups.setdefault(group, []).append((variant, str(folder), flags))
    for group, variants in groups.items():
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        launcher = launcher if group.endswith("2 ranks") else []
        with open(work / f"{group}.log", "w") as log:
            worker = [
                sys.executable,
                *launcher,
                str(Path(__file__).resolve()),
                "--worker",
                root,
                json.dumps(variants),
            ]
            subprocess.run(worker, cwd=root, stdout=log, stderr=log, check=False)


def read(directory):
    """An output directory -> its metrics and weights, {name: value} each, and the list of its completions."""
    metrics, weights, completions = {}, {}, []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if isinstance(value, (int, float)) and not re.search("second|time|utilization|wait", name):
                metrics[f"{name}, step {row['step']}"] = value
    for path in [*directory.glob("final/*model.safetensors"), *directory.glob("adapter/*model.safetensors")]:
        weights |= {f"{path.stem}: {name}": weight.float() for name, weight in load_file(path).items()}
    if (directory / "completions.jsonl").exists():
        for line in (directory / "completions.jsonl").read_text().splitlines():
            row = json.loads(line)
            completions.append((row["step"], row["prompt"], row["completion"]))
    return metrics, weights, completions


def largest_difference(old, new):
    """{name: number or array} of both sides -> a cell of the table, about the names that both have."""
    sizes = {}
    for name in old.keys() & new.keys():
        a, b = (np.asarray(side[name], dtype=np.float64) for side in (old, new))
        if a.shape != b.shape:
            sizes[name] = float("inf")
        elif not np.array_equal(a, b, equal_nan=True):
            sizes[name] = float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-4))
    if not old.keys() & new.keys():
        return "nothing in common"
    worst = max(sizes, key=sizes.get, default=None)
    return "equal" if worst is None else f"{sizes[worst]:.1e} ({worst})"


def main(old, new, pattern="", work=None):
    old, new, work = (Path(path).resolve() for path in (old, new, work or tempfile.mkdtemp()))
    (work / "data").mkdir(parents=True, exist_ok=True)
    for kind in set(DATA.values()):
        for name, count in ((kind, 200), (f"{kind}_eval", 40)):
            rows = (old / "tests" / "assets" / f"{name}.jsonl").read_text().splitlines(keepends=True)
            (work / "data" / f"{name}.jsonl").write_text("".join(rows[:count]))
    commands = {"old": {}, "new": {}}
    for line in (Path(__file__).parent / "before_after.txt").read_text().splitlines():
        variant, flags, *own = (part.strip() for part in [*line.split("|"), "", "", ""][:4])
        if not line.startswith("#") and re.search(pattern, variant):
            data = work / "data" / DATA[variant.split(":")[0]]
            flags = f"{STEPS} --dataset {data}.jsonl --eval-dataset {data}_eval.jsonl {flags}"
            for side, more in zip(commands, own, strict=True):
                words = f"{flags} {more}".replace("ASSETS", f"{old}/tests/assets")
                commands[side][variant] = shlex.split(words)
    run_variants(str(old), work / "old", commands["old"])
    run_variants(str(new), work / "new", commands["new"])
    print("| variant | metrics | same completions | weights |\n|---|---|---|---|")
    for variant in commands["new"]:
        folders = [work / side / re.sub(r"\W+", "_", variant) for side in commands]
        failed = [folder.parent.name for folder in folders if not (folder / "flags").exists()]
        if failed:
            print(f"| {variant} | FAILED ({' and '.join(failed)}): see the logs in {work} | | |")
            continue
        (metrics, weights, texts), (new_metrics, new_weights, new_texts) = (read(f / "out") for f in folders)
        same = sum(min(texts.count(text), new_texts.count(text)) for text in set(texts))
        counts = f"{same} of {len(texts)}" if texts else "-"
        cells = [largest_difference(metrics, new_metrics), counts, largest_difference(weights, new_weights)]
        print("|", " | ".join([variant, *cells]), "|", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        run_here(sys.argv[2], json.loads(sys.argv[3]))
    main(*sys.argv[1:])
