"""common.py's section 1: rows, chat templates and loss masks, the data report. Templates are stock ones, from TRL, and
assets/mistral.jinja, as Mistral-7B-Instruct-v0.3's, without a header and with tools in the last user's message."""

import copy
import functools
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock, call

import datasets
import numpy as np
import pytest
import trl
from conftest import ASSETS, write_rows
from filelock import FileLock, Timeout
from tokenizers import AddedToken
from tokenizers.processors import ByteLevel, TemplateProcessing

import common
import gkd
from common import UserError, encode_preference, encode_prompt, encode_sft, load_tokenizer, mark_trained

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOL = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}  # fmt: skip
CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {"x": 1}}}]
EMBEDDED = load_tokenizer(ASSETS / "model")


def tokenizer_with(template):
    """The embedded tokenizer under another chat template, whose control tokens are added as special tokens. As in most
    tokenizers of the hub, they have no names beside bos and eos."""
    tokenizer = copy.deepcopy(EMBEDDED)
    control = {*re.findall(r"<\|\w+\|>|<\|\w+>|<\w+\|>|<(?:start|end)_of_turn>", template)}
    control |= {"<s>", "</s>", bos := "<|begin_of_text|>"}
    tokenizer.add_tokens(sorted(control), special_tokens=True)
    tokenizer.bos_token = bos if "begin_of_text" in template or "eot_id" in template else "<s>"
    tokenizer.eos_token = "<|endoftext|>" if "endoftext" in template else "</s>"
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def stock(name):
    """The tokenizer with a stock template, or with a Jinja text."""
    path = (ASSETS if name == "mistral" else TEMPLATES) / f"{name}.jinja"
    return tokenizer_with(path.read_text() if name.isidentifier() else name)


def chat(*turns):
    """Alternating user and assistant texts -> messages."""
    return [message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]


def message(role, content, **more):
    return {"role": role, "content": content, **more}


user, assistant, tool = (functools.partial(message, role) for role in ("user", "assistant", "tool"))
SYSTEM = [{"role": "system", "content": "Be brief."}]
TWO = chat("a", "One.", "b", "Two.")
CALLED = [user("a"), assistant("", tool_calls=CALL), tool("RESULT", name="look_up"), assistant("One.")]


def trained(tokenizer, messages, tools=None, **kwargs):
    """The texts that are trained, turn by turn; checks that the ids are the template's own."""
    row = {"messages": copy.deepcopy(messages), "tools": tools, "chat_template_kwargs": kwargs}
    found = encode_sft(row, tokenizer, max_length=10_000)
    options = {"tools": tools, "return_dict": True, **kwargs}
    assert found["input_ids"] == tokenizer.apply_chat_template(messages, **options)["input_ids"]
    return re.findall(r"\[\[(.*?)\]\]", mark_trained(tokenizer, found["input_ids"], found["loss_mask"]), re.S)


# ---- Masks: what the model must write, by template -----------------------------------------------------------------

