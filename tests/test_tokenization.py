"""common.py's rows, chat templates and loss masks. Templates are the stock ones that TRL ships, and Mistral's below."""

import copy
import functools
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import trl
from conftest import ASSETS, write_rows
from transformers import AutoTokenizer

from common import (
    SFT_COLUMNS,
    UserError,
    encode_messages,
    encode_sft,
    encode_text,
    load_tokenizer,
    mark_trained,
    parse_source,
    prepare_data,
)

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]\
{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""
TOOL = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}  # fmt: skip
CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {"x": 1}}}]


def tokenizer_with(template):
    """The embedded tokenizer under another chat template, whose control tokens become special tokens."""
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(ASSETS / "model"))
    control = set(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", template)) | {
        "<s>",
        "</s>",
        "<|begin_of_text|>",
    }
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(control)})
    tokenizer.bos_token = (
        "<|begin_of_text|>" if "begin_of_text" in template or "eot_id" in template else "<s>"
    )
    tokenizer.eos_token = "<|endoftext|>" if "endoftext" in template else "</s>"
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def stock(name):
    return tokenizer_with(MISTRAL if name == "mistral" else (TEMPLATES / f"{name}.jinja").read_text())


def chat(*turns):
    """Alternating user and assistant texts -> messages."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def trained(tokenizer, messages, turns=None, tools=None, **kwargs):
    """The texts that are trained, turn by turn; checks that the ids are the template's own."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"] if turns is None else turns
    ids, mask = encode_messages(tokenizer, messages, turns, tools, kwargs)
    assert (
        ids == tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, **kwargs)["input_ids"]
    )
    assert len(ids) == len(mask)
    return re.findall(r"\[\[(.*?)\]\]", mark_trained(tokenizer, ids, mask), re.S)


STOPS = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "mistral": "</s>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "llama3_training": "<|eot_id|>",
    "gemma3_training": "<end_of_turn>",
    "phi3_training": "<|end|>",
}


@pytest.mark.parametrize("name", STOPS)
def test_trained_turns_are_the_answers_with_their_end(name):
    tokenizer, stop = stock(name), STOPS[name]
    think = "<think>\n\n</think>\n\n" if name == "qwen3" else ""  # stock Qwen3 opens a last answer with it
    expected = [f"One.{stop}", f"{think}Two.{stop}"]
    assert [text.lstrip(" ") for text in trained(tokenizer, chat("a", "One.", "b", "Two."))] == expected
    assert [text.lstrip(" ") for text in trained(tokenizer, chat("a", "One.", "b", "Two."), [3])] == expected[
        1:
    ]
    if name not in ("gemma", "mistral"):
        with_system = [{"role": "system", "content": "Be brief."}, *chat("a", "One.", "b", "Two.")]
        assert trained(tokenizer, with_system) == expected


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_what_a_template_refuses_is_an_error(name):
    with pytest.raises(UserError, match=r"template refuses these messages"):
        trained(stock(name), [{"role": "system", "content": "s"}, *chat("a", "b")])


def test_thinking_blocks():
    think = "<think>\nhm\n</think>\n\n"
    messages = chat("a", f"{think}One.", "b", f"{think}Two.")
    for name in ("qwen2_5", "llama3", "gemma3", "phi3"):
        assert trained(stock(name), messages) == [f"{think}One.{STOPS[name]}", f"{think}Two.{STOPS[name]}"]
    # Stock Qwen3 strips the thinking of earlier turns: what remains of them is trained, and nothing beside it.
    assert trained(stock("qwen3"), messages) == ["One.<|im_end|>", f"{think}Two.<|im_end|>"]
    reasoned = chat("a", "One.", "b", "Two.")
    reasoned[3]["reasoning_content"] = "hm"
    assert trained(stock("qwen3"), reasoned) == ["One.<|im_end|>", f"{think}Two.<|im_end|>"]
    # Without thinking, the generation prompt holds the empty block, and the model only writes the answer.
    assert trained(stock("qwen3"), chat("a", "One."), enable_thinking=False) == ["One.<|im_end|>"]
    # Qwen3.5's generation prompt opens a thinking block that earlier turns lack: it is not a prefix of the rendering.
    assert trained(stock("qwen3_5_think"), messages) == ["One.<|im_end|>", "hm\n</think>\n\nTwo.<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1", "llama3_2", "lfm2_v2"])
