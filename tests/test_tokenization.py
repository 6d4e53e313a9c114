"""common.py's rows, chat templates and loss masks. Templates are the stock ones that TRL ships, and Mistral's below."""

import copy
import functools
import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import trl
from conftest import ASSETS, write_rows
from filelock import FileLock, Timeout
from tokenizers import AddedToken
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer

from common import (
    SFT_FEATURES,
    UserError,
    encode_messages,
    encode_sft,
    encode_text,
    load_tokenizer,
    mark_trained,
    parse_row,
    parse_source,
    prepare_data,
)

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# As Mistral-7B-Instruct-v0.3's: no header, the system prompt and the tools in the last user's message, a call's id.
MISTRAL = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}\
{%- else %}{%- set rest = messages %}{%- endif %}{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}\
{%- set ns = namespace(index=0) %}{%- for message in rest %}{%- if message.role != 'tool' and message.tool_calls is not defined %}\
{%- if (message.role == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}\
{%- set ns.index = ns.index + 1 %}{%- endif %}{%- endfor %}\
{{- bos_token }}{%- for message in rest %}{%- if message.role == 'user' %}{%- if tools and message == users[-1] %}\
{{- '[AVAILABLE_TOOLS] [' }}{%- for tool in tools %}{{- tool.function | tojson }}{%- endfor %}{{- '][/AVAILABLE_TOOLS]' }}\
{%- endif %}{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}\
{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}{%- elif message.tool_calls is defined %}\
{{- '[TOOL_CALLS] [' }}{%- for call in message.tool_calls %}{%- if call.id | length != 9 %}\
{{- raise_exception('ids must have 9 characters') }}{%- endif %}{{- (call.function | tojson)[:-1] }}\
{{- ', "id": "' + call.id + '"}' }}{%- endfor %}{{- ']' + eos_token }}{%- elif message.role == 'assistant' %}\
{{- ' ' + message.content | trim + eos_token }}{%- elif message.role == 'tool' %}\
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}\
{%- else %}{{- raise_exception('roles are user, assistant, system and tool') }}{%- endif %}{%- endfor %}"""
TOOL = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}  # fmt: skip
CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {"x": 1}}}]


EMBEDDED = load_tokenizer(ASSETS / "model")


def tokenizer_with(template):
    """The embedded tokenizer under another chat template, whose control tokens are added as special tokens. As in most
    tokenizers of the hub, they have no names beside bos and eos."""
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(ASSETS / "model"))
    control = set(re.findall(r"<\|\w+\|>|<\|\w+>|<\w+\|>|<(?:start|end)_of_turn>", template)) | {
        "<s>",
        "</s>",
        "<|begin_of_text|>",
    }
    tokenizer.add_tokens(sorted(control), special_tokens=True)
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
    if name != "gemma":
        with_system = [{"role": "system", "content": "Be brief."}, *chat("a", "One.", "b", "Two.")]
        assert [text.lstrip(" ") for text in trained(tokenizer, with_system)] == expected


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_what_a_template_refuses_is_an_error(name):
    first = {"role": "system" if name == "gemma" else "user", "content": "s"}
    with pytest.raises(UserError, match=r"template refuses these messages"):
        trained(stock(name), [first, *chat("a", "b")])


def test_mistral_with_system_prompt_tools_and_several_turns():
    """It has no header; the system prompt and the tools move to the last user's message as the conversation grows."""
    tokenizer = stock("mistral")
    system = [{"role": "system", "content": "Be brief."}]
    # The blank before an answer is the model's to write, whatever stands before it.
    assert trained(tokenizer, system + chat("a", "One.", "b", "Two.")) == [" One.</s>", " Two.</s>"]
    assert trained(tokenizer, system + chat("a", "a", "a", "a")) == [" a</s>", " a</s>"]
    call = {"role": "assistant", "content": "", "tool_calls": [{**CALL[0], "id": "abcdefghi"}]}
    result = {"role": "tool", "content": "7", "tool_call_id": "abcdefghi"}
    messages = [*chat("a"), call, result, {"role": "assistant", "content": "One."}]
    called = '[TOOL_CALLS] [{"name": "look_up", "arguments": {"x": 1}, "id": "abcdefghi"}]</s>'
    assert trained(tokenizer, messages, tools=[TOOL]) == [called, " One.</s>"]
    more = messages + chat("b", "Two.")
    assert trained(tokenizer, more, tools=[TOOL]) == [called, " One.</s>", " Two.</s>"]
    assert trained(tokenizer, system + more, tools=[TOOL]) == [called, " One.</s>", " Two.</s>"]


