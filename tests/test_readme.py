"""Every command of the README runs: with --max-steps 2, and without a GPU or a network."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ASSETS, ROOT
from sync_shared import SCRIPTS

import gkd
from common import ServerNeeds, VLLMServer

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)
COMMANDS = [
    line.split(" #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"\b(sft|dpo|reward_model|grpo|async_grpo|gkd|stdlib_conversations)\.py\b", line)
]


def test_the_first_two_blocks_set_up_and_run():
    assert README.splitlines().index("```bash") < 20
    assert BLOCKS[0].strip().endswith("python sft.py")
    assert "pip install -r requirements.txt" in BLOCKS[0]
    assert "pytest" in BLOCKS[1]


STAND_INS = {
    "Qwen/Qwen3-0.6B": str(ASSETS / "model"),
    "Qwen/Qwen3-4B": str(ASSETS / "teacher"),
    "chats.jsonl": str(ASSETS / "messages.jsonl"),
    "heldout.jsonl": str(ASSETS / "messages_eval.jsonl"),
    "pairs.jsonl": str(ASSETS / "preferences.jsonl"),
    "prompts.jsonl": str(ASSETS / "prompts.jsonl"),
}


def run(command, directory):
    """Run a command of the README in a directory, with small stand-ins for what it names."""
    words = [STAND_INS.get(word, word) for word in shlex.split(command.split("&&")[-1])]
    if "--nnodes" in words:  # several nodes: one here
        words[words.index("--nnodes") + 1] = "1"
        words[words.index("--rdzv-endpoint") + 1] = "127.0.0.1:0"
    if "--nproc-per-node" in words:
        words[words.index("--nproc-per-node") + 1] = "2"
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[
        words[0]
    ]
    trains = any(word in SCRIPTS for word in words) and "--score" not in words
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words[1:]]
    words = [*program, *words, *(["--max-steps", "2"] if trains else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        words, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, (command, result.stderr[-6000:])
    return result.stdout


def test_the_server_is_started_as_the_scripts_would():
    shown = re.search(r"^    (VLLM_SERVER_DEV_MODE=1 .*?)\n\n", README, re.S | re.M)[1]
    needs = ServerNeeds("Qwen/Qwen3-0.6B", "bfloat16", 2048, "nccl")
    words = [word for word in shlex.split(shown) if word != "\n"]
    assert words == [word.replace("127.0.0.1", "0.0.0.0") for word in shlex.split(needs.shell())]


def test_the_teachers_server_is_started_as_gkd_says():
    shown = re.search(r"^    (python -m vllm.*?)\n\n", README, re.S | re.M)[1]
    args = gkd.Args(teacher="http://HOST:8001", teacher_top_k=20)
    words = [word for word in shlex.split(shown) if word != "\n"]
    expected = shlex.split(gkd.TeacherServer(args, 2047, 512).shell())
    swapped = {"TEACHER": "Qwen/Qwen3-32B", "127.0.0.1": "0.0.0.0", "8000": "8001"}
    assert words == [swapped.get(word, word) for word in expected]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With the student, or with a teacher that is one, and with what runs before have made of it."""
    needs = ServerNeeds(STAND_INS["Qwen/Qwen3-0.6B"], "float32", 2048, "gloo")
    running = VLLMServer(needs, log_path=tmp_path_factory.mktemp("server") / "vllm.log")
    yield running
    running.stop()


def starts_server(command):
    return "--engine vllm" in command or "http://HOST:" in command


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=[pytest.mark.vllm] if starts_server(one) else []) for one in COMMANDS]
)
def test_command_runs(tmp_path, command, request):
    """One that needs what another made (a run to resume, data) comes after that one."""
    (tmp_path / "rewards.py").write_text(
        "def brevity(completion_ids, **_):\n    return [-len(ids) for ids in completion_ids]\n"
    )
    if starts_server(command) and not find_spec("vllm"):
        pytest.skip("needs vLLM")
    if "http://HOST:" in command:
        run(re.sub(r"http://HOST:\d+", request.getfixturevalue("server").url, command), tmp_path)
    elif "--resume" in command:
        run(command.replace(" --resume", ""), tmp_path)
        assert "resuming after step 2" in run(command, tmp_path)
    elif " stdlib/" in command:
        run("python tests/assets/stdlib_conversations.py stdlib", tmp_path)
        run(command, tmp_path)
    elif "runs/judge/final" in command:
        run("python reward_model.py --output-dir runs/judge", tmp_path)
        run(command, tmp_path)
    else:
        run(command, tmp_path)
    made = ["runs/*/final", "stdlib/train.jsonl", "runs/*/scores.jsonl"]
    assert any(list(tmp_path.glob(pattern)) for pattern in made)
