"""What the scripts share: tokenization, rewards and environments, rollout engines and weight sync.

    row --encode_sft--> ids, loss mask --split_batch--> micro-batches --collate--> MicroBatch --> model
    prompt --HFEngine or VLLMEngine, play_episodes--> Rollouts --RewardWorker--> rewards

Shapes: T packed tokens of a micro-batch, N trained positions among them, H heads, D head size.
Alignment: labels_N[i] is the token that position positions_N[i] predicts, ids_T[positions_N[i] + 1].
Rows are counted from 1: "row 17" of a .jsonl file is its line 17.

UserError marks a user's mistake: scripts print its message alone. Every other exception is a bug.
"""

import asyncio
import atexit
import contextlib
import csv
import fcntl
import functools
import hashlib
import heapq
import importlib.util
import inspect
import itertools
import json
import logging
import math
import multiprocessing.forkserver
import operator
import os
import queue
import random
import re
import resource
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import datasets
import httpx
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from datasets import Features, List, Value
from filelock import FileLock, Timeout
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
    render_jinja_template,
)

IGNORE = -100


class UserError(ValueError):
    """Wrong input, told in one message that names what was found, where, and the remedy."""


# ============================================================================================================
# 1. Tokenization
# ============================================================================================================

# ---- Reading rows ------------------------------------------------------------------------------------------

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
TEXT_FEATURES = Features({"row": Value("int64"), "json": Value("binary")})


def parse_source(source):
    """PATH or PATH:WEIGHT -> (path, weight). Weight 2 takes every row twice an epoch, 0.5 a seeded half."""
    path, colon, weight = source.rpartition(":")
    if Path(source).exists() or not colon or not re.match(r"[-+.\d]|nan|inf", weight):
        return source, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise UserError(
            f"--dataset {source}: a weight must be above 0 and at most 1000; or leave the dataset out"
        )
    return path, value


def read_rows(path, config=None, split="train"):
    """A file, a directory (saved by `datasets`, or of data files) or a hub id -> datasets.Dataset.

    Rows of .jsonl, .json and .csv files stay text, in the columns `row` (its number) and `json`. Arrow would
    infer types over all rows: a date would become a timestamp, and every object have the keys of all others.
    """
    location = Path(path).expanduser()
    kind = location.suffix
    if not location.exists() and (kind in FILE_TYPES or path.startswith((".", "/", "~"))):
        raise UserError(f"dataset {path}: no such file or directory (looked from {Path.cwd()})")
    if location.is_file() and kind not in FILE_TYPES:
        raise UserError(f"dataset {path}: the file type must be one of {', '.join(FILE_TYPES)}")
    try:
        if location.is_file() and kind == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(location), split="train")
        if location.is_file():
            with open(location, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            arguments = {"path": str(location), "content": content}
            if next(text_rows(**arguments), None) is None:
                raise UserError("it has no rows")
            return datasets.Dataset.from_generator(text_rows, features=TEXT_FEATURES, gen_kwargs=arguments)
        if (location / "state.json").exists():
            return datasets.load_from_disk(str(location)).with_format(None)
        if (location / "dataset_dict.json").exists():
            splits = datasets.load_from_disk(str(location)).with_format(None)
            if split not in splits:
                raise UserError(f"there is no such split; there are {', '.join(splits)}")
            return splits[split]
        return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the library's many errors all mean that these rows cannot be read
        cause = error.__cause__ or error
        raise UserError(f"dataset {path} (config {config}, split {split}) cannot be read: {cause}") from error


def without_decoding(rows):
    """The rows with images and sounds left as bytes: to decode them needs packages, to refuse does not."""
    for name, feature in rows.features.items():
        inner = feature.feature if isinstance(feature, List) else feature
        if isinstance(inner, (datasets.Image, datasets.Audio)):
            inner = type(inner)(decode=False)
            rows = rows.cast_column(name, List(inner) if isinstance(feature, List) else inner)
    return rows


def text_rows(path, content):
    """The number and the JSON text of each row of a file. `content`, its hash, tells datasets' cache of a
    change."""
    if path.endswith(".csv"):
        csv.field_size_limit(2**31 - 1)
        with open(path, newline="", encoding="utf-8-sig") as file:
            filled = (cells for cells in csv.reader(file) if any(cells))
            header = [name.strip() for name in next(filled, [])]
            if len(set(header)) < len(header):
                raise UserError(f"the header names a column twice: {', '.join(header)}")
            for number, cells in enumerate(filled, 1):
                if len(cells) != len(header):
                    raise UserError(f"row {number} has {len(cells)} cells; the header has {len(header)}")
                yield {"row": number, "json": json.dumps(dict(zip(header, cells, strict=True))).encode()}
        return
    with open(path, "rb") as file:
        start = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        file.seek(0)
        if path.endswith(".json") and start == b"[":
            for number, row in enumerate(json.load(file), 1):
                yield {"row": number, "json": json.dumps(row).encode()}
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield {"row": number, "json": line}


def load_tokenizer(model, chat_template=None, trust_remote_code=False):
    """The model's own tokenizer; its chat template replaced by the Jinja file `chat_template` if one is
    given."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # hub, file and format errors alike
        raise UserError(f"--model {model}: its tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"--model {model}: its tokenizer has no fast version, which locating trained turns needs"
        )
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat-template {chat_template} must be a file with a Jinja template: {error}"
            ) from error
    return tokenizer


# ---- Validating rows ---------------------------------------------------------------------------------------

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def parse_row(text):
    """The JSON text of a row -> dict."""
    try:
        row = json.loads(text)
        if re.search(rb"\\u[dD]", text):  # an escape that may be half of a character
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise UserError(f"the row is not JSON ({error}); fix or remove it") from error
    if not isinstance(row, dict):
        raise UserError(f"the row is {excerpt(row)}, not an object with columns")
    return row


def drop_none(value):
    """Remove the `None` entries that Arrow adds to dictionaries whose keys differ between rows."""
    if isinstance(value, dict):
        return {key: drop_none(entry) for key, entry in value.items() if entry is not None}
    return [drop_none(entry) for entry in value] if isinstance(value, list) else value


def excerpt(value):
    """The beginning of a value as JSON, for messages."""
    return json.dumps(value, default=str, ensure_ascii=False)[:60]


def check_messages(messages, column):
    """A row's messages (also ShareGPT's from/value) -> a list of {role, content, ...}; UserError for what is
    not that."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"`{column}` is {excerpt(messages)}, not a non-empty list of messages")
    checked = []
    for index, message in enumerate(messages):
        where = f"`{column}[{index}]`"
        if not isinstance(message, dict):
            raise UserError(f"{where} is {excerpt(message)}, not an object with `role` and `content`")
        message = {key: value for key, value in message.items() if value is not None}
        if "from" in message and "role" not in message:
            message = from_sharegpt(message, where)
        role, content, calls = message.get("role"), message.get("content", ""), message.get("tool_calls")
        if role not in ROLES:
            raise UserError(f"{where} has the role {excerpt(role)}; roles are {', '.join(ROLES)}")
        parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        if any("image" in str(part.get("type")) for part in parts):
            raise UserError(f"{where} holds an image; images are not supported, keep text-only rows")
        if not isinstance(content, str) or ("content" not in message and not calls):
            found = type(content).__name__ if "content" in message else "nothing"
            raise UserError(f"{where} ({role}) has {found} as content; make it one string")
        if role == "assistant" and not content.strip() and not calls:
            raise UserError(f"{where} is an empty assistant turn; remove it, or the row")
        message["content"] = content
        if not isinstance(calls or [], list) or calls == 0:
            raise UserError(f"{where} has tool calls that are no list: {excerpt(calls)}")
        message |= {"tool_calls": [check_tool_call(call, where) for call in calls]} if calls else {}
        for key in ("reasoning_content", "thinking"):
            if not isinstance(message.get(key, ""), str):
                raise UserError(f"{where} has {type(message[key]).__name__} as `{key}`; make it one string")
        checked.append(message)
    return checked


def from_sharegpt(message, where):
    """{"from", "value"} -> {"role", "content"}; a function call's JSON becomes a tool call."""
    sender, value = message["from"], message.get("value")
    role = SHAREGPT_ROLES.get(sender, sender) if isinstance(sender, str) else sender
    rest = {key: entry for key, entry in message.items() if key not in ("from", "value")}
    if sender != "function_call":
        return {**rest, "role": role, "content": value}
    try:
        return {**rest, "role": role, "tool_calls": [json.loads(value)]}
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is a function call that is not JSON: {error}") from error


def check_tool_call(call, where):
    """{"function": {"name", "arguments"}} (or that object alone), with arguments given as JSON text made an
    object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} has a tool call without a function name: {excerpt(call)}")
    function = dict(function)
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError as error:
            raise UserError(f"{where}: the arguments of {function['name']} are not JSON: {error}") from error
    return {"type": "function", **{k: v for k, v in call.items() if k == "id"}, "function": function}


def read_json_column(row, column, kind):
    """A column that holds `kind` (list or dict), itself or as JSON text; None where it is empty."""
    value = row.get(column) or None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"`{column}` is text but not JSON: {error}") from error
    if value is not None and not isinstance(value, kind):
        raise UserError(f"`{column}` is of type {type(value).__name__}, not {kind.__name__}")
    return value or None


# ---- Chat templates and loss masks -------------------------------------------------------------------------

TEMPLATE_REMEDY = "give one with {% generation %} around the assistant's output by --chat-template"
CALLS_REMEDY = "the chat template does not render all tool calls; give one that does by --chat-template"
PROBE = "7probe7"  # written into a message, it shows where a template puts that message


def encode_messages(tokenizer, messages, turns=None, tools=None, template_kwargs=None):
    """Tokenize a conversation, marking what the model is to learn.

    turns: indices of the assistant messages to train; None marks every token. Returns ids and mask, two lists
    of one length; the ids are those of `apply_chat_template(messages)`. Of a trained turn, all that the model
    must write is marked, the token that ends the turn included. Raises UserError where the template refuses
    the messages or a turn cannot be located.
    """
    source, arguments = tokenizer.get_chat_template(tools=tools), json.dumps(template_kwargs or {})
    template = ChatTemplate.cached(tokenizer, source, json.dumps(tools), arguments)
    text, messages = render_with_calls(template, messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(
            f"the rendered row begins with two {tokenizer.bos_token}; remove the one in the first message"
        )
    if turns is None:
        return ids, [True] * len(ids)
    # A token runs from the end of the one before: tokenizers that trim offsets give blanks no width. One that
    # begins before the turn but holds its first characters is one that the model must write; but a special
    # token only swallows them (rstrip, as Phi-3's).
    spans = trained_spans(template, text, messages, turns)
    bounds = [0, *(end for _, end in encoding["offset_mapping"])]
    control, mask, current = set(special_tokens(tokenizer).values()), [], 0
    for token, (begin, end) in zip(ids, itertools.pairwise(bounds), strict=True):
        while current < len(spans) and spans[current][1] <= begin:
            current += 1
        first = spans[current][0] if current < len(spans) else math.inf
        mask.append(end > first and (begin >= first or token not in control))
    return ids, mask


class ChatTemplate:
    """A tokenizer's chat template under the tools and arguments of some rows."""

    def __init__(self, tokenizer, source, tools, arguments):
        self.tokenizer, self.source, self.tools, self.arguments = tokenizer, source, tools, arguments
        longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self.special = "|".join(map(re.escape, longest_first)) or "(?!)"

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def cached(tokenizer, source, tools, arguments):
        """The same from JSON texts; rows with the same tools and arguments share what is found out once."""
        return ChatTemplate(tokenizer, source, json.loads(tools), json.loads(arguments))

    def render(self, messages, generation_prompt=False):
        """The text of a conversation; UserError for whatever the template, code of the user's, raises."""
        options = {"tools": self.tools, "tokenize": False, "add_generation_prompt": generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(messages, **options, **self.arguments)
        except Exception as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error

    def specials_at_start(self, text):
        """The special tokens, blanks between them, with which a text begins."""
        return re.findall(self.special, re.match(rf"(?:\s*(?:{self.special}))*", text).group())

    def specials_at_end(self, text):
        """Those with which it ends."""
        return re.findall(self.special, re.search(rf"(?:(?:{self.special})\s*)*$", text).group())

    @functools.cached_property
    def plain_answer(self):
        """How a plain answer is framed: the generation prompt that opens it, the special token that closes it
        at the end of a conversation, and the one that closes it where more follows.

        The last two are one wherever both places share a token. Phi-3 writes <|end|> and, at the very end,
        <|endoftext|>; Cohere two tokens after each answer; gpt-oss <|return|> at the end and <|end|> before.
        """
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}
        prompt = self.render([user], generation_prompt=True)
        header = prompt[len(os.path.commonprefix([prompt, self.render([user])])) :]
        final = self.specials_at_start(self.render([user, answer]).rpartition(PROBE)[2])
        inner = self.specials_at_start(self.render([user, answer, user]).rpartition(PROBE)[2])
        if shared := os.path.commonprefix([final, inner]):
            return header, shared[-1], shared[-1]
        return header, final[-1] if final else None, inner[0] if inner else None

    def blocks(self, messages):
        """Assistant message -> (begin, end) of its {% generation %} block; {} if not each has just one."""
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.source):
            return {}
        _, (blocks,) = render_jinja_template(
            conversations=[messages],
            tools=self.tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.arguments},
        )
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return dict(zip(assistants, blocks, strict=True)) if len(blocks) == len(assistants) else {}


def render_with_calls(template, messages):
    """-> the text of a conversation, and the messages as the template wants them.

    Tool calls have dialects: where the messages as they are raise or lose a call, DeepSeek's are tried, whose
    templates want null as the content beside a call, and arguments as JSON text.
    """
    dialects, names = [messages], called_functions(messages)
    if names:
        dialects.append(
            [{**m, "content": m["content"] or None} if m.get("tool_calls") else m for m in messages]
        )
        dialects.append([with_text_arguments(message) for message in dialects[1]])
    problem = None
    for dialect in dialects:
        try:
            text = template.render(dialect)
        except UserError as error:
            problem = error if dialect is messages else problem
            continue
        if all(name in text for name in names):
            return text, dialect
    raise problem or UserError(CALLS_REMEDY)