def test_a_special_token_before_the_turn_is_never_trained():
    """Phi-3's control tokens swallow the blanks after them, with which an answer may begin."""
    tokenizer = stock("phi3")
    plain = trained(tokenizer, chat("a", "\n  One."))
    swallowing = stock("phi3")
    for token in ("<|assistant|>", "<|user|>", "<|end|>"):
        swallowing.add_tokens([AddedToken(token, special=True, rstrip=True)], special_tokens=True)
    assert plain[0].endswith("One.<|end|>")
    assert trained(swallowing, chat("a", "\n  One.")) == ["One.<|end|>"]


def test_words_that_the_template_parts_from_their_calls_are_an_error():
    """Gemma 4 writes the words of a message with calls after the tool's result: no one span holds both."""
    call = {"role": "assistant", "content": "CALLING.", "tool_calls": CALL}
    messages = [*chat("a"), call, {"role": "tool", "content": "7", "name": "look_up"}, *chat("a", "One.")[1:]]
    with pytest.raises(UserError, match="parts the words of message 1 from its tool calls"):
        trained(stock("gemma4"), messages, tools=[TOOL])


def test_columns_of_any_name_and_images(tmp_path):
    """A column called `json` is the user's own; images are refused without what it takes to decode them."""
    rows = [{"text": "hello", "json": "{}"}] * 3
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    data, report = prepared(tmp_path, [], sources=[str(tmp_path / "rows.parquet")])
    assert (len(data), report["unused"]) == (3, {"json"})
    stored = datasets.Dataset.from_list([{"text": "a", "image": {"bytes": b"no image", "path": "x.png"}}])
    features = datasets.Features(text=datasets.Value("string"), image=datasets.Image())
    images = datasets.Dataset(stored.data, info=datasets.DatasetInfo(features=features))
    images.save_to_disk(tmp_path / "images")
    with pytest.raises(UserError, match="row 1: the row has images, which are not supported"):
        prepared(tmp_path, [], sources=[str(tmp_path / "images")])


@pytest.mark.parametrize("escape", [r"\ud800", r"\uD800"])
def test_half_of_a_character_is_an_error(escape):
    with pytest.raises(UserError, match="the row is not JSON"):
        parse_row(f'{{"text": "a{escape}b"}}'.encode())


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
    with pytest.raises(UserError, match="does not end an assistant turn with a special token"):
        trained(tokenizer, chat("a", "b"))
    only_last = tokenizer_with(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}</s>"
    )
    with pytest.raises(UserError, match="does not end an assistant turn with a special token"):
        trained(only_last, chat("a", "b", "c", "d"))
    with pytest.raises(UserError, match="does not render all tool calls"):
        trained(
            stock("llama3"),
            [*chat("a"), {"role": "assistant", "content": "", "tool_calls": CALL}, *chat("b", "c")],
        )
    with pytest.raises(UserError, match=r"contains <\|im_end\|>"):
        trained(stock("qwen2_5"), chat("a", "b<|im_end|>"))
    other_each_time = "{% for m in messages %}{{ messages | map(attribute='content') | join | length }}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"  # fmt: skip
    with pytest.raises(UserError, match="cannot be told from the rest"):
        trained(tokenizer_with(other_each_time), chat("a", "bb", "c", "d"))


