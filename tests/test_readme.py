"""Every command of the README: it runs with --max-steps 2 in this process, or under torchrun where ONCE says so.

Commands that need a vLLM server are parsed and their flags checked; test_vllm.py has real servers.
"""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
import tyro
from conftest import ASSETS, ROOT
from sync_shared import SCRIPTS

import common
import gkd
from common import UserError

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)
COMMANDS = [
    line.split(" #")[0].split("&&")[-1].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if ".py" in line
]
STAND_INS = {
    "Qwen/Qwen3-0.6B": str(ASSETS / "model"),
    "Qwen/Qwen3-4B": str(ASSETS / "teacher"),
    "chats.jsonl": str(ASSETS / "messages_eval.jsonl"),
    "heldout.jsonl": str(ASSETS / "messages_eval.jsonl"),
    "pairs.jsonl": str(ASSETS / "preferences_eval.jsonl"),
    "prompts.jsonl": str(ASSETS / "prompts_eval.jsonl"),
    "tests/assets/vlm": str(ASSETS / "vlm"),
    "tests/assets/pictures.parquet": str(ASSETS / "pictures_eval.parquet"),
    "tests/assets/pictures_eval.parquet": str(ASSETS / "pictures_eval.parquet"),
}
SHORT = ["--max-steps", "2", "--batch-size", "16"]
ONCE = "torchrun --nnodes"  # the other commands under torchrun run with one rank


def test_the_first_two_blocks_set_up_and_run():
    assert README.splitlines().index("```bash") < 20
    assert BLOCKS[0].strip().endswith("python sft.py")
    assert "pip install -r requirements.txt" in BLOCKS[0]
    assert "pytest" in BLOCKS[1]


class Stop(Exception):
    """Raised where a script has checked its flags and begins to load."""


def run_here(words, monkeypatch, only_checks=False):
    """`main` of a script in this process, after two optimizer steps or, with only_checks, after its checks of flags."""
    script = importlib.import_module(words[0].removesuffix(".py"))
    if only_checks:
        monkeypatch.setattr(script, "load_tokenizer", lambda *_: (_ for _ in ()).throw(Stop))
    words = words if "--score" in words else [*words, *SHORT]
    script.main(tyro.cli(script.Args, args=words[1:]))


def run_as_a_process(words, directory):
    places = {"--nnodes": "1", "--rdzv-endpoint": "127.0.0.1:0", "--nproc-per-node": "2"}
    for flag, value in places.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    paths = [str(ROOT / word) if word.endswith(".py") else word for word in words[1:]]
    paths += SHORT if words[0] == "torchrun" else []
    options = {"cwd": directory, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run([*programs[words[0]], *paths], **options)
    assert result.returncode == 0, result.stderr[-6000:]


def prepare(command, directory, monkeypatch):
    """What commands before this one have made: a run to resume, a judge, data, a reward function."""
    monkeypatch.chdir(directory)
    (directory / "rewards.py").write_text(
        "def brevity(completion_ids, **_):\n    return [-len(ids) for ids in completion_ids]\n"
    )
    if " stdlib/" in command:
        run_as_a_process(["python", "tests/assets/stdlib_conversations.py", "stdlib"], directory)
    if "--resume" in command:
        run_here(shlex.split(command.replace(" --resume", ""))[1:], monkeypatch)
    if "runs/judge/final" in command:
        run_here(["reward_model.py", "--output-dir", "runs/judge"], monkeypatch)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(tmp_path, command, monkeypatch):
    prepare(command, tmp_path, monkeypatch)
    words = [STAND_INS.get(word, word) for word in shlex.split(command)]
    script = next(place for place, word in enumerate(words) if word.endswith(".py"))
    if command.startswith(ONCE) or words[script] not in SCRIPTS:
        run_as_a_process(words, tmp_path)
    elif "vllm" in command or "http://HOST" in command:
        with pytest.raises(Stop):
            run_here(words[script:], monkeypatch, only_checks=True)
        return
    else:
        run_here(words[script:], monkeypatch)
    made = ("runs/*/final", "stdlib/train.jsonl", "runs/*/scores.jsonl")
    assert any([*tmp_path.glob(pattern)] for pattern in made)


def test_the_servers_are_started_as_the_scripts_would():
    """The README's two command lines of vLLM are those that the message about a server that fails shows."""
    shown = re.findall(r"^    ((?:\w+=1 )?python -m vllm.*(?:\n        .*)*)", README, re.M)
    teacher, policy = (shlex.split(text.replace("\\\n", " ")) for text in shown)
    url, model = "http://0.0.0.0:8000", "Qwen/Qwen3-0.6B"
    assert policy == shlex.split(common.server_command(url, model, 2048, "", "bfloat16", "nccl"))
    with pytest.raises(UserError) as caught:
        gkd.VLLMTeacher("http://0.0.0.0:8001", 20, 2047, seconds=0.1)
    expected = shlex.split(str(caught.value).splitlines()[-1].replace("TEACHER", "Qwen/Qwen3-32B"))
    assert teacher == expected