def with_text_arguments(message):
    """A message with the arguments of its tool calls as JSON text."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments"))}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def trained_spans(template, text, messages, turns):
    """[(begin, end), ...]: the characters of `text` that the model must write in each of `turns`."""
    _, final_stop, inner_stop = template.plain_answer
    blocks, spans = template.blocks(messages), []
    for turn in turns:
        closing = template.specials_at_end(text[slice(*blocks[turn])]) if blocks else []
        if closing:  # the block says where the turn ends, too
            stop, (begin, end) = closing[-1], blocks[turn]
            end = text.rindex(stop, begin, end) + len(stop)
        else:
            own = template.specials_at_end(template.render(messages[: turn + 1]))
            if final_stop in own:
                stop = final_stop if turn == len(messages) - 1 else inner_stop
            else:  # not as a plain answer: Llama ends some tool calls with <|eom_id|>, gpt-oss with <|call|>
                stop = own[-1] if own else None
            if stop is None:
                raise UserError(
                    "the chat template does not end an assistant turn with a special token: no model could "
                    "learn to stop; put eos_token after the assistant's content by --chat-template"
                )
            begin = blocks[turn][0] if blocks else locate_turn(template, text, messages, turn, stop)
            end = text.find(stop, begin) + len(stop)
        if stop in json.dumps(messages[turn], ensure_ascii=False, default=str):
            raise UserError(
                f"the assistant's message {turn} contains {stop}, which the template adds; remove it"
            )
        earliest, latest = spans[-1][1] if spans else 0, end_of_next(template, text, messages, turn)
        if not earliest <= begin < end <= latest:
            raise UserError(f"the turn of message {turn} cannot be told from the rest; {TEMPLATE_REMEDY}")
        if not all(name in text[begin:end] for name in called_functions([messages[turn]])):
            raise UserError(CALLS_REMEDY)
        if messages[turn].get("tool_calls") and messages[turn]["content"]:  # Gemma 4 puts the words elsewhere
            other = {**messages[turn], "content": messages[turn]["content"] + unlike("")}
            changed = template.render([*messages[:turn], other, *messages[turn + 1 :]])
            if not begin <= len(os.path.commonprefix([text, changed])) < end:
                raise UserError(
                    f"the template parts the words of message {turn} from its tool calls; {TEMPLATE_REMEDY}"
                )
        spans.append((begin, end))
    return spans


def locate_turn(template, text, messages, turn, stop):
    """The character of `text` at which the model begins to write message `turn`, which `stop` ends."""
    try:
        earlier = template.render(messages[:turn])
        prompt = template.render(messages[:turn], generation_prompt=True)
    except UserError:  # some templates refuse to stop there, or to begin with the assistant
        earlier = prompt = ""
    # Case 1: the conversation before the turn, with its generation prompt, begins the text.
    if prompt and text.startswith(prompt):
        return len(prompt)
    # Case 2: the generation prompt opens a thinking block that this turn lacks. What the two share is no part
    # of the turn, back to the last whole line or token: <think> and <tool_call> share two characters.
    if prompt and text.startswith(earlier) and prompt.startswith(earlier):
        shared = re.match(rf"(?s).*(?:\n|{template.special})|", os.path.commonprefix([text, prompt]))
        return max(len(earlier), shared.end())
    # Case 3: the text before the turn depends on what follows it: Qwen3 strips the thinking of earlier turns.
    # With other words in the turn, the text first changes at the turn's first word.
    words = ("content", "reasoning_content", "thinking")
    words = {key: unlike(messages[turn][key]) for key in words if messages[turn].get(key)}
    if not messages[turn]["content"]:
        first, *rest = messages[turn]["tool_calls"]
        function = {**first["function"], "name": unlike(first["function"]["name"])}
        words["tool_calls"] = [{**first, "function": function}, *rest]
    changed = template.render([*messages[:turn], {**messages[turn], **words}, *messages[turn + 1 :]])
    before, after = os.path.commonprefix([text, changed]), changed.rpartition(PROBE)[2]
    if PROBE in changed[len(before) :] and text.endswith(after):
        header, _, _ = template.plain_answer
        begin = before.rfind(header)
        if header and begin >= 0 and stop not in before[begin:]:
            return begin + len(header)  # the turn's own: what stands between it and the words is written, too
        # No header tells where the turn begins: what the prompt has after the message before it does.
        said = messages[turn - 1]["content"].strip() if turn else ""
        closing = prompt.rpartition(said)[2] if said and prompt else ""
        if closing and (end := before.rfind(said + closing)) >= 0 and stop not in before[end:]:
            return end + len(said + closing)
        if "tool_calls" not in words:
            return len(before)
    raise UserError(f"the turn of message {turn} cannot be told from the rest; {TEMPLATE_REMEDY}")


def end_of_next(template, text, messages, turn):
    """A character of `text` beyond which message `turn` cannot reach: where the content of the next ends."""
    if turn + 1 == len(messages) or not messages[turn + 1].get("content"):
        return len(text)
    following = messages[turn + 1]
    following = {**following, "content": following["content"] + unlike("")}
    try:
        changed = template.render([*messages[: turn + 1], following, *messages[turn + 2 :]])
    except UserError:
        return len(text)
    return len(os.path.commonprefix([text, changed]))


def unlike(text):
    """A text with another first character, which holds PROBE."""
    return ("Q" if text.lstrip().startswith("Z") else "Z") + PROBE


def called_functions(messages):
    return [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]


@functools.lru_cache
def special_tokens(tokenizer):
    """Text -> id of the control tokens, those included that the tokenizer does not name as bos, eos and so
    on."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {
        token: tokenizer.convert_tokens_to_ids(token) for token in added | {*tokenizer.all_special_tokens}
    }


@functools.lru_cache
def adds_bos(tokenizer):
    """Whether this tokenizer begins plain text with its BOS token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def encode_text(tokenizer, prompt, completion):
    """Tokenize plain text once, as prompt + completion + EOS -> ids, mask of the completion with its EOS."""
    eos, bos = tokenizer.eos_token, tokenizer.bos_token_id
    if eos is None:
        raise UserError(
            "the tokenizer has no EOS token, so that a model could not learn to stop; set its eos_token"
        )
    stripped = completion.rstrip()
    text = prompt + (stripped if stripped.endswith(eos) else completion + eos)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = encoding["input_ids"], [end > len(prompt) for _, end in encoding["offset_mapping"]]
    return ([bos, *ids], [False, *mask]) if adds_bos(tokenizer) and ids[0] != bos else (ids, mask)


# What a row may hold: the column that says its kind -> the columns that are used with it.
SFT_KINDS = {
    "input_ids": ("input_ids", "labels"),
    "messages": ("messages", "tools", "chat_template_kwargs"),
    "conversations": ("conversations", "tools", "chat_template_kwargs"),
    "prompt messages": ("prompt", "completion", "tools", "chat_template_kwargs"),
    "prompt": ("prompt", "completion"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
SFT_FEATURES = Features(
    input_ids=List(Value("int32")),
    loss_mask=List(Value("bool")),
    length=Value("int64"),
    num_targets=Value("int64"),
    stop_id=Value("int64"),
    dropped=Value("string"),
    unused=Value("string"),
)


def encode_sft(row, tokenizer, loss_on="auto", max_length=1024, overflow="drop", vocab_size=None):
    """One row -> SFT_FEATURES.

    loss_mask[t] marks ids[t] as a token to learn; the first of a row follows nothing and is never one.
    num_targets counts them; stop_id is the special one that ends them, blanks after it aside, or -1. dropped:
    why the row is not used, or "". unused: its columns that are not. What is trained, by loss_on: auto is the
    completion, else the assistant's turns, else (plain text) all. Raises UserError for a row that is not what
    its columns promise.
    """
    refuse_images(row)
    kind = next((column for column in SFT_KINDS if row.get(column) is not None), None)
    if kind in ("prompt", "completion") and isinstance(row.get("prompt"), list):
        kind = "prompt messages"
    if kind is None:
        columns = ", ".join(column for column in SFT_KINDS if " " not in column)
        raise UserError(f"the row has the columns {sorted(row)}; it needs one of {columns} that is not empty")
    choices = {
        "input_ids": () if row.get("labels") is not None else ("all",),
        "messages": ("assistant", "last-assistant", "all"),
        "conversations": ("assistant", "last-assistant", "all"),
        "prompt messages": ("completion", "assistant", "last-assistant", "all"),
        "prompt": ("completion", "all"),
        "completion": ("completion", "all"),
        "text": ("all",),
    }[kind]
    if loss_on not in (allowed := ("auto", *choices)):
        raise UserError(f"--loss-on {loss_on} does not apply to this kind of row; use {' or '.join(allowed)}")

    match kind:
        case "input_ids":
            ids, mask = check_tokenized(row)
        case "messages" | "conversations":
            ids, mask = encode_chat(tokenizer, row, [], read_messages(row, kind), loss_on)
        case "prompt messages":
            prompt, completion = read_messages(row, "prompt"), read_messages(row, "completion")
            ids, mask = encode_chat(tokenizer, row, prompt, completion, loss_on)
        case "prompt" | "completion":
            prompt, completion = check_text(row, "prompt", empty=True), check_text(row, "completion")
            ids, mask = encode_text(tokenizer, prompt, completion)
        case "text":
            ids, mask = encode_text(tokenizer, "", check_text(row, "text"))
    mask = [True] * len(ids) if loss_on == "all" else mask
    check_ids(ids, vocab_size)

    dropped = ""
    if len(ids) > max_length and overflow == "error":
        raise UserError(f"the row has {len(ids)} tokens, more than --max-length {max_length}; raise it")
    if len(ids) > max_length and overflow == "drop":
        dropped = f"longer than --max-length {max_length}"
    elif not any(mask[1:max_length]):
        dropped = f"nothing to train{f' within --max-length {max_length}' if any(mask[1:]) else ''}"
    length, cut = (0 if dropped else min(len(ids), max_length)), len(ids) > max_length
    ids, mask = ids[:length], [False, *mask[1:]][:length]
    return {
        "input_ids": ids,
        "loss_mask": mask,
        "length": length,
        "num_targets": sum(mask),
        "stop_id": -1 if cut else stop_of(tokenizer, ids, mask),
        "dropped": dropped,
        "unused": unused_columns(row, SFT_KINDS[kind]),
    }


def refuse_images(row):
    if row.get("image") or row.get("images"):
        raise UserError("the row has images, which are not supported; use text-only rows and drop the column")


def stop_of(tokenizer, ids, mask):
    """The special token that ends what is trained, blanks after it aside, or -1."""
    trained = (token for token, is_target in zip(ids[::-1], mask[::-1], strict=True) if is_target)
    stop_id = next((token for token in trained if tokenizer.decode([token]).strip()), -1)
    return stop_id if stop_id in special_tokens(tokenizer).values() else -1


def unused_columns(row, used):
    """The names of a row's columns that hold something and are not used."""
    return ", ".join(sorted(name or "''" for name in row if row[name] and name not in used))


def read_messages(row, column):
    """A row's messages, also as JSON text, checked."""
    messages = row.get(column)
    return check_messages(
        read_json_column(row, column, list) if isinstance(messages, str) else messages, column
    )


def encode_chat(tokenizer, row, prompt, messages, loss_on):
    """Checked messages that follow those of a prompt, with the row's tools and arguments -> ids, mask.

    A message of weight 0 is not trained, as in OpenAI's and Mistral's formats.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the row holds messages, but the tokenizer has no chat template; give one by --chat-template"
        )
    first = 0 if loss_on in ("assistant", "last-assistant") else len(prompt)
    messages = prompt + messages
    turns = [
        i
        for i in range(first, len(messages))
        if messages[i]["role"] == "assistant" and messages[i].get("weight") != 0
    ]
    turns = {"all": None, "last-assistant": turns[-1:]}.get(loss_on, turns)
    tools = read_json_column(row, "tools", list)
    arguments = read_json_column(row, "chat_template_kwargs", dict)
    if taken := {"chat_template", "tools", "tokenize", "add_generation_prompt"} & (arguments or {}).keys():
        raise UserError(f"`chat_template_kwargs` may not hold {', '.join(sorted(taken))}; remove it")
    return encode_messages(tokenizer, messages, turns, tools, arguments)


def check_text(row, column, empty=False):
    """The text of a column; UserError if it holds something else."""
    if not isinstance(row.get(column), str) or not (row[column] or empty):
        raise UserError(f"`{column}` is {excerpt(row.get(column))}, not {'' if empty else 'non-empty '}text")
    return row[column]


def check_ids(ids, vocab_size):
    """UserError for ids that the model does not know: a tokenizer may have more."""
    if vocab_size and ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(
            f"the row has ids from {min(ids)} to {max(ids)}, but the model's vocabulary is {vocab_size}; "
            "resize its embeddings, or use its own tokenizer"
        )


def check_tokenized(row):
    """`input_ids` and, if there are any, `labels` (the same ids, or -100: not trained) -> ids, mask."""
    ids = read_json_column(row, "input_ids", list)
    labels = ids if row.get("labels") is None else read_json_column(row, "labels", list) or []
    if masks := [name for name in ("completion_mask", "assistant_masks") if row.get(name)]:
        raise UserError(f"`{masks[0]}` is not used; say what is trained in `labels`, -100 where nothing is")
    if not ids or not all(type(token) is int for token in [*ids, *labels]):
        raise UserError("`input_ids` and `labels` must be non-empty lists of integers")
    pairs = zip(ids, labels, strict=False)
    if len(labels) != len(ids) or any(label not in (token, IGNORE) for token, label in pairs):
        raise UserError("`labels` must repeat `input_ids`, unshifted, with -100 where nothing is trained")
    return ids, [label != IGNORE for label in labels]


# ---- Preferences -------------------------------------------------------------------------------------------

PREFERENCE_FEATURES = Features(
    input_ids=List(Value("int32")),
    loss_mask=List(Value("bool")),
    lengths=List(Value("int64")),
    prompt_length=Value("int64"),
    targets=List(Value("int64")),
    keys=List(Value("string")),
    near_tie=Value("bool"),
    length=Value("int64"),
    num_targets=Value("int64"),
    stop_id=Value("int64"),
    dropped=Value("string"),
    unused=Value("string"),
)
RANKING_FEATURES = Features(
    **PREFERENCE_FEATURES, ranks=List(Value("float64")), margin=Value("float64"), probability=Value("float64")
)


def encode_preference(row, tokenizer, max_length=1024, overflow="drop", vocab_size=None):
    """A row with `chosen` and `rejected` -> PREFERENCE_FEATURES.

    input_ids and loss_mask hold the documents one after the other, the chosen one first; lengths and targets
    count the tokens of each and those to learn, keys are hashes of them. The first prompt_length tokens, not
    marked, are the same in all. near_tie: they were cut, and less than a tenth of what is left of
    two completions differs. The rest is as in encode_sft. Raises UserError for a row that is not what its
    columns promise.
    """
    sides = {name: row.get(name) for name in ("chosen", "rejected")}
    return encode_sides(row, tokenizer, sides, max_length, overflow, vocab_size, ("chosen", "rejected"))


def encode_ranking(row, tokenizer, max_length=1024, overflow="drop", vocab_size=None):
    """A row as for encode_preference, or with `completions` and their `ranks` (1 is best) or `scores` (the
    highest is best) -> RANKING_FEATURES.

    The same for any number of documents, the best first. ranks: the place of each, from 0; those that tie
    have the same. margin: by how much the first of two should score above the second, 0 without such a
    column. probability: that the first of two wins, -1 without. It is chosen, but where the row gives it less
    than a half: then the sides change places and the margin its sign, which says the same.
    """
    margin, probability = row.get("margin"), row.get("probability")
    if row.get("completions") is None:
        if margin is not None and not is_number(margin):
            raise UserError(f"`margin` is {excerpt(margin)}, not a finite number")
        if probability is not None and not (is_number(probability) and 0 <= probability <= 1):
            raise UserError(f"`probability` is {excerpt(probability)}, not a number from 0 to 1")
        ranks, sides = [0.0, 1.0], {name: row.get(name) for name in ("chosen", "rejected")}
        used, tied = ("chosen", "rejected", "margin", "probability"), False
        if probability is not None and probability < 0.5:
            sides, margin, probability = dict(reversed(sides.items())), -(margin or 0.0), 1 - probability
    else:
        completions = read_json_column(row, "completions", list) or []
        ranks, scores = (read_json_column(row, name, list) or [] for name in ("ranks", "scores"))
        if len(completions) < 2 or len(ranks or scores) != len(completions):
            raise UserError(
                f"the row has {len(completions)} completions and {len(ranks or scores)} ranks or scores; it "
                "needs two or more, and one for each"
            )
        if ranks and scores:
            raise UserError("the row has `ranks` and `scores`; leave one of them out")
        if not all(map(is_number, ranks or scores)) or margin is not None or probability is not None:
            raise UserError("`ranks` or `scores` must be finite numbers, without `margin` and `probability`")
        ranks = ranks or [-score for score in scores]
        places = sorted(range(len(ranks)), key=ranks.__getitem__)
        sides = {f"completions[{place}]": completions[place] for place in places}
        levels = sorted(set(ranks))  # the loss needs no more than places, and float32 would round numbers
        ranks = [float(levels.index(ranks[place])) for place in places]
        used, tied = ("completions", "ranks", "scores"), ranks[0] == ranks[-1]
        margin, probability = 0.0, None
    reason = "all completions tie" if tied else ""
    encoded = encode_sides(row, tokenizer, sides, max_length, overflow, vocab_size, used, reason)
    encoded |= {"ranks": ranks[: len(encoded["lengths"])], "margin": float(margin or 0.0)}
    return encoded | {"probability": -1.0 if probability is None else float(probability)}


def is_number(value):
    """Whether it is one that float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38


def encode_sides(row, tokenizer, sides, max_length, overflow, vocab_size, used, dropped=""):
    """Completions of one prompt, column -> text or messages -> what encode_preference says."""
    refuse_images(row)
    for name, side in sides.items():
        if not isinstance(side, (str, list)):
            raise UserError(f"`{name}` is {excerpt(side)}, neither text nor a list of messages")
    documents, cut = [], False
    if any(map(is_empty, sides.values())):
        dropped = "an empty side"
    if not dropped:
        whole = tokenize_sides(row, tokenizer, sides)
        check_ids([token for ids, _ in whole for token in ids], vocab_size)
        documents, dropped = fit_sides(whole, max_length, overflow)
        cut = documents != whole
    keys = [hashlib.blake2b(repr(ids).encode(), digest_size=8).hexdigest() for ids, _ in documents]
    if len(set(keys)) < len(keys):
        documents, keys = [], []
        dropped = "identical sides" + (f" within --max-length {max_length}" if cut else "")
    near_tie = False
    for (ids, mask), (others, _) in itertools.pairwise(documents) if cut else ():
        differing = sum(a != b for a, b in zip(ids, others, strict=True))
        near_tie |= differing < 0.1 * (len(ids) - mask.index(True))
    is_text = all(isinstance(side, str) for side in sides.values()) and not isinstance(
        row.get("prompt"), list
    )
    used = ("prompt", *used, *(() if is_text else ("tools", "chat_template_kwargs")))
    return {
        "input_ids": [token for ids, _ in documents for token in ids],
        "loss_mask": [is_target for _, mask in documents for is_target in mask],
        "lengths": [len(ids) for ids, _ in documents],
        "prompt_length": len(os.path.commonprefix([ids[: mask.index(True)] for ids, mask in documents])),
        "targets": [sum(mask) for _, mask in documents],
        "keys": keys,
        "near_tie": near_tie,
        "length": sum(len(ids) for ids, _ in documents),
        "num_targets": sum(sum(mask) for _, mask in documents),
        "stop_id": stop_of(tokenizer, *documents[0]) if documents and not cut else -1,
        "dropped": dropped,
        "unused": unused_columns(row, used),
    }