def test_tool_calls_are_trained_and_tool_results_are_not(name):
    stop = "<|eot_id|>" if "llama" in name else "<|im_end|>"
    messages = [*chat("a", ""), {"role": "tool", "name": "look_up", "content": "RESULT"}, {"role": "assistant", "content": "One."}, *chat("b", "Two.")]  # fmt: skip
    messages[1]["tool_calls"] = CALL
    first, second, third = trained(stock(name), messages, tools=[TOOL])
    assert "look_up" in first
    assert first.endswith(stop)
    assert second == f"One.{stop}"
    assert third.endswith(f"Two.{stop}")
    assert "RESULT" not in first + second + third


def test_earlier_turn_located_by_sentinel_where_no_prefix_of_the_conversation_is_one_of_the_text():
    # After a tool call with thinking, Qwen3 renders the shorter conversation with the thinking, the whole one without.
    messages = [*chat("a", ""), {"role": "tool", "content": "r"}, {"role": "assistant", "content": "One."}, *chat("b", "Two.")]  # fmt: skip
    messages[1] |= {"tool_calls": CALL, "reasoning_content": "hm"}
    tokenizer = stock("qwen3")
    text = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    assert not text.startswith(tokenizer.apply_chat_template(messages[:3], tools=[TOOL], tokenize=False))
    assert trained(tokenizer, messages, tools=[TOOL])[1] == "One.<|im_end|>"
    # A conversation that begins with the assistant has no prompt before it.
    assert (
        trained(stock("qwen2_5"), [{"role": "assistant", "content": "Hi."}, *chat("a", "One.")])[0]
        == "Hi.<|im_end|>"
    )


def test_turns_that_cannot_be_told_apart_are_an_error():
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(UserError, match="not with a special token"):
        trained(tokenizer, chat("a", "b"))
    with pytest.raises(UserError, match="does not render the tool calls"):
        trained(
            stock("llama3"),
            [*chat("a"), {"role": "assistant", "content": "", "tool_calls": CALL}, *chat("b", "c")],
        )
    with pytest.raises(UserError, match=r"contains <\|im_end\|>"):
        trained(stock("qwen2_5"), chat("a", "b<|im_end|>"))
    other_each_time = "{% for m in messages %}{{ messages | map(attribute='content') | join | length }}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"  # fmt: skip
    with pytest.raises(UserError, match="cannot be told from the rest"):
        trained(tokenizer_with(other_each_time), chat("a", "bb", "c", "d"))


def test_no_second_bos_and_no_second_eos():
    tokenizer = stock("llama3")
    ids, _ = encode_messages(tokenizer, chat("a", "b"))
    assert ids.count(tokenizer.bos_token_id) == 1
    with pytest.raises(UserError, match="begins with two"):
        encode_messages(tokenizer_with("{{ bos_token }}{{ bos_token }}a<|im_end|>"), chat("a", "b"))
    plain = AutoTokenizer.from_pretrained(ASSETS / "model")
    once = encode_text(plain, "Q", "A")
    assert encode_text(plain, "Q", "A" + plain.eos_token) == once
    assert once[0][-1] == plain.eos_token_id
    assert once[1] == [False, True, True]


def test_text_of_a_tokenizer_that_adds_bos_begins_with_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = stock("mistral")
    bos = tokenizer.bos_token_id
    with_bos = copy.deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    ids, mask = encode_text(with_bos, "Q", "A")
    assert ids[0] == bos
    assert mask == [False, False, True, True]
    assert encode_text(with_bos, "<s>Q", "A") == (ids, mask)
    assert encode_text(tokenizer, "Q", "A")[0] == ids[1:]


