"""What the scripts share: tokenization. (Rewards, engines and weight sync join it with the RL scripts.)

    row --encode_sft--> ids, loss mask --split_batch--> micro-batches --collate--> MicroBatch --> model

Shapes: T packed tokens of a micro-batch, N trained positions among them, H heads, D head size.
Alignment: labels_N[i] is the token that position positions_N[i] predicts, ids_T[positions_N[i] + 1].
Rows are counted from 1, so that "row 17" of a .jsonl file is its line 17.

UserError marks a user's mistake: scripts print its message alone. Every other exception is a bug.
"""

import csv
import functools
import hashlib
import heapq
import json
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
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

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def parse_source(source):
    """PATH or PATH:WEIGHT -> (path, weight). Weight 2 takes every row twice an epoch, 0.5 a seeded half."""
    match = re.fullmatch(r"(.+):(\d+(?:\.\d+)?)", source)
    if match and not Path(source).exists():
        if float(match[2]) == 0:
            raise UserError(f"--dataset {source}: a weight must be above 0; leave the dataset out instead")
        return match[1], float(match[2])
    return source, 1.0


def read_rows(path, config=None, split="train"):
    """A file, a directory (saved by `datasets`, or of data files) or a hub id -> datasets.Dataset, one row a
    sample."""
    location = Path(path)
    is_file = location.suffix in FILE_TYPES
    if not location.exists() and (is_file or path.startswith((".", "/", "~"))):
        raise UserError(f"dataset {path}: no such file or directory (looked from {Path.cwd()})")
    if location.is_file() and not is_file:
        raise UserError(f"dataset {path}: the file type must be one of {', '.join(FILE_TYPES)}")
    if location.is_file() and location.stat().st_size == 0:
        raise UserError(f"dataset {path} is empty")
    try:
        if is_file:
            options = {}
            if (
                location.suffix == ".csv"
            ):  # every column is text: an answer "54" is no number, "None" not missing
                with open(location, newline="", encoding="utf-8") as file:
                    columns = {name: datasets.Value("string") for name in next(csv.reader(file), [])}
                options = {"features": datasets.Features(columns), "keep_default_na": False}
            return datasets.load_dataset(
                FILE_TYPES[location.suffix], data_files=str(location), split="train", **options
            )
        if (location / "state.json").exists():
            return datasets.load_from_disk(str(location))
        if (location / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(location))[split]
        return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the library's many errors all mean that these rows cannot be read
        if location.suffix == ".jsonl":
            name_bad_line(location)
        cause = error.__cause__ or error
        raise UserError(f"dataset {path} (config {config}, split {split}) cannot be read: {cause}") from error


def name_bad_line(path):
    """Raise a UserError that names the first line of a .jsonl file that is not JSON."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line.strip() or "{}")
            except json.JSONDecodeError as error:
                raise UserError(
                    f"dataset {path}: row {number} is not JSON ({error}); fix or remove it"
                ) from error


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
        if not Path(chat_template).is_file():
            raise UserError(
                f"--chat-template {chat_template}: no such file; it must be a file with a Jinja template"
            )
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


# ---- Validating rows ---------------------------------------------------------------------------------------

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def drop_none(value):
    """Remove the `None` entries that Arrow adds to dictionaries whose keys differ between rows."""
    if isinstance(value, dict):
        return {key: drop_none(entry) for key, entry in value.items() if entry is not None}
    return [drop_none(entry) for entry in value] if isinstance(value, list) else value


def check_messages(messages, column):
    """A row's messages (also ShareGPT's from/value) -> a list of {role, content, ...}; UserError for what is
    not that."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"`{column}` is {json.dumps(messages)[:60]}, not a non-empty list of messages")
    checked = []
    for index, message in enumerate(messages):
        where = f"`{column}[{index}]`"
        if not isinstance(message, dict):
            raise UserError(f"{where} is {json.dumps(message)[:60]}, not an object with `role` and `content`")
        message = drop_none(message)
        if "from" in message and "role" not in message:
            message = {
                "role": SHAREGPT_ROLES.get(message["from"], message["from"]),
                "content": message.get("value"),
            }
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}")
        if isinstance(content, list) and any(
            isinstance(part, dict) and "image" in str(part.get("type")) for part in content
        ):
            raise UserError(f"{where} holds an image; images are not supported, keep text-only rows")
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise UserError(
                f"{where} ({role}) has content of type {type(content).__name__}; make it one string"
            )
        if role == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise UserError(f"{where} is an empty assistant turn; remove it, or the row")
        message["content"] = content
        if message.get("tool_calls"):
            message["tool_calls"] = [check_tool_call(call, where) for call in message["tool_calls"]]
        checked.append(message)
    return checked


