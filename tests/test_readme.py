"""Every command of the README runs: with --max-steps 2, and without a GPU or a network."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ASSETS, ROOT
from sync_shared import SCRIPTS

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)
COMMANDS = [
    line.split(" #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"\b(sft|dpo|reward_model|grpo|async_grpo|gkd)\.py\b", line)
]


def test_the_first_two_blocks_set_up_and_run():
    assert README.splitlines().index("```bash") < 20
    assert BLOCKS[0].strip().endswith("python sft.py")
    assert "pip install -r requirements.txt" in BLOCKS[0]
    assert "pytest" in BLOCKS[1]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(tmp_path, command):
    command = command.split("&&")[-1].strip()
    stand_ins = {
        "Qwen/Qwen3-0.6B": str(ASSETS / "model"),
        "chats.jsonl": str(ASSETS / "messages.jsonl"),
        "heldout.jsonl": str(ASSETS / "messages_eval.jsonl"),
    }
    words = [stand_ins.get(word.split(":")[0], word) for word in shlex.split(command)]
    if "--nnodes" in words:  # several nodes: one here
        words[words.index("--nnodes") + 1] = "1"
        words[words.index("--rdzv-endpoint") + 1] = "127.0.0.1:0"
    if "--nproc-per-node" in words:
        words[words.index("--nproc-per-node") + 1] = "2"
    if "--resume" in words:  # a run to resume, which has not ended
        pytest.skip("needs a stopped run: tests/test_sft.py resumes with this command's flags")
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[
        words[0]
    ]
    words = [
        *program,
        *(str(ROOT / word) if word in SCRIPTS else word for word in words[1:]),
        "--max-steps",
        "2",
    ]
    words = [word for word in words if word]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert list(tmp_path.glob("runs/*/final")) or "--output-dir" in command