IM, EOT, EOTURN = "<|im_end|>", "<|eot_id|>", "<end_of_turn>"
STOPS = {  # template -> the token that ends an answer
    "qwen2_5": IM, "qwen3": IM, "qwen3_instruct_2507": IM, "llama3": EOT, "llama3_1": EOT, "llama3_2": EOT,
    "gemma": EOTURN, "gemma3": EOTURN, "phi3": "<|end|>", "phi3_5": "<|end|>", "mistral": "</s>",
    "cohere": "<|END_OF_TURN_TOKEN|>", "llama3_training": EOT, "gemma3_training": EOTURN, "phi3_training": "<|end|>",
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_trained_turns_are_the_answers_with_their_end(name):
    tokenizer, stop = stock(name), STOPS[name]
    think = "<think>\n\n</think>\n\n" if name == "qwen3" else ""  # stock Qwen3 opens a last answer with it
    expected = [f"One.{stop}", f"{think}Two.{stop}"]
    assert [text.lstrip(" ") for text in trained(tokenizer, TWO)] == expected
    for switch in ({"weight": 0}, {"loss": False}, {"train": False}):
        only_last = [TWO[0], {**TWO[1], **switch}, *TWO[2:]]
        assert [text.lstrip(" ") for text in trained(tokenizer, only_last)] == expected[1:]
    if name not in ("gemma", "mistral"):  # see REFUSED
        assert [text.lstrip(" ") for text in trained(tokenizer, SYSTEM + TWO)] == expected
    if name in ("phi3", "qwen2_5", "llama3", "gemma3"):  # a conversation that ends with the user
        assert trained(tokenizer, TWO[:3]) == [f"One.{stop}"]


THINK = "<think>\nhm\n</think>\n\n"
THOUGHT = chat("a", f"{THINK}One.", "b", f"{THINK}Two.")
REASONED = [*TWO[:3], assistant("Two.", reasoning_content="hm")]
CALL_TEXT = '<tool_call>\n{"name": "look_up", "arguments": {"x": 1}}\n</tool_call>'
REASONED_CALL = [CALLED[0], {**CALLED[1], "reasoning_content": "hm"}, *CALLED[2:], *TWO[2:]]
CHANNEL = "<|channel|>final<|message|>"
MISTRAL_CALL = [CALLED[0], assistant("", tool_calls=[{**CALL[0], "id": "abcdefghi"}]), tool("7", tool_call_id="abcdefghi"), CALLED[3]]  # fmt: skip
MISTRAL_CALLED = '[TOOL_CALLS] [{"name": "look_up", "arguments": {"x": 1}, "id": "abcdefghi"}]</s>'
EXACT = {  # what -> template, messages, options, the trained texts
    "thinking in the content": ("qwen2_5", THOUGHT, {}, [f"{THINK}One.{IM}", f"{THINK}Two.{IM}"]),
    "thinking, Llama": ("llama3", THOUGHT, {}, [f"{THINK}One.{EOT}", f"{THINK}Two.{EOT}"]),
    "Qwen3 strips the thinking of earlier turns": ("qwen3", THOUGHT, {}, [f"One.{IM}", f"{THINK}Two.{IM}"]),
    "reasoning_content": ("qwen3", REASONED, {}, [f"One.{IM}", f"{THINK}Two.{IM}"]),
    "without thinking, the prompt holds the empty block": ("qwen3", TWO[:2], {"enable_thinking": False}, [f"One.{IM}"]),
    "the prompt opens a block that earlier turns lack": ("qwen3_5_think", THOUGHT, {}, [f"One.{IM}", f"hm\n</think>\n\nTwo.{IM}"]),
    "a call with thinking that Qwen3 strips": ("qwen3", REASONED_CALL, {"tools": [TOOL]}, [f"{CALL_TEXT}{IM}", f"One.{IM}", f"<think>\n\n</think>\n\nTwo.{IM}"]),
    "begins with the assistant": ("qwen2_5", [assistant("Hi."), *TWO[:2]], {}, [f"Hi.{IM}", f"One.{IM}"]),
    "two ends": ("cohere2", TWO, {}, [f"{n}.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for n in ("One", "Two")]),
    "another end where more follows": ("gptoss", TWO, {}, [f"{CHANNEL}One.<|end|>", f"{CHANNEL}Two.<|return|>"]),
    "Mistral, tools before the last user": ("mistral", TWO, {"tools": [TOOL]}, [" One.</s>", " Two.</s>"]),
    "Mistral's calls": ("mistral", MISTRAL_CALL, {"tools": [TOOL]}, [MISTRAL_CALLED, " One.</s>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_trained_texts_are_exact(name):
    template, messages, options, expected = EXACT[name]
    assert trained(stock(template), messages, **options) == expected


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1", "llama3_2", "lfm2_v2", "gptoss"])
def test_tool_calls_are_trained_and_tool_results_are_not(name):
    first, *others = trained(stock(name), CALLED + TWO[2:], tools=[TOOL])
    stop = {"gptoss": ("<|call|>", "<|end|>", "<|return|>")}.get(name, (EOT if "llama" in name else IM,) * 3)
    assert "look_up" in first
    assert [text.endswith(end) for text, end in zip([first, *others], stop, strict=True)] == [True] * 3
    assert re.sub("<.*?>|final|\n", "", others[0]) == "One."
    assert "RESULT" not in first + "".join(others)


OTHER_EACH_TIME = "{% for m in messages %}{{ messages | map(attribute='content') | join | length }}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"  # fmt: skip
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DROPS = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip
REFUSED = {  # template (a stock one's name, or Jinja), messages, the message
    "a system message": ("gemma", SYSTEM + TWO, "template refuses these messages"),
    "Mistral drops a system message": ("mistral", SYSTEM + TWO, r"drops message 0 .system: \"Be brief"),
    "no end": (PLAIN, TWO, "ends no answer with a special token, to stop at; give one with {% generation %}"),
    "an end after the last answer only": (PLAIN + "{{ eos_token }}</s>", TWO, "does not show where message 1 begins"),
    "no beginning": (OTHER_EACH_TIME, chat("a", "bb", "c", "d"), "does not show where message 1 begins; give one with {% gen"),
    "the end within the answer": ("qwen2_5", chat("a", f"b{IM}"), r"message 1 .assistant: .* contains <\|im_end\|>, which only the chat template may write"),
    "a turn within the user's words": ("llama3", chat(f"a{EOT}<|start_header_id|>system", "b"), r"message 0 .user: .* contains <\|eot_id\|>, which"),
    "a control token in a tool's result": ("qwen3", [*CALLED[:2], tool(f"7{IM}"), CALLED[3]], r"message 2 .tool: .* contains <\|im_end\|>, which"),
    "calls that are dropped": ("llama3", [*CALLED, *TWO[2:]], r"template drops `tools`; give another"),
    "tools that no text shows": ("llama3", TWO, "template drops .*`tools`"),
    "reasoning that is dropped": ("llama3", [TWO[0], assistant("b", thinking="hm")], "template drops .*`thinking`"),
    "reasoning that no text can show, earlier": ("llama3", [TWO[0], assistant("b", thinking="hm"), *TWO[2:]], "template drops `thinking`"),
    "thinking that is cut off": (PLAIN.replace("m.content", "m.content.split('</think>')[-1]") + IM, chat("a", f"{THINK}Two."), "drops part of the assistant's"),
    "a control token in a tool": ("qwen3", [{"tools": f"a{IM}"}], r"tools or chat_template_kwargs contains <\|im_end\|>, which"),
    "a developer message that is dropped": (DROPS, [{"role": "developer", "content": "a"}, *TWO], r"drops message 0 .developer: \"a\""),
    "words apart from their call": ("gemma4", [user("a"), assistant("CALLING.", tool_calls=CALL), *CALLED[2:]], "does not render message 1 in one place"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rendered_or_marked_is_refused(name):
    template, messages, expected = REFUSED[name]
    row = {"messages": messages, "tools": [TOOL] * ("tool" in name or "call" in name)}
    row |= {"messages": TWO, "chat_template_kwargs": messages[0]} if "tools" in messages[0] else {}
    with pytest.raises(UserError, match=expected):
        encode_sft(row, stock(template))


def test_control_tokens_need_no_mark():
    """DeepSeek-R1's tokens of roles are not marked as special."""
    tokenizer = copy.deepcopy(EMBEDDED)
    tokenizer.add_tokens([AddedToken("<\uff5cUser\uff5c>", special=False), AddedToken("<think>", special=False)])  # fmt: skip
    assert encode_sft({"messages": chat("a <think> b", "c")}, tokenizer)["length"] > 1
    with pytest.raises(UserError, match="contains <\uff5cUser\uff5c>, which"):
        encode_sft({"messages": chat("a <\uff5cUser\uff5c> b", "c")}, tokenizer)


def test_tokenizers_that_swallow_blanks_or_trim_offsets_give_the_same_mask():
    """Phi-3's control tokens swallow the blanks after them, with which an answer may begin."""
    swallowing, trimming = copy.deepcopy(stock("phi3")), copy.deepcopy(EMBEDDED)
    tokens = [AddedToken(f"<|{name}|>", special=True, rstrip=True) for name in ("assistant", "user", "end")]
    swallowing.add_tokens(tokens, special_tokens=True)
    assert trained(swallowing, chat("a", "\n  One.")) == ["One.<|end|>"]
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    offsets = [each("a  b", return_offsets_mapping=True)["offset_mapping"] for each in (trimming, EMBEDDED)]
    assert offsets[0] != offsets[1]
    for row in ({"messages": chat("a", "def f():\n\n    return  1\n\n\n  x")}, {"prompt": "q:", "completion": "\n\n  a\n\n b"}):  # fmt: skip
        assert encode_sft(row, trimming) == encode_sft(row, EMBEDDED)


def test_no_second_bos_and_no_second_eos():
    llama = stock("llama3")
    assert encode_sft({"messages": TWO}, llama)["input_ids"].count(llama.bos_token_id) == 1
    ids, mask, _ = common.encode_text(EMBEDDED, "Q", "A")
    assert (ids[-1], mask) == (EMBEDDED.eos_token_id, [False, True, True])
    for completion in (f"A{EMBEDDED.eos_token}", f"A{EMBEDDED.eos_token}\n"):
        assert common.encode_text(EMBEDDED, "Q", completion)[:2] == (ids, mask)
    with_bos = copy.deepcopy(stock("mistral"))
    bos = [("<s>", with_bos.bos_token_id)]
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    assert common.encode_text(with_bos, "Q", "A")[:2] == common.encode_text(with_bos, "<s>Q", "A")[:2]
    for prompt in ("Q", "<s>Q"):
        assert encode_prompt({"prompt": prompt}, with_bos)["input_ids"] == with_bos("Q")["input_ids"]


# ---- What is trained, by kind of row -------------------------------------------------------------------------------

Q = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "One."}]
IDS = {"input_ids": EMBEDDED("7890")["input_ids"]}
MARKED = {  # row, --loss-on, its text with what is trained between [[ and ]]
    "messages": ({"messages": TWO[:2]}, "auto", f"{Q}[[One.{IM}]]\n"),
    "messages as JSON text": ({"messages": json.dumps(TWO[:2])}, "auto", f"{Q}[[One.{IM}]]\n"),
    "ShareGPT": ({"conversations": SHAREGPT}, "auto", f"{Q}[[One.{IM}]]\n"),
    "all": ({"messages": TWO[:2]}, "all", f"<|im_start|>[[{Q.removeprefix('<|im_start|>')}One.{IM}\n]]"),
    "last-assistant": ({"messages": TWO}, "last-assistant", f"{Q}One.{IM}\n{Q.replace('a<', 'b<')}[[Two.{IM}]]\n"),
    "prompt and completion": ({"prompt": TWO[:3], "completion": TWO[3:]}, "auto", f"{Q}One.{IM}\n{Q.replace('a<', 'b<')}[[Two.{IM}]]\n"),
    "assistant, also in the prompt": ({"prompt": TWO[:3], "completion": TWO[3:]}, "assistant", f"{Q}[[One.{IM}]]\n{Q.replace('a<', 'b<')}[[Two.{IM}]]\n"),
    "text, then messages": ({"prompt": "a", "completion": TWO[1:2]}, "auto", f"{Q}[[One.{IM}]]\n"),
    "text": ({"text": "xyz"}, "auto", f"x[[yz{IM}]]"),
    "a rendered chat": ({"text": f"<|im_start|>user\na{IM}\n<|im_start|>assistant\nb{IM}"}, "auto", f"<|im_start|>[[user\na{IM}\n<|im_start|>assistant\nb{IM}]]"),
    "documents in one text": ({"text": f"xyz{IM}abc"}, "auto", f"x[[yz{IM}abc{IM}]]"),
    "prompt and completion as text": ({"prompt": "Q: a A:", "completion": " b"}, "auto", f"Q: a A:[[ b{IM}]]"),
    "a completion alone": ({"completion": "bc"}, "auto", f"b[[c{IM}]]"),
    "ids": (IDS, "auto", "7[[890]]"),
    "ids and labels": ({**IDS, "labels": [-100, *IDS["input_ids"][1:2], -100, -100]}, "auto", "7[[8]]90"),
    "ids and masks": ({**IDS, "completion_mask": [0, 1, 1, 0], "assistant_masks": [1, 0, 1, 1]}, "auto", "78[[9]]0"),
    "ids as JSON text": ({"input_ids": json.dumps(IDS["input_ids"]), "completion_mask": "[0, 0, 0, 1]"}, "auto", "789[[0]]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_what_is_trained_by_kind_of_row(name):
    row, loss_on, expected = MARKED[name]
    found = encode_sft(row, EMBEDDED, loss_on)
    assert mark_trained(EMBEDDED, found["input_ids"], found["loss_mask"]) == expected
    assert found["num_targets"] == sum(found["loss_mask"]) > 0
    has_end = f"{IM}]]" in expected or expected.endswith(f"{IM}\n]]")
    assert found["stop_id"] == (EMBEDDED.convert_tokens_to_ids(IM) if has_end else -1)
    assert found["unused"] == []


# ---- Preferences, prompts, distillation ----------------------------------------------------------------------------

END = [EMBEDDED.convert_tokens_to_ids(IM)]
ASKED = {"prompt": "Q:", "chosen": "yes", "rejected": "no"}
SIDES = {  # a row -> its documents as text with what is trained in [[ ]], ranks, margin, probability
    "text": (ASKED, [f"Q:[[yes{IM}]]", f"Q:[[no{IM}]]"], [0, 1], 0, -1),
    "no prompt": ({"chosen": "Q:yes", "rejected": "Q:no"}, [f"Q:[[yes{IM}]]", f"Q:[[no{IM}]]"], [0, 1], 0, -1),
    "one begins the other": ({"chosen": "ab", "rejected": "abc"}, [f"ab[[{IM}]]", f"ab[[c{IM}]]"], [0, 1], 0, -1),
    "messages": ({"prompt": TWO[:1], "chosen": TWO[1:2], "rejected": [assistant("No.")]}, [f"{Q}[[One.{IM}]]\n", f"{Q}[[No.{IM}]]\n"], [0, 1], 0, -1),
    "messages, prompt repeated": ({"prompt": TWO[:1], "chosen": TWO[:2], "rejected": [*TWO[:1], assistant("No.")]}, [f"{Q}[[One.{IM}]]\n", f"{Q}[[No.{IM}]]\n"], [0, 1], 0, -1),
    "messages, prompt shared": ({"chosen": TWO[:2], "rejected": [*TWO[:1], assistant("No.")]}, [f"{Q}[[One.{IM}]]\n", f"{Q}[[No.{IM}]]\n"], [0, 1], 0, -1),
    "margin": ({**ASKED, "margin": "1.5", "probability": 0.75}, [f"Q:[[yes{IM}]]", f"Q:[[no{IM}]]"], [0, 1], 1.5, 0.75),
    "the likelier side comes first": ({**ASKED, "margin": 1.5, "probability": 0.25}, [f"Q:[[no{IM}]]", f"Q:[[yes{IM}]]"], [0, 1], -1.5, 0.75),
    "ranks": ({"prompt": "Q:", "completions": ["b", "c", "a"], "ranks": [2, 2, 1]}, [f"Q:[[a{IM}]]", f"Q:[[b{IM}]]", f"Q:[[c{IM}]]"], [0, 1, 1], 0, -1),
    "scores": ({"prompt": "Q:", "completions": '["b", "a"]', "scores": [16777216, 16777217]}, [f"Q:[[a{IM}]]", f"Q:[[b{IM}]]"], [0, 1], 0, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", SIDES)
def test_preferences_and_rankings(name):
    row, expected, ranks, margin, probability = SIDES[name]
    found = encode_preference(row, EMBEDDED, rankings=True)
    ends = np.cumsum(found["lengths"])
    parts = [slice(end - length, end) for end, length in zip(ends, found["lengths"], strict=True)]
    texts = [mark_trained(EMBEDDED, found["input_ids"][part], found["loss_mask"][part]) for part in parts]
    assert texts == expected
    assert found["targets"] == [sum(found["loss_mask"][part]) for part in parts]
    prompt = found["loss_mask"].index(True)
    assert found["packed_length"] == sum(found["lengths"]) - prompt * (len(parts) - 1)
    assert (found["ranks"], found["margin"], found["probability"]) == (ranks, margin, probability)
    assert len(set(found["keys"])) == len(parts)


def test_a_token_that_spans_the_end_of_the_prompt_belongs_to_every_completion():
    texts = ["def f", "def  g"]
    joined = next((a, b) for a in "abcdefghij " for b in texts if EMBEDDED(a + b)["input_ids"][0] != EMBEDDED(a)["input_ids"][0])  # fmt: skip
    found = encode_preference({"prompt": joined[0], "chosen": joined[1], "rejected": "7"}, EMBEDDED)
    first, second = found["input_ids"][: found["lengths"][0]], found["input_ids"][found["lengths"][0] :]
    assert [first, second] == [EMBEDDED(joined[0] + end)["input_ids"] + END for end in (joined[1], "7")]
    assert found["loss_mask"][:2] == [False, True]  # the first token of a row follows nothing


NOTED = {  # encoder, row, the names of what nothing reads, or why it is dropped
    "an unknown column": (encode_sft, {"text": "abc", "id": 7, "empty": None}, ["`id`"]),
    "columns of another kind": (encode_sft, {"messages": TWO, "text": "abc", "prompt": "a"}, ["`prompt`", "`text`"]),
    "tools of text": (encode_sft, {"completion": "abc", "tools": [TOOL]}, ["`tools`"]),
    "a template's argument": (encode_sft, {"messages": TWO, "chat_template_kwargs": {"mood": "x"}}, ["`mood`"]),
    "reasoning that Qwen3 strips, and none": (encode_sft, {"messages": [TWO[0], assistant("b", reasoning_content="hm"), TWO[2], assistant("c", reasoning_content="")]}, ["`reasoning_content`"]),
    "thinking that Qwen3 strips": (encode_sft, {"messages": THOUGHT}, ["part of the assistant's message"]),
    "an unknown key": (encode_sft, {"messages": [{**TWO[0], "name": "Ann"}, {**TWO[1], "weight": 1}]}, ["`name`"]),
    "sides of a preference": (encode_preference, {"prompt": "a", "chosen": [assistant("b", mood="hm")], "rejected": "c", "id": 1}, ["`id`", "`mood`"]),
    "too long": (encode_sft, {"text": "7" * 100}, "longer than 50 tokens"),
    "nothing to train": (encode_sft, {"messages": TWO[:1]}, "nothing to train"),
    "an empty turn": (encode_sft, {"messages": chat("a", " ")}, "an empty assistant turn"),
    "identical sides": (encode_preference, {**ASKED, "rejected": "yes"}, "identical sides"),
    "an empty side": (encode_preference, {**ASKED, "rejected": ""}, "an empty side"),
    "ties": (functools.partial(encode_preference, rankings=True), {"completions": ["a", "b"], "scores": [1, 1]}, "all completions tie"),
    "a long prompt": (encode_prompt, {"prompt": "7" * 100}, "longer than the 50 tokens left for a prompt"),
    "no prompt": (functools.partial(gkd.encode_distillation, room=10), {"text": "abc"}, "without a prompt of 2 to 10 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTED)
def test_what_nothing_reads_is_named_and_rows_that_are_dropped_say_why(name):
    encode, row, expected = NOTED[name]
    if isinstance(expected, list):
        tokenizer = stock("qwen3") if "Qwen3" in name else EMBEDDED
        assert sorted(encode(row, tokenizer)["unused"]) == expected
        return
    with pytest.raises(common.DroppedRow, match=expected):
        encode(row, EMBEDDED, max_length=50)


def test_prompts_end_where_the_model_begins_and_keep_all_columns():
    found = encode_prompt({"prompt": TWO[:1], "answer": "7", "tools": None}, EMBEDDED)
    assert EMBEDDED.decode(found["input_ids"]) == Q
    assert json.loads(found["columns"]) == {"answer": "7", "tools": None}
    assert (json.loads(found["prompt"]), found["stop_id"]) == (TWO[:1], *END)
    qwen, options = stock("qwen3"), {"enable_thinking": False}
    found = encode_prompt({"prompt": TWO[:1], "chat_template_kwargs": options}, qwen, tools=[TOOL])
    expected = qwen.apply_chat_template(TWO[:1], tools=[TOOL], add_generation_prompt=True, tokenize=False, **options)  # fmt: skip
    assert qwen.decode(found["input_ids"]) == expected
    found = encode_prompt({"prompt": TWO[:1], "chat_template_kwargs": json.dumps(options)}, qwen)
    assert json.loads(found["columns"]) == {"chat_template_kwargs": options}  # episodes render with them


DISTILLED = {  # row -> what stands before its last answer
    "messages": ({"messages": TWO}, f"{Q}One.{IM}\n{Q.replace('a<', 'b<')}"),
    "ShareGPT": ({"conversations": SHAREGPT}, Q),
    "prompt and completion": ({"prompt": TWO[:1], "completion": "One."}, Q),
    "text": ({"prompt": "Q:", "completion": "A"}, "Q:"),
    "ids": ({**IDS, "completion_mask": [0, 1, 0, 1]}, "789"),
}


@pytest.mark.parametrize("name", DISTILLED)
def test_distillation_gives_the_row_and_the_prompt_of_its_last_answer(name):
    row, prompt = DISTILLED[name]
    found, expected = gkd.encode_distillation(row, EMBEDDED, room=40), encode_sft(row, EMBEDDED)
    assert EMBEDDED.decode(found.pop("prompt_ids")) == prompt
    assert found == expected
    assert gkd.encode_distillation(row, EMBEDDED)["prompt_ids"] == []
    if "prompt" in row:  # without an answer of the row's own
        alone = gkd.encode_distillation({"prompt": row["prompt"]}, EMBEDDED, room=40, use_answer=False)
        assert EMBEDDED.decode(alone["input_ids"]) == EMBEDDED.decode(alone["prompt_ids"]) == prompt
        assert alone["stop_id"] == (-1 if prompt == "Q:" else END[0])
        assert alone.keys() == gkd.FEATURES.keys()


# ---- Datasets ------------------------------------------------------------------------------------------------------


def prepared(tmp_path, rows, name="rows.jsonl", sources=None, budget=10_000, **options):
    """The data that common.prepare_data makes of these rows, or of other sources."""
    sources = sources or (write_rows(tmp_path / name, rows),)
    options = {"tokenizer": EMBEDDED, "max_length": 100, "vocab_size": 10_000, **options}
    encode = functools.partial(encode_sft, **options)
    return common.prepare_data(sources, encode, common.SFT_FEATURES, budget)


def test_every_row_is_accounted_for_and_errors_name_the_first_bad_ones(tmp_path, capsys, monkeypatch):
    rows = [{"messages": chat("a", "b" * n), "id": n} for n in (1, 2, 300, 3)] + [{"messages": chat("a")}]
    data = prepared(tmp_path, [*rows, {"messages": TWO, "chat_template_kwargs": {"mood": "x"}}])
    path = tmp_path / "rows.jsonl"
    assert data["row"][:] == [f"row {n} of {path}" for n in (1, 2, 4, 6)]
    said, tokens, targets = capsys.readouterr().out, sum(data["length"]), sum(data["num_targets"])
    assert f"{path}: 6 rows, 4 used; dropped: 1 longer than 100 tokens, 1 nothing to train\n" in said
    share, longest = targets / tokens, max(map(len, data["input_ids"]))
    assert f" {tokens} tokens, {share:.1%} of them trained; the longest row has {longest}\n" in said
    assert f" `id`: not used, in 3 rows, first in row 1 of {path}\n" in said
    assert f" `mood`: not used, in 1 rows, first in row 6 of {path}\n" in said
    assert f"example   {Q}[[b{IM}]]\n" in said
    with pytest.raises(UserError, match=f"row 6 of .* has {longest} tokens; raise --micro-batch-tokens by 7"):
        prepared(tmp_path, [], sources=(str(path),), budget=longest - 7)
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    assert len(prepared(tmp_path, [], sources=(str(path),))) == 4
    assert capsys.readouterr().out == ""  # only the first rank reports
    bad = [{"messages": [{"role": "robot", "content": "a"}]}] * 9
    with pytest.raises(UserError, match=r"9 of 12 rows cannot be used.*\n  row 4 of .*: `messages\[0\]` has the role .robot.") as error:  # fmt: skip
        prepared(tmp_path, [{"messages": TWO}] * 3 + bad)
    assert str(error.value).count("\n") == 5
    (tmp_path / "numbers.jsonl").write_text('\n{"text": "abc"}\n\n{"text": 5}\n')
    with pytest.raises(UserError, match=r"row 4 of .*: `text` is 5"):  # rows are counted as lines
        prepared(tmp_path, [], sources=(str(tmp_path / "numbers.jsonl"),))


def test_sources_of_all_types_give_the_same_rows_and_are_mixed_by_weight(tmp_path, monkeypatch):
    rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(5)]
    expected = prepared(tmp_path, rows)["input_ids"][:]
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "half": table.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("rows.json", "rows.parquet", "rows.csv", "saved", "splits", "splits:train", "folder"):
        assert prepared(tmp_path, rows, sources=(str(tmp_path / name),))["input_ids"][:] == expected, name
    assert prepared(tmp_path, rows, sources=(f"{tmp_path / 'splits'}:half",))["input_ids"][:] == expected[:1]
    load_dataset = Mock(return_value=table)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared(tmp_path, [], sources=("org/name", "org/name:test", "org/name/config:test[:5]", "squad"))
    names = ("org/name", None, "train"), ("org/name", None, "test"), ("org/name", "config", "test[:5]"), ("squad", None, "train")  # fmt: skip
    assert load_dataset.call_args_list == [call(repo, config, split=split) for repo, config, split in names]
    first = write_rows(tmp_path / "first.jsonl", [{"text": f"a{n}"} for n in range(10)])
    second = write_rows(tmp_path / "second.jsonl", [{"text": f"b{n}"} for n in range(4)])
    rows = prepared(tmp_path, [], sources=(f"{first}:0.5", f"{second}:2.25"))["row"][:]
    assert len({row for row in rows if row.endswith(first)}) == 5
    counts = sorted(rows.count(f"row {n} of {second}") for n in (1, 2, 3, 4))
    assert (counts, len(rows)) == ([2, 2, 2, 3], 14)
    assert prepared(tmp_path, [], sources=(f"{first}:0.5", f"{second}:2.25"))["row"][:] == rows


def test_values_reach_the_encoder_as_they_are_in_the_file(tmp_path):
    rows = [{"text": "2024-01-01"}, {"text": "2024-01-02", "json": "{}"}]  # Arrow would make two timestamps
    texts = [EMBEDDED.decode(row["input_ids"]) for row in prepared(tmp_path, rows)]
    assert texts == [f"2024-01-01{IM}", f"2024-01-02{IM}"]
    for name, row in zip(("days/a", "days/b", "named/train-0", "named/test"), rows * 2, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / f"{name}.jsonl", [row])
    for folder, expected in (("days", texts), ("named", texts[:1]), ("named:test", texts[1:])):
        found = prepared(tmp_path, [], sources=(f"{tmp_path}/{folder}",))
        assert [EMBEDDED.decode(row["input_ids"]) for row in found] == expected
    tokenizer = copy.deepcopy(EMBEDDED)
    tokenizer.chat_template = "{{ tools | tojson }}|{{ one is defined }}|{% for m in messages %}{{ m | tojson }}{% endfor %}"  # fmt: skip
    function = {"name": "f", "arguments": '{"x": null, "y": 1}'}  # a real null is kept
    rows = [{"messages": TWO[:1], "tools": json.dumps([json.dumps(TOOL)]), "chat_template_kwargs": {"two": 2}}]  # fmt: skip
    rows += [{"messages": [{"from": "function_call", "value": json.dumps(function)}], "chat_template_kwargs": {"one": 1}}]  # fmt: skip
    called = {"type": "function", "function": {"name": "f", "arguments": {"x": None, "y": 1}}}
    table = datasets.Dataset.from_list(rows)
    assert "one" in table[0]["chat_template_kwargs"]  # Arrow gives every object the keys of all others
    table.to_parquet(tmp_path / "rows.parquet")
    for source in (write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.parquet")):
        data = prepared(tmp_path, [], sources=(source,), tokenizer=tokenizer, loss_on="all", max_length=999)
        texts = [tokenizer.decode(row["input_ids"]).split("|") for row in data]
        assert [(json.loads(tools), one) for tools, one, _ in texts] == [([TOOL], "False"), (None, "True")]
        assert [json.loads(text) for _, _, text in texts] == [TWO[0], assistant("", tool_calls=[called])]
    text = ',prompt, completion\r\n0,q,NA\r\n\r\n1,"q\n2",054\r\n'  # as spreadsheets write .csv files
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8-sig", newline="")
    data = prepared(tmp_path, [], sources=(str(tmp_path / "rows.csv"),))
    rows = [{"prompt": "q", "completion": "NA"}, {"prompt": "q\n2", "completion": "054"}]
    assert data["input_ids"][:] == prepared(tmp_path, rows)["input_ids"][:]
    assert [row.split(" of ")[0] for row in data["row"]] == ["row 1", "row 2"]


def test_what_changes_is_tokenized_again(tmp_path):
    """A file of the same size and time, the tokenizer, an argument of the encoder; and the digests tell."""
    one, two = [{"text": "one"}], [{"text": "two"}]
    found, stamp = [prepared(tmp_path, one)], (tmp_path / "rows.jsonl").stat()
    path = write_rows(tmp_path / "rows.jsonl", two)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    other = copy.deepcopy(EMBEDDED)
    other.eos_token = "<|im_start|>"
    found += [prepared(tmp_path, [], sources=(path,), **changed) for changed in ({}, {"tokenizer": other}, {"loss_on": "all"})]  # fmt: skip
    assert [data["input_ids"][0][-1] == END[0] for data in found] == [True, True, False, True]
    assert len({data["digest"][0] for data in found}) == 3  # to train all of a text is what auto does
    assert prepared(tmp_path, one)["digest"][:] == found[0]["digest"][:]


def test_several_workers_tokenize_under_a_lock_that_no_other_process_can_have(tmp_path, monkeypatch):
    map_rows = datasets.Dataset.map

    def spy(self, *args, **options):
        path = next((Path(datasets.config.HF_DATASETS_CACHE) / "post-training").glob("*.lock"))
        with pytest.raises(Timeout):
            FileLock(path).acquire(timeout=0)
        assert options["num_proc"] == 4
        return map_rows(self, *args, **{**options, "num_proc": None})

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.Dataset, "map", spy)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert len(prepared(tmp_path, [{"text": f"row {i}"} for i in range(6001)])) == 6001


def test_batches_are_cut_evenly_and_rows_hold_shared_prompts_once():
    assert common.split_batch([9, 2, 6, 3, 5], 2, 10) == [[[0], [4]], [[2], [3, 1]]]
    assert common.split_batch([2, 2, 2], 2, 10, alone=True) == [[[0], [2]], [[1], []]]
    documents = [(np.array(ids), np.array([0, 0, 1, 1], bool)) for ids in ([1, 2, 3, 4], [1, 2, 5, 6])]
    batch = common.collate(documents, share_prompts=True)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3]]
    assert (batch.positions_N.tolist(), batch.labels_N.tolist()) == ([1, 2, 1, 4], [3, 4, 5, 6])
    assert (batch.documents_N.tolist(), batch.last_B.tolist()) == ([0, 0, 1, 1], [3, 5])