# ---- Rows ------------------------------------------------------------------------------------------------------------

EMBEDDED = load_tokenizer(ASSETS / "model")


def encoded_text(row, **kwargs):
    encoded = encode_sft(row, EMBEDDED, **{"max_length": 200, **kwargs})
    return (
        mark_trained(EMBEDDED, encoded["input_ids"], encoded["loss_mask"])
        if encoded["input_ids"]
        else encoded["dropped"]
    )


def test_what_is_trained_by_kind_of_row():
    two = {"messages": chat("a", "One.", "b", "Two.")}
    assert encoded_text(two).count("[[") == 2
    assert "One.[[" not in encoded_text(two, loss_on="last-assistant")
    assert encoded_text(two, loss_on="last-assistant").count("[[") == 1
    assert encoded_text(two, loss_on="all").startswith("<|im_start|>[[")
    split = {"prompt": chat("a", "One.", "b"), "completion": chat("", "Two.")[1:]}
    assert encoded_text(split).endswith("assistant\n[[Two.<|im_end|>]]\n")
    assert encoded_text(split).count("[[") == 1
    assert encoded_text(split, loss_on="assistant").count("[[") == 2
    assert encoded_text({"prompt": "Q: a A:", "completion": " b"}) == "Q: a A:[[ b<|im_end|>]]"
    assert encoded_text({"text": "xyz"}) == "x[[yz<|im_end|>]]"
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "One."}]}
    assert encoded_text(sharegpt) == encoded_text({"messages": chat("a", "One.")})
    assert encoded_text({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}) == EMBEDDED.decode([5]) + f"[[{EMBEDDED.decode([6])}]]" + EMBEDDED.decode([7])  # fmt: skip


@pytest.mark.parametrize(
    ("row", "loss_on"),
    [
        ({"text": "a"}, "assistant"),
        ({"messages": chat("a", "b")}, "completion"),
        ({"prompt": "a", "completion": "b"}, "assistant"),
    ],
)
def test_loss_on_that_does_not_apply_is_an_error(row, loss_on):
    with pytest.raises(UserError, match=f"--loss-on {loss_on} does not apply"):
        encoded_text(row, loss_on=loss_on)


def test_tools_and_template_kwargs_reach_the_template():
    tokenizer = stock("qwen3")
    row = {
        "messages": chat("a", "One."),
        "tools": json.dumps([TOOL]),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    encoded = encode_sft(row, tokenizer)
    text = mark_trained(tokenizer, encoded["input_ids"], encoded["loss_mask"])
    assert "look_up" in text
    assert "</think>\n\n[[One.<|im_end|>]]" in text


def test_too_long_rows():
    row = {"prompt": "7" * 10, "completion": "8" * 10}
    assert encoded_text(row, max_length=12) == "longer than --max-length 12"
    with pytest.raises(UserError, match="has 21 tokens, more than --max-length 12"):
        encoded_text(row, max_length=12, overflow="error")
    assert encoded_text(row, max_length=12, overflow="truncate") == "7777777777[[88]]"
    assert encoded_text(row, max_length=10, overflow="truncate") == "nothing to train within --max-length 10"


def prepared(tmp_path, rows, name="rows.jsonl", sources=None, **kwargs):
    path = write_rows(tmp_path / name, rows)
    encode = functools.partial(encode_sft, tokenizer=EMBEDDED, **{"max_length": 100, **kwargs})
    return prepare_data(sources or (path,), encode, SFT_COLUMNS)


def test_every_row_is_accounted_for(tmp_path):
    rows = [{"messages": chat("a", "b" * n), "id": n} for n in (1, 2, 300, 3)] + [{"messages": chat("a")}]
    data, report = prepared(tmp_path, rows)
    assert data["row"][:] == [1, 2, 4]
    assert report["rows"] == 5
    assert report["dropped"] == {"longer than --max-length 100": 1, "nothing to train": 1}
    assert report["ignored_columns"] == {"id"}
    with pytest.raises(UserError, match="no row is left to train of 1"):
        prepared(tmp_path, [{"messages": chat("a")}], "none.jsonl")


def test_errors_name_the_first_bad_rows(tmp_path):
    rows = [{"messages": chat("a", "b")}] * 3 + [{"messages": [{"role": "robot", "content": "a"}]}] * 9
    with pytest.raises(
        UserError, match=r"9 of 12 rows cannot be used.*\n  row 4: `messages\[0\]` has the role 'robot'"
    ) as error:
        prepared(tmp_path, rows)
    assert str(error.value).count("\n") == 5


def test_sources_of_all_types_give_the_same_rows(tmp_path):
    rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(5)]
    expected = prepared(tmp_path, rows)[0]["input_ids"][:]
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved_dict")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("rows.json", "rows.parquet", "rows.csv", "saved", "saved_dict", "folder"):
        assert prepared(tmp_path, rows, sources=(str(tmp_path / name),))[0]["input_ids"][:] == expected, name


