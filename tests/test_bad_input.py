"""What a user gets wrong, and the message it gets: before training, without a traceback, nothing overwritten."""

import json
import re
import shutil
from dataclasses import replace

import datasets
import pytest
from conftest import ASSETS, run, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sft
from common import UserError

GOOD = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8


def messages(*pairs):
    return [{"messages": [{"role": role, "content": content} for role, content in pairs]}]


USER = ("user", "a")

ROWS = {  # rows of a .jsonl file -> the message
    "unknown columns": ([{"question": "a", "answer": "b"}], r"row 1: the row has the columns \['answer', 'question'\]; it needs one of input_ids, messages, "),
    "all columns empty": ([{"text": None, "id": 1}], r"row 1: the row has the columns \['id', 'text'\]; it needs one of .* that is not empty"),
    "content is a number": (messages(USER, ("assistant", 3)), r"row 1: `messages\[1\]` \(assistant\) has int as content; make it one string"),
    "content is missing": ([{"messages": [{"role": "user"}]}], r"`messages\[0\]` \(user\) has nothing as content; make it one string"),
    "unknown role": (messages(("robot", "a")), r"has the role \"robot\"; roles are system, developer, user, assistant, tool"),
    "messages is text": ([{"messages": "hello"}], r"`messages` is text but not JSON"),
    "messages is empty": ([{"messages": []}, *GOOD], r"row 1: `messages` is \[\], not a non-empty list"),
    "a message is text": ([{"messages": ["a"]}], r"`messages\[0\]` is \"a\", not an object with `role`"),
    "empty answer": (messages(USER, ("assistant", " ")), r"`messages\[1\]` is an empty assistant turn; remove it"),
    "image part": (messages(("user", [{"type": "image"}])), r"`messages\[0\]` holds an image; images are not supported"),
    "image column": ([{"images": ["x.png"], "text": "a"}], r"row 1: the row has images, which are not supported"),
    "parts": (messages(("user", [{"type": "text", "text": "a"}])), r"has list as content; make it one string"),
    "prompt without completion": ([{"prompt": "a", "completion": None}], r"`completion` is null, not non-empty text"),
    "empty completion": ([{"prompt": "a", "completion": ""}], r"`completion` is \"\", not non-empty text"),
    "completion of another kind": ([{"prompt": GOOD[0]["messages"], "completion": "b"}], r"`completion` is text but not JSON"),
    "empty text": ([{"text": ""}], r"`text` is \"\", not non-empty text"),
    "ids beyond the vocabulary": ([{"input_ids": [1, 512]}], r"has ids from 1 to 512, but the model's vocabulary is 512; resize"),
    "labels of another length": ([{"input_ids": [1, 2], "labels": [1]}], r"`labels` must repeat `input_ids`, unshifted"),
    "no labels": ([{"input_ids": [1, 2], "labels": []}], r"`labels` must repeat `input_ids`, unshifted"),
    "ids are true and false": ([{"input_ids": [True, False, 3]}], r"must be non-empty lists of integers"),
    "a mask of TRL's": ([{"input_ids": [1, 2], "completion_mask": [0, 1]}], r"`completion_mask` is not used; say what is trained in `labels`"),
    "thinking is a list": ([{"messages": [{"role": "assistant", "content": "a", "reasoning_content": ["b"]}]}], r"has list as `reasoning_content`; make it one string"),
    "tool calls are 0": ([{"messages": [{"role": "user", "content": "a", "tool_calls": 0}]}], r"has tool calls that are no list: 0"),
    "template argument that is taken": ([{**GOOD[0], "chat_template_kwargs": {"tokenize": True}}], r"`chat_template_kwargs` may not hold tokenize"),
    "shifted labels": ([{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}], r"`labels` must repeat `input_ids`, unshifted"),
    "tools are not JSON": ([{**GOOD[0], "tools": "look_up"}], r"`tools` is text but not JSON"),
    "tools is an object": ([{**GOOD[0], "tools": '{"a": 1}'}], r"`tools` is of type dict, not list"),
    "tool call without name": ([{"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}], r"a tool call without a function name"),
    "end of turn in an answer": (messages(USER, ("assistant", "b<|im_end|>")), r"contains <\|im_end\|>, which the template adds"),
    "null": ([None], r"row 1: the row is null, not an object"),
    "prompt messages without completion": ([{"prompt": GOOD[0]["messages"][:1]}], r"`completion` is null, not a non-empty list"),
    "ids are no list": ([{"input_ids": 5}], r"`input_ids` is of type int, not list"),
    "labels are no list": ([{"input_ids": [5, 6], "labels": 5}], r"`labels` is of type int, not list"),
    "sender is a list": ([{"conversations": [{"from": ["human"], "value": "a"}]}], r"has the role \[\"human\"\]; roles are"),
    "function call is not JSON": ([{"conversations": [{"from": "function_call", "value": "f(1)"}]}], r"is a function call that is not JSON"),
    "tool calls are a number": ([{"messages": [{"role": "assistant", "tool_calls": 5}]}], r"has tool calls that are no list: 5"),
    "function is text": ([{"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]}], r"a tool call without a function name"),
    "arguments are not JSON": ([{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x=1"}]}]}], r"the arguments of f are not JSON"),
    "nothing to train": (messages(USER), r"no row is left to train of 1 in .*: \{'nothing to train': 1\}"),
    "all too long": (messages(USER, ("assistant", "word " * 3000)), r"\{'longer than --max-length 2048': 1\}"),
}  # fmt: skip

FLAGS = {  # flags -> the message
    "no such file": ({"dataset": ("nowhere.jsonl",)}, r"dataset nowhere.jsonl: no such file or directory"),
    "no such eval file": ({"eval_dataset": ("./nowhere",)}, r"dataset ./nowhere: no such file or directory"),
    "unknown file type": ({"dataset": (str(ASSETS / "make_assets.py"),)}, r"the file type must be one of .jsonl, .json"),
    "no dataset": ({"dataset": ()}, r"--dataset is empty"),
    "negative weight": ({"dataset": ("a:-1",)}, r"--dataset a:-1: a weight must be above 0"),
    "weight that takes nothing": ({"dataset": (f"{ASSETS / 'messages_eval.jsonl'}:1e-4",)}, r":0.0001 takes none of its 500 rows; raise the weight"),
    "weight beyond all use": ({"dataset": (f"{ASSETS / 'messages_eval.jsonl'}:1e9",)}, r"a weight must be above 0 and at most 1000"),
    "weight that is no number": ({"dataset": (f"{ASSETS / 'messages_eval.jsonl'}:nan",)}, r"a weight must be above 0"),
    "half a step of warm-up": ({"max_steps": 5, "warmup_steps": 2.5}, r"--warmup-steps 2.5 must be whole, or below 1"),
    "no LoRA targets": ({"lora_rank": 4, "lora_targets": ()}, r"--lora-targets names no module"),
    "LoRA on a block": ({"lora_rank": 4, "lora_targets": ("mlp",)}, r"--lora-targets mlp matches no linear layer; there are .*q_proj"),
    "LoRA rank beyond the model": ({"lora_rank": 10**8}, r"--lora-rank 100000000 is above the model's hidden size, 128"),
    "flex attention on a CPU": ({"attention": "flex_attention"}, r"--attention flex_attention cannot train on a CPU"),
    "weight of zero": ({"dataset": ("a:0",)}, r"a weight must be above 0"),
    "no such hub dataset": ({"dataset": ("nobody/nothing",)}, r"dataset nobody/nothing .* cannot be read"),
    "no such model": ({"model": "./nowhere"}, r"--model ./nowhere: its config cannot be loaded"),
    "batch size 0": ({"batch_size": 0}, r"--batch-size is 0; it must be above 0"),
    "learning rate not a number": ({"learning_rate": float("nan")}, r"--learning-rate is nan; it must be above 0"),
    "negative weight decay": ({"weight_decay": -1.0}, r"--weight-decay is -1.0; it must be 0 or more"),
    "beta of one": ({"adam_beta2": 1.0}, r"--adam-beta2 is 1.0; it must be at least 0 and below 1"),
    "warm-up beyond the end": ({"max_steps": 5, "warmup_steps": 5}, r"--warmup-steps 5 leaves nothing of the 5 steps"),
    "over the context": ({"max_length": 4096}, r"--max-length 4096 is above the model's context of 2048 tokens"),
    "over the micro-batch": ({"micro_batch_tokens": 8}, r"row \d+ of .* has \d+ tokens, .* the smallest value that works is"),
    "LoRA flag without LoRA": ({"lora_alpha": 8.0}, r"--lora-alpha needs adapters: add --lora-rank 16"),
    "4 bits without LoRA": ({"load_in_4bit": True}, r"--load-in-4bit needs adapters"),
    "several LoRA targets, one unknown": ({"lora_rank": 4, "lora_targets": ("q_proj", "c_attn")}, r"--lora-targets c_attn matches no linear layer"),
    "all-linear among others": ({"lora_rank": 4, "lora_targets": ("all-linear", "embed_tokens")}, r"all-linear, which takes all of these but lm_head, stands alone"),
    "split of a file": ({"dataset_split": "half"}, r"--dataset-split half does not apply to files"),
    "split of no evaluation": ({"eval_split": "half"}, r"--eval-split half does not apply to files"),
    "name of a run that wandb does not see": ({"run_name": "mine"}, r"--run-name is the run's name in wandb, which is disabled"),
    "output directory below a file": ({"output_dir": str(ASSETS / "messages.jsonl" / "run")}, r"messages.jsonl is no writable directory"),
    "seed beyond 64 bits": ({"seed": 2**64}, r"--seed is 18446744073709551616; it must be 0 or more"),
    "infinite learning rate": ({"learning_rate": float("inf")}, r"--learning-rate is inf; it must be above 0"),
    "noise that is not a number": ({"neftune_alpha": float("nan")}, r"--neftune-alpha is nan; it must be 0 or more"),
    "router loss that is not a number": ({"router_aux_loss_coef": float("nan")}, r"--router-aux-loss-coef is nan"),
    "LoRA on the head": ({"lora_rank": 4, "lora_targets": ("lm_head",)}, r"--lora-targets lm_head is refused"),
    "no such LoRA target": ({"lora_rank": 4, "lora_targets": ("c_attn",)}, r"--lora-targets c_attn matches no linear layer; there are down_proj, "),
    "resume of nothing": ({"resume": True}, r"--resume needs --output-dir"),
    "smoothing of dft": ({"loss_type": "dft", "label_smoothing": 0.1}, r"--label-smoothing applies to --loss-type nll only"),
    "router loss without experts": ({"router_aux_loss_coef": 0.1}, r"--router-aux-loss-coef needs a mixture of experts"),
    "no such template": ({"chat_template": "nowhere.jinja"}, r"--chat-template nowhere.jinja must be a file with a Jinja template: .*No such file"),
    "no such attention": ({"attention": "magic"}, r"cannot be loaded with --attention magic"),
    "loss on what is not there": ({"loss_on": "completion"}, r"--loss-on completion does not apply to this kind of row; use auto or assistant"),
    "config of a local file": ({"dataset_config": "en"}, r"--dataset-config en applies to hub datasets only"),
}  # fmt: skip


def message_of(tmp_path, **flags):
    output_dir = tmp_path / "run"
    args = sft.Args(output_dir=None if flags.get("resume") else str(output_dir))
    with pytest.raises(UserError) as error:
        sft.main(replace(args, **{"eval_dataset": (), "wandb": "disabled", "max_steps": 1, **flags}))
    if sft.dist.is_initialized():
        sft.dist.destroy_process_group()
    assert not output_dir.exists(), "something was written"
    return str(error.value)


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows(tmp_path, name):
    rows, expected = ROWS[name]
    message = message_of(tmp_path, dataset=(write_rows(tmp_path / "rows.jsonl", rows),))
    assert re.search(expected, message), message
    assert "rows.jsonl" in message


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flags(tmp_path, name):
    flags, expected = FLAGS[name]
    message = message_of(tmp_path, **flags)
    assert re.search(expected, message), message


def test_bad_files(tmp_path):
    (tmp_path / "broken.jsonl").write_text(json.dumps(GOOD[0]) + "\n{'text': 1}\n")
    assert "row 2: the row is not JSON" in message_of(tmp_path, dataset=(str(tmp_path / "broken.jsonl"),))
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    assert "row 1: the row is [1, 2], not an object with columns" in message_of(
        tmp_path, dataset=(str(tmp_path / "list.jsonl"),)
    )
    for name, content in (
        ("a.jsonl", ""),
        ("b.jsonl", "\n\n"),
        ("c.json", "[]"),
        ("d.csv", "prompt,completion\n"),
    ):
        (tmp_path / name).write_text(content)
        assert re.search(f"{name} .*has no rows", message_of(tmp_path, dataset=(str(tmp_path / name),)))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\u00e9"}\n'.encode("latin-1"))
    assert "row 1: the row is not JSON ('utf-8' codec" in message_of(
        tmp_path, dataset=(str(tmp_path / "latin.jsonl"),)
    )
    (tmp_path / "short.csv").write_text("prompt,completion\na,b\na\n")
    assert "row 2 has 1 cells; the header has 2" in message_of(
        tmp_path, dataset=(str(tmp_path / "short.csv"),)
    )
    (tmp_path / "null.jsonl").write_text("null\n")
    assert "row 1: the row is null" in message_of(tmp_path, dataset=(str(tmp_path / "null.jsonl"),))
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(GOOD)}).save_to_disk(tmp_path / "splits")
    assert "there is no such split; there are validation" in message_of(
        tmp_path, dataset=(str(tmp_path / "splits"),)
    )


def test_templates_that_cannot_be_used(tmp_path):
    for template, expected in (
        ("{{ raise_exception('no system role') }}", "refuses these messages: no system role"),
        ("{% for %}", "refuses these messages"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "does not end an assistant turn with a special token",
        ),
    ):
        (tmp_path / "template.jinja").write_text(template)
        assert expected in message_of(tmp_path, chat_template=str(tmp_path / "template.jinja"))


def test_models_that_cannot_be_used(tmp_path):
    shutil.copytree(ASSETS / "model", tmp_path / "large")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "large")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "large")
    rows = [{"text": "a"}, {"text": "a <new> token"}]
    flags = {"model": str(tmp_path / "large"), "dataset": (write_rows(tmp_path / "rows.jsonl", rows),)}
    assert "row 2: the row has ids from" in (message := message_of(tmp_path, **flags))
    assert "to 512, but the model's vocabulary is 512" in message
    # Gemma 3's tokenizer has a token that its text model lacks; nothing is wrong where no row has it.
    sft.main(replace(sft.Args(output_dir=str(tmp_path / "fine"), eval_dataset=(), wandb="disabled", max_steps=1, batch_size=1),
                     model=str(tmp_path / "large"), dataset=(write_rows(tmp_path / "one.jsonl", rows[:1]),)))  # fmt: skip
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter" in message_of(tmp_path, model=str(tmp_path / "adapter"))
    shutil.copytree(ASSETS / "model", tmp_path / "no_template")
    (tmp_path / "no_template" / "chat_template.jinja").unlink()
    assert "give one by --chat-template" in message_of(tmp_path, model=str(tmp_path / "no_template"))


def test_models_that_cannot_be_trained_so(tmp_path):
    sizes = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512}
    shutil.copytree(ASSETS / "model", tmp_path / "gptj")
    config = AutoConfig.for_model("gptj", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gptj")
    message = message_of(tmp_path, model=str(tmp_path / "gptj"))
    assert "cannot be loaded with --attention varlen: 'varlen'" in message
    assert "try eager or sdpa" in message
    shutil.copytree(ASSETS / "model", tmp_path / "tied")
    edit_json(tmp_path / "tied" / "config.json", tie_word_embeddings=True)
    flags = {"lora_rank": 4, "lora_targets": ("embed_tokens",), "lora_merge": True}
    assert "would change the output head too" in message_of(tmp_path, model=str(tmp_path / "tied"), **flags)
    shutil.copytree(ASSETS / "model", tmp_path / "cut")
    weights = (ASSETS / "model" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[:-1000])
    assert "cannot be loaded" in message_of(tmp_path, model=str(tmp_path / "cut"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_batch_smaller_than_the_world(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "--batch-size 2 is below the number of ranks, 4" in message_of(tmp_path, batch_size=2)


def test_an_output_directory_that_holds_another_run(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", GOOD)
    flags = {"dataset": (rows,), "eval_dataset": (), "wandb": "disabled", "max_steps": 2, "save_every": 1}
    args = replace(sft.Args(output_dir=str(tmp_path / "run")), **flags)
    sft.main(args)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for change, expected in (
        ({}, "holds a run already; add --resume"),
        (
            {"resume": True, "learning_rate": 0.5, "seed": 3},
            "--learning-rate was 0.001, is 0.5\n  --seed was 0, is 3",
        ),
        (
            {"resume": True, "dataset": (write_rows(tmp_path / "rows.jsonl", GOOD[:4]),)},
            "the data that .* was begun with has changed",
        ),
    ):
        with pytest.raises(UserError, match=expected):
            sft.main(replace(args, **change))
        sft.dist.destroy_process_group() if sft.dist.is_initialized() else None
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_exit_codes_and_messages_of_the_command(tmp_path):
    wrong = run("sft.py", "--dataset", "nowhere.jsonl")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: dataset nowhere.jsonl: no such file")
    assert "Traceback" not in wrong.stderr
    for flags in (("--learnin-rate", "1"), ("--batch-size", "many"), ("--loss-type", "mse")):
        unparsable = run("sft.py", *flags)
        assert unparsable.returncode == 2
        assert "Traceback" not in unparsable.stderr


FOREIGN = {
    "final/model.bin": "x",
    "common.py": "mine",
    "script.py": "mine",
    "metrics.jsonl": "not JSON",
    "checkpoint-1/x": "x",
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_not_overwritten(tmp_path, name, resume):
    """A directory without args.json is no run of ours, whatever the names in it."""
    directory = tmp_path / "theirs"
    (directory / name).parent.mkdir(parents=True)
    (directory / name).write_text(FOREIGN[name])
    args = sft.Args(output_dir=str(directory), eval_dataset=(), wandb="disabled", max_steps=1, resume=resume)
    with pytest.raises(UserError, match=rf"has {name.split('/')[0]}, but no run; name another directory"):
        sft.main(args)
    assert [path for path in directory.rglob("*") if path.is_file()] == [directory / name]
    assert (directory / name).read_text() == FOREIGN[name]


def test_records_that_are_damaged_are_named(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", GOOD)
    args = replace(
        sft.Args(output_dir=str(tmp_path / "run")), dataset=(rows,), eval_dataset=(), wandb="disabled", max_steps=2,
        save_every=1, batch_size=8,
    )  # fmt: skip
    sft.main(args)
    good = {path: path.read_text() for path in (tmp_path / "run").glob("*.json*")}
    progress = next((tmp_path / "run").glob("checkpoint-*2/progress.json"))
    good[progress] = progress.read_text()
    for path, text, message in (
        (tmp_path / "run" / "args.json", "{}", "args.json is damaged: KeyError"),
        (
            tmp_path / "run" / "metrics.jsonl",
            "{\n" + good[tmp_path / "run" / "metrics.jsonl"],
            "metrics.jsonl is damaged",
        ),
        (progress, '{"step": 2}', "cannot be read .KeyError.*delete it to resume from the one before"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            sft.main(replace(args, resume=True))
        sft.dist.destroy_process_group()
        path.write_text(good[path])
    shard = next((tmp_path / "run").glob("checkpoint-*2/*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be read \(\w+"):
        sft.main(replace(args, resume=True))


def test_wandb_online_without_an_account(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb.api, "_api_key", None, raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "--wandb online needs an account" in message_of(tmp_path, wandb="online")


def test_other_data_are_not_evaluated_on_the_embedded_ones(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", GOOD)
    sft.main(
        replace(sft.Args(output_dir=str(tmp_path / "run")), dataset=(rows,), wandb="disabled", max_steps=1)
    )
    assert "held out" not in (said := capsys.readouterr().out)
    assert f"train     {rows}: 8 rows, 8 used" in said


def test_the_data_report_counts(tmp_path, capsys):
    long = [{"text": "word " * 200, "note": "x"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "one two", "note": 1}] * 4 + long)
    flags = {"dataset": (rows,), "wandb": "disabled", "max_steps": 1, "max_length": 50}
    sft.main(replace(sft.Args(output_dir=str(tmp_path / "run")), **flags))
    said = capsys.readouterr().out
    ids = len(AutoTokenizer.from_pretrained(ASSETS / "model")("one two<|im_end|>")["input_ids"])
    assert "5 rows, 4 used" in said
    assert "dropped: 1 longer than --max-length 50; columns not used: note" in said
    assert f"{4 * ids} tokens, {(ids - 1) / ids:.1%} of them trained; the longest row has {ids}" in said
