"""Environments: exact tokens over several turns, tool calls, processes that hang or die, seeds, and whole runs."""

import contextlib
import copy
import functools
import json
import math
import re
import time

import conftest
import numpy as np
import pytest
import torch
from conftest import ASSETS, read_metrics, run, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenization import stock
from trl.chat_template_utils import llama3_template, qwen3_template

import common
import grpo
from common import EnvironmentWorker, Sample, UserError, chat_template, tool_tokens

EMBEDDED = common.load_tokenizer(str(ASSETS / "model"))
STOP = [EMBEDDED.eos_token_id]
ECHO = f"{ASSETS / 'echo.py'}:Echo"
CALCULATOR = f"{ASSETS / 'calculator.py'}:Calculator"


@pytest.fixture(scope="module")
def echo():
    yield (worker := EnvironmentWorker(ECHO, timeout=20))
    worker.stop()


def hermes(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Script:
    """An engine that writes what a script says: `turns(key, turn)` gives the text of a turn, which is tokenized in two
    parts, as no tokenizer would. It records what it saw."""

    def __init__(self, turns, cut=0):
        self.turns, self.cut, self.seen = turns, cut, []

    def generate(self, prompts, keys, num_samples, max_lengths, temperature, stop_ids):
        groups = []
        for prompt, (*key, turn), limit in zip(prompts, keys, max_lengths, strict=True):
            assert limit >= num_samples == 1
            text = self.turns(tuple(key), turn)
            parts = EMBEDDED([text[: self.cut], text[self.cut :]])["input_ids"]
            ids = [*parts[0], *parts[1], *stop_ids]
            sample = Sample(prompt, ids[:limit], [True] * len(ids[:limit]), [-0.5 - turn] * len(ids[:limit]))
            sample.versions, sample.is_finished = [turn] * len(sample.ids), len(ids) <= limit
            self.seen.append((tuple(key), turn, list(prompt), sample.ids))
            groups.append([sample])
        return groups


def play(worker, turns, rows=({},), num_samples=2, max_turns=8, max_length=2000, max_new=1000, cut=0):
    """Play scripted turns in an environment -> the groups of Samples and the engine."""
    user = {"role": "user", "content": "Go."}
    encode = functools.partial(common.encode_prompt, tokenizer=EMBEDDED, max_length=500, tools=worker.tools)
    rows = [encode({"prompt": [user], **row}) for row in rows]
    keys, engine = [(0, 0, place) for place in range(len(rows))], Script(turns, cut)
    limits = max_turns, max_length, max_new
    return common.play_episodes(engine, worker, EMBEDDED, rows, keys, num_samples, limits, 1.0, STOP), engine


def results(sample):
    return [message["content"] for message in sample.raw_completion if message["role"] == "tool"]


# ---- Tokens ----------------------------------------------------------------------------------------------------------

SPECIAL = ["<|im_end|>", "<|im_start|>assistant\n", "\n\n", "7probe7", "</tool_call>", "<think>", "\ud800", "🂡é"]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(SPECIAL))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tokens_are_exactly_what_the_engine_saw(echo, data):
    """Whatever is said, in how many turns and calls, and wherever a limit cuts."""
    start = data.draw(st.sampled_from(["", " Look: 7probe7", " seed"]))
    max_new, max_turns = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 4))
    scripts = {}
    for key in [(0, 0, place, sample) for place in range(2) for sample in range(2)]:
        turns = data.draw(st.lists(st.lists(TEXTS, min_size=1, max_size=2), max_size=4))
        scripts[key] = [*("".join(hermes("say", text=text) for text in texts) for texts in turns), "The end."]
    rows = [{"start": start}] * 2
    groups, engine = play(echo, lambda key, turn: scripts[key][turn], rows, 2, max_turns, 600, max_new, 4)
    for key, sample in zip(scripts, [sample for group in groups for sample in group], strict=True):
        assert not sample.failure
        whole, seen = sample.prompt_ids + sample.ids, [entry[2:] for entry in engine.seen if entry[0] == key]
        assert len(seen) == sample.turns <= max_turns
        for prompt, ids in seen:  # each turn stands where the engine wrote it, after what the engine saw
            assert whole[: len(prompt) + len(ids)] == prompt + ids
        assert len(seen[-1][0]) + len(seen[-1][1]) == len(whole) <= 600
        begins = [len(prompt) - len(sample.prompt_ids) for prompt, _ in seen]
        sampled = {b + i for b, (_, ids) in zip(begins, seen, strict=True) for i in range(len(ids))}
        assert sample.mask == [place in sampled for place in range(len(sample.ids))]
        assert sample.logps == [-0.5 - turn for turn, (_, ids) in enumerate(seen) for _ in ids]
        assert sample.versions == [turn for turn, (_, ids) in enumerate(seen) for _ in ids]
        assert len(sample.ids) <= max_new
        assert sample.is_finished == (sample.turns == len(scripts[key]) and sample.ids[-1] == STOP[0])
        assert sample.raw_completion[-1]["role"] == "assistant"