def check_tool_call(call, where):
    """{"function": {"name", "arguments"}} (or that object alone), with arguments given as JSON text made an
    object."""
    if not isinstance(call, dict) or not isinstance(call.get("function", call).get("name"), str):
        raise UserError(f"{where} has a tool call without a function name: {json.dumps(call)[:60]}")
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: the arguments of {function['name']} are not JSON: {error}") from error
    return {"type": "function", **{k: v for k, v in call.items() if k == "id"}, "function": function}


def read_json_column(row, column, kind):
    """A column that holds `kind` (list or dict), itself or as JSON text; None where it is empty."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"`{column}` is text but not JSON: {error}") from error
    if value is not None and not isinstance(value, kind):
        raise UserError(f"`{column}` is of type {type(value).__name__}, not {kind.__name__}")
    return drop_none(value) or None


# ---- Chat templates and loss masks -------------------------------------------------------------------------


def encode_messages(tokenizer, messages, turns=None, tools=None, template_kwargs=None):
    """Tokenize a conversation, marking what the model is to learn.

    turns: indices of the assistant messages to train; None marks every token. Returns ids and mask, two lists
    of one length; the ids are those of `apply_chat_template(messages)`. Of a trained turn, all that the model
    must write is marked, the token that ends the turn included. Raises UserError where the template refuses
    the messages or a turn cannot be located.
    """

    def render(messages, generation_prompt=False):
        try:
            return tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **template_kwargs or {},
            )
        except (
            Exception
        ) as error:  # a template is code of the user's: whatever it raises is about these messages
            raise UserError(f"the chat template refuses these messages: {error}") from error

    text = render(messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(
            f"the rendered row begins with two {tokenizer.bos_token}; remove the one in the first message"
        )
    if turns is None:
        return ids, [True] * len(ids)

    template = tokenizer.get_chat_template(tools=tools)
    blocks = None
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        blocks = generation_blocks(tokenizer, template, messages, tools, template_kwargs)
    special, spans = "|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True))), []
    for turn in turns:
        stop = end_of_turn(render, special, messages[: turn + 1])
        start = blocks[turn] if blocks else locate_turn(render, special, text, messages, turn, stop)
        if stop in json.dumps(messages[turn], ensure_ascii=False):
            raise UserError(
                f"the assistant's message {turn} contains {stop}, which the template adds; remove it"
            )
        end = text.find(stop, start) + len(stop)
        if end < start + len(stop) or (spans and start < spans[-1][1]):
            raise UserError(f"the turn of message {turn} cannot be told from the rest; {TEMPLATE_REMEDY}")
        for call in messages[turn].get("tool_calls", ()):
            if call["function"]["name"] not in text[start:end]:
                raise UserError(
                    f"the chat template does not render the tool calls of message {turn}; {TEMPLATE_REMEDY}"
                )
        spans.append((start, end))

    mask, remaining = [], spans[::-1]
    for first, last in offsets:
        while remaining and remaining[-1][1] <= first:
            remaining.pop()
        # A token that begins before the turn but holds its first characters is one the model must produce.
        mask.append(bool(remaining) and last > remaining[-1][0] and last > first)
    return ids, mask


TEMPLATE_REMEDY = (
    "give one that does, with {% generation %} around the assistant's output, by --chat-template"
)


def generation_blocks(tokenizer, template, messages, tools, template_kwargs):
    """Assistant message -> the character at which its {% generation %} block begins; None if not each has
    just one."""
    _, (blocks,) = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **(template_kwargs or {})},
    )
    assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(blocks) != len(assistants):
        return None
    return {index: begin for index, (begin, _) in zip(assistants, blocks, strict=True)}


def locate_turn(render, special, text, messages, turn, stop):
    """The character of `text` at which the model begins to write the assistant's message `turn`, ended by
    `stop`.

    First the generation prompt: what precedes the turn, rendered with one, is a prefix of the text. Where the
    template ends that prompt with a thinking block that this turn lacks: the part of the prompt that the text
    shares. Else (an earlier turn is rendered differently once more follow, or the conversation begins with
    the assistant) a sentinel: the turn begins where the text first changes when the turn's own words change.
    """
    earlier, prompt = (
        (render(messages[:turn]), render(messages[:turn], generation_prompt=True)) if turn else ("", "")
    )
    if turn and text.startswith(prompt):
        return len(prompt)
    if turn and text.startswith(earlier) and prompt.startswith(earlier):
        shared = re.match(rf"(?s).*(?:\n|{special})|", os.path.commonprefix([text, prompt]))
        return max(
            len(earlier), shared.end()
        )  # not in mid-line: <think> and <tool_call> share two characters

    sentinel = "Zq7sentinel7qZ"
    words = {key: sentinel for key in ("content", "reasoning_content", "thinking") if messages[turn].get(key)}
    changed = render([*messages[:turn], {**messages[turn], **words}, *messages[turn + 1 :]])
    before = os.path.commonprefix([text, changed])
    after = changed[changed.rfind(sentinel) + len(sentinel) :]
    if not words or sentinel not in changed[len(before) :] or not text.endswith(after):
        raise UserError(f"the turn of message {turn} cannot be told from the rest; {TEMPLATE_REMEDY}")
    header = prompt[len(os.path.commonprefix([prompt, earlier])) :]
    begin = before.rfind(header)
    if (
        header and begin >= 0 and stop not in before[begin:]
    ):  # this turn's own header: the model writes what follows,
        return begin + len(header)  # a thinking block that opens before the sentinel included
    return len(before)


def end_of_turn(render, special, messages):
    """The special token that ends the last message: the one with which the template ends a plain answer, if
    it is there.

    Phi-3 closes a last turn with <|end|> and then the document with <|endoftext|>; LFM2 closes a tool call
    with its own token and then the turn with <|im_end|>.
    """
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    endings = []
    for conversation in (plain, messages):
        rendered = render(conversation)
        endings.append(re.findall(special, re.search(rf"(?:(?:{special})\s*)*$", rendered).group()))
    if not endings[1]:
        raise UserError(
            f"the chat template ends an assistant turn with {rendered[-12:]!r}, not with a special token: "
            "no model could learn to stop; add eos_token after the assistant's content by --chat-template"
        )
    return endings[0][0] if endings[0] and endings[0][0] in endings[1] else endings[1][-1]


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
    text = prompt + completion + ("" if completion.endswith(eos) else eos)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = (
        encoding["input_ids"],
        [end > max(start, len(prompt)) for start, end in encoding["offset_mapping"]],
    )
    return ([bos, *ids], [False, *mask]) if adds_bos(tokenizer) and ids[0] != bos else (ids, mask)


SFT_COLUMNS = ("input_ids", "messages", "conversations", "prompt", "completion", "text")
EXTRA_COLUMNS = ("labels", "tools", "chat_template_kwargs")


def encode_sft(row, tokenizer, loss_on="auto", max_length=1024, overflow="drop", vocab_size=None):
    """One row -> {"input_ids", "loss_mask", "num_targets", "dropped"}; dropped: why it is not used, or "".

    What is trained, by loss_on: auto is the completion, else the assistant's turns, else (plain text) all.
    loss_mask[t] marks ids[t] as a token to learn; the first of a row follows nothing and is never one.
    Raises UserError for a row that is not what its columns promise.
    """
    if any(row.get(column) is not None for column in ("image", "images")):
        raise UserError("the row has images, which are not supported; use text-only rows and drop the column")
    kind = next((column for column in SFT_COLUMNS if row.get(column) is not None), None)
    if kind in ("prompt", "completion") and isinstance(row.get("prompt"), list):
        kind = "prompt messages"
    choices = {
        "input_ids": () if row.get("labels") is not None else ("all",),
        "messages": ("assistant", "last-assistant", "all"),
        "conversations": ("assistant", "last-assistant", "all"),
        "prompt messages": ("completion", "assistant", "last-assistant", "all"),
        "prompt": ("completion", "all"),
        "completion": ("completion", "all"),
        "text": ("all",),
        None: (loss_on,),
    }[kind]
    if loss_on not in (allowed := ("auto", *choices)):
        raise UserError(f"--loss-on {loss_on} does not apply to this kind of row; use {' or '.join(allowed)}")

    match kind:
        case "input_ids":
            ids, mask = check_tokenized(row, vocab_size)
        case "messages" | "conversations":
            ids, mask = encode_chat(tokenizer, row, [], check_messages(row[kind], kind), loss_on)
        case "prompt messages":
            prompt = check_messages(row["prompt"], "prompt")
            ids, mask = encode_chat(
                tokenizer, row, prompt, check_messages(row["completion"], "completion"), loss_on
            )
        case "prompt" | "completion":
            prompt, completion = check_text(row, "prompt", empty=True), check_text(row, "completion")
            ids, mask = encode_text(tokenizer, prompt, completion)
        case "text":
            ids, mask = encode_text(tokenizer, "", check_text(row, "text"))
        case None:
            raise UserError(f"the columns {', '.join(SFT_COLUMNS)} are all empty; fill one or remove the row")
    mask = [True] * len(ids) if loss_on == "all" else mask

    dropped = ""
    if len(ids) > max_length and overflow == "error":
        raise UserError(f"the row has {len(ids)} tokens, more than --max-length {max_length}; raise it")
    if len(ids) > max_length and overflow == "drop":
        dropped = f"longer than --max-length {max_length}"
    elif not any(mask[1:max_length]):
        dropped = f"nothing to train{f' within --max-length {max_length}' if any(mask[1:]) else ''}"
    end = 0 if dropped else max_length
    ids, mask = ids[:end], [False, *mask[1:]][:end]
    return {"input_ids": ids, "loss_mask": mask, "num_targets": sum(mask), "dropped": dropped}


def encode_chat(tokenizer, row, prompt, messages, loss_on):
    """Checked messages that follow those of a prompt, with the row's tools and arguments -> ids, mask."""
    if tokenizer.chat_template is None:
        raise UserError(
            "the row holds messages, but the tokenizer has no chat template; give one by --chat-template"
        )
    first = 0 if loss_on in ("assistant", "last-assistant") else len(prompt)
    messages = prompt + messages
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    turns = {"all": None, "last-assistant": turns[-1:]}.get(loss_on, turns)
    tools, arguments = (
        read_json_column(row, "tools", list),
        read_json_column(row, "chat_template_kwargs", dict),
    )
    return encode_messages(tokenizer, messages, turns, tools, arguments)