def is_empty(side):
    """Whether a completion says nothing: blank text, no messages, or a last one without content and calls."""
    if isinstance(side, str):
        return not side.strip()
    last = side[-1] if side and isinstance(side[-1], dict) else {}
    says = last.get("content") or last.get("value") or ""
    return not side or (bool(last) and not str(says).strip() and not last.get("tool_calls"))


def tokenize_sides(row, tokenizer, sides):
    """Completions of one prompt -> [(ids, mask), ...], the ids before what is marked the same in all.

    sides: column -> text or messages. The prompt is the row's (text or messages, which the sides may repeat),
    else what the sides share at their beginning. Where a token of one side spans the end of the prompt, or
    the prompt's text has other tokens before one side, the completions of all begin where they part.
    """
    prompt, texts = row.get("prompt"), [side for side in sides.values() if isinstance(side, str)]
    if texts and len(texts) < len(sides):
        raise UserError(f"{' and '.join(f'`{name}`' for name in sides)} must be all text or all messages")
    if texts and not isinstance(prompt, list):
        text = check_text(row, "prompt", empty=True) if prompt is not None else ""
        documents = [encode_text(tokenizer, text, side) for side in sides.values()]
        ends = [len(ids) - 1 if prompt is None else mask.index(True) for ids, mask in documents]
        shared = min(len(os.path.commonprefix([ids for ids, _ in documents])), *ends)
        documents = [(ids, [t >= shared for t in range(len(ids))]) for ids, _ in documents]
    else:
        prompt, *sides = split_prompt(prompt, sides)
        documents = [encode_chat(tokenizer, row, prompt, side, "completion") for side in sides]
    if not all(any(mask) for _, mask in documents):
        raise UserError("a side has no assistant turn to learn from; end it with one")
    begin = min(mask.index(True) for _, mask in documents)
    if any(ids[:begin] != documents[0][0][:begin] for ids, _ in documents):
        raise UserError(
            "the chat template renders the prompt in another way before each side; give one that does not "
            "look ahead by --chat-template"
        )
    begin = max(begin, 1)  # the first token of all follows nothing
    return [
        (ids, [t >= begin and (trained or t < mask.index(True)) for t, trained in enumerate(mask)])
        for ids, mask in documents
    ]


def split_prompt(prompt, sides):
    """A prompt (messages, the text of a user's message, or None) and sides -> the prompt and sides as checked
    messages."""
    sides = [
        [{"role": "assistant", "content": side}] if isinstance(side, str) else check_messages(side, name)
        for name, side in sides.items()
    ]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is not None:
        prompt = check_messages(prompt, "prompt")
        if all(side[: len(prompt)] == prompt for side in sides):
            sides = [side[len(prompt) :] for side in sides]
        elif begins := [side[0]["role"] for side in sides if side and follows_oddly(side[0], prompt[-1])]:
            raise UserError(
                f"a side begins with a {begins[0]} message, but not all sides repeat `prompt`: give it the "
                "messages that they share, or leave that column out"
            )
    else:
        alike = [all(message == some[0] for message in some) for some in zip(*sides, strict=False)]
        shared = min([*alike, False].index(False), *(len(side) - 1 for side in sides))
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    if not prompt or not all(sides):
        raise UserError("the sides share no prompt that they follow; give it in a column `prompt`")
    return prompt, *sides


def follows_oddly(message, last):
    """Whether no answer to a prompt that ends with `last` begins with this message."""
    return message["role"] in ("system", "developer") or message["role"] == last["role"] == "user"


def fit_sides(documents, max_length, overflow):
    """Documents of one prompt -> those within max_length, each completion cut or none is; and why they are
    dropped, or ""."""
    lengths = [len(ids) for ids, _ in documents]
    if max(lengths) <= max_length:
        return documents, ""
    if overflow == "error":
        raise UserError(f"a side has {max(lengths)} tokens, more than --max-length {max_length}; raise it")
    if overflow == "drop":
        return [], f"longer than --max-length {max_length}"
    if min(lengths) <= max_length:
        return [], f"only one side longer than --max-length {max_length}"
    if not all(any(mask[1:max_length]) for _, mask in documents):
        return [], f"nothing to train within --max-length {max_length}"
    return [(ids[:max_length], mask[:max_length]) for ids, mask in documents], ""


def check_pairs(data, contradictions):
    """Look for what no row shows alone -> the pairs to train, and a line for the report.

    Contradictory are pairs of which another row holds the reverse; by `contradictions`, all of them are kept
    and named ("warn"), removed ("drop"), or a UserError.
    """
    places = {}
    for index, (keys, row, source) in enumerate(zip(data["keys"], data["row"], data["source"], strict=True)):
        places.setdefault(tuple(keys), {}).setdefault((source, row), []).append(index)
    reverse = {keys: found for keys, found in places.items() if keys[::-1] in places}
    duplicates = sum(len(found) - 1 for found in places.values())
    named = sorted(place for found in reverse.values() for place in found)
    listed = "; ".join(f"row {row} of {source}" for source, row in named[:8])
    if named and contradictions == "error":
        raise UserError(
            f"{len(named)} pairs contradict others, which prefer the reverse: {listed}; remove them, or use "
            "--contradictions drop"
        )
    longer = np.mean([lengths[0] > lengths[-1] for lengths in data["lengths"]])
    line = f"{duplicates} duplicated, {sum(data['near_tie'])} near-ties after cutting, "
    line += f"{len(named)} contradictory" + (f" ({listed})" if named else "")
    if named and contradictions == "drop":
        removed = {index for found in reverse.values() for indices in found.values() for index in indices}
        data = data.select([index for index in range(len(data)) if index not in removed])
        line += ", removed"
        if not len(data):
            raise UserError(f"no pair is left: all {len(named)} contradict others; mend the data")
    return data, f"{line}; the chosen side is longer in {longer:.0%}"


# ---- Preparing a dataset -----------------------------------------------------------------------------------

PREPARE_DEADLINE_H = 12


def prepare_data(sources, encode, features, config=None, split="train", seed=0):
    """Tokenize the rows of some datasets in parallel, cached by `datasets` under an explicit fingerprint.

    sources: what --dataset holds. encode: a functools.partial, row -> `features`, "dropped" and "unused" of
    them; its arguments are part of the fingerprint.
    Returns the rows to train, with those columns, `source`, `row` and `digest` (a hash of what was encoded);
    and a report, a dict of counts. Call it before init_process_group: one process of a machine works while
    the others wait for its lock. Raises UserError that names the first bad rows.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "post-training"
    features = Features(
        {**features, **dict.fromkeys(("error", "digest"), Value("string")), "row": Value("int64")}
    )
    parts, report = [], {"rows": 0, "dropped": Counter(), "unused": set()}
    for number, (path, weight) in enumerate(map(parse_source, sources)):
        name = hashlib.sha256(path.encode()).hexdigest()[:16]
        with wait_for_lock(cache / f"{name}.lock", f"tokenize {path}"):
            rows = without_decoding(read_rows(path, config, split))
            if not len(rows):
                raise UserError(f"dataset {path} has no rows")
            key = fingerprint(rows, encode)
            encoded = rows.map(
                functools.partial(
                    encode_row, encode=encode, names=list(features), is_text=rows.features == TEXT_FEATURES
                ),
                with_indices=True,
                remove_columns=rows.column_names,
                features=features,
                num_proc=min(os.cpu_count(), 1 + len(rows) // 2000) if len(rows) > 2000 else None,
                new_fingerprint=key,
                cache_file_name=str(cache / f"{key}.arrow"),
                desc=f"Tokenizing {path}",
            )
        bad = [(row, error) for row, error in zip(encoded["row"], encoded["error"], strict=True) if error]
        if bad:
            lines = "\n".join(f"  row {row}: {error}" for row, error in bad[:5])
            raise UserError(
                f"dataset {path}: {len(bad)} of {len(rows)} rows cannot be used (the first is 1):\n{lines}"
            )
        dropped = encoded["dropped"]
        report["rows"] += len(encoded)
        report["dropped"] += Counter(reason for reason in dropped if reason)
        report["unused"] |= {name for names in encoded.unique("unused") for name in names.split(", ") if name}
        kept = [index for index, reason in enumerate(dropped) if not reason]
        share = round(len(kept) * (weight % 1))
        if kept and not share and weight < 1:
            raise UserError(f"--dataset {path}:{weight} takes none of its {len(kept)} rows; raise the weight")
        extra = random.Random(f"{seed}:{number}").sample(kept, share)
        part = encoded.remove_columns(["dropped", "error", "unused"])
        part = part.select(kept * int(weight) + sorted(extra))  # each row as often as the weight is whole
        if len(part):
            parts.append(part.add_column("source", [path] * len(part)))
    if not parts:
        dropped = dict(report["dropped"])
        raise UserError(f"no row is left to train of {report['rows']} in {', '.join(sources)}: {dropped}")
    return datasets.concatenate_datasets(parts), report


def encode_row(row, index, encode, names, is_text):
    number = row["row"] if is_text else index + 1
    try:
        encoded = encode(parse_row(row["json"]) if is_text else drop_none(row))
    except UserError as error:
        return {**dict.fromkeys(names), "error": str(error), "row": number}
    except Exception as error:
        error.add_note(f"in row {number}")
        raise
    digest = hashlib.blake2b(repr(encoded).encode(), digest_size=8).hexdigest()
    return {**encoded, "error": "", "digest": digest, "row": number}


def fingerprint(rows, encode):
    """Of what tokenized rows depend on: rows, tokenizer and template, the encoder's arguments, the code."""
    given = dict(encode.keywords)
    tokenizer = given.pop("tokenizer")
    parts = [rows._fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]
    parts += [
        tokenizer.chat_template,
        given,
        encode.func.__name__,
        Path(__file__).read_text(encoding="utf-8"),
    ]
    parts += [transformers.__version__, tokenizers.__version__]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def wait_for_lock(path, purpose):
    """Acquire a file lock, saying every 30 s what is waited for; the holder's death frees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    for waited in range(0, PREPARE_DEADLINE_H * 3600, 30):
        try:
            return lock.acquire(timeout=30)
        except Timeout:
            print(f"waiting for another process to {purpose} ({waited + 30} s; lock {path})", flush=True)
    raise UserError(f"waited {PREPARE_DEADLINE_H} h for another process to {purpose}; is it alive? ({path})")


def mark_trained(tokenizer, ids, mask):
    """One example as text, what is trained between [[ and ]]."""
    text = ""
    for trained, run in itertools.groupby(zip(map(bool, mask), ids, strict=True), key=operator.itemgetter(0)):
        piece = tokenizer.decode([token for _, token in run])
        text += f"[[{piece}]]" if trained else piece
    return text


# ---- Packing -----------------------------------------------------------------------------------------------


def split_batch(lengths, world_size, budget, alone=False):
    """Cut a step's documents into micro-batches: plan[rank][micro-batch] -> indices into `lengths`.

    Every rank has the same number of micro-batches (some may be empty), none above `budget` tokens, all about
    as long: the longest document first into the shortest micro-batch (LPT), with as few as fit. `alone` gives
    each its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    assert lengths[order[0]] <= budget, "checked before training"
    count = -(-len(lengths) // world_size) if alone else -(-sum(lengths) // (budget * world_size))
    while True:
        heap = [(0, bin) for bin in range(count * world_size)]
        bins = [[] for _ in heap]
        for index in order:
            load, bin = heapq.heappop(heap)
            bins[bin].append(index)
            heapq.heappush(heap, (load + lengths[index], bin))
        if max(heap)[0] <= budget and not (alone and max(map(len, bins)) > 1):
            return [bins[rank::world_size] for rank in range(world_size)]
        count += 1 + count // 64  # one more; faster where there are many, as for a whole evaluation set


@dataclass
class MicroBatch:
    """Documents in one row. `inputs` are the model's arguments; `positions_N`, `labels_N` the positions that
    predict trained tokens, and those tokens; `documents_N` the document (counted from 0) that each belongs
    to; `last_B` the position of each document's last token."""

    inputs: dict
    positions_N: torch.Tensor
    labels_N: torch.Tensor
    documents_N: torch.Tensor
    last_B: torch.Tensor
    num_tokens: int


def collate(documents, device="cpu", share_prompts=False):
    """[(ids, loss mask), ...] -> MicroBatch. No documents: one that trains nothing, so that every rank runs a
    forward.

    share_prompts: the prompt of a document, what is before its first trained token, stands in the row once if
    the document before it begins with it, too; both attend to it. Their hidden states are what they are
    alone: every token sees its own document from the beginning.
    """
    is_empty, documents = not documents, documents or [(np.zeros(2, np.int64), np.zeros(2, bool))]
    # S counts the tokens of all documents; T those of the row, where shared ones stand once.
    lengths, heads = [len(ids) for ids, _ in documents], list(range(len(documents)))
    shared_B = np.zeros(len(documents), np.int64)
    for number in range(1, len(documents) if share_prompts else 0):
        (ids, mask), head = documents[number], heads[number - 1]
        prompt = ids[: np.argmax(mask)]
        if len(prompt) and np.array_equal(prompt, documents[head][0][: len(prompt)]):
            heads[number], shared_B[number] = head, len(prompt)
    ids_S = np.concatenate([ids for ids, _ in documents]).astype(np.int64)
    mask_S = np.concatenate([mask for _, mask in documents]).astype(bool)
    starts_B = np.cumsum(lengths) - lengths
    documents_S = np.repeat(np.arange(len(documents)), lengths)
    places_S = np.arange(len(ids_S)) - starts_B[documents_S]
    own_S = places_S >= shared_B[documents_S]
    row_S = np.cumsum(own_S) - 1  # where a token of the documents is in the row
    row_S = np.where(own_S, row_S, row_S[starts_B[heads][documents_S] + places_S])
    mask_S[starts_B] = False  # the first token of a document is predicted by nothing
    targets_N = mask_S.nonzero()[0]
    on_cpu = torch.device(device).type == "cpu"

    def to_device(array):
        tensor = torch.from_numpy(array)
        return tensor if on_cpu else tensor.pin_memory().to(device, non_blocking=True)

    groups = group_documents(lengths, shared_B, row_S) if on_cpu else None
    if not on_cpu and shared_B.any():
        groups = to_device(row_S), to_device(own_S.nonzero()[0])
    cu_seqlens = to_device(np.append(starts_B, len(ids_S)).astype(np.int32))
    return MicroBatch(
        inputs={
            "input_ids": to_device(ids_S[own_S])[None],
            "position_ids": to_device(places_S[own_S])[None],
            "attention_mask": None,
            "use_cache": False,
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "groups": groups,
        },
        positions_N=to_device(row_S[targets_N - 1]),
        labels_N=to_device(ids_S[targets_N]),
        documents_N=to_device(documents_S[targets_N]),
        last_B=to_device(row_S[starts_B + lengths - 1]),
        num_tokens=0 if is_empty else int(own_S.sum()),
    )


# ---- Attention that keeps packed documents apart -----------------------------------------------------------

LONG_DOCUMENT = 256  # tokens from which a document's attention is one call of its own on CPU


def group_documents(lengths, shared_B, row_S):
    """Documents of similar length, to be attended in one batched call each on CPU (many tiny calls are slow).

    shared_B: how many tokens at a document's beginning are those of one before it. row_S: as in `collate`.
    Returns [((n, L) positions in the row, each document padded at its end by its last token; how many of
    them are shared, which are attended to and do not attend again), ...], and for each position of the row
    its place in the flattened outputs of all groups. Causality keeps padding at the end from being seen.
    """
    ends, groups, order = np.cumsum(lengths), [], sorted(range(len(lengths)), key=lambda b: -lengths[b])
    order = sorted(order, key=lambda b: shared_B[b])
    while order:
        shared, longest = shared_B[order[0]], lengths[order[0]]
        alike = [b for b in order if shared_B[b] == shared and lengths[b] >= 0.8 * longest]
        groups.append(alike if shared or longest < LONG_DOCUMENT else alike[:1])
        order = order[len(groups[-1]) :]
    rows, back_S, offset = [], np.full(ends[-1], -1), 0
    for group in groups:
        length, shared = lengths[group[0]], int(shared_B[group[0]])
        starts = np.array([ends[b] - lengths[b] for b in group])[:, None]
        last = np.array([ends[b] - 1 for b in group])[:, None]
        rows.append((torch.from_numpy(row_S[np.minimum(starts + np.arange(length), last)]), shared))
        for b in group:
            own = lengths[b] - shared
            back_S[ends[b] - own : ends[b]] = np.arange(offset, offset + own)
            offset += length - shared
    return rows, torch.from_numpy(back_S[back_S >= 0])


def varlen_attention(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    groups=None,
    kv_cache=None,
    **kwargs,
):
    """Causal attention within each document of a packed row: transformers' attention function "varlen".

    query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D), None. Without `cu_seq_lens_q`, as when
    transformers itself generates, it is transformers' SDPA; with a `kv_cache`, T are the next tokens of the
    sequences in it. Soft-capped scores and attention sinks are refused.
    """
    if softcap is not None or s_aux is not None:
        raise UserError(
            "this model soft-caps attention or uses sinks, which varlen lacks; use --attention eager"
        )
    query_THD, key_THD, value_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if kv_cache is not None and cu_seq_lens_q is None:
        out_THD = kv_cache.attend(module.layer_idx, query_THD, key_THD, value_THD, scaling, sliding_window)
        return out_THD[None], None
    if cu_seq_lens_q is None or attention_mask is not None:
        new, seen = query.shape[2], key.shape[2]
        window = sliding_window or seen
        if attention_mask is None and (
            1 < new < seen or seen > window
        ):  # SDPA's own causal mask is for new == seen
            last_Q1 = torch.arange(seen - new, seen, device=key.device)[:, None]
            position_K = torch.arange(seen, device=key.device)
            attention_mask = ((position_K <= last_Q1) & (position_K > last_Q1 - window))[None, None]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kv_cache is not None:
        kv_cache.fill(module.layer_idx, key_THD, value_THD)
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn  # CUDA only

        if groups:  # the documents share prompts: write each out
            qkv = query_THD, key_THD, value_THD
            query_THD, key_THD, value_THD = (tensor.index_select(0, groups[0]) for tensor in qkv)
        repeats = query.shape[1] // key.shape[1]
        key_THD, value_THD = (tensor.repeat_interleave(repeats, 1) for tensor in (key_THD, value_THD))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        qkv = (query_THD.contiguous(), key_THD, value_THD)
        out_THD = varlen_attn(*qkv, *bounds, scale=scaling, window_size=window)
        return (out_THD.index_select(0, groups[1]) if groups else out_THD)[None], None
    return grouped_attention(query_THD, key_THD, value_THD, scaling, sliding_window, *groups)[None], None


@torch.compiler.disable
def grouped_attention(query_THD, key_THD, value_THD, scaling, sliding_window, rows, back):
    """The CPU's varlen attention: one causal SDPA a group of documents. Shapes (T, H, D) and (T, H_kv, D)."""
    outputs, gqa = [], query_THD.shape[1] != key_THD.shape[1]
    for rows_GL, shared in rows:
        n, length = rows_GL.shape
        start = int(rows_GL[0, 0])
        if n == 1 and int(rows_GL[0, -1]) - start == length - 1:  # a slice of the row, without a copy
            qkv = [tensor[None, start : start + length] for tensor in (query_THD, key_THD, value_THD)]
        else:
            indices = rows_GL[:, shared:], rows_GL, rows_GL
            qkv = [
                tensor.index_select(0, index.flatten()).unflatten(0, (n, -1))
                for tensor, index in zip((query_THD, key_THD, value_THD), indices, strict=True)
            ]
        mask = None
        if shared or (sliding_window is not None and length > sliding_window):
            mask = torch.ones(length - shared, length, dtype=torch.bool).tril(shared)
            mask = mask if sliding_window is None else mask.triu(shared + 1 - sliding_window)
        out = F.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in qkv),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=gqa,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)


