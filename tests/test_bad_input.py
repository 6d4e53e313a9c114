"""What a user gets wrong, and the message it gets: before training, without a traceback, nothing overwritten."""

import functools
import json
import re
import shutil
from dataclasses import replace

import datasets
import pytest
import tyro
from conftest import ASSETS, run, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
import sft
from common import UserError, encode_preference, encode_prompt, encode_sft, load_tokenizer, prepare_data

EMBEDDED = load_tokenizer(ASSETS / "model")
OPTIONS = {"tokenizer": EMBEDDED, "vocab_size": 512}
SFT = functools.partial(encode_sft, **OPTIONS), common.SFT_FEATURES
PAIRS = functools.partial(encode_preference, rankings=True, **OPTIONS), common.PREFERENCE_FEATURES
PROMPTS = functools.partial(encode_prompt, **OPTIONS), common.PROMPT_FEATURES
GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ASKED = GOOD["messages"][:1]


def says(role, content, **more):
    return {"messages": [{"role": role, "content": content, **more}]}


def calls(*tool_calls):
    return {"messages": [{"role": "assistant", "tool_calls": [*tool_calls]}]}


ROWS = {  # a row of a .jsonl file -> the message
    "unknown columns": ({"question": "a", "answer": "b"}, r"the row has the columns \['answer', 'question'\]; it needs one of input_ids, messages, "),
    "all columns empty": ({"text": None, "messages": [], "id": 1}, r"the row has the columns \['id', 'messages', 'text'\]; it needs one of .*, not empty"),
    "null": (None, r"the row is null, not an object"),
    "a list": ([1, 2], r"the row is \[1, 2\], not an object with columns"),
    "content is a number": (says("assistant", 3), r"`messages\[0\].content` is 3; it must be str"),
    "content is missing": ({"messages": [{"role": "user"}]}, r"`messages\[0\].content` is null; it must be str"),
    "an image in a message": (says("user", [{"type": "image"}]), r"images need a vision-language model"),
    "an image column": ({"images": ["x.png"], "text": "a"}, r"images need a vision-language model"),
    "unknown role": (says("robot", "a"), r"`messages\[0\]` has the role \"robot\"; roles are system, developer, user, assistant, tool"),
    "unknown sender": ({"conversations": [{"from": ["human"], "value": "a"}]}, r"`conversations\[0\].role` is \[\"human\"\]; it must be str"),
    "messages is text": ({"messages": "hello"}, r"`messages` is \"hello\"; it must be list\[dict\]"),
    "a message is text": ({"messages": ["a"]}, r"`messages` is \[\"a\"\]; it must be list\[dict\]"),
    "weight is a share": (says("assistant", "a", weight=0.5), r"`messages\[0\].weight` is 0.5; it must be 0 or 1"),
    "weight is 2": (says("assistant", "a", weight=2), r"`messages\[0\].weight` is 2; it must be 0 or 1"),
    "thinking is a list": (says("assistant", "a", reasoning_content=["b"]), r"`messages\[0\].reasoning_content` is \[\"b\"\]; it must be str"),
    "prompt without completion": ({"prompt": "a", "completion": None}, r"the row has the columns \['completion', 'prompt'\]; it needs one of .*completion"),
    "completion is a number": ({"prompt": "a", "completion": 5}, r"`completion` is 5; it must be str \| list\[dict\]"),
    "the end in a prompt": ({"prompt": "a<|im_end|>b", "completion": "c"}, r"the text contains <\|im_end\|>, a control token; give messages"),
    "a control token in a completion": ({"completion": "b<|im_start|>c"}, r"the text contains <\|im_start\|>, a"),
    "text is a number": ({"text": 5}, r"`text` is 5; it must be str"),
    "half of a character": ("\ud800", r"the row is not JSON: .*surrogates not allowed"),
    "ids beyond the vocabulary": ({"input_ids": [1, 512]}, r"its ids are 1 to 512, the model has 512"),
    "ids below 0": ({"input_ids": [1, -7]}, r"its ids are -7 to 1, the model has 512"),
    "ids are true and false": ({"input_ids": [True, False, 3]}, r"`input_ids` is \[true, false, 3\]; it must be list\[int\]"),
    "labels of another length": ({"input_ids": [1, 2], "labels": [1]}, r"`labels` and masks must be as long as `input_ids`"),
    "shifted labels": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, r"`labels` the same ids or -100"),
    "a mask of another length": ({"input_ids": [1, 2], "completion_mask": [0]}, r"`labels` and masks must be as long as `input_ids`"),
    "tools are not JSON": ({**GOOD, "tools": "look_up"}, r"`tools` is \"look_up\"; it must be list"),
    "a template argument that is taken": ({**GOOD, "chat_template_kwargs": {"tokenize": True}}, r"template refuses these messages: .*'tokenize'"),
    "tool calls are a number": (says("assistant", "a", tool_calls=5), r"`messages\[0\].tool_calls` is 5; it must be list"),
    "a call without name": (calls({"id": "1"}), r"`messages\[0\]` has a tool call without a function name: \{\"id\": \"1\"\}"),
    "arguments are not JSON": (calls({"name": "f", "arguments": "x=1"}), r"`messages\[0\].tool_calls.arguments` is \"x=1\"; it must be dict"),
    "a ShareGPT call that is not JSON": ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, r"`conversations\[0\].tool_calls` is .*; it must be list"),
    "nothing to train": (says("user", "a"), r"no row is left of 1 in .*; dropped: 1 nothing to train"),
}  # fmt: skip
SIDES = {  # a row of preferences -> the message
    "one side": ({"prompt": "a", "chosen": "b"}, r"the row has the columns \['chosen', 'prompt'\]; it needs chosen and rejected"),
    "a side is a number": ({"prompt": "a", "chosen": "b", "rejected": 3}, r"`rejected` is 3; it must be str \| list\[dict\]"),
    "sides without a prompt": ({"chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}, r"each side must begin with the assistant's trained reply"),
    "sides begin with the user": ({"prompt": ASKED, "chosen": GOOD["messages"], "rejected": [*ASKED, *ASKED]}, r"each side must begin with the assistant's trained reply to the prompt"),
    "nothing of the assistant": ({"prompt": ASKED, "chosen": [{**GOOD["messages"][1], "weight": 0}], "rejected": "c"}, r"each side must begin with the assistant's trained reply"),
    "a control token in a side": ({"prompt": "a", "chosen": "b<|im_start|>", "rejected": "c"}, r"the text contains <\|im_start\|>, a"),
    "margin is text": ({"chosen": "a", "rejected": "b", "margin": "much"}, r"`margin` is \"much\"; it must be float"),
    "margin is infinite": ({"chosen": "a", "rejected": "b", "margin": float("inf")}, r"`margin` is Infinity; it must be float"),
    "probability above 1": ({"chosen": "a", "rejected": "b", "probability": 1.5}, r"`probability` is 1.5; it must be from 0 to 1"),
    "one completion": ({"completions": ["a"], "ranks": [1]}, r"`completions` must be two or more, with a number for each in `ranks` or `scores`"),
    "ranks and scores": ({"completions": ["a", "b"], "ranks": [1, 2], "scores": [1, 2]}, r"with a number for each in `ranks` or `scores`"),
    "a rank is text": ({"completions": ["a", "b"], "ranks": [1, "2"]}, r"`ranks` is \[1, \"2\"\]; it must be list\[float\]"),
    "a completion is a number": ({"completions": ["a", 5], "scores": [1, 2]}, r"`completions\[1\]` is 5; it must be str"),
}  # fmt: skip
ASKS = {  # a row of prompts -> the message
    "no prompt": ({"question": "a"}, r"the row has the columns \['question'\]; it needs a prompt"),
    "the end at a prompt's end": ({"prompt": "a<|im_end|>b"}, r"the text contains <\|im_end\|>, a control token"),
    "an empty prompt": ({"prompt": ""}, r"it needs a prompt, not empty"),
    "a prompt that is answered": ({"prompt": GOOD["messages"]}, r"`prompt` ends with an assistant message; remove it"),
    "a prompt is a number": ({"prompt": 5}, r"`prompt` is 5; it must be str \| list\[dict\]"),
}  # fmt: skip
CASES = [(SFT, *case) for case in ROWS.items()] + [(PAIRS, *case) for case in SIDES.items()] + [(PROMPTS, *case) for case in ASKS.items()]  # fmt: skip


def message_of_data(kind, *sources, **options):
    encode, features = kind
    with pytest.raises(UserError) as error:
        prepare_data(sources, functools.partial(encode, **options), features, 8192)
    return str(error.value)


@pytest.mark.parametrize(("kind", "name", "case"), CASES, ids=[name for _, name, _ in CASES])
def test_bad_rows(tmp_path, kind, name, case):
    row, expected = case
    path = write_rows(tmp_path / "rows.jsonl", [row])
    message = message_of_data(kind, path)
    assert re.search(expected, message), message
    assert f"row 1 of {path}" in message or f"no row is left of 1 in {path}" in message


@pytest.mark.parametrize(("row", "loss_on", "choices"), [
    ({"text": "a"}, "assistant", "auto or all"),
    (GOOD, "completion", "auto or all or assistant or last-assistant"),
    ({"prompt": "a", "completion": "b"}, "assistant", "auto or all or completion"),
])  # fmt: skip
def test_loss_on_that_does_not_apply(tmp_path, row, loss_on, choices):
    message = message_of_data(SFT, write_rows(tmp_path / "rows.jsonl", [row]), loss_on=loss_on)
    assert f"--loss-on {loss_on} does not apply to this row; use {choices}" in message


def test_an_environment_brings_its_own_tools(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for row in ({"prompt": "a"}, {"prompt": ASKED, "tools": tools}):
        message = message_of_data(PROMPTS, write_rows(tmp_path / "rows.jsonl", [row]), tools=tools)
        assert "with --environment, `prompt` must be messages, without images, and no `tools`" in message


FILES = {  # a file's name, its content, the message
    "not JSON": ("a.jsonl", json.dumps(GOOD) + "\n{'text': 1}\n", r"row 2 of .*a.jsonl: the row is not JSON: Expecting"),
    "another encoding": ("a.jsonl", '{"text": "caf\u00e9"}\n'.encode("latin-1"), r"row 1 of .*: the row is not JSON: 'utf-8' codec"),
    "nothing": ("a.jsonl", "", r"a.jsonl cannot be read: .*it has no rows"),
    "an empty list": ("a.json", "[]", r"cannot be read: .*it has no rows"),
    "a header": ("a.csv", "prompt,completion\n", r"cannot be read: .*it has no rows"),
    "a short row": ("a.csv", "prompt,completion\na,b\na\n", r"row 2 of .*: the row has the columns \['completion', 'prompt'\]; it needs one of"),
    "a list that is not closed": ("a.json", '[{"text": "a"}', r"a.json cannot be read: .*Expecting ',' delimiter"),
    "no parquet": ("a.parquet", "x", r"a.parquet cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_bad_files(tmp_path, name):
    file, content, expected = FILES[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message_of_data(SFT, str(tmp_path / file))
    assert re.search(expected, message), message


def test_datasets_that_are_not_there(tmp_path):
    datasets.DatasetDict({"validation": datasets.Dataset.from_list([GOOD])}).save_to_disk(tmp_path / "splits")
    for source, expected in (
        ("nowhere.jsonl", r"dataset nowhere.jsonl cannot be read: .*No such file or directory"),
        ("./nowhere", r"dataset ./nowhere cannot be read"),
        ("nobody/nothing:test", r"dataset nobody/nothing:test cannot be read"),
        (str(tmp_path / "splits"), r"splits cannot be read: KeyError\('train'\)"),
        (f"{ASSETS / 'messages_eval.jsonl'}:1e-4", r"messages_eval.jsonl:1e-4 cannot be read"),
        (f"{ASSETS / 'messages_eval.jsonl'}:0.0001", r"no row is left of 500 in .*:0.0001"),
    ):
        message = message_of_data(SFT, source)
        assert re.search(expected, message), message


# ---- Flags, models, directories: through a script's main -----------------------------------------------------------

EVAL = str(ASSETS / "messages_eval.jsonl")
FLAGS = {  # flags -> the message
    "no such file": ({"dataset": ("nowhere.jsonl",)}, r"dataset nowhere.jsonl cannot be read"),
    "no such model": ({"model": "./nowhere"}, r"\./nowhere"),
    "no such template": ({"chat_template": "nowhere.jinja"}, r"No such file or directory: 'nowhere.jinja'"),
    "batch size 0": ({"batch_size": 0}, r"--batch-size is 0; it must be from 1 to inf"),
    "learning rate infinite": ({"learning_rate": float("inf")}, r"--learning-rate is inf; it must be from 0 to inf"),
    "learning rate not a number": ({"learning_rate": float("nan")}, r"--learning-rate is nan; it must be from 0 to inf"),
    "beta above 1": ({"adam_beta2": 1.5}, r"--adam-beta2 is 1.5; it must be from 0 to"),
    "two at once": ({"weight_decay": -1.0, "seed": -1}, r"(?s)--weight-decay is -1.0.*--seed is -1"),
    "over the context": ({"max_length": 4096}, r"--max-length 4096 is above the model's context, 2048"),
    "over the micro-batch": ({"micro_batch_tokens": 8}, r"row \d+ of .* has \d+ tokens; raise --micro-batch-tokens by \d"),
    "LoRA flag without LoRA": ({"lora_alpha": 8.0}, r"--lora-alpha has no effect without --lora-rank"),
    "smoothing of dft": ({"loss_type": "dft", "label_smoothing": 0.1}, r"--label-smoothing has no effect without --loss-type nll"),
    "resume of nothing": ({"resume": True, "output_dir": None}, r"--resume has no effect without --output-dir"),
    "LoRA on the head": ({"lora_rank": 4, "lora_targets": ("lm_head",)}, r"--lora-targets: embeddings and output head cannot have adapters"),
    "no such LoRA target": ({"lora_rank": 4, "lora_targets": ("c_attn",)}, r"--lora-targets c_attn: .*c_attn"),
    "no such attention": ({"attention": "magic"}, r"--attention magic: "),
    "loss on what is not there": ({"loss_on": "completion"}, r"--loss-on completion does not apply to this row"),
}  # fmt: skip


def message_of(tmp_path, **flags):
    """The message of sft.py. OSError: what the libraries raise for missing files, which scripts print alike."""
    args = sft.Args(output_dir=str(tmp_path / "run"), dataset=(EVAL,), eval_dataset=(), wandb="disabled", max_steps=1)  # fmt: skip
    with pytest.raises((UserError, OSError)) as error:
        sft.main(replace(args, **flags))
    assert not (tmp_path / "run").exists(), "something was written"
    return str(error.value)


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flags(tmp_path, name):
    flags, expected = FLAGS[name]
    message = message_of(tmp_path, **flags)
    assert re.search(expected, message), message


@pytest.mark.parametrize("flags", ["--learnin-rate 1", "--batch-size many", "--loss-type mse"])
def test_flags_that_do_not_parse_end_with_2(flags):
    with pytest.raises(SystemExit) as end:
        tyro.cli(sft.Args, args=flags.split())
    assert end.value.code == 2


def test_models_that_cannot_be_used(tmp_path):
    for name in ("large", "gptj", "no_template", "cut"):
        shutil.copytree(ASSETS / "model", tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "large")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "large")
    sizes = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", **sizes)).save_pretrained(tmp_path / "gptj")
    (tmp_path / "no_template" / "chat_template.jinja").unlink()
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "a <new> token"}])
    for flags, expected in (
        ({"model": str(tmp_path / "large"), "dataset": (rows,)}, r"row 2 of .*: its ids are \d+ to 512, the model has 512"),
        ({"model": str(tmp_path / "no_template")}, r"no chat template; give one by --chat-template"),
        ({"model": str(tmp_path / "gptj")}, r"--model .*gptj.* --attention varlen: "),
    ):  # fmt: skip
        message = message_of(tmp_path, **flags)
        assert re.search(expected, message), message


def test_an_output_directory_that_holds_another_run(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [GOOD] * 8)
    args = sft.Args(output_dir=str(tmp_path / "run"), dataset=(rows,), eval_dataset=(), wandb="disabled")
    args = replace(args, max_steps=2, save_every=1, batch_size=4)
    sft.main(args)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before
    for change, expected in (
        ({}, r"--output-dir .* holds a run; add --resume, or name another"),
        ({"resume": True, "learning_rate": 0.5, "seed": 3}, r"begun differently: --learning.rate was 0.001, is 0.5; --seed was 0, is 3"),
        ({"resume": True}, r"begun differently: the rows of --dataset have changed"),
    ):  # fmt: skip
        if change == {"resume": True}:  # as many rows and tokens, another answer
            write_rows(tmp_path / "rows.jsonl", [GOOD] * 7 + [says("assistant", "c") | {"messages": [*ASKED, {"role": "assistant", "content": "c"}]}])  # fmt: skip
        with pytest.raises(UserError, match=expected):
            sft.main(replace(args, **change))
        if sft.dist.is_initialized():
            sft.dist.destroy_process_group()
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_the_command_prints_the_message_alone_and_ends_with_1():
    wrong = run("sft.py", "--dataset", "nowhere.jsonl")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: dataset nowhere.jsonl cannot be read: ")
    assert "Traceback" not in wrong.stderr


def test_other_data_are_not_evaluated_on_the_embedded_ones(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [GOOD] * 8)
    options = {"wandb": "disabled", "max_steps": 1, "batch_size": 8}
    sft.main(sft.Args(output_dir=str(tmp_path / "run"), dataset=(rows,), **options))
    assert "eval" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert capsys.readouterr().out.count("data      ") == 1