def test_answers_that_end_with_several_tokens_or_other_ones_before_more_turns():
    both = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    assert trained(stock("cohere2"), chat("a", "One.", "b", "Two.")) == [f"One.{both}", f"Two.{both}"]
    final = "<|channel|>final<|message|>"
    assert trained(stock("gptoss"), chat("a", "One.", "b", "Two.")) == [
        f"{final}One.<|end|>",
        f"{final}Two.<|return|>",
    ]
    messages = [
        *chat("a", ""),
        {"role": "tool", "name": "look_up", "content": "r"},
        {"role": "assistant", "content": "One."},
    ]
    messages[1]["tool_calls"] = CALL
    assert [text[-8:] for text in trained(stock("gptoss"), messages, tools=[TOOL])] == [
        "<|call|>",
        "|return|>"[-8:],
    ]


def test_a_conversation_that_ends_with_the_user_trains_no_more_than_the_answers():
    for name in ("phi3", "qwen2_5", "llama3", "gemma3"):
        assert trained(stock(name), chat("a", "One.", "b")) == [f"One.{STOPS[name]}"]


def test_turns_that_the_sentinel_locates_lose_no_letter():
    tokenizer = stock("qwen3")
    for answer in ("Zebra.", "Quagga.", "Z7probe7", "7"):
        messages = [*chat("a", ""), {"role": "tool", "content": "r"}, {"role": "assistant", "content": answer}, *chat("b", "Two.")]  # fmt: skip
        messages[1] |= {"tool_calls": CALL, "reasoning_content": "hm"}
        assert trained(tokenizer, messages, tools=[TOOL])[1] == f"{answer}<|im_end|>"
    # A second call without words, whose thinking Qwen3 strips once the user speaks again.
    messages[3:4] = [{**messages[1]}, messages[2], messages[3]]
    call = '<tool_call>\n{"name": "look_up", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert trained(tokenizer, messages, tools=[TOOL])[:2] == [call, call]


def test_tool_calls_in_the_dialect_of_the_template():
    messages = [*chat("a", ""), {"role": "tool", "name": "look_up", "content": "r"}, *chat("", "One.")[1:]]
    messages[1]["tool_calls"] = CALL
    template = (TEMPLATES / "deepseekv3.jinja").read_text()
    control = set(re.findall(r"<[^<>{}' ]+>", template))
    tokenizer = copy.deepcopy(EMBEDDED)
    tokenizer.add_tokens(sorted(control), special_tokens=True)
    tokenizer.chat_template = template
    null = [{**m, "content": m["content"] or None} for m in copy.deepcopy(messages)]
    null[1]["tool_calls"][0]["function"]["arguments"] = '{"x": 1}'
    ids, mask = encode_messages(tokenizer, messages, [1, 3])
    assert ids == tokenizer.apply_chat_template(null, return_dict=True)["input_ids"]
    first, second = re.findall(r"\[\[(.*?)\]\]", mark_trained(tokenizer, ids, mask), re.S)
    assert 'look_up\n```json\n{"x": 1}' in first
    assert second.startswith("One.<")


def test_tokenizers_that_trim_offsets_give_the_same_mask():
    trimming = copy.deepcopy(EMBEDDED)
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    code = chat("a", "def f():\n\n    return  1\n\n\n  x")
    assert (
        trimming("a  b", return_offsets_mapping=True)["offset_mapping"]
        != EMBEDDED("a  b", return_offsets_mapping=True)["offset_mapping"]
    )
    assert encode_messages(trimming, code, [1]) == encode_messages(EMBEDDED, code, [1])
    assert encode_text(trimming, "q:", "\n\n  a\n\n b") == encode_text(EMBEDDED, "q:", "\n\n  a\n\n b")


def test_messages_of_weight_zero_are_not_trained():
    messages = chat("a", "One.", "b", "Two.")
    messages[1]["weight"] = 0
    assert "One.<" in encoded_text({"messages": messages})
    assert encoded_text({"messages": messages}).count("[[") == 1