def test_an_episode_is_what_the_template_renders(echo):
    """With well-behaved texts, ids are those of the whole conversation; the trained ones are sft.py's."""
    second = hermes("say", text="c") + hermes("later", text="d", seconds=0)
    said = [hermes("say", text="a\nb"), second, "Done."]
    ((sample, _),), _ = play(echo, lambda key, turn: said[turn])
    contents = ["a\nb", "c", "{'said': 'd'}"]
    tools = [{"role": "tool", "content": content} for content in contents]
    answers = [{"role": "assistant", "content": text} for text in said]
    messages = [{"role": "user", "content": "Go."}, answers[0], tools[0], answers[1], *tools[1:], answers[2]]
    row = common.encode_sft({"messages": messages}, EMBEDDED)
    ids, mask = row["input_ids"], row["loss_mask"]
    whole = sample.prompt_ids + sample.ids
    assert ids[: len(whole)] == whole  # the template ends with a line break
    assert mask[: len(whole)] == [False] * len(sample.prompt_ids) + sample.mask
    assert [m["content"] for m in sample.raw_completion] == [said[0], "a\nb", said[1], *contents[1:], "Done."]
    assert (sample.turns, sample.calls, sample.failed_calls, sample.environment_reward) == (3, 3, 0, 2.0)
    Sample(**vars(sample))  # as checkpoints keep it


# ---- Templates and tool calls ----------------------------------------------------------------------------------------

PARAMETERS = {"type": "object", "properties": {"text": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "say", "description": "d", "parameters": PARAMETERS}}]
STOPS = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "mistral": "</s>"}


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("count", [1, 2])
def test_tool_tokens_are_the_templates(name, count):
    """They follow the stop token of the turn in the template's own rendering of a whole conversation."""
    tokenizer, template = stock(name), chat_template(stock(name), TOOLS)
    stop_id = tokenizer.convert_tokens_to_ids(STOPS[name])
    answers = [("ok", (f"result {i}", False)) for i in range(count)]
    messages = common.tool_messages(template, [("say", {"text": "a"}, "")] * count, answers)
    text = STOPS[name] + tokenizer.decode(tool_tokens(template, messages, [stop_id]))
    other = {"type": "function", "function": {"name": "say", "arguments": {"text": "other"}}}
    called = [{**other, "id": message["tool_call_id"]} for message in messages]
    said = {"content": "", "tool_calls": called}
    if name == "llama3" or (name, count) == ("llama3_1", 2):  # it knows no tool calls, or only one
        said = {"content": "Other."}
    conversation = [{"role": "user", "content": "Other."}, {"role": "assistant", **said}, *messages]
    assert template.render(conversation, True).endswith(text)
    assert [text.count(f"result {i}") for i in range(count)] == [1] * count


def with_template(text):
    tokenizer = copy.deepcopy(EMBEDDED)
    tokenizer.chat_template = text
    return tokenizer


TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NO_PLACE = "has no place for a tool's result"