def varlen_mask(*args, attention_mask=None, **kwargs):
    """No mask tensor for packed rows: `varlen_attention` knows the documents. A padded batch gets SDPA's
    mask."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register("varlen", varlen_attention)
AttentionMaskInterface.register("varlen", varlen_mask)

# ============================================================================================================
# 2. Rewards
# ============================================================================================================

PROMPT_FEATURES = Features(
    input_ids=List(Value("int32")),
    length=Value("int64"),
    prompt=Value("string"),
    columns=Value("string"),
    dropped=Value("string"),
    unused=Value("string"),
)


def encode_prompt(row, tokenizer, max_length=1024, vocab_size=None, tools=None):
    """A row with a `prompt`, text or messages, -> PROMPT_FEATURES. tools: the schemas of an environment's.

    input_ids are the prompt's, with the header that opens an answer; prompt and columns (all others, for the
    rewards) are JSON text. dropped: why the row is not used, or "". Raises UserError for a row without a
    prompt or with one that ends in an answer.
    """
    refuse_images(row)
    if tools and (row.get("tools") or not isinstance(row.get("prompt"), list)):
        raise UserError("with --environment, `prompt` must be messages, and `tools` none but its methods")
    if isinstance(row.get("prompt"), list):
        prompt = read_messages(row, "prompt")
        if prompt[-1]["role"] == "assistant":
            raise UserError(
                "`prompt` ends with an assistant message; remove it: that is for the model to write"
            )
        if tokenizer.chat_template is None:
            raise UserError(
                "the row holds messages, but the tokenizer has no chat template; give one by --chat-template"
            )
        template = tools_template(tokenizer, tools or row.get("tools"), row.get("chat_template_kwargs"))
        text = template.render(prompt, generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt = check_text(row, "prompt")
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *ids] if adds_bos(tokenizer) else ids
    check_ids(ids, vocab_size)
    dropped = (
        f"longer than the {max_length} tokens that are left for a prompt" if len(ids) > max_length else ""
    )
    columns = {name: value for name, value in row.items() if name != "prompt"}
    return {
        "input_ids": ids,
        "length": len(ids),
        "prompt": json.dumps(prompt),
        "columns": json.dumps(columns),
        "dropped": dropped,
        "unused": "",
    }


DISTILLATION_FEATURES = Features(**SFT_FEATURES, prompt_ids=List(Value("int32")))


def encode_distillation(
    row,
    tokenizer,
    loss_on="auto",
    max_length=1024,
    overflow="drop",
    vocab_size=None,
    room=None,
    use_answer=True,
):
    """A row for encode_sft or encode_prompt -> DISTILLATION_FEATURES: encode_sft's, and prompt_ids, what
    stands before the answer at its end, if there is one, for a model to write another.

    room: most tokens of such a prompt; None where nobody writes: prompt_ids are []. use_answer: False where
    the row's own answer, which it need not have, is not used: input_ids are the prompt's, and stop_id is what
    the chat template ends answers with.
    """
    encoded, stop_id = {}, -1
    refuse_images(row)
    if use_answer:
        if row.get("prompt") and row.get("completion") is None:
            raise UserError("the row has a `prompt` without a `completion`; --lmbda 1 or --seq-kd need none")
        encoded = encode_sft(row, tokenizer, loss_on, max_length, overflow, vocab_size)
        if room is None or encoded["dropped"]:
            return {**encoded, "prompt_ids": []}
    kind = next((column for column in SFT_KINDS if row.get(column) is not None), None)
    prompt = row.get("prompt")
    if kind in ("messages", "conversations"):
        prompt = read_messages(row, kind)
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    if kind == "input_ids":
        ids, mask = check_tokenized(row)
        check_ids(ids, vocab_size)
        trained = np.flatnonzero(np.diff(mask, prepend=0) == 1) if row.get("labels") else [0]
        ids = ids[: trained[-1] if len(trained) else None]
        dropped = f"longer than the {room} tokens that are left for a prompt" if len(ids) > room else ""
    elif prompt:
        tools = read_json_column(row, "tools", list)
        arguments = read_json_column(row, "chat_template_kwargs", dict)
        asked = {"prompt": prompt, "tools": tools, "chat_template_kwargs": arguments}
        asked = encode_prompt(asked, tokenizer, room, vocab_size)
        ids, dropped = asked["input_ids"], asked["dropped"]
        if isinstance(prompt, list):
            _, stop, _ = tools_template(tokenizer, tools, arguments).plain_answer
            stop_id = special_tokens(tokenizer).get(stop, -1)
    else:
        ids, dropped = [], ""
    if not ids:
        dropped = "without a prompt that could be answered"
    if not use_answer:
        used = SFT_KINDS.get("prompt messages" if isinstance(row.get("prompt"), list) else kind, ())
        encoded = {"input_ids": ids, "loss_mask": [False] * len(ids), "length": len(ids), "num_targets": 0}
        encoded |= {"stop_id": stop_id, "unused": unused_columns(row, used)}
    return {**encoded, "prompt_ids": ids, "dropped": dropped}


# ---- Reward functions: (prompts, completions, completion_ids, **columns of the data) -> [float or None] ----


def text_of(completion):
    """What was said: a completion is text, or messages whose last one counts."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def golds_of(completions, answer, solution):
    """The right answer to each: the column `answer`, else `solution`, else None."""
    nothing = [None] * len(completions)
    pairs = zip(completions, answer or nothing, solution or nothing, strict=True)
    return [second if first is None else first for _, first, second in pairs]


def accuracy(completions, answer=None, solution=None, percent=None, **_):
    """1 where the completion's final answer equals the column `answer` or `solution`, else 0; None where the
    row has neither. Where the column `percent` is true, 42% is also 42 and 0.42."""
    golds, percent = golds_of(completions, answer, solution), percent or [False] * len(completions)
    return [
        None if gold is None else float(answers_agree(text_of(said), str(gold), flag is True))
        for said, gold, flag in zip(completions, golds, percent, strict=True)
    ]


def choice(completions, answer=None, solution=None, **_):
    """1 where the last letter from A to E that the completion states is the row's answer, else 0."""
    letters = [final_choice(text_of(said)) for said in completions]
    return [
        None if gold is None else float(letter != "" and letter == final_choice(str(gold)))
        for letter, gold in zip(letters, golds_of(completions, answer, solution), strict=True)
    ]


def think_format(completions, **_):
    """1 where all begins with one <think> block that is followed by an answer, else 0 (arXiv:2501.12948
    section 2.2.2)."""
    pattern = re.compile(r"<think>(?!.*<think>).*?</think>\s*\S", re.DOTALL)
    return [float(bool(pattern.match(text_of(said)))) for said in completions]


REWARDS = {"accuracy": accuracy, "choice": choice, "format": think_format}


# ---- What is the answer, and is it right? ------------------------------------------------------------------

ANSWER = re.compile(r"(?is).*\banswer\b[^.:=\n]{0,40}?(?:\bis\b|[:=])[\s:=*]*(.+?)(?:\.(?=[\s*]|$)|\n|$)")
# Around it: \u20ac is the euro, \u00a3 the pound, \u00b0 the degree.
EDGES = re.compile(
    r"^(?:\s|\*\*|\\?\$|\\[(\[]|[\u20ac\u00a3])+|(?:\s|\*\*|\\?\$|\\[)\]]|[.\u20ac\u00a3\u00b0])+$"
)
# After a number; math-verify drops some units, but no currencies and no squares.
UNIT = re.compile(
    r"(?<=[\d}$])(?:[\s~]|\\ )*(?:dollars?|euros?|USD|EUR|[kcm]?m/[hs]|(?:[kcdm]?m|in|ft)\s*\^\s*\{?[23]\}?)$"
)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3}|/\d+)?", re.IGNORECASE)
# Left to do: 12 + 30, (12)(30), 12 30; with the signs of Unicode, too.
ARITHMETIC = re.compile(
    r"[\d)}\]]\s*(?:[-+*\u00d7\u00f7\u00b7\u2219\u22c5\uff0b]|\\times|\\cdot|\\div|\(\s*\d|\s\d)"
)
WORDS = re.compile(r"(?=.*[a-z]{3})[a-z ,;'-]+", re.IGNORECASE)
LONGEST_ANSWER = 300  # characters; what is longer is only compared as text


def answers_agree(said, gold, percent=False):
    """Whether a completion ends in the right answer: as numbers, exactly; else as text; else as mathematics
    (sets, intervals, expressions) by math-verify, which rounds decimals to six places and drops units.

    Only one answer counts, and arithmetic left to do is none: a policy that repeats "12 + 30" or lists
    candidates wins nothing.
    """
    said, gold = final_answer(said), final_answer(gold)
    is_percent = [re.search(r"%|per ?cent", text) is not None for text in (said, gold)]
    if not said or (is_percent[0] != is_percent[1] and not percent):
        return False
    said, gold = (re.sub(r"\s?(?:\\?%|per ?cent)", "", text) for text in (said, gold))
    said, gold = (EDGES.sub("", UNIT.sub("", text)) for text in (said, gold))
    if (right := as_number(gold)) is not None and len(said) <= LONGEST_ANSWER:
        said = re.sub(r"^(?:.*[^<>!])?=\s*", "", said)  # x = 42
        if (found := as_number(said)) is not None:
            return found in (right, right * Fraction(100) ** (is_percent[0] - is_percent[1]))
        if ARITHMETIC.search(said):
            return False
    if said.casefold() == gold.casefold():
        return True
    if WORDS.fullmatch(said) or WORDS.fullmatch(gold) or max(len(said), len(gold)) > LONGEST_ANSWER:
        return False
    brackets = [re.match(r"\\?([(\[{])(?=.*,.*[)\]}]$)", text) for text in (said, gold)]
    if all(brackets) and brackets[0][1] != brackets[1][1]:  # a set is no tuple
        return False
    return same_maths(gold, said)


@functools.lru_cache(maxsize=4096)  # a group often says the same
def same_maths(gold, said):
    """Whether two formulas are equal. Some take forever: this runs in a process with a deadline."""
    import math_verify  # slow to import, and only needed here

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are disabled
    config = (math_verify.LatexExtractionConfig(boxed_match_priority=0),)
    gold, said = (
        math_verify.parse(rf"\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=None)
        for text in (gold, said)
    )
    return math_verify.verify(gold, said, timeout_seconds=None)


def final_answer(text):
    r"""After the thinking: what stands in the last \boxed{}; else what follows the last ####, or all, or the
    last "answer is" or "answer:" in it, to the end of that sentence. Without $, \text{} and a final point."""
    text = text.rpartition("</think>")[2]
    if (start := text.rfind(r"\boxed{")) >= 0:
        depths = itertools.accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in text[start + 6 :])
        length = next((place for place, depth in enumerate(depths) if depth == 0), 0)  # 0: it never ends
        text = text[start + 7 : start + 6 + length]
    else:
        text = text.rpartition("####")[2]
        text = match[1] if (match := ANSWER.match(text)) else text
    text = " ".join(text.split())
    if len(text) > LONGEST_ANSWER:
        return text
    text = re.sub("[\u2212\u2013]", "-", text).replace("{,}", ",")  # minus signs; 1{,}234
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;:]", "", text)
    return EDGES.sub("", text)


def final_choice(text):
    """The letter from A to E that an answer begins with, as in (C), "C. Paris"; else its last one; or ""."""
    text = final_answer(text)
    if match := re.match(r"\(?([A-Ea-e])(?:[).:,]|$)", text):
        return match[1].upper()
    letters = re.findall(r"(?<![\w\\'])[A-E](?![\w'])", text)
    return letters[-1] if letters else ""


def as_number(text):
    r"""The exact value (0.1 is 1/10) of a number in digits, with thousands separators, an exponent or
    \times 10^n, of a fraction of two, or of a whole number in words; None for anything else."""
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text.strip())
    text = re.sub(r"\s*(?:\\times|\\cdot|[*x\u00d7\u00b7])\s*10\s*\^\s*\{?(-?\d{1,3})\}?$", r"e\1", text)
    text = re.sub(r"^(-?)\\[dt]?frac\s*(\d|\{\d+\})\s*(\d|\{\d+\})$", r"\1\2/\3", text)
    text = re.sub(r"\s*/\s*", "/", re.sub(r"[{}]", "", text) if "/" in text else text)
    try:
        return Fraction(text) if NUMBER.fullmatch(text) else number_in_words(text)
    except (ValueError, ZeroDivisionError):  # ValueError: thousands of digits
        return None