def test_datasets_are_mixed_by_weight(tmp_path):
    first = write_rows(tmp_path / "first.jsonl", [{"text": f"a{n}"} for n in range(10)])
    second = write_rows(tmp_path / "second.jsonl", [{"text": f"b{n}"} for n in range(4)])
    data, _ = prepared(tmp_path, [{"text": "x"}], sources=(f"{first}:0.5", f"{second}:2.25"))
    assert sum(source == first for source in data["source"]) == 5
    assert sorted(
        row for row, source in zip(data["row"], data["source"], strict=True) if source == second
    ) in (sorted([1, 2, 3, 4] * 2 + [extra]) for extra in (1, 2, 3, 4))
    again, _ = prepared(tmp_path, [{"text": "x"}], sources=(f"{first}:0.5", f"{second}:2.25"))
    assert again["row"][:] == data["row"][:]
    assert parse_source("a/b:0.5") == ("a/b", 0.5)
    assert parse_source("org/name") == ("org/name", 1.0)


def test_rows_with_different_keys_are_not_mixed_up_by_arrow(tmp_path):
    rows = [
        {"messages": chat("a", "b"), "tools": [TOOL]},
        {"messages": chat("a", "b"), "chat_template_kwargs": {"one": 1}},
        {"messages": [*chat("a"), {"role": "assistant", "content": None, "tool_calls": CALL}], "tools": None},
    ]
    tokenizer = copy.deepcopy(EMBEDDED)
    tokenizer.chat_template = (
        "{{ tools | tojson }}|{{ one is defined }}|{% for m in messages %}{{ m | tojson }}{% endfor %}"
    )
    encode = functools.partial(encode_sft, tokenizer=tokenizer, loss_on="all", max_length=1000)
    data, _ = prepare_data((write_rows(tmp_path / "rows.jsonl", rows),), encode, SFT_COLUMNS)
    tools, one, last = zip(*(tokenizer.decode(row["input_ids"]).split("|") for row in data), strict=True)
    assert [json.loads(text) for text in tools] == [[TOOL], None, None]
    assert one == ("False", "True", "False")
    assert (
        json.loads(last[0][: len(last[0]) // 2 + 1].split("}{")[0].rstrip("}") + "}")
        == rows[0]["messages"][0]
    )
    assert "null" not in "".join(last)
    assert '"arguments": {"x": 1}' in last[2]


def test_cache_knows_its_inputs(tmp_path):
    rows = [{"messages": chat("a", "b")}]
    plain = prepared(tmp_path, rows)[0]["num_targets"][:]
    everything = prepared(tmp_path, rows, loss_on="all")[0]["num_targets"][:]
    assert plain != everything
    assert prepared(tmp_path, rows)[0]["num_targets"][:] == plain


def test_marking_shows_exactly_the_mask():
    ids = EMBEDDED("abcd")["input_ids"]
    assert mark_trained(EMBEDDED, ids, [True, False, False, True]).count("[[") == 2
    assert mark_trained(EMBEDDED, ids, np.zeros(len(ids), bool)) == "abcd"