@pytest.mark.parametrize(("tokenizer", "stop", "message"), [
    (EMBEDDED, "<|im_end|>", None),
    (stock("llama3_1"), "<|eot_id|>", r"writes calls as .*\"name\": \"say\".*needs a `response_template`"),
    (with_template("{% for m in messages if m.role != 'tool' %}" + TURN), "<|im_end|>", NO_PLACE),
    (with_template("{% for m in messages[::-1] %}" + TURN), "<|im_end|>", NO_PLACE),
])  # fmt: skip
def test_templates_that_do_not_serve_are_refused(tokenizer, stop, message):
    stop_ids = [tokenizer.convert_tokens_to_ids(stop)]
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        common.check_tools(tokenizer, TOOLS, stop_ids)


BAD = ("unknown", {}, "malformed tool call: ...")
YES, NO = ("say", {"text": "yes"}, ""), ("say", {"text": "no"}, "")
QWEN = qwen3_template, "<|im_start|>assistant\n", "<|im_end|>"
LLAMA = llama3_template, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"
SAY_YES, SAY_NO = hermes("say", text="yes"), hermes("say", text="no")


@pytest.mark.parametrize(("form", "text", "expected"), [
    (None, SAY_YES, [YES]),
    (None, 'A<b:\n<tool_call>\n{"name": "say", "arguments": "{\\"text\\": \\"é\\\\n\\"}"}\n</tool_call>\n' + SAY_NO, [("say", {"text": "é\n"}, ""), NO]),
    (None, "<think>" + SAY_NO + "</think>" + SAY_YES, [YES]),
    (None, '<tool_call>{"name": "say"}</tool_call>', [("say", {}, "")]),
    (None, hermes("shout", text="a"), [("shout", {"text": "a"}, "Tool shout not found.")]),
    (None, hermes("reset"), [("reset", {}, "Tool reset not found.")]),
    (None, '<tool_call>{"name": "say", "arguments"</tool_call>', [BAD]),
    (None, "<tool_call>" + "[" * 100_000 + "</tool_call>", [BAD]),
    (None, SAY_NO + "<tool_call>7</tool_call>" + SAY_YES, [NO, BAD]),
    (QWEN, "<think>\nHm.\n</think>\n\n" + SAY_YES + "\n" + SAY_NO, [YES, NO]),
    (LLAMA, '{"name": "say", "parameters": {"text": "yes"}}', [YES]),
])  # fmt: skip
def test_calls_as_hermes_and_response_templates_have_them(form, text, expected):
    tokenizer = copy.deepcopy(EMBEDDED)
    tokenizer.response_template, prefix, stop = form or (None, "", "<|im_end|>")
    found = common.parse_calls(tokenizer, prefix, text + stop, TOOLS)
    assert [(*call, re.sub(r"(?s)(call: ).+", r"\1...", problem)) for *call, problem in found] == expected


# ---- Environments that behave, and others ----------------------------------------------------------------------------


def test_results_and_errors_reach_the_model(echo):
    wrong = [hermes("go_wrong", how=how) for how in ("raise", "exit", "")]
    said = ["".join(wrong) + hermes("shout"), hermes("say", words="a"), "<tool_call>{</tool_call>"]
    said += [hermes("go_wrong", how="end"), "never"]
    groups, engine = play(echo, lambda key, turn: said[turn], num_samples=1)
    (sample,) = groups[0]
    contents = results(sample)
    assert contents[:3] == [str({"error": "'gone'"}), str({"error": "1"}), "7"]
    assert contents[3] == str({"error": "Tool shout not found."})
    assert "unexpected keyword argument 'words'" in contents[4]
    assert contents[5].startswith("{'error': 'malformed tool call")
    assert (sample.turns, sample.calls, sample.failed_calls) == (4, 7, 5)
    assert sample.is_finished  # the environment was done
    assert sample.raw_completion[-1]["content"] == said[3]
    assert len(engine.seen) == 4


def test_control_tokens_of_results_do_not_reach_the_model(echo):
    """Not those that a tool returns, nor those in the name of a tool that the model made up."""
    control = "<|im_end|>\n<|im_start|>user"
    said = [hermes("say", text=control) + hermes(control) + hermes("say", text="|im_end|"), "Done."]
    groups, _ = play(echo, lambda key, turn: said[turn], num_samples=1)
    error = "{'error': 'The call or its result has a control token.'}"
    assert results(groups[0][0]) == [error, error, "|im_end|"]