def test_no_second_bos_and_no_second_eos():
    tokenizer = stock("llama3")
    ids, _ = encode_messages(tokenizer, chat("a", "b"))
    assert ids.count(tokenizer.bos_token_id) == 1
    with pytest.raises(UserError, match="begins with two"):
        encode_messages(tokenizer_with("{{ bos_token }}{{ bos_token }}a<|im_end|>"), chat("a", "b"))
    plain = AutoTokenizer.from_pretrained(ASSETS / "model")
    once = encode_text(plain, "Q", "A")
    assert encode_text(plain, "Q", "A" + plain.eos_token) == once
    assert encode_text(plain, "Q", f"A{plain.eos_token}\n") == once
    assert once[0][-1] == plain.eos_token_id
    assert once[1] == [False, True, True]


def test_text_of_a_tokenizer_that_adds_bos_begins_with_one():
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
    return prepare_data(sources or (path,), encode, SFT_FEATURES)


def test_every_row_is_accounted_for(tmp_path):
    rows = [{"messages": chat("a", "b" * n), "id": n} for n in (1, 2, 300, 3)] + [{"messages": chat("a")}]
    data, report = prepared(tmp_path, rows)
    assert data["row"][:] == [1, 2, 4]
    assert report["rows"] == 5
    assert report["dropped"] == {"longer than --max-length 100": 1, "nothing to train": 1}
    assert report["unused"] == {"id"}
    with pytest.raises(UserError, match="no row is left to train of 1"):
        prepared(tmp_path, [{"messages": chat("a")}], "none.jsonl")


