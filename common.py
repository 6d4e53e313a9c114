"""What the scripts share: tokenization. (Rewards, engines and weight sync join it with the RL scripts.)

    row --encode_sft--> ids, loss mask --split_batch--> micro-batches --collate--> MicroBatch --> model

Shapes: T packed tokens of a micro-batch, N trained positions among them, H heads, D head size.
Alignment: labels_N[i] is the token that position positions_N[i] predicts, ids_T[positions_N[i] + 1].
Rows are counted from 1: "row 17" of a .jsonl file is its line 17.

UserError marks a user's mistake: scripts print its message alone. Every other exception is a bug.
"""

import csv
import functools
import hashlib
import heapq
import itertools
import json
import math
import operator
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from datasets import Features, List, Value
from filelock import FileLock, Timeout
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.chat_template_utils import render_jinja_template

IGNORE = -100


class UserError(ValueError):
    """Wrong input, told in one message that names what was found, where, and the remedy."""


# ============================================================================================================
# 1. Tokenization
# ============================================================================================================

# ---- Reading rows ------------------------------------------------------------------------------------------

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


def parse_source(source):
    """PATH or PATH:WEIGHT -> (path, weight). Weight 2 takes every row twice an epoch, 0.5 a seeded half."""
    path, _, weight = source.rpartition(":")
    if Path(source).exists() or not re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", weight):
        return source, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UserError(f"--dataset {source}: the weight must be a number above 0; or leave the dataset out")
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
            features = Features({"row": Value("int64"), "json": Value("binary")})
            arguments = {"path": str(location), "content": content}
            if next(text_rows(**arguments), None) is None:
                raise UserError("it has no rows")
            return datasets.Dataset.from_generator(text_rows, features=features, gen_kwargs=arguments)
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


def text_rows(path, content):
    """The number and the JSON text of each row of a file. `content`, its hash, tells datasets' cache of a
    change."""
    if path.endswith(".csv"):
        csv.field_size_limit(2**31 - 1)
        with open(path, newline="", encoding="utf-8-sig") as file:
            filled = (cells for cells in csv.reader(file) if any(cells))
            header = [name.strip() for name in next(filled, [])]
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
        if rb"\ud" in text:  # an escape that may be half of a character
            json.dumps(row, ensure_ascii=False).encode()
    except ValueError as error:  # not JSON, or not UTF-8
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
        if calls:
            if not isinstance(calls, list):
                raise UserError(f"{where} has tool calls that are no list: {excerpt(calls)}")
            message["tool_calls"] = [check_tool_call(call, where) for call in calls]
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
    # begins before the turn but holds its first characters is one that the model must write.
    spans = trained_spans(template, text, messages, turns)
    bounds = [0, *(end for _, end in encoding["offset_mapping"])]
    mask, current = [], 0
    for begin, end in itertools.pairwise(bounds):
        while current < len(spans) and spans[current][1] <= begin:
            current += 1
        mask.append(current < len(spans) and end > spans[current][0])
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
    if row.get("image") or row.get("images"):
        raise UserError("the row has images, which are not supported; use text-only rows and drop the column")
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
            ids, mask = check_tokenized(row, vocab_size)
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

    dropped = ""
    if len(ids) > max_length and overflow == "error":
        raise UserError(f"the row has {len(ids)} tokens, more than --max-length {max_length}; raise it")
    if len(ids) > max_length and overflow == "drop":
        dropped = f"longer than --max-length {max_length}"
    elif not any(mask[1:max_length]):
        dropped = f"nothing to train{f' within --max-length {max_length}' if any(mask[1:]) else ''}"
    length, cut = (0 if dropped else min(len(ids), max_length)), len(ids) > max_length
    ids, mask = ids[:length], [False, *mask[1:]][:length]
    stops = (token for token, trained in zip(ids[::-1], mask[::-1], strict=True) if trained)
    stop_id = next((token for token in stops if tokenizer.decode([token]).strip()), -1)
    ends = not cut and stop_id in special_tokens(tokenizer).values()
    return {
        "input_ids": ids,
        "loss_mask": mask,
        "length": length,
        "num_targets": sum(mask),
        "stop_id": stop_id if ends else -1,
        "dropped": dropped,
        "unused": ", ".join(
            sorted(name or "''" for name in row if row[name] and name not in SFT_KINDS[kind])
        ),
    }


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
    return encode_messages(tokenizer, messages, turns, tools, arguments)