def test_calls_of_episodes_run_at_the_same_time_and_answers_keep_their_order(echo):
    turn_1 = "".join(hermes("later", text=str(n), seconds=s) for n, s in enumerate((0.3, 0.0, 0.1)))
    began = time.monotonic()
    groups, _ = play(echo, lambda key, turn: [turn_1, "Done."][turn], num_samples=20)
    assert time.monotonic() - began < 5  # one after the other they take 8 s
    assert [results(sample) for sample in groups[0]] == [[str({"said": str(n)}) for n in range(3)]] * 20


def test_a_group_has_one_seed_and_one_prompt(echo):
    rows = [{"start": "seed", "seed_of": "row"}, {"start": "seed"}, {"start": "seed", "seed": 99}]
    groups, _ = play(echo, lambda key, turn: "Done.", rows, num_samples=3)
    said = [{sample.raw_prompt[-1]["content"] for sample in group} for group in groups]
    assert [len(prompts) for prompts in said] == [1, 1, 1]
    assert len(set().union(*said)) == 3
    assert said[2] == {"Go. seed 99"}
    assert "Go. seed 99<|im_end|>" in EMBEDDED.decode(groups[2][0].prompt_ids)


def test_what_fails_costs_its_episode(echo):
    """A reward that is NaN is the reward function's to judge."""
    rows = [{"start": "raise"}, {"reward": 1}, {"start": "x " * 700}, {"start": "<|im_end|>"}]

    def turns(key, turn):
        return "Done." if turn else hermes("say", text=["nan", "broken"][key[3]])

    groups, engine = play(echo, turns, rows, max_length=300)
    failures = ["no start"] * 2, ["", "no reward"], ["the prompt is too long"] * 2
    failures += (["reset returned <|im_end|>"] * 2,)
    assert [[s.failure.removeprefix("environment: ") for s in group] for group in groups] == [*failures]
    assert all(math.isnan(sample.environment_reward) for group in groups for sample in group)
    assert {entry[0][2] for entry in engine.seen} == {1}


@pytest.mark.parametrize("how", ["hang", "crash", "freeze"])
def test_a_process_in_which_a_call_hangs_or_that_dies_is_replaced(how):
    """A call that hangs costs its episode; a process that dies or hangs costs all that wait for a call."""

    def turns(key, turn):
        if key[3] == 0:
            return "At once."
        return "Done." if turn == 2 else hermes("go_wrong", how=how if (turn, key[3]) == (1, 1) else "")

    worker = EnvironmentWorker(ECHO, timeout=1)
    process = worker.process.pid
    groups, _ = play(worker, turns, num_samples=3)
    kind = "environment: crash" if how == "crash" else "environment: timeout"
    assert [sample.failure for sample in groups[0]] == ["", kind, "" if how == "hang" else kind]
    assert [s.environment_reward for s in groups[0] if not s.failure] == [0] * (2 if how == "hang" else 1)
    groups, _ = play(worker, lambda key, turn: "Done." if turn else hermes("say", text="a"))
    assert [(sample.failure, sample.environment_reward) for sample in groups[0]] == [("", 1), ("", 1)]
    assert worker.process.pid != process
    worker.stop()


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere.py:A", "there is no file"),
    ("echo.py:Nothing", r"KeyError..Nothing"),
    ("echo.py:NoReset", "it needs a method `reset`"),
    ("echo.py:NoTools", "and a public one that is a tool"),
    ("echo.py:NoHints", "Argument x is missing a type hint"),
])  # fmt: skip
def test_environments_that_are_none_are_refused(name, message):
    with pytest.raises(UserError, match=f"--environment .*{message}"):
        EnvironmentWorker(str(ASSETS / name), 1)


# ---- Whole runs ------------------------------------------------------------------------------------------------------