@functools.cache
def words_below_1000():
    """{"": 0, "one": 1, ..., "forty two": 42, ..., "nine hundred ninety nine": 999}"""
    ones = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    ones = ["", *(ones + "seventeen eighteen nineteen").split()]
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    below_100 = ones + [f"{ten} {one}".strip() for ten in tens for one in ones[:10]]
    hundreds = ["", *(f"{one} hundred" for one in ones[1:10])]
    names = [f"{hundred} {name}".strip() for hundred in hundreds for name in below_100]
    return {name: number for number, name in enumerate(names)}


def number_in_words(text):
    """minus two million, three hundred and forty-two -> -2000342; None for what is no number in words."""
    text = " ".join(re.sub(r"[\s,-]+|\band\b", " ", text.casefold()).split())
    if text == "zero":
        return Fraction(0)
    pattern = r"(minus |negative )?(?:(.+) million ?)?(?:(.+) thousand ?)?(.*)"
    sign, *parts = re.fullmatch(pattern, text).groups()
    values = [words_below_1000().get(part or "") for part in parts]
    if None in values or not any(values):
        return None
    return Fraction((-1 if sign else 1) * (values[0] * 1_000_000 + values[1] * 1000 + values[2]))


# ---- NAME:ARGUMENT: functions of the argument and the longest completion -> a reward function --------------


def whole_number(argument, least, most=math.inf):
    if not argument.isdecimal() or not least <= int(argument) <= most:
        raise UserError(f"{argument!r} is not a whole number from {least} to {most}")
    return int(argument)


def need_limit(longest):
    if longest is None:
        raise UserError("it needs to know the longest completion: give RewardWorker a max_completion_length")
    return longest


def regex(pattern, _):
    """regex:PATTERN is 1 where the whole completion matches (re.DOTALL), else 0."""
    if not pattern:
        raise UserError("regex needs a pattern: regex:PATTERN")
    try:
        pattern = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"the pattern does not compile: {error}") from error
    return lambda completions, **_: [float(bool(pattern.fullmatch(text_of(said)))) for said in completions]


def cosine(argument, longest):
    """Right answers from 1 (short) to 0.5 (long), wrong ones from -1 to -0.5: arXiv:2502.03373 appendix C.1,
    with the defaults of TRL's get_cosine_scaled_reward. Where accuracy is None, None."""
    if argument:
        raise UserError("cosine takes no argument")
    longest = need_limit(longest)

    def reward(completions, completion_ids, **columns):
        sizes = [0.75 + 0.25 * math.cos(math.pi * min(1, len(ids) / longest)) for ids in completion_ids]
        pairs = zip(accuracy(completions, **columns), sizes, strict=True)
        return [None if right is None else size if right else -size for right, size in pairs]

    return reward


def overlong(argument, longest):
    """overlong:CACHE falls from 0 to -1 over the last CACHE tokens of the longest completion (DAPO's soft
    overlong punishment, arXiv:2503.14476 eq. 13)."""
    longest = need_limit(longest)
    cache = whole_number(argument, 1, longest)
    return lambda completion_ids, **_: [
        max(-1.0, min(0.0, (longest - cache - len(ids)) / cache)) for ids in completion_ids
    ]


def repetition(argument, _):
    """repetition:N is minus the share of n-grams of tokens that are repeats (arXiv:2502.03373 appendix C.2);
    N is 3 if not given, as in TRL's get_repetition_penalty_reward."""
    n = whole_number(argument or "3", 1)

    def reward(completion_ids, **_):
        grams = [list(zip(*(ids[shift:] for shift in range(n)), strict=False)) for ids in completion_ids]
        return [len(set(some)) / len(some) - 1 if some else 0.0 for some in grams]

    return reward


def json_schema(path, _):
    """json-schema:FILE is 1 where the completion, or its last ```json fence, is JSON that the schema allows
    (json-schema.org), else 0."""
    import jsonschema  # only needed here

    try:
        schema = json.loads(Path(path).read_text())
        check = jsonschema.validators.validator_for(schema)
        check.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        raise UserError(f"{path} is no JSON schema: {error}") from error

    def is_valid(text):
        fences = re.findall(r"```json\s*\n(.*?)```", text, re.DOTALL)
        try:
            value = json.loads(fences[-1] if fences else text, parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            return False
        return check(schema).is_valid(value)

    return lambda completions, **_: [
        float(is_valid(text_of(said).rpartition("</think>")[2])) for said in completions
    ]


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def reward_model(path, _):
    """reward-model:PATH is the score that a model with one label, such as reward_model.py's final/, gives to
    prompt and completion, encoded as by its --score (encode_sft); NaN, a failure, for an empty text or one
    beyond the model's context. Conversations share a row where that leaves their scores as they are alone.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    device = device if torch.cuda.is_available() else torch.device("cpu")
    model, tokenizer = load_scorer(path, device), load_tokenizer(path)
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or sys.maxsize
    encode = functools.partial(encode_sft, tokenizer=tokenizer, max_length=limit, vocab_size=text.vocab_size)

    def ids_of(prompt, completion, tools):
        try:
            return encode({"prompt": prompt, "completion": completion, "tools": tools})["input_ids"]
        except UserError:  # an empty text
            return []

    @torch.inference_mode()
    def scores(documents):
        batch = collate([(np.array(ids), np.zeros(len(ids), bool)) for ids in documents], device)
        hidden_TD = model.base_model(**batch.inputs).last_hidden_state[0]
        return model.score(hidden_TD[batch.last_B].float()).float().squeeze(1).tolist()

    probes = [[token for token in range(start, 2 * start) if token != text.pad_token_id] for start in (7, 12)]
    with torch.inference_mode():
        own = [model(input_ids=torch.tensor([ids], device=device)).logits.item() for ids in probes]
    model.score.float()
    tolerance = 1e-3 if device.type == "cpu" else 0.2
    if not np.allclose([scores([ids])[0] for ids in probes], own, 0, tolerance):
        raise UserError(f"{path}: its score is not a linear layer on the last token's hidden state")
    rope = str(getattr(text, "rope_parameters", ""))  # that of these two depends on the length of a row
    packed = scores(probes)
    leak = abs(packed[1] - scores([probes[0][::-1], probes[1]])[1])  # nothing at all, if rows are kept apart
    alone = leak > 1e-5 or not np.allclose(packed, own, 0, tolerance)
    alone = alone or "longrope" in rope or "dynamic" in rope

    def reward(prompts, completions, tools=None, **_):
        documents = list(map(ids_of, prompts, completions, tools or itertools.repeat(None)))
        values = np.full(len(documents), np.nan)
        places = [place for place, ids in enumerate(documents) if ids]
        lengths = [len(documents[place]) for place in places]
        for chosen in split_batch(lengths, 1, max(8192, *lengths), alone)[0] if places else []:
            some = [places[index] for index in chosen]
            values[some] = scores([documents[place] for place in some])
        return values

    return reward


def load_scorer(path, device):
    """The sequence-classification model with one label at `path`, or with the adapter there; UserError where
    there is none."""
    try:
        adapter = Path(path) / "adapter_config.json"
        adapter = json.loads(adapter.read_text()) if adapter.is_file() else {}
        config = AutoConfig.from_pretrained(adapter.get("base_model_name_or_path", path))
        kind = adapter.get("task_type") or ", ".join(config.architectures or ())
        labels = 1 if adapter else config.num_labels
        if labels != 1 or not re.search("SequenceClassification|SEQ_CLS", kind):
            raise UserError(f"it is {kind} with {labels} labels; a reward model scores with one")
        load = functools.partial(
            AutoModelForSequenceClassification.from_pretrained,
            path,
            num_labels=1,
            dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        )
        model = load()
        if model._supports_attention_backend:  # else it knows no attention but its own
            model.set_attn_implementation("varlen")
    except Exception as error:  # hub, file and format errors alike
        raise UserError(f"{path} cannot be loaded as a reward model: {error}") from error
    return model.to(device).eval()


FACTORIES = {
    "cosine": cosine,
    "json-schema": json_schema,
    "overlong": overlong,
    "regex": regex,
    "repetition": repetition,
    "reward-model": reward_model,
}


def check_reward_columns(names, rows):
    """Raise UserError where a reward needs an answer and no row has one, or where a column has the name of
    what all rewards get; rows: `columns` of encode_prompt."""
    for taken in ("prompts", "completions", "completion_ids"):
        if any(taken in json.loads(row) for row in rows):
            raise UserError(
                f"the data has a column `{taken}`, which rewards know as something else; rename it"
            )
    asking = [name for name in names if name in ("accuracy", "choice", "cosine")]
    known = map(json.loads, rows)
    if asking and not any(row.get(name) is not None for row in known for name in ("answer", "solution")):
        found = sorted({name for row in rows for name in json.loads(row)})
        raise UserError(
            f"--rewards {asking[0]} needs a column `answer` or `solution`; besides `prompt` the data has "
            f"{', '.join(found) or 'none'}"
        )


# ---- Running them in a process of their own ----------------------------------------------------------------


def load_reward(name, max_completion_length=None):
    """A reward function of ours by its name (and argument), or of a user's by path/to/file.py:function."""
    if name in REWARDS:
        return REWARDS[name]
    kind, _, argument = name.partition(":")
    if kind in FACTORIES:
        try:
            return FACTORIES[kind](argument, max_completion_length)
        except UserError as error:
            raise UserError(f"--rewards {name}: {error}") from error
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        known = ", ".join([*REWARDS, *FACTORIES])
        raise UserError(f"--rewards {name}: neither FILE.py:FUNCTION nor one of {known}")
    module = import_file(f"--rewards {name}", path)
    if not callable(reward := getattr(module, function, None)):
        raise UserError(f"--rewards {name}: {path} has no function {function}")
    if "environments" in inspect.signature(reward).parameters:
        raise UserError(
            f"--rewards {name} asks for `environments`; give the environment a `get_reward` instead"
        )
    return reward


def import_file(flag, path):
    """The module that the Python file `path`, which `flag` names, holds."""
    spec = importlib.util.spec_from_file_location(f"user_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{flag}: {path} cannot be imported: {error!r}") from error
    return module


def prepare_workers():
    """Begin to start the process that workers are forked from. It imports what scripts do, which takes
    seconds, while the caller goes on."""
    multiprocessing.forkserver.set_forkserver_preload(["common", "peft"])
    multiprocessing.forkserver.ensure_running()


def detach():
    """Make a worker the leader of a session: signals to the trainer's group are the trainer's to handle, and
    what the worker starts ends with it. All of it ends with the trainer, even in a call that hangs."""
    os.setsid()
    multiprocessing.current_process().daemon = False  # one may have no processes of its own
    if sys.platform == "linux":  # the kernel kills the group when this pipe from the trainer is closed
        pipe = multiprocessing.parent_process().sentinel
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def end_worker(process):
    """Kill a worker and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def reward_values(values):
    """What a reward function returned -> [float or None, ...]. Text is no reward, nor are a dict's keys."""
    if isinstance(values, str | dict | set):
        raise TypeError(f"it returned a {type(values).__name__}; it must be a list of numbers")
    values = list(values)
    if text := [value for value in values if isinstance(value, str)]:
        raise TypeError(f"it returned the text {text[0]!r}; it must be a list of numbers")
    return [None if value is None else float(value) for value in values]


def serve_rewards(pipe, names, max_completion_length):
    """The worker process: answers (index of a reward, arguments) with ("ok", values) or what went wrong."""
    detach()
    own = os.getpid()
    try:
        rewards = [load_reward(name, max_completion_length) for name in names]
    except UserError as error:
        return pipe.send(("refused", str(error)))
    pipe.send(("ok", None))
    while True:
        try:
            index, arguments = pipe.recv()
        except EOFError:  # the trainer has ended
            return None
        try:
            values = rewards[index](**arguments)
            if inspect.isawaitable(values):
                values = asyncio.run(as_coroutine(values))
            answer = "ok", reward_values(values)
        except Exception as error:
            answer = "exception", f"{error!r}"
        if os.getpid() != own:  # a fork, by the function, that came back: nobody waits for its answer
            os._exit(0)
        with contextlib.suppress(BrokenPipeError):  # the trainer has ended meanwhile
            pipe.send(answer)


async def as_coroutine(awaitable):
    return await awaitable


class RewardWorker:
    """Reward functions in a process that is killed and replaced when a call hangs or crashes.

    A batch whose call fails is judged again one completion at a time, so that only those fail that are to
    blame.
    """

    def __init__(self, names, timeout, max_completion_length=None):
        """names: as in load_reward. timeout: seconds a call may take. Raises UserError for a bad name."""
        self.names, self.timeout, self.problem = names, timeout, ""  # what the newest exception said
        self.max_completion_length = max_completion_length  # in tokens; what cosine and overlong measure by
        self.context = multiprocessing.get_context("forkserver")
        self.start()

    def start(self):
        self.pipe, theirs = self.context.Pipe()
        arguments = theirs, self.names, self.max_completion_length
        self.process = self.context.Process(target=serve_rewards, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        kind, problem = self.receive(deadline=300)
        if kind != "ok":
            self.stop()
            raise UserError(problem if kind == "refused" else f"the reward process does not start: {kind}")

    def stop(self):
        end_worker(self.process)
        self.pipe.close()

    def receive(self, deadline):
        """-> what the worker says, or why it says nothing."""
        try:
            return self.pipe.recv() if self.pipe.poll(deadline) else ("timeout", None)
        except (EOFError, OSError):
            return "crash", None

    def call(self, index, arguments):
        """-> values, one for each completion, or None; and what went wrong, or ""."""
        try:
            self.pipe.send((index, arguments))
            kind, values = self.receive(self.timeout)
        except OSError:  # it died since
            kind, values = "crash", None
        if kind in ("timeout", "crash"):
            self.stop()
            self.start()
        if kind == "ok" and len(values) != len(arguments["completions"]):
            return None, "count"
        if kind == "exception":
            self.problem = f"{self.names[index]} raised {values}"
        return (values, "") if kind == "ok" else (None, kind)

    def __call__(self, prompts, completions, completion_ids, columns):
        """columns: name -> a value for each completion -> rewards_SR, (completions, rewards): NaN where a
        function says None, and everywhere for a completion where one failed; and why, a Counter of kinds."""
        arguments = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            **columns,
        }
        rewards_SR, failures = np.full((len(completions), len(self.names)), np.nan), Counter()
        failed = set()
        for index in range(len(self.names)):
            values, kind = self.call(index, arguments)
            if values is None:
                values = []
                for place in range(len(completions)):
                    one = {name: column[place : place + 1] for name, column in arguments.items()}
                    value, kind = self.call(index, one) if failures["timeout"] < 8 else (None, "timeout")
                    values += value or [math.nan]
                    if value is None:
                        failures[kind] += 1
                        failed.add(place)
            for place, value in enumerate(values):
                if value is not None and not math.isfinite(value) and place not in failed:
                    failures["not finite"] += 1
                    failed.add(place)
                rewards_SR[place, index] = math.nan if value is None else value
        rewards_SR[sorted(failed)] = np.nan
        return rewards_SR, failures


# ---- Environments: tasks of several turns, with tools ------------------------------------------------------
#
# class Environment:                       as in TRL, whose environments with a get_reward run unchanged
#     def reset(self, **row)               -> text to add to the prompt's last message, or None; `seed` is the
#                                          same for all samples of a prompt
#     def any_name(self, x: int)           -> anything; a public method is a tool, described by its docstring
#     def get_reward(self)                 -> float; optional, --rewards environment
#     def close(self)                      optional
#     done                                 optional: true once the episode is over
#
# Each method may be async. An episode has an object and a thread, with an event loop, of its own.

PROTOCOL = ("reset", "get_reward", "close")


def load_environment(name):
    """path/to/file.py:Class -> the class, the JSON schemas of its tools, and whether it has a get_reward."""
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"--environment {name}: it must be FILE.py:CLASS, and the file must exist")
    module = import_file(f"--environment {name}", path)
    if not inspect.isclass(kind := getattr(module, class_name, None)):
        raise UserError(f"--environment {name}: {path} has no class {class_name}")
    members = [member for member, _ in inspect.getmembers(kind, inspect.isfunction)]
    tools = [member for member in members if member not in PROTOCOL and not member.startswith("_")]
    if "reset" not in members or not tools:
        missing = "no public method that is a tool" if "reset" in members else "no method `reset`"
        raise UserError(f"--environment {name}: {class_name} has {missing}")
    unmade, schemas = kind.__new__(kind), []  # methods can be described without what __init__ does
    for tool in tools:
        try:
            schemas.append(get_json_schema(getattr(unmade, tool)))
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise UserError(f"--environment {name}: the tool {tool} cannot be described: {error}") from error
    return kind, schemas, "get_reward" in members