def test_errors_name_the_first_bad_rows(tmp_path):
    rows = [{"messages": chat("a", "b")}] * 3 + [{"messages": [{"role": "robot", "content": "a"}]}] * 9
    with pytest.raises(
        UserError, match=r"9 of 12 rows cannot be used.*\n  row 4: `messages\[0\]` has the role .robot."
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
    data, _ = prepare_data((write_rows(tmp_path / "rows.jsonl", rows),), encode, SFT_FEATURES)
    tools, one, last = zip(*(tokenizer.decode(row["input_ids"]).split("|") for row in data), strict=True)
    assert [json.loads(text) for text in tools] == [[TOOL], None, None]
    assert one == ("False", "True", "False")
    assert (
        json.loads(last[0][: len(last[0]) // 2 + 1].split("}{")[0].rstrip("}") + "}")
        == rows[0]["messages"][0]
    )
    assert "null" not in "".join(last)
    assert '"arguments": {"x": 1}' in last[2]


def test_values_reach_the_encoder_as_they_are_in_the_file(tmp_path):
    rows = [{"text": "2024-01-01"}, {"text": "2024-01-02"}]  # Arrow would make these timestamps
    texts = [EMBEDDED.decode(row["input_ids"]) for row in prepared(tmp_path, rows)[0]]
    assert texts == ["2024-01-01<|im_end|>", "2024-01-02<|im_end|>"]
    call = [{"function": {"name": "f", "arguments": {"x": None, "y": 1}}}]  # a real null is kept
    messages = [{"role": "assistant", "content": None, "tool_calls": call, "name": None}]
    tokenizer = copy.deepcopy(EMBEDDED)
    tokenizer.chat_template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    text = tokenizer.decode(encode_sft({"messages": messages}, tokenizer, loss_on="all")["input_ids"])
    assert json.loads(text)["tool_calls"][0]["function"]["arguments"] == {"x": None, "y": 1}
    assert "name" not in json.loads(text)


def test_csv_files_as_spreadsheets_write_them(tmp_path):
    rows = [{"prompt": "q", "completion": "NA"}, {"prompt": "q\n2", "completion": "054"}]
    expected = prepared(tmp_path, rows)[0]["input_ids"][:]
    text = '\r\n,prompt, completion\r\n0,q,NA\r\n\r\n1,"q\n2",054\r\n'
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8-sig", newline="")
    data, report = prepared(tmp_path, rows, "other.jsonl", sources=(str(tmp_path / "rows.csv"),))
    assert data["input_ids"][:] == expected
    assert data["row"][:] == [1, 2]
    assert report["unused"] == {"''"}


def test_first_thousand_rows_dropped(tmp_path):
    rows = [{"text": "x" * 200}] * 1200 + [{"text": "abc"}]
    data, report = prepared(tmp_path, rows)
    assert data["row"][:] == [1201]
    assert report["dropped"] == {"longer than --max-length 100": 1200}


def test_row_numbers_are_line_numbers(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\n{"text": "abc"}\n\n{"text": 5}\n')
    encode = functools.partial(encode_sft, tokenizer=EMBEDDED)
    with pytest.raises(UserError, match="row 4: `text` is 5"):
        prepare_data((str(tmp_path / "rows.jsonl"),), encode, SFT_FEATURES)


def test_stop_id_is_what_ends_the_training_tokens():
    stop = EMBEDDED.convert_tokens_to_ids("<|im_end|>")
    messages = {"messages": chat("a", "One.")}
    for loss_on in ("auto", "all"):  # under "all" a newline follows the end of the turn
        assert encode_sft(messages, EMBEDDED, loss_on=loss_on)["stop_id"] == stop
    assert encode_sft({"text": "abc"}, EMBEDDED)["stop_id"] == EMBEDDED.eos_token_id
    assert encode_sft(messages, EMBEDDED, max_length=12, overflow="truncate", loss_on="all")["stop_id"] == -1
    assert encode_sft({"input_ids": [5, 6]}, EMBEDDED)["stop_id"] == -1


def test_a_changed_file_or_tokenizer_is_tokenized_again(tmp_path):
    first, _ = prepared(tmp_path, [{"text": "one"}])
    stamp = (tmp_path / "rows.jsonl").stat()
    write_rows(tmp_path / "rows.jsonl", [{"text": "two"}])
    os.utime(tmp_path / "rows.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    encode = functools.partial(encode_sft, tokenizer=copy.deepcopy(EMBEDDED))
    second, _ = prepare_data((str(tmp_path / "rows.jsonl"),), encode, SFT_FEATURES)
    assert first["input_ids"][:] != second["input_ids"][:]
    encode.keywords["tokenizer"].eos_token = "<|im_start|>"
    third, _ = prepare_data((str(tmp_path / "rows.jsonl"),), encode, SFT_FEATURES)
    assert third["input_ids"][0][-1] == EMBEDDED.convert_tokens_to_ids("<|im_start|>")


def test_digests_tell_rows_and_masks_apart(tmp_path):
    ids = [5, 6, 7]
    rows = [
        {"input_ids": ids},
        {"input_ids": ids, "labels": [-100, -100, 7]},
        {"input_ids": [5, 6, 8]},
        {"input_ids": ids},
    ]
    digests = prepared(tmp_path, rows)[0]["digest"][:]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


def test_cache_knows_its_inputs(tmp_path):
    rows = [{"messages": chat("a", "b")}]
    plain = prepared(tmp_path, rows)[0]["num_targets"][:]
    everything = prepared(tmp_path, rows, loss_on="all")[0]["num_targets"][:]
    assert plain != everything
    assert prepared(tmp_path, rows)[0]["num_targets"][:] == plain


def test_marking_shows_exactly_the_mask():
    ids = EMBEDDED("1234")["input_ids"]
    assert mark_trained(EMBEDDED, ids, [True, False, False, True]) == "[[1]]23[[4]]"
    assert mark_trained(EMBEDDED, ids, np.zeros(len(ids), bool)) == "1234"


def test_tokenizing_is_parallel_and_one_process_at_a_time(tmp_path, monkeypatch):
    """Two processes' worth of rows are mapped by several workers, under a lock that no other process can have."""
    seen, map_rows = {}, datasets.Dataset.map

    def spy(self, *args, **options):
        path = next((Path(datasets.config.HF_DATASETS_CACHE) / "post-training").glob("*.lock"))
        with pytest.raises(Timeout):
            FileLock(path).acquire(timeout=0)
        seen["num_proc"] = options["num_proc"]
        return map_rows(self, *args, **{**options, "num_proc": None})

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.Dataset, "map", spy)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    prepared(tmp_path, [{"text": f"row {i}"} for i in range(6001)])
    assert seen["num_proc"] == 4