def train(output_dir, rows, **flags):
    """grpo.py in this process, with few samples -> metrics, samples."""
    flags = {"num_generations": 4, "max_steps": 2, "rewards": ("environment",), **flags}
    data = write_rows(output_dir / "rows.jsonl", rows)
    metrics = conftest.train(grpo, output_dir / "run", dataset=(data,), **flags)
    said = (output_dir / "run" / "completions.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in said]


def scripted(monkeypatch, turns):
    """Let the embedded engine write a script, with the log-probs that its model gives it."""
    script = Script(turns)

    @torch.no_grad()
    def generate(self, *arguments):
        groups = script.generate(*arguments)
        self.model.set_attn_implementation("sdpa")
        for (sample,) in groups:
            ids, sample.versions = np.array(sample.prompt_ids + sample.ids), [self.version] * len(sample.ids)
            batch = common.collate([(ids, np.arange(len(ids)) >= len(sample.prompt_ids))])
            logits = self.model(torch.tensor(ids)[None]).logits[0, batch.positions_N].log_softmax(-1)
            sample.logps = logits.gather(1, batch.labels_N[:, None])[:, 0].tolist()
        return groups

    monkeypatch.setattr(common.HFEngine, "generate", generate)
    return script


ROWS = [{"prompt": [{"role": "user", "content": f"1+1, {n}"}], "answer": "2"} for n in range(8)]


def test_a_run_trains_what_was_sampled_and_nothing_else(tmp_path, monkeypatch):
    def turns(key, turn):
        wrong = key[3] % 2
        return f"{2 + wrong}" if turn else hermes("add", a=1, b=1 + wrong) + "x" * key[3]

    script = scripted(monkeypatch, turns)
    flags = {"micro_batch_tokens": 300, "max_length": 300, "max_completion_length": 150, "num_iterations": 2}
    (first, _), said = train(tmp_path, ROWS, environment=CALCULATOR, beta=0.1, **flags)
    sampled = [len(ids) for *_, ids in script.seen]
    # Only on the same tokens, after the same ones, do sampler and trainer agree.
    assert first["sampling/sampling_logp_difference/mean"] < 1e-4
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert (first["tools/call_frequency"], first["tools/failure_frequency"], first["turns/mean"]) == (1, 0, 2)
    assert first["rewards/environment/mean"] == 0.5
    assert first["tokens"] == sum(sampled)
    assert first["completions/mean_length"] == sum(sampled) / 8
    result = "<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    assert said[0]["completion"] == hermes("add", a=1, b=1) + result
    assert said[0]["rewards"] == {"environment": 1.0}
    assert said[0]["advantage"] > 0 > said[1]["advantage"]


def test_a_run_plays_2048(tmp_path):
    with pytest.raises(UserError, match="messages"):
        train(tmp_path, [{"prompt": "a"}] * 4, environment=CALCULATOR)
    rows = [{"prompt": [{"role": "user", "content": "Play."}]}] * 6
    _, said = train(tmp_path, rows, environment=f"{ASSETS / 'game_2048.py'}:Game2048")
    boards = [one["prompt"] for one in said]
    assert all("Play.\nscore=0\n" in board for board in boards)
    assert [len(set(boards[first : first + 4])) for first in range(0, 16, 4)] == [1] * 4  # a group's
    assert len(set(boards)) == 4
    assert all(one["rewards"] == {"environment": 0.0} for one in said)  # the model has never seen a tool


@pytest.mark.learn
def test_grpo_teaches_the_calculator(tmp_path):
    """The commands of tests/assets/calculator.py: a start that is neither ignorant nor done, then reinforcement alone."""
    chats, start, end = tmp_path / "chats.jsonl", tmp_path / "start", tmp_path / "end"
    sft = ["--batch-size", 32, "--learning-rate", 3e-3, "--lr-schedule", "constant", "--max-steps", 150]
    rl = ["--max-completion-length", 100, "--temperature", 0.7, "--max-steps", 20]
    grpo_flags = ["--model", start / "final", "--environment", CALCULATOR, *rl, "--output-dir", end]
    assert run("tests/assets/calculator.py", chats).returncode == 0
    assert run("sft.py", "--dataset", chats, *sft, "--output-dir", start, timeout=1200).returncode == 0
    assert run("grpo.py", *grpo_flags, timeout=1200).returncode == 0
    evals = [row["eval/reward"] for row in read_metrics(end) if "eval/reward" in row]
    assert 0.05 < evals[0] < 0.6
    assert evals[-1] > evals[0] + 0.2