def check_text(row, column, empty=False):
    """The text of a column; UserError if it holds something else."""
    if not isinstance(row.get(column), str) or not (row[column] or empty):
        raise UserError(f"`{column}` is {excerpt(row.get(column))}, not {'' if empty else 'non-empty '}text")
    return row[column]


def check_tokenized(row, vocab_size):
    """`input_ids` and, if there are any, `labels` (the same ids, or -100: not trained) -> ids, mask."""
    ids = read_json_column(row, "input_ids", list)
    labels = read_json_column(row, "labels", list) or ids
    if not ids or not all(isinstance(token, int) for token in [*ids, *labels]):
        raise UserError("`input_ids` and `labels` must be non-empty lists of integers")
    if vocab_size and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(
            f"`input_ids` has ids from {min(ids)} to {max(ids)}; the model's vocabulary is {vocab_size}"
        )
    pairs = zip(ids, labels, strict=False)
    if len(labels) != len(ids) or any(label not in (token, IGNORE) for token, label in pairs):
        raise UserError("`labels` must repeat `input_ids`, unshifted, with -100 where nothing is trained")
    return ids, [label != IGNORE for label in labels]


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
            rows = read_rows(path, config, split)
            if not len(rows):
                raise UserError(f"dataset {path} has no rows")
            key = fingerprint(rows, encode)
            encoded = rows.map(
                functools.partial(encode_row, encode=encode, names=list(features)),
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
        parts.append(part.add_column("source", [path] * len(part)))
    data = datasets.concatenate_datasets(parts)
    if not len(data):
        dropped = dict(report["dropped"])
        raise UserError(f"no row is left to train of {report['rows']} in {', '.join(sources)}: {dropped}")
    return data, report


def encode_row(row, index, encode, names):
    number = row["row"] if "json" in row else index + 1
    try:
        encoded = encode(parse_row(row["json"]) if "json" in row else drop_none(row))
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
    are trained and the token each predicts; `documents_N` the document (counted from 0) that each belongs
    to."""

    inputs: dict
    positions_N: torch.Tensor
    labels_N: torch.Tensor
    documents_N: torch.Tensor
    num_tokens: int


def collate(documents, device="cpu"):
    """[(ids, loss mask), ...] -> MicroBatch. No documents: one that trains nothing, so that every rank runs a
    forward."""
    real = sum(len(ids) for ids, _ in documents)
    documents = documents or [(np.zeros(2, np.int64), np.zeros(2, bool))]
    lengths = [len(ids) for ids, _ in documents]
    ids_T = torch.from_numpy(np.concatenate([ids for ids, _ in documents]).astype(np.int64))
    mask_T = torch.from_numpy(np.concatenate([mask for _, mask in documents]).astype(bool))
    ends = np.cumsum(lengths)
    mask_T[ends - lengths] = False  # the first token of a document is predicted by nothing
    targets_N = mask_T.nonzero().squeeze(1)
    lengths_B = torch.tensor(lengths)
    documents_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths_B)
    positions_T = torch.arange(len(ids_T)) - torch.repeat_interleave(
        torch.from_numpy(ends - lengths), lengths_B
    )
    cu_seqlens = F.pad(lengths_B.cumsum(0), (1, 0)).to(device, torch.int32)

    def to_device(tensor):
        return (
            tensor.pin_memory().to(device, non_blocking=True)
            if torch.device(device).type == "cuda"
            else tensor
        )

    return MicroBatch(
        inputs={
            "input_ids": to_device(ids_T)[None],
            "position_ids": to_device(positions_T)[None],
            "attention_mask": None,
            "use_cache": False,
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "groups": group_documents(lengths) if torch.device(device).type == "cpu" else None,
        },
        positions_N=to_device(targets_N - 1),
        labels_N=to_device(ids_T[targets_N]),
        documents_N=to_device(documents_T[targets_N]),
        num_tokens=real,
    )


# ---- Attention that keeps packed documents apart -----------------------------------------------------------

LONG_DOCUMENT = 256  # tokens from which a document's attention is one call of its own on CPU


def group_documents(lengths):
    """Documents of similar length, to be attended in one batched call each on CPU (many tiny calls are slow).

    Returns [(rows (n, L) of token indices, each padded at its end by its last token)], and the index that
    puts the flattened outputs of all groups back into the packed order. Causality keeps padding at the end
    from being seen.
    """
    ends, groups = np.cumsum(lengths), []
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        longest = lengths[order[0]]
        n = sum(1 for index in order if lengths[index] >= 0.8 * longest) if longest < LONG_DOCUMENT else 1
        groups.append(order[:n])
        order = order[n:]
    rows, back, offset = [], np.empty(ends[-1], np.int64), 0
    for group in groups:
        width = lengths[group[0]]
        starts = np.array([ends[index] - lengths[index] for index in group])[:, None]
        last = np.array([ends[index] - 1 for index in group])[:, None]
        rows.append(torch.from_numpy(np.minimum(starts + np.arange(width), last)))
        for line, index in enumerate(group):
            begin = offset + line * width
            back[ends[index] - lengths[index] : ends[index]] = np.arange(begin, begin + lengths[index])
        offset += len(group) * width
    return rows, torch.from_numpy(back)


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
    **kwargs,
):
    """Causal attention within each document of a packed row: transformers' attention function "varlen".

    query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D), None. Without `cu_seq_lens_q`, as when
    transformers itself generates, it is transformers' SDPA. Soft-capped scores and attention sinks are
    refused.
    """
    if softcap is not None or s_aux is not None:
        raise UserError(
            "this model soft-caps attention or uses sinks, which varlen lacks; use --attention eager"
        )
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
    query_THD, key_THD, value_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn  # CUDA only

        repeats = query.shape[1] // key.shape[1]
        key_THD, value_THD = (tensor.repeat_interleave(repeats, 1) for tensor in (key_THD, value_THD))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        qkv = (query_THD.contiguous(), key_THD, value_THD)
        out_THD = varlen_attn(*qkv, *bounds, scale=scaling, window_size=window)
        return out_THD[None], None
    return grouped_attention(query_THD, key_THD, value_THD, scaling, sliding_window, *groups)[None], None


@torch.compiler.disable
def grouped_attention(query_THD, key_THD, value_THD, scaling, sliding_window, rows, back):
    """The CPU's varlen attention: one causal SDPA a group of documents. Shapes (T, H, D) and (T, H_kv, D)."""
    outputs = []
    for rows_GL in rows:
        n, length = rows_GL.shape
        if n == 1:  # one document is a slice of the row, without a copy
            start = int(rows_GL[0, 0])
            qkv = [tensor[None, start : start + length] for tensor in (query_THD, key_THD, value_THD)]
        else:
            index = rows_GL.flatten()
            qkv = [
                tensor.index_select(0, index).unflatten(0, (n, length))
                for tensor in (query_THD, key_THD, value_THD)
            ]
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv)
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - sliding_window)
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)


def varlen_mask(*args, attention_mask=None, **kwargs):
    """No mask tensor for packed rows: `varlen_attention` knows the documents. A padded batch gets SDPA's
    mask."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register("varlen", varlen_attention)
AttentionMaskInterface.register("varlen", varlen_mask)