def serve_environments(pipe, name):
    """The worker process: gets (episode, [(method, arguments), ...]), sends (episode, kind, value) for each
    call in its order; gets and sends None to show that it is alive."""
    detach()
    try:
        kind, tools, has_reward = load_environment(name)
    except UserError as error:
        return pipe.send(("refused", str(error)))
    pipe.send(("ok", (tools, has_reward)))
    inboxes, lock = {}, threading.Lock()
    while True:
        try:
            message = pipe.recv()
        except EOFError:  # the trainer has ended
            os._exit(0)  # whatever the threads are at
        if message is None:
            with lock:
                pipe.send(None)
            continue
        episode, calls = message
        if episode not in inboxes:
            inboxes[episode] = queue.SimpleQueue()
            arguments = (kind, episode, inboxes[episode], pipe, lock)
            threading.Thread(target=serve_episode, args=arguments, daemon=True).start()
        inboxes[episode].put(calls)
        if calls[-1][0] == "close":
            del inboxes[episode]


def serve_episode(kind, episode, inbox, pipe, lock):
    """A thread of the worker: one environment, from its reset to its close."""
    environment = method = None
    with asyncio.Runner() as runner:
        while method != "close":
            for method, arguments in inbox.get():
                try:
                    environment = kind() if environment is None else environment
                    answer = "ok", call_environment(environment, method, arguments, runner)
                except (Exception, SystemExit) as error:
                    answer = "exception", f"{method}: {error!r}" if method in PROTOCOL else clean(error)
                with lock:
                    pipe.send((episode, *answer))


def call_environment(environment, method, arguments, runner):
    """-> what reset says or get_reward finds; of a tool, its result as text, and whether the episode is over.
    A reset without **kwargs gets only what it names."""
    if method == "close" and not hasattr(environment, "close"):
        return None
    function = getattr(environment, method)
    parameters = inspect.signature(function).parameters.values()
    if method == "reset" and all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
        names = {parameter.name for parameter in parameters}
        arguments = {name: value for name, value in arguments.items() if name in names}
    value = function(**arguments)
    if inspect.isawaitable(value):
        value = runner.run(as_coroutine(value))
    match method:
        case "reset":
            if not isinstance(value, str | None):
                raise TypeError(f"it returned {type(value).__name__}; it must be text or None")
            return value and clean(value)
        case "get_reward":
            return float(value)
        case "close":
            return None
    done = getattr(environment, "done", False)
    return clean(value), not callable(done) and bool(done)


def clean(value):
    """A value as text without half characters, which cannot be tokenized."""
    return str(value).encode("utf-8", "replace").decode()


class EnvironmentWorker:
    """A rank's environments, in one process that is killed and replaced when it crashes or hangs.

    Calls of different episodes run at the same time. A call past its deadline fails only its episode: the
    thread is left behind, and the process replaced before the next episodes begin.
    """

    GRACE = 5  # seconds in which a process that is alive says so

    def __init__(self, name, timeout):
        """name: as in load_environment. timeout: seconds a call may take. Raises UserError for a bad name."""
        self.name, self.timeout, self.problem = name, timeout, ""  # what the newest exception said
        self.context, self.numbers = multiprocessing.get_context("forkserver"), itertools.count()
        self.start()

    def start(self):
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=serve_environments, args=(theirs, self.name), daemon=True)
        self.process.start()
        theirs.close()
        self.inbox = queue.SimpleQueue()
        # Reading and writing have threads: a process that hangs half-way would make them wait for it.
        threading.Thread(target=receive_all, args=(self.pipe, self.inbox), daemon=True).start()
        self.living, self.is_stale = set(), False  # episodes in this process; whether a call in it hangs
        kind, value = self.hear(300)
        if kind != "ok":
            self.stop()
            raise UserError(value if kind == "refused" else f"the environment process does not start: {kind}")
        self.tools, self.has_reward = value

    def stop(self):
        end_worker(self.process)

    def hear(self, seconds):
        """-> what the process says."""
        try:
            return self.inbox.get(timeout=max(0, seconds))
        except queue.Empty:
            return "silence", None

    def send(self, messages):
        threading.Thread(target=send_all, args=(self.pipe, messages), daemon=True).start()

    def open(self, count):
        """-> numbers for so many new episodes, when no others are going on."""
        if self.is_stale:
            self.stop()
            self.start()
        self.living = {next(self.numbers) for _ in range(count)}
        return sorted(self.living)

    def run(self, jobs):
        """jobs: episode -> [(method, arguments), ...] to do one after the other -> episode -> [(kind, value),
        ...]; kinds are ok, exception, and where nothing more comes of an episode timeout, hang or crash."""
        answers = {episode: [] if episode in self.living else [("crash", None)] for episode in jobs}
        started = {episode: calls for episode, calls in jobs.items() if calls and not answers[episode]}
        self.send([*started.items()])
        deadlines = dict.fromkeys(started, time.monotonic() + self.timeout)
        while deadlines:
            message = self.hear(min(deadlines.values()) - time.monotonic())
            if message == ("silence", None):  # is a call late, or does the whole process hang?
                self.send([None])
                message = self.hear(self.GRACE)
            if message in (("silence", None), ("crash", None)):
                for episode in deadlines:
                    answers[episode].append(("crash" if message[0] == "crash" else "hang", None))
                self.stop()
                self.start()
                break
            if message is not None and message[0] in deadlines:
                episode, *answer = message
                answers[episode].append(tuple(answer))
                deadlines[episode] = time.monotonic() + self.timeout
                if len(answers[episode]) == len(jobs[episode]):
                    del deadlines[episode]
            for episode in [each for each, at in deadlines.items() if at <= time.monotonic()]:
                answers[episode].append(("timeout", None))
                self.living.discard(episode)
                self.is_stale = True
                del deadlines[episode]
        problems = [value for some in answers.values() for kind, value in some if kind == "exception"]
        self.problem = f"{self.name} raised {problems[-1]}" if problems else self.problem
        return answers


def send_all(pipe, messages):
    try:
        for message in messages:
            pipe.send(message)
    except OSError:  # it was killed, which who waits for an answer is told
        return


def receive_all(pipe, inbox):
    while True:
        try:
            inbox.put(pipe.recv())
        except (EOFError, OSError):
            return inbox.put(("crash", None))


def environment_reward(environment_reward, **_):
    """What get_reward said, which comes as a column."""
    return environment_reward


REWARDS["environment"] = environment_reward


# ---- Tool calls and the tokens between turns ---------------------------------------------------------------


class Call(NamedTuple):
    """A tool call that a model wrote."""

    name: str
    arguments: dict
    problem: str = ""
    """Why it cannot be made, if so."""


def parse_calls(tokenizer, prefix, text, tools):
    """The text of a turn, which follows `prefix`, control tokens included -> [Call, ...].

    The tokenizer's response template says where calls are, if it has one. Otherwise they are looked for as
    Hermes and Qwen write them, after the thinking: <tool_call>{"name": ..., "arguments": {...}}</tool_call>.
    """
    names = {tool["function"]["name"] for tool in tools}
    if getattr(tokenizer, "response_template", None):
        try:
            found = tokenizer.parse_response(text, prefix=prefix, tools=tools).get("tool_calls") or []
        except Exception as error:  # of many kinds, by what the model wrote
            return [Call("unknown", {}, f"malformed tool call: {error}")]
    else:
        said = text.rpartition("</think>")[2]
        blocks = re.findall(r"<tool_call>(.*?)(</tool_call>|$)", said, re.DOTALL)
        found = [block if end else "" for block, end in blocks]
    return [read_call(call, names) for call in found]


def read_call(call, names):
    """A call as JSON text or an object -> Call."""
    try:
        call = json.loads(call) if isinstance(call, str) else call
        function = check_tool_call(call, "the message")["function"]
    except (ValueError, RecursionError) as error:
        return Call("unknown", {}, f"malformed tool call: {error}")
    name, arguments = function["name"], function.get("arguments") or {}
    if name not in names:
        return Call("unknown", {}, f"Tool {clean(name)} not found.")
    if not isinstance(arguments, dict):
        return Call(name, {}, "malformed tool call: its arguments are no object")
    return Call(name, arguments)


def tool_messages(calls, answers):
    """Calls, and the worker's answers to those that can be made -> messages; errors as TRL words them."""
    answers, messages = iter(answers), []
    for index, call in enumerate(calls):
        kind, value = ("exception", call.problem) if call.problem else next(answers)
        content = value[0] if kind == "ok" else str({"error": value})
        message = {"role": "tool", "name": call.name, "tool_call_id": f"call{index:05d}"}
        messages.append({**message, "content": content})
    return messages


def split_at_tools(template, messages, stop_ids):
    """Tool messages -> the text of a short conversation up to their call's stop token, the id of that, and
    the text from there to the model's next word. Raises UserError where the template has no such place."""
    stops = {template.tokenizer.decode([token]): token for token in stop_ids}
    pattern = "|".join(map(re.escape, stops)) or "(?!)"
    functions = [{"name": message["name"], "arguments": {}} for message in messages]
    functions[-1]["arguments"] = {"x": PROBE}
    calls = [
        {"type": "function", "id": message["tool_call_id"], "function": function}
        for message, function in zip(messages, functions, strict=True)
    ]
    # A template that does not know tool calls (or not several) still shows where a plain turn ends.
    for said in ({"content": "", "tool_calls": calls}, {"content": PROBE}):
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", **said}, *messages]
        try:
            _, conversation = render_with_calls(template, conversation)
            text = template.render(conversation, generation_prompt=True)
        except UserError as error:
            problem = error
            continue
        if stop := re.compile(pattern).search(text, text.find(PROBE)) if PROBE in text else None:
            return text[: stop.end()], stops[stop.group()], text[stop.end() :]
        problem = f"it ends a turn by none of {', '.join(stops) or 'no stop tokens'}"
    raise UserError(
        f"the chat template has no place for a tool's result after a call ({problem}); give one that has by "
        "--chat-template"
    )


def tool_tokens(template, messages, stop_ids):
    """The template's own tokens from a turn's stop token, without it, to the model's next word."""
    _, stop_id, text = split_at_tools(template, messages, stop_ids)
    stop = template.tokenizer.decode([stop_id])
    ids = template.tokenizer(stop + text, add_special_tokens=False)["input_ids"]
    if ids[0] != stop_id:
        raise UserError(f"the tokenizer does not keep the stop token {stop} apart from what follows it")
    return ids[1:]


def check_tools(tokenizer, tools, stop_ids):
    """UserError where the chat template has no place for tools' results, or writes calls that would not be
    read."""
    template, name = tools_template(tokenizer, tools, None), tools[0]["function"]["name"]
    results = [tool_messages([Call(name, {})], [("ok", (text, False))]) for text in ("a", PROBE)]
    splits = [split_at_tools(template, messages, stop_ids) for messages in results]
    header, _, _ = template.plain_answer
    if splits[0][:2] != splits[1][:2] or PROBE not in splits[1][2]:
        raise UserError(
            "the chat template does not put a tool's result after the turn that called it; give one that "
            "does by --chat-template"
        )
    written = splits[0][0]
    prefix, _, turn = written.rpartition(header) if header else ("", "", written)
    found = [call.name for call in parse_calls(tokenizer, prefix + header, turn, tools)]
    if name in turn and found != [name]:
        raise UserError(
            f"the chat template writes a tool call as {turn[:200]!r}, which is not read; the tokenizer needs "
            "a `response_template`, or the template Hermes' form, <tool_call>{json}</tool_call>"
        )


def tools_template(tokenizer, tools, arguments):
    """The ChatTemplate under an environment's tools (None: none) and a row's arguments."""
    source = tokenizer.get_chat_template(tools=tools)
    return ChatTemplate.cached(tokenizer, source, json.dumps(tools), json.dumps(arguments or {}))


# ---- Episodes ----------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """A sample of several turns."""

    number: int
    """The EnvironmentWorker knows it by this."""
    key: tuple
    """Its tokens are drawn from this and the turn."""
    template: ChatTemplate
    prompt: list
    """Messages, with what reset said."""
    rollout: "Rollout"
    limit: int = 0
    """Most tokens that may follow the prompt's."""
    messages: list = field(default_factory=list)
    """What the model and the tools said."""
    is_going: bool = True
    failure: str = ""
    """Why it does not count, if so."""
    reward: float = math.nan
    """The environment's own."""
    turns: int = 0
    calls: int = 0
    failed_calls: int = 0
    """Those that were malformed, of no tool, or raised."""

    def fail(self, why):
        self.failure, self.is_going = f"environment {why}", False


def play_episodes(
    rows, keys, seeds, num_samples, temperature, stop_ids, *, engine, environment, tokenizer, limits
):
    """Play rows of PROMPT_FEATURES in an EnvironmentWorker -> [[Episode, ...] of num_samples for each row].

    keys: as in HFEngine.generate. seeds: an int for each row. limits: an episode's most turns, its most
    tokens, and those without the prompt. All episodes go on together, turn by turn.

    What was sampled is never tokenized again: between two turns stand the template's own tokens for the
    tools' messages, False in Rollout.mask. An episode ends with a turn without calls, or where the
    environment is done. It is cut (not finished) by the limits; what tools say counts, and is left out where
    it leaves no room for another token.
    """
    max_turns, *max_tokens = limits
    groups = begin_episodes(rows, keys, seeds, num_samples, environment, tokenizer, max_tokens)
    for turn in range(max_turns):
        try:
            written = write_turn(engine, groups, turn, temperature, stop_ids)
        except EngineError:
            end_episodes(groups, environment)
            raise
        calls = {}
        for episode, prefix, piece in written:
            text = tokenizer.decode(piece.ids, skip_special_tokens=True)
            episode.messages.append({"role": "assistant", "content": text})
            texts = tokenizer.decode(prefix), tokenizer.decode(piece.ids)
            found = parse_calls(tokenizer, *texts, environment.tools) if piece.is_finished else []
            episode.is_going = bool(found)
            if found:
                calls[episode.number] = found
                functions = [{"name": call.name, "arguments": call.arguments} for call in found]
                tool_calls = [{"type": "function", "function": function} for function in functions]
                episode.messages[-1]["tool_calls"] = tool_calls
        jobs = {number: [c[:2] for c in found if not c.problem] for number, found in calls.items()}
        answers = environment.run(jobs)
        for episode in [episode for episode, _, _ in written if episode.is_going]:
            found, answered = calls[episode.number], answers[episode.number]
            if answered and answered[-1][0] not in ("ok", "exception"):
                episode.fail(answered[-1][0])
                continue
            episode.calls += len(found)
            episode.failed_calls += sum(bool(call.problem) for call in found)
            episode.failed_calls += sum(kind == "exception" for kind, _ in answered)
            is_done = any(kind == "ok" and value[1] for kind, value in answered)
            rollout, messages = episode.rollout, tool_messages(found, answered)
            more = [] if is_done else tool_tokens(episode.template, messages, stop_ids)
            if is_done or turn + 1 == max_turns or len(rollout.ids) + len(more) >= episode.limit:
                rollout.is_finished, episode.is_going = is_done, False
                continue
            episode.messages += messages
            rollout.ids += more
            rollout.logps += [0.0] * len(more)
            rollout.mask += [False] * len(more)
            rollout.versions += [-1] * len(more)
    end_episodes(groups, environment)
    return groups