def check_text(row, column, empty=False):
    """The text of a column; UserError if it holds something else."""
    if not isinstance(row.get(column), str) or not (row[column] or empty):
        raise UserError(
            f"`{column}` is {json.dumps(row.get(column))[:60]}, not {'' if empty else 'non-empty '}text"
        )
    return row[column]


def check_tokenized(row, vocab_size):
    """`input_ids` and, if there are any, `labels` (the same ids, or -100: not trained) -> ids, mask."""
    ids, labels = row["input_ids"], row.get("labels")
    labels = ids if labels is None else labels
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


def prepare_data(sources, encode, columns, config=None, split="train", seed=0):
    """Tokenize the rows of some datasets in parallel, cached by `datasets` under an explicit fingerprint.

    sources: what --dataset holds. encode: a functools.partial, row -> columns and "dropped"; its arguments
    are part of the fingerprint. columns: those of which a row must have one.
    Returns the rows to train, with the columns of encode, `source` and `row`; and a report, a dict of counts.
    Call it before init_process_group: one process of a machine works while the others wait for its lock.
    Raises UserError that names the first bad rows.
    """
    parts, report = [], {"rows": 0, "dropped": Counter(), "ignored_columns": set()}
    for number, (path, weight) in enumerate(map(parse_source, sources)):
        name = hashlib.sha256(path.encode()).hexdigest()[:16]
        with wait_for_lock(
            Path(datasets.config.HF_DATASETS_CACHE) / f"{name}.prepare.lock", f"tokenize {path}"
        ):
            rows = read_rows(path, config, split)
            if not len(rows):
                raise UserError(f"dataset {path} is empty")
            if not set(rows.column_names) & set(columns):
                found = f"dataset {path} has columns {rows.column_names}"
                raise UserError(f"{found}; it needs one of {', '.join(columns)}")
            encoded = rows.map(
                functools.partial(encode_row, encode=encode),
                with_indices=True,
                remove_columns=rows.column_names,
                num_proc=min(os.cpu_count(), 1 + len(rows) // 2000) if len(rows) > 2000 else None,
                new_fingerprint=fingerprint(rows, encode),
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
        report["ignored_columns"] |= set(rows.column_names) - {*columns, *EXTRA_COLUMNS}
        kept = [index for index, reason in enumerate(dropped) if not reason]
        extra = random.Random(f"{seed}:{number}").sample(kept, round(len(kept) * (weight % 1)))
        chosen = kept * int(weight) + sorted(extra)
        part = encoded.remove_columns(["dropped", "error"]).select(chosen)
        parts.append(part.add_column("source", [path] * len(part)))
    data = datasets.concatenate_datasets(parts)
    if not len(data):
        dropped = dict(report["dropped"])
        raise UserError(f"no row is left to train of {report['rows']} in {', '.join(sources)}: {dropped}")
    return data, report


def encode_row(row, index, encode):
    try:
        return {**encode(row), "error": "", "row": index + 1}
    except UserError as error:
        blank = {"input_ids": [], "loss_mask": [], "num_targets": 0, "dropped": "error"}
        return {**blank, "error": str(error), "row": index + 1}


def fingerprint(rows, encode):
    """Of what tokenized rows depend on: rows, tokenizer and template, the encoder's arguments, this file."""
    given = dict(encode.keywords)
    tokenizer = given.pop("tokenizer")
    parts = [rows._fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, given]
    text = repr(parts) + encode.func.__name__ + Path(__file__).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
    text, runs, start = "", np.flatnonzero(np.diff(mask, prepend=not mask[0])).tolist(), 0
    for start, end in zip(runs, [*runs[1:], len(ids)], strict=True):
        piece = tokenizer.decode(ids[start:end])
        text += f"[[{piece}]]" if mask[start] else piece
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
        count += 1


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
        documents_N=documents_T[targets_N],
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
        if sliding_window is not None and attention_mask is None and key.shape[2] > sliding_window:
            last = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device)[:, None]
            seen = torch.arange(key.shape[2], device=key.device)
            attention_mask = ((seen <= last) & (seen > last - sliding_window))[None, None]
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