def begin_episodes(rows, keys, seeds, num_samples, environment, tokenizer, max_tokens):
    """-> groups of Episodes that were reset, with their prompts."""
    numbers, groups, resets = iter(environment.open(num_samples * len(rows))), [], {}
    for row, key, seed in zip(rows, keys, seeds, strict=True):
        prompt, columns = json.loads(row["prompt"]), json.loads(row["columns"])
        template = tools_template(tokenizer, environment.tools, columns.get("chat_template_kwargs"))
        groups.append([])
        for sample in range(num_samples):
            rollout = Rollout(row["input_ids"], [], [], False, [])
            groups[-1].append(Episode(next(numbers), (*key, sample), template, prompt, rollout))
            resets[groups[-1][-1].number] = [("reset", {"seed": seed, "prompt": prompt, **columns})]
    answers = environment.run(resets)
    for episode in itertools.chain(*groups):
        kind, said = answers[episode.number][0]
        if kind != "ok":
            episode.fail(kind)
            continue
        ids = episode.rollout.prompt_ids
        if said:
            last = {**episode.prompt[-1], "content": episode.prompt[-1]["content"] + said}
            episode.prompt = [*episode.prompt[:-1], last]
            text = episode.template.render(episode.prompt, generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        max_length, max_completion_length = max_tokens
        episode.limit = min(max_completion_length, max_length - len(ids))
        if episode.limit < 1:
            episode.fail("prompt too long")
        else:
            episode.rollout.prompt_ids = ids
    return groups


def write_turn(engine, groups, turn, temperature, stop_ids):
    """Sample the next turn of the episodes that go on -> [(episode, ids before it, it), ...].
    The first turns of a group are sampled together if its prompts are the same."""
    whole = [
        group for group in groups
        if not turn and all(e.is_going and e.rollout.prompt_ids == group[0].rollout.prompt_ids for e in group)
    ]  # fmt: skip
    episodes, sampled = [episode for group in whole for episode in group], []
    together = {episode.number for episode in episodes}
    alone = [e for group in groups for e in group if e.is_going and e.number not in together]
    options = temperature, stop_ids
    if whole:
        first = [group[0] for group in whole]
        prompts, keys = [e.rollout.prompt_ids for e in first], [e.key[:-1] for e in first]
        sampled += engine.generate(prompts, keys, len(whole[0]), [e.limit for e in first], *options)
    if alone:
        prompts = [e.rollout.prompt_ids + e.rollout.ids for e in alone]
        keys, limits = [(*e.key, turn) for e in alone], [e.limit - len(e.rollout.ids) for e in alone]
        sampled += engine.generate(prompts, keys, 1, limits, *options)
    written = []
    for episode, piece in zip(episodes + alone, itertools.chain(*sampled), strict=True):
        rollout = episode.rollout
        written.append((episode, rollout.prompt_ids + rollout.ids, piece))
        rollout.ids, rollout.logps = rollout.ids + piece.ids, rollout.logps + piece.logps
        rollout.mask, rollout.is_finished = rollout.mask + [True] * len(piece.ids), piece.is_finished
        rollout.versions = rollout.versions + piece.versions
        episode.turns += 1
    return written


def end_episodes(groups, environment):
    """Ask for the rewards of episodes that did not fail, and close all."""
    episodes = {e.number: e for group in groups for e in group if e.number in environment.living}
    asked = [("get_reward", {})] if environment.has_reward else []
    jobs = {number: [*([] if e.failure else asked), ("close", {})] for number, e in episodes.items()}
    answers = environment.run(jobs)
    for episode in itertools.chain(*groups):
        if environment.has_reward and not episode.failure:
            kind, value = answers.get(episode.number, [("crash", None)])[0]
            if kind == "ok":
                episode.reward = value
            else:
                episode.fail(kind)


# ============================================================================================================
# 3. Rollout engines and weight sync
# ============================================================================================================


@dataclass
class Rollout:
    """One completion of a prompt, on the CPU; `logps` has an entry for each of `ids`."""

    prompt_ids: list
    ids: list
    logps: list
    """The sampler's log-prob of each token, at its temperature."""
    is_finished: bool
    """Whether it ended by a stop token rather than by its length."""
    mask: list | None = None
    """Which of ids were sampled; None: all. The others are a tool's: `logps` is 0 there."""
    versions: list = field(default_factory=list)
    """The optimizer step whose weights sampled each of ids; -1 where none did."""


class HFEngine:
    """Embedded generation with a copy of the policy: transformers' forward, our own sampling and cache.

    A prompt is computed once for all of its samples; decoding is a packed row with a token of each sequence.
    Every token is drawn by inverting the distribution at a uniform number that depends on the sequence's key
    and the token's place alone, so that what is generated together does not change samples.
    """

    CACHE_TOKENS = 2**17  # most tokens, prompts included, of the sequences that are decoded together

    def __init__(self, model):
        """model: a causal language model with the attention "varlen", in the dtype to compute in."""
        self.model = model.eval().requires_grad_(False)
        self.parameters = dict(model.named_parameters())
        self.device, self.version = next(model.parameters()).device, 0

    @torch.no_grad()
    def load_weights(self, weights, version):
        """weights: (name, whole tensor) pairs, named as by `named_parameters`; what is not named stays.
        version: the optimizer step that they come from."""
        for name, weight in weights:
            self.parameters[name].copy_(weight)
        self.version = version

    def wake(self):
        """Before a generation; sleep: after it. There is nothing to do."""

    sleep = stop = wake

    def generate(self, prompts, keys, num_samples, max_lengths, temperature, stop_ids):
        """prompts: token ids; for each, keys: a tuple of ints from which its samples are drawn, max_lengths:
        the most new tokens. temperature 0 is greedy -> [[Rollout, ...] of num_samples for each prompt]."""
        results, begin = [], 0
        sizes = [num_samples * (len(ids) + new) for ids, new in zip(prompts, max_lengths, strict=True)]
        while begin < len(prompts):
            end = begin + 1
            while end < len(prompts) and sum(sizes[begin : end + 1]) <= self.CACHE_TOKENS:
                end += 1
            some = (each[begin:end] for each in (prompts, keys, max_lengths))
            results += self.generate_together(*some, num_samples, temperature, stop_ids)
            begin = end
        return results

    @torch.no_grad()
    def generate_together(self, prompts, keys, max_lengths, num_samples, temperature, stop_ids):
        batch = collate([(np.array(ids), np.zeros(len(ids), bool)) for ids in prompts], self.device)
        longest = max(max_lengths)
        cache = KVCache(batch.inputs["cu_seq_lens_q"].long(), num_samples, longest)
        logits_PV = self.model(**batch.inputs, logits_to_keep=batch.last_B, kv_cache=cache).logits[0]
        logits_SV = logits_PV.repeat_interleave(num_samples, 0)  # S: sequences in the cache
        uniform_RT = np.zeros((len(prompts) * num_samples, longest))  # R: all that are asked for
        for row in range(len(uniform_RT)):
            key = [*keys[row // num_samples], row % num_samples]
            uniform_RT[row] = np.random.default_rng(key).random(longest)
        limits_R, stop_K = np.repeat(max_lengths, num_samples), torch.tensor(stop_ids, device=self.device)
        rollouts = [Rollout(prompts[row // num_samples], [], [], False) for row in range(len(limits_R))]
        rows_S = np.arange(len(rollouts))  # which rollout a sequence in the cache is
        is_growing_S = np.ones(len(rollouts), bool)
        for place in range(longest):
            uniform_S = torch.from_numpy(uniform_RT[rows_S, place]).to(self.device)
            token_S, logp_S = draw(logits_SV.float(), temperature, uniform_S)
            tokens, logps, stops = token_S.tolist(), logp_S.tolist(), torch.isin(token_S, stop_K).tolist()
            for index in is_growing_S.nonzero()[0]:
                rollout = rollouts[rows_S[index]]
                rollout.ids.append(tokens[index])
                rollout.logps.append(logps[index])
                rollout.is_finished = stops[index]
            is_growing_S &= ~np.array(stops) & (limits_R[rows_S] > place + 1)
            if not is_growing_S.any():
                break
            if is_growing_S.mean() < 0.75:  # else copying the cache costs more than ended sequences do
                kept = torch.from_numpy(is_growing_S.nonzero()[0]).to(self.device)
                cache.keep(kept)
                token_S, rows_S = token_S[kept], rows_S[is_growing_S]
                is_growing_S = np.ones(len(rows_S), bool)
            inputs = {"input_ids": token_S[None], "position_ids": cache.length_S[None]}
            logits_SV = self.model(**inputs, attention_mask=None, use_cache=False, kv_cache=cache).logits[0]
            cache.length_S += 1
            cache.longest += 1
        for rollout in rollouts:
            rollout.versions = [self.version] * len(rollout.ids)
        return [rollouts[first : first + num_samples] for first in range(0, len(rollouts), num_samples)]


class KVCache:
    """Keys and values of all layers, (S, H_kv, L, D) each, of sequences that begin at L = 0 and grow
    together; `varlen_attention` fills and reads it."""

    def __init__(self, cu_seqlens, num_samples, new_tokens):
        """cu_seqlens: where the prompts of the packed row that comes first begin and end."""
        lengths_P = cu_seqlens.diff()
        self.num_samples, self.new_tokens, self.longest = num_samples, new_tokens, int(lengths_P.max())
        places_L = torch.arange(self.longest, device=cu_seqlens.device)
        self.index_PL = (cu_seqlens[:-1, None] + places_L).clamp(max=int(cu_seqlens[-1]) - 1)
        self.length_S = lengths_P.repeat_interleave(num_samples)
        self.keys, self.values = {}, {}

    def fill(self, layer, key_THD, value_THD):
        """Take the packed prompts' keys and values, once for each sample."""
        for store, tensor_THD in ((self.keys, key_THD), (self.values, value_THD)):
            prompts_PHLD = tensor_THD[self.index_PL].transpose(1, 2)
            p, h, length, d = prompts_PHLD.shape
            store[layer] = prompts_PHLD.new_zeros(p * self.num_samples, h, length + self.new_tokens, d)
            store[layer][:, :, :length] = prompts_PHLD.repeat_interleave(self.num_samples, 0)

    def attend(self, layer, query_SHD, key_SHD, value_SHD, scaling, window):
        """Append a token to each sequence, and attend from it to all of its own -> (S, H, D)."""
        sequences = torch.arange(len(self.length_S), device=key_SHD.device)
        self.keys[layer][sequences, :, self.length_S] = key_SHD
        self.values[layer][sequences, :, self.length_S] = value_SHD
        key_SHLD, value_SHLD = (store[layer][:, :, : self.longest + 1] for store in (self.keys, self.values))
        places_L = torch.arange(self.longest + 1, device=key_SHD.device)
        mask_SL = places_L <= self.length_S[:, None]
        if window is not None:
            mask_SL &= places_L > self.length_S[:, None] - window
        gqa = query_SHD.shape[1] != key_SHD.shape[1]
        mask, query_SH1D = mask_SL[:, None, None], query_SHD[:, :, None]
        return F.scaled_dot_product_attention(
            query_SH1D, key_SHLD, value_SHLD, attn_mask=mask, scale=scaling, enable_gqa=gqa
        ).squeeze(2)

    def keep(self, sequences):
        """Drop all other sequences."""
        self.length_S = self.length_S[sequences]
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                store[layer] = tensor[sequences]


def draw(logits_SV, temperature, uniform_S):
    """A token for each row and its log-prob: the arg-max at temperature 0, else where the cumulative
    distribution passes uniform_S, in [0, 1)."""
    logps_SV = (logits_SV / (temperature or 1)).log_softmax(-1)
    if temperature == 0:
        token_S = logps_SV.argmax(-1)
    else:
        cdf_SV = logps_SV.exp().cumsum(-1)
        # Below the last value even if the product rounds up: else a token without probability could be drawn.
        level_S = uniform_S.float().clamp(max=1 - 2**-22) * cdf_SV[:, -1]
        token_S = torch.searchsorted(cdf_SV, level_S[:, None], right=True).squeeze(1)
    return token_S, logps_SV.gather(1, token_S[:, None]).squeeze(1)


# ---- vLLM over HTTP ----------------------------------------------------------------------------------------


class EngineError(UserError):
    """A generation server is gone, late, or has not the weights that it should have. It may be mended."""

    status = None  # of the HTTP answer, if there was one


class RefusedError(EngineError):
    """A generation server says that a prompt is wrong; it may take others."""


@dataclass(frozen=True)
class ServerNeeds:
    """What a vLLM server must be started with."""

    model: str
    dtype: str
    """What the trainer computes in: float32 or bfloat16."""
    max_length: int
    """Most tokens of a prompt and its completion."""
    transport: str
    """How weights reach it: gloo on CPU, ipc on the trainer's own GPUs, nccl on others."""
    flags: tuple = ()
    """More of vLLM's own."""

    def command(self, port=8000, host="127.0.0.1"):
        """-> environment, a dict, and arguments of Python. vLLM's control routes have no password: the server
        listens to its own machine only, unless `host` is another's name for it."""
        env = {"VLLM_SERVER_DEV_MODE": "1"}
        args = ["--model", self.model, "--host", host, "--port", str(port), "--enable-scale-out"]
        args += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        args += ["--disable-uvicorn-access-log"]
        args += ["--dtype", self.dtype, "--max-model-len", str(self.max_length)]
        args += ["--weight-transfer-config", json.dumps({"backend": self.transport})]
        if self.transport == "gloo":
            env |= {"PYTHONPATH": str(Path(__file__).parent), "VLLM_CPU_KVCACHE_SPACE": "1"}
            args += ["--worker-extension-cls", "common.VLLMExtension", "--enforce-eager"]
            # vLLM 0.32's CPU worker ends where a prompt with a seed is computed in parts.
            args += [
                "--no-enable-chunked-prefill",
                "--max-num-batched-tokens",
                str(max(8192, self.max_length)),
            ]
        if self.transport == "ipc":  # handles of GPU memory come pickled
            env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
            args.append("--enable-sleep-mode")
        return env, ["-m", "vllm.entrypoints.openai.api_server", *args, *self.flags]

    def shell(self, url="http://127.0.0.1:8000"):
        """The command as one types it, for a server at `url`."""
        env, args = self.command(httpx.URL(url).port or 80, httpx.URL(url).host)
        return " ".join(
            [*(f"{k}={shlex.quote(v)}" for k, v in env.items()), "python", *map(shlex.quote, args)]
        )

    def problems(self, config):
        """Why a server with this vLLM config, as JSON, cannot be used -> [str, ...]."""
        model, transfer = config["model_config"], config["weight_transfer_config"] or {}
        found = {
            "--logprobs-mode": (model["logprobs_mode"], "processed_logprobs"),
            "--dtype": (model["dtype"].removeprefix("torch."), self.dtype),
            "--weight-transfer-config": (transfer.get("backend"), self.transport),
        }
        problems = [f"{name} is {has}, not {need}" for name, (has, need) in found.items() if has != need]
        if model["max_model_len"] < self.max_length:
            problems.append(f"--max-model-len is {model['max_model_len']}, below {self.max_length}")
        if self.transport == "ipc" and not model["enable_sleep_mode"]:
            problems.append("--enable-sleep-mode is missing")
        if self.transport == "gloo" and config["scheduler_config"]["enable_chunked_prefill"]:
            problems.append("--no-enable-chunked-prefill is missing")
        return problems


class VLLMServer:
    """One server, its process if we started it, and the way of weights to it. Every wait has a deadline."""

    def __init__(self, needs, url=None, log_path=None, gpus=None, is_owner=True, timeout=600.0):
        """url: where it listens; None starts one, which writes to log_path and sees the GPUs numbered `gpus`.
        is_owner: whether this rank, of those that use it, controls it. timeout: seconds for anything."""
        self.needs, self.log_path, self.gpus, self.timeout = needs, log_path, gpus, timeout
        self.is_owner, self.is_asleep, self.is_paused = is_owner, False, False
        self.process, self.reaper, self.sender, self.url, self.version = None, None, None, url, None
        self.pause_seconds = 0.0  # in which requests were frozen for weights, in all
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # each request has a connection
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        if url is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
            self.launch()
        atexit.register(self.stop)

    def launch(self):
        """Start the process; it ends when ours does, however that ends."""
        env, args = self.needs.command(self.url.rpartition(":")[2])
        of_torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        ours = {k: v for k, v in os.environ.items() if k not in of_torchrun and "TORCHELASTIC" not in k}
        if self.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpus))

        # vLLM's shutdown may hang. When we end, however we do, this one's pipe closes, and it ends the group.
        waits = "for _ in $(seq 100); do kill -s 0 -- -$pid || exit; sleep 0.2; done"
        self.reaper = subprocess.Popen(
            ["sh", "-c", f"read pid; read _; kill -TERM $pid; {waits}; kill -s KILL -- -$pid"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with open(self.log_path, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *args],
                env=ours | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.reaper.stdin.write(b"%d\n" % self.process.pid)
        self.reaper.stdin.flush()

    def is_dead(self):
        return self.process is not None and self.process.poll() is not None

    def kill(self):
        """End the process and those that it has started."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.reaper.kill()
            self.reaper.communicate()

    def stop(self):
        """End what we started, and leave what was given to us unpaused, partial weights by another name."""
        if self.process is None and self.is_paused:
            with contextlib.suppress(EngineError):
                label = {"new_version": "incomplete"}
                self.request("POST", "update_weight_version", seconds=10, json=label)
                self.end_update()
                self.request("POST", "resume", seconds=10)
        self.kill()
        self.process, self.is_paused = None, False

    def end_update(self):
        """End an update that was cut short: vLLM begins no other before. Requests would read garbage."""
        self.request("POST", "abort_requests", seconds=10, json={})
        for route in ("start_weight_update", "finish_weight_update"):  # the first fails where one is going on
            with contextlib.suppress(EngineError):
                self.request("POST", route, seconds=10, json={})

    def request(self, method, path, seconds=None, **kwargs):
        """-> the JSON of the answer; EngineError where none comes in time, or one that tells of a failure."""
        try:
            options = {"timeout": seconds or self.timeout, "verify": tls_context(), **kwargs}
            answer = httpx.request(method, f"{self.url}/{path}", **options)
        except httpx.HTTPError as error:
            raise EngineError(f"the vLLM server {self.url} does not answer /{path}: {error!r}") from error
        if answer.status_code != 200:
            said = f"answers /{path} with {answer.status_code}: {answer.text[:500]}"
            error = EngineError(f"the vLLM server {self.url} {said}")
            error.status = answer.status_code
            raise error
        return answer.json() if answer.content else None

    def wait(self, stopped=()):
        """Until the server answers; EngineError where it has ended, is late, or `stopped` holds something."""
        deadline = time.monotonic() + self.timeout
        while True:
            if self.is_dead():
                said = "".join(Path(self.log_path).read_text(errors="replace").splitlines(True)[-15:])
                raise EngineError(
                    f"the vLLM server ended with exit code {self.process.returncode}; its log, "
                    f"{self.log_path}, ends with:\n{said}Is vLLM installed? The README says how"
                )
            try:
                return self.request("GET", "health", seconds=5)
            except EngineError as error:
                if stopped or time.monotonic() > deadline:
                    said = "stopped by a signal" if stopped else f"waited {self.timeout:g} s"
                    start = f"Start it with\n{self.needs.shell(self.url)}"
                    raise EngineError(f"{error}; {said}. {start}") from error
                time.sleep(0.5)

    def check(self):
        """UserError with the right command line where the server's flags do not do."""
        problems, missing = [], "VLLM_SERVER_DEV_MODE=1"
        try:
            config = self.request("GET", "server_info", params={"config_format": "json"})["vllm_config"]
            problems, missing = self.needs.problems(config), "--enable-scale-out"
            self.request("POST", "inference/v1/generate", json={})  # 422: the route is there
        except EngineError as error:
            if error.status in (403, 404):
                problems.append(f"{error}; it needs {missing}")
            elif error.status not in (400, 422):
                raise
        if problems:
            raise UserError(
                f"the vLLM server {self.url} cannot be used: {'; '.join(problems)}. Start it with\n"
                f"{self.needs.shell(self.url)}"
            )
        self.version = self.request("GET", "weight_info")["weight_version"]
        self.is_paused = self.is_owner and bool(self.request("GET", "is_paused").get("is_paused"))
        if self.is_paused:  # by an update that was cut short, of this run or of one that was killed
            self.version = "incomplete"

    def sleep(self):
        """Give the GPU's memory to the trainer, which shares it with the server."""
        if self.needs.transport == "ipc" and not self.is_asleep:
            if self.is_owner:
                self.request("POST", "sleep", params={"level": 1})
            self.is_asleep = True

    def wake(self):
        if self.is_asleep:
            if self.is_owner:
                self.request("POST", "wake_up")
            self.is_asleep = False

    def has_lost(self, version):
        """Whether it has died, or has other weights than `version`, as one that was started again has."""
        if self.is_dead():
            return True
        try:
            return self.request("GET", "weight_info", seconds=5)["weight_version"] != str(version)
        except EngineError as error:  # a busy one is late; one of ours that has ended is dead
            return self.process is None and isinstance(error.__cause__, httpx.ConnectError)

    def load_weights(self, weights, version, keep_kv=False):
        """weights: name -> whole tensor in the server's dtype, named as in checkpoints. Requests that run are
        frozen meanwhile, and go on with the new weights: what they hold of keys and values is computed again,
        or kept. All ranks that use an ipc server take part."""
        began = time.monotonic()
        deadline = began + self.timeout
        keep_kv = keep_kv and self.sender is not None  # what is cached may be another run's
        if self.is_owner:
            was_cut_short, self.is_paused = self.is_paused, True
            self.request("POST", "pause", params={"mode": "keep", "clear_cache": not keep_kv})
            if was_cut_short:
                self.end_update()
        if self.is_owner or self.needs.transport == "ipc":
            if self.sender is None:
                self.sender = (GlooSender if self.needs.transport == "gloo" else VLLMSender)(self, deadline)
            self.sender.send(weights, deadline)
        if self.is_owner:
            self.request("POST", "update_weight_version", json={"new_version": str(version)})
            if not keep_kv:
                self.request("POST", "reset_prefix_cache")
            self.request("POST", "resume")
            self.is_paused = False
            self.pause_seconds += time.monotonic() - began
            self.version = self.request("GET", "weight_info")["weight_version"]
            if self.version != str(version):
                raise EngineError(f"the vLLM server {self.url} says {self.version} after it got {version}")


def side_by_side(deadline, *calls):
    """Run calls in threads -> their results; EngineError at the first that fails, or at the deadline. What
    then still runs is left alone: it has a deadline of its own."""
    answers = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run(index, call):
        try:
            if device is not None:
                torch.cuda.set_device(device)
            answers.put((index, call(), None))
        except Exception as error:
            answers.put((index, None, error))

    results = [None] * len(calls)
    for index, call in enumerate(calls):
        threading.Thread(target=run, args=(index, call), daemon=True).start()
    for _ in calls:
        try:
            index, results[index], error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise EngineError("the weight transfer to the vLLM server was not done in time") from None
        if error is not None:
            raise EngineError(f"the weight transfer to the vLLM server failed: {error}") from error
    return results


def own_address(url):
    """This machine's address as the server at `url` sees it."""
    host, port = httpx.URL(url).host, httpx.URL(url).port or 80
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return probe.getsockname()[0]


class GlooSender:
    """The trainer's side of our weight transfer to a CPU server: a broadcast for each tensor."""

    def __init__(self, server, deadline):
        self.server = server
        world_size = 1 + server.request("GET", "get_world_size")["world_size"]
        host, timeout = own_address(server.url), timedelta(seconds=server.timeout)
        store = dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        info = {"host": host, "port": store.port, "world_size": world_size, "timeout": server.timeout}
        self.group, _ = side_by_side(
            deadline,
            lambda: dist.ProcessGroupGloo(store, 0, world_size, timeout),
            lambda: server.request("POST", "init_weight_transfer_engine", json={"init_info": info}),
        )

    def send(self, weights, deadline):
        info = {"names": list(weights), "shapes": [list(weight.shape) for weight in weights.values()]}
        info["dtype_names"] = [str(weight.dtype).removeprefix("torch.") for weight in weights.values()]

        def broadcast():
            for weight in weights.values():
                self.group.broadcast(weight.detach().cpu().contiguous(), 0).wait()

        self.server.request("POST", "start_weight_update")
        side_by_side(
            deadline,
            broadcast,
            lambda: self.server.request("POST", "update_weights", json={"update_info": info}),
        )
        self.server.request("POST", "finish_weight_update", json={})


class VLLMSender:
    """The trainer's side of vLLM's own nccl and ipc transfers. Call order is tested against a server that
    records it; neither has run on GPUs yet."""

    def __init__(self, server, deadline):
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient,
            ParamMeta,
            WeightSource,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        class Weights(WeightSource):
            """What is sent next."""

            def metadata(self):
                return [ParamMeta(name, w.dtype, tuple(w.shape)) for name, w in self.weights.items()]

            def __iter__(self):
                return iter(self.weights.items())

        self.source = Weights()
        if server.needs.transport == "ipc":
            info = IPCTrainerInitInfo(rank=0 if server.is_owner else 1)
        else:
            world_size = 1 + server.request("GET", "get_world_size")["world_size"]
            with socket.socket() as free:
                free.bind(("", 0))
                port = free.getsockname()[1]
            info = NCCLTrainerInitInfo(own_address(server.url), port, world_size, rank=0)
        client = HTTPVLLMWeightSyncClient(server.url, server.timeout)
        start = functools.partial(
            WeightTransferTrainerFactory.trainer_init, client=client, source=self.source
        )
        (self.engine,) = side_by_side(deadline, lambda: start(info))

    def send(self, weights, deadline):
        self.source.weights = weights
        side_by_side(deadline, self.engine.send_weights)


@functools.cache
def tls_context():
    """Made once: that reads all certificates."""
    return ssl.create_default_context()


def versions_of(choices):
    """The labels of the weights that sampled some choices of a vLLM server."""
    return {span["version"] for choice in choices for span in choice["weight_versions"]}


def is_spoilt(choices):
    """Whether some were aborted, or sampled by weights that no trainer has completed."""
    is_aborted = any(choice["finish_reason"] not in ("stop", "length") for choice in choices)
    return is_aborted or not all(version.isdecimal() for version in versions_of(choices))


class VLLMEngine:
    """Generation by vLLM servers: token ids in, token ids and log-probs out. As HFEngine, over HTTP."""

    def __init__(self, servers, model=None, dtype=None, in_flight=False, keep_kv=False):
        """servers: those that this rank asks, the least busy first. model: whose weights they get, in
        `dtype`. in_flight: requests go on while a trainer gives the servers weights, of whatever version; but
        those of a server that was started again do not count. keep_kv: requests keep their keys and values
        then; what is cached of prompts counts for one version only."""
        self.servers, self.model, self.dtype, self.version = servers, model, dtype, None
        self.in_flight, self.keep_kv = in_flight, keep_kv
        self.load = Counter()  # URL -> prompts that are there now
        self.retries = Counter()  # why prompts were asked for again

    def load_weights(self, weights, version):
        """As HFEngine.load_weights, for all ranks at once: gathering `weights` may need them all."""
        weights = {name: weight.detach().to(self.dtype) for name, weight in weights}
        weights = revert_weight_conversion(self.model, weights)  # experts have other names in checkpoints
        for server in self.servers:
            server.load_weights(weights, version, self.keep_kv)
        self.version = version

    def generate(self, prompts, keys, num_samples, max_lengths, temperature, stop_ids):
        """As HFEngine.generate; EngineError where a server fails or has other weights than it was given."""
        return asyncio.run(self.generate_all(prompts, keys, num_samples, max_lengths, temperature, stop_ids))

    async def generate_all(self, prompts, keys, num_samples, max_lengths, temperature, stop_ids):
        # Every setting is given: else a server's own defaults would apply.
        shared = {"n": num_samples, "temperature": temperature, "logprobs": 0, "stop_token_ids": stop_ids}
        shared |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        shared |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "detokenize": False}
        limits = httpx.Limits(max_connections=None)
        tls = tls_context()
        async with httpx.AsyncClient(verify=tls, timeout=self.servers[0].timeout, limits=limits) as client:
            requests = []
            for ids, key, length in zip(prompts, keys, max_lengths, strict=True):
                seed = int(np.random.default_rng(key).integers(2**62))  # vLLM adds 1 for each further sample
                body = {"token_ids": ids, "sampling_params": {**shared, "max_tokens": length, "seed": seed}}
                body |= {"cache_salt": f"version {self.version}"} if self.keep_kv else {}
                server = self.least_busy()
                self.load[server.url] += 1
                requests.append(self.ask(client, server, body))
            return await asyncio.gather(*requests)

    def least_busy(self):
        return min(self.servers, key=lambda server: self.load[server.url])

    async def ask(self, client, server, body):
        """-> the Rollouts of one prompt."""
        try:
            check = is_spoilt if self.in_flight else None
            answer = await ask_server(client, server, body, self.retries, check)
        finally:
            self.load[server.url] -= 1
        return [self.read(server, body["token_ids"], choice) for choice in answer["choices"]]

    def read(self, server, prompt_ids, choice):
        """A choice of a server's answer -> Rollout."""
        found = versions_of([choice])
        if not self.in_flight and found != {str(self.version)} and self.version is not None:
            has = ", ".join(sorted(found))
            raise EngineError(f"the vLLM server {server.url} has weights {has}, not {self.version}")
        if choice["finish_reason"] not in ("stop", "length"):
            raise EngineError(f"the vLLM server {server.url} ended a sample: {choice['finish_reason']}")
        logps = [token["logprob"] for token in choice["logprobs"]["content"]]
        versions = []
        for span in choice["weight_versions"]:
            version = int(span["version"]) if span["version"].isdecimal() else -1
            versions += [version] * (span["end"] - span["start"])
        if not len(versions) == len(logps) == len(choice["token_ids"]):
            raise EngineError(
                f"the vLLM server {server.url} does not tell versions and log-probs of all tokens"
            )
        is_finished = choice["finish_reason"] == "stop"
        return Rollout(prompt_ids, choice["token_ids"], logps, is_finished, versions=versions)

    def recover(self, stopped=()):
        """Start again what we started, wait for what others do, as `wait`; all need weights again."""
        for server in self.servers:
            server.sender, server.is_asleep, self.version = None, False, None
            if server.process is not None:
                server.kill()
                server.launch()
                server.is_paused = False
            server.wait(stopped)
            try:
                server.check()
            except UserError as error:  # it was started again with other flags
                raise EngineError(str(error)) from error

    def sleep(self):
        """Between generation and training."""
        for server in self.servers:
            server.sleep()

    def wake(self):
        for server in self.servers:
            server.wake()

    def stop(self):
        for server in self.servers:
            server.stop()


async def ask_server(client, server, body, retries, is_spoilt=None):
    """-> the JSON of its answer to a request to generate. A server that fails, or whose choices `is_spoilt`,
    is asked again for server.timeout from then on, which `retries` counts by reason; one that says that the
    request is wrong is not."""
    deadline = math.inf
    while True:
        try:
            answer = await client.post(f"{server.url}/inference/v1/generate", json=body)
            kind, problem = f"{answer.status_code}", f"{answer.status_code}: {answer.text[:500]}"
            if answer.status_code == 200:
                found, kind = answer.json(), "lost weights"
                problem = "it lost the trainer's weights meanwhile"
                if not (is_spoilt and is_spoilt(found["choices"])):
                    return found
            elif answer.status_code < 500 and answer.status_code not in (408, 425, 429):
                raise RefusedError(f"the vLLM server {server.url} refuses a prompt with {problem}")
        except httpx.HTTPError as error:
            kind, problem = type(error).__name__, repr(error)
        patience = server.timeout
        if kind == "ReadTimeout":  # it had its time already
            problem, patience = f"{problem} after {patience:g} s (--vllm-timeout)", 0.0
        deadline = min(deadline, time.monotonic() + patience)
        if server.is_dead() or time.monotonic() >= deadline:
            raise EngineError(f"the vLLM server {server.url} does not generate: {problem}")
        retries[kind] += 1
        await asyncio.sleep(0.5)


class VLLMExtension:
    """For --worker-extension-cls: a vLLM worker that imports this module learns our weight transfer."""


def register_gloo_transfer():
    """The server's side of GlooSender, as a weight transfer engine of vLLM."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        host: str
        port: int
        world_size: int
        timeout: float

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        names: list
        dtype_names: list
        shapes: list

    class GlooReceiver(WeightTransferEngine):
        init_info_cls, update_info_cls = InitInfo, UpdateInfo

        def init_transfer_engine(self, info):
            timeout, rank = timedelta(seconds=info.timeout), 1 + self.parallel_config.rank
            store = dist.TCPStore(info.host, info.port, info.world_size, is_master=False, timeout=timeout)
            self.group = dist.ProcessGroupGloo(store, rank, info.world_size, timeout)

        def start_weight_update(self):
            for layer in self.model.modules():
                info = get_layerwise_info(layer)
                if info.can_load():  # half loaded by an update that failed: vLLM would go on from there
                    _place_kernel_tensors(layer, info)
                    info.reset()
            initialize_layerwise_reload(self.model)

        def receive_weights(self, info):
            for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                self.group.broadcast(weight, 0).wait()
                self.model.load_weights([(name, weight)])

        def finish_weight_update(self):
            finalize_layerwise_reload(self.model, self.model_config)
            for module in self.model.modules():  # a tied head would keep its old weights, packed for the CPU
                if hasattr(module, "cpu_linear") and module.weight.numel():
                    dispatch_cpu_unquantized_gemm(module, remove_weight=False)

        def shutdown(self):
            self.group = None

    WeightTransferEngineFactory.register_engine("gloo", GlooReceiver)


if "vllm.v1.worker.worker_base" in sys.modules:  # this is a vLLM worker, see VLLMExtension
    register_gloo_transfer()
