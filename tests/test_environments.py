"""Environments: exact tokens over several turns, tool calls, processes that hang or die, seeds, and whole runs."""

import copy
import json
import math
import random
import re
import time

import numpy as np
import pytest
import torch
from conftest import ASSETS, flags_of, read_metrics, run, write_rows
from game_2048 import Game2048, slide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenization import stock
from trl.chat_template_utils import llama3_template, qwen3_template

import common
import grpo
from common import (
    Call,
    EnvironmentWorker,
    RefusedError,
    Rollout,
    UserError,
    check_tools,
    collate,
    encode_messages,
    encode_prompt,
    load_tokenizer,
    parse_calls,
    play_episodes,
    tool_messages,
    tool_tokens,
    tools_template,
)

EMBEDDED = load_tokenizer(str(ASSETS / "model"))
STOP = [EMBEDDED.eos_token_id]
ECHO = '''
import asyncio, ctypes, os, threading, time

class Echo:
    """Says what it is told, or does what goes wrong."""

    async def reset(self, start="", seed=None, **row):
        self.done, self.seed, self.said = False, seed, []
        if start == "raise":
            raise RuntimeError("no start")
        if start == "seed":
            return f" seed {seed}"
        return start or None

    def say(self, text: str) -> str:
        """
        Say a text.

        Args:
            text: What to say.
        """
        self.said.append(text)
        return text

    async def later(self, text: str, seconds: float):
        """
        Say a text, later.

        Args:
            text: What to say.
            seconds: How much later.
        """
        await asyncio.sleep(seconds)
        return {"said": text, "thread": threading.get_ident() > 0}

    def go_wrong(self, how: str):
        """
        Go wrong.

        Args:
            how: In which way.
        """
        if how == "raise":
            raise KeyError("gone")
        if how == "exit":
            raise SystemExit(1)
        if how == "hang":
            time.sleep(60)
        if how == "crash":
            os._exit(3)
        if how == "freeze":
            ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock
        if how == "end":
            self.done = True
        return 7

    def get_reward(self):
        return float("nan") if "nan" in self.said else float(len(self.said))
'''


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    path = tmp_path_factory.mktemp("echo") / "echo.py"
    path.write_text(ECHO)
    worker = EnvironmentWorker(f"{path}:Echo", timeout=20)
    yield worker
    worker.stop()


@pytest.fixture
def hasty(tmp_path, monkeypatch):
    monkeypatch.setattr(EnvironmentWorker, "GRACE", 2)
    (tmp_path / "echo.py").write_text(ECHO)
    worker = EnvironmentWorker(f"{tmp_path / 'echo.py'}:Echo", timeout=1.5)
    yield worker
    worker.stop()


def hermes(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Script:
    """An engine that writes what a script says: `turns(key, turn)` gives the text of a turn. It records what it saw."""

    version = 0

    def __init__(self, turns, stops=True):
        self.turns, self.stops, self.seen = turns, stops, []

    def generate(self, prompts, keys, num_samples, max_lengths, temperature, stop_ids):
        groups = []
        for prompt, key, limit in zip(prompts, keys, max_lengths, strict=True):
            assert limit >= 1
            groups.append([])
            for sample in range(num_samples):
                of, turn = ((*key, sample), 0) if len(key) == 3 else (key[:4], key[4])
                ids = EMBEDDED(self.turns(of, turn))["input_ids"] + stop_ids[:1]
                rollout = Rollout(prompt, ids[:limit], [-0.5 - turn] * len(ids[:limit]), len(ids) <= limit)
                self.seen.append((of, turn, list(prompt), rollout.ids))
                groups[-1].append(rollout)
        return groups


def play(worker, turns, rows=({},), num_samples=2, max_turns=8, max_length=2000, max_new=1000, seeds=None):
    """Play scripted turns in an environment -> the groups of Episodes and the engine."""
    rows = [
        encode_prompt(
            {"prompt": [{"role": "user", "content": "Go."}], **row}, EMBEDDED, 500, tools=worker.tools
        )
        for row in rows
    ]
    keys, engine = [(0, 0, place) for place in range(len(rows))], Script(turns)
    groups = play_episodes(
        rows, keys, seeds or [5] * len(rows), num_samples, 1.0, STOP,
        engine=engine, environment=worker, tokenizer=EMBEDDED, limits=(max_turns, max_length, max_new),
    )  # fmt: skip
    return groups, engine


# ---- Tokens ----------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "\n\n", "7probe7", "</tool_call>", "<think>", "\ud800", "🂡é"]),
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tokens_are_exactly_what_the_engine_saw(echo, data):
    """Whatever is said, in how many turns and calls, and wherever a limit cuts."""
    scripts = {}
    start = data.draw(st.sampled_from(["", " Look: <|im_end|>", " seed"]))
    max_new, max_turns = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 4))
    for place in range(2):
        for sample in range(2):
            turns = data.draw(st.lists(st.lists(TEXTS, min_size=1, max_size=2), max_size=4))
            scripts[0, 0, place, sample] = [
                "".join(hermes("say", text=text) for text in texts) for texts in turns
            ] + ["The end."]
    groups, engine = play(
        echo,
        lambda key, turn: scripts[key][min(turn, len(scripts[key]) - 1)],
        rows=[{"start": start}] * 2,
        max_turns=max_turns,
        max_length=600,
        max_new=max_new,
    )
    for episode in [episode for group in groups for episode in group]:
        assert not episode.failure
        rollout = episode.rollout
        seen = [entry[2:] for entry in engine.seen if entry[0] == episode.key]
        assert len(seen) == episode.turns <= max_turns
        for prompt, ids in seen:  # each turn stands where the engine wrote it, after what the engine saw
            whole = rollout.prompt_ids + rollout.ids
            assert whole[: len(prompt) + len(ids)] == prompt + ids
        assert len(seen[-1][0]) + len(seen[-1][1]) == len(rollout.prompt_ids) + len(rollout.ids)
        begins = [len(prompt) - len(rollout.prompt_ids) for prompt, _ in seen]
        sampled = {b + i for b, (_, ids) in zip(begins, seen, strict=True) for i in range(len(ids))}
        assert rollout.mask == [place in sampled for place in range(len(rollout.ids))]
        expected = [-0.5 - turn for turn, (_, ids) in enumerate(seen) for _ in ids]
        assert [
            logp for logp, trained in zip(rollout.logps, rollout.mask, strict=True) if trained
        ] == expected
        assert all(trained or logp == 0 for logp, trained in zip(rollout.logps, rollout.mask, strict=True))
        assert len(rollout.ids) <= max_new
        assert len(rollout.ids) + len(rollout.prompt_ids) <= 600
        assert rollout.is_finished == (
            episode.turns == len(scripts[episode.key]) and rollout.ids[-1] == STOP[0]
        )
        assert episode.messages[-1]["role"] == "assistant"


def test_an_episode_is_what_the_template_renders(echo):
    """With well-behaved texts, ids are those of the whole conversation; the trained ones are sft.py's."""
    said = [
        hermes("say", text="a\nb"),
        hermes("say", text="c") + hermes("later", text="d", seconds=0),
        "Done.",
    ]
    groups, _ = play(echo, lambda key, turn: said[turn])
    episode = groups[0][0]
    results = ["a\nb", "c", "{'said': 'd', 'thread': True}"]
    tools = [{"role": "tool", "content": content} for content in results]
    answers = [{"role": "assistant", "content": text} for text in said]
    user = {"role": "user", "content": "Go."}
    messages = [user, answers[0], tools[0], answers[1], *tools[1:], answers[2]]
    ids, mask = encode_messages(EMBEDDED, messages, [1, 3, 6])
    whole = episode.rollout.prompt_ids + episode.rollout.ids
    assert ids[: len(whole)] == whole  # the template ends with a line break
    assert mask[: len(whole)] == [False] * len(episode.rollout.prompt_ids) + episode.rollout.mask
    assert [m["content"] for m in episode.messages] == [said[0], "a\nb", said[1], *results[1:], "Done."]
    assert (episode.turns, episode.calls, episode.failed_calls, episode.reward) == (3, 3, 0, 2.0)


def test_micro_batches_train_what_was_sampled():
    sample = grpo.Sample(
        0, [1, 2], [3, 4, 5, 6], [True, False, False, True], [-1.0, -2.0], [0, 0], True, [1.0], ""
    )
    other = grpo.Sample(0, [1, 2], [7], [True], [-3.0], [0], True, [0.0], "")
    batch = grpo.collate_samples([sample, other], "cpu", "shared")
    assert batch.labels_N.tolist() == [3, 6, 7]
    sample.advantage = other.advantage = 1.0
    sampled = grpo.stack_tokens([sample, other], np.array([0.25, 0.5]), "cpu")
    assert sampled.sampler_logps_N.tolist() == [-1, -2, -3]
    assert sampled.documents_N.tolist() == [0, 0, 1]
    assert sampled.weight_N.tolist() == [0.25, 0.25, 0.5]
    other.prompt_ids = [1, 9]
    assert collate([], "cpu").labels_N.tolist() == []
    assert sorted(map(len, grpo.plan_samples([sample, other], 1, 7, "shared")[0])) == [1, 1]


# ---- Templates and tool calls ----------------------------------------------------------------------------------------

TEMPLATES = {"qwen3": "<|im_end|>", "qwen2_5": "<|im_end|>", "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>",
             "glm4moe": "<|user|>", "mistral": "</s>"}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "say", "description": "d", "parameters": {
    "type": "object", "properties": {"text": {"type": "string", "description": "t"}}, "required": ["text"]}}}]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3", "llama3_1", "mistral"])
@pytest.mark.parametrize("count", [1, 2])
def test_tool_tokens_are_the_templates(name, count):
    """They follow the stop token of the turn in the template's own rendering of a whole conversation."""
    tokenizer = stock(name)
    stop_id = tokenizer.convert_tokens_to_ids(TEMPLATES[name])
    calls, answers = (
        [Call("say", {"text": "a"})] * count,
        [("ok", (f"result {i}", False)) for i in range(count)],
    )
    messages = tool_messages(calls, answers)
    template = tools_template(tokenizer, TOOLS, None)
    text = TEMPLATES[name] + tokenizer.decode(tool_tokens(template, messages, [stop_id]))
    function = {"name": "say", "arguments": {"text": "other"}}
    called = [{"type": "function", "id": m["tool_call_id"], "function": function} for m in messages]
    said = {"content": "", "tool_calls": called}
    if name == "llama3" or (name, count) == ("llama3_1", 2):  # it knows no tool calls, or only one
        said = {"content": "Other."}
    conversation = [{"role": "user", "content": "Other."}, {"role": "assistant", **said}, *messages]
    assert template.render(conversation, generation_prompt=True).endswith(text)
    assert [text.count(f"result {i}") for i in range(count)] == [1] * count


def test_templates_that_do_not_serve_are_refused():
    check_tools(EMBEDDED, TOOLS, STOP)
    for name in ("qwen3", "qwen2_5"):
        check_tools(stock(name), TOOLS, [stock(name).convert_tokens_to_ids("<|im_end|>")])
    eot = [stock("llama3_1").convert_tokens_to_ids("<|eot_id|>")]
    with pytest.raises(
        UserError, match=r"writes a tool call as .*\"name\": \"say\".*needs a `response_template`"
    ):
        check_tools(stock("llama3_1"), TOOLS, eot)
    known = copy.deepcopy(stock("llama3_1"))
    known.response_template = llama3_template
    check_tools(known, TOOLS, eot)
    with pytest.raises(
        UserError, match=r"has no place for a tool's result after a call .it ends a turn by none of"
    ):
        check_tools(EMBEDDED, TOOLS, [EMBEDDED.convert_tokens_to_ids("<|endoftext|>")])
    for template in (  # tools' results come first; or nowhere
        "{% for m in messages if m.role == 'tool' %}{{ m.content }}{% endfor %}{% for m in messages if m.role != 'tool' %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    ):
        changed = copy.deepcopy(EMBEDDED)
        changed.chat_template = template
        with pytest.raises(UserError, match="does not put a tool's result after the turn"):
            check_tools(changed, TOOLS, STOP)


@pytest.mark.parametrize(("text", "expected"), [
    ("No call.", []),
    (hermes("say", text="a<b"), [("say", {"text": "a<b"}, "")]),
    ("Well:\n<tool_call>\n" + json.dumps({"name": "say", "arguments": '{"text": "é\\n"}'}) + "\n</tool_call>\n" +
     hermes("say", text=""), [("say", {"text": "é\n"}, ""), ("say", {"text": ""}, "")]),
    ("<think>" + hermes("say", text="no") + "</think>" + hermes("say", text="yes"), [("say", {"text": "yes"}, "")]),
    ('<tool_call>{"name": "say"}</tool_call>', [("say", {}, "")]),
    (hermes("shout", text="a"), [("unknown", {}, "Tool shout not found.")]),
    (hermes("reset"), [("unknown", {}, "Tool reset not found.")]),
    ('<tool_call>{"name": "say", "arguments"</tool_call>', [("unknown", {}, "malformed tool call: ...")]),
    ('<tool_call>{"name": "say", "arguments": {}}', [("unknown", {}, "malformed tool call: ...")]),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", [("unknown", {}, "malformed tool call: ...")]),
    ('<tool_call>{"name": 5}</tool_call>', [("unknown", {}, "malformed tool call: ...")]),
    ('<tool_call>{"name": "say", "arguments": [1]}</tool_call>', [("say", {}, "malformed tool call: ...")]),
    (hermes("say", text="a") + "<tool_call>7</tool_call>",
     [("say", {"text": "a"}, ""), ("unknown", {}, "malformed tool call: ...")]),
])  # fmt: skip
def test_calls_as_hermes_writes_them(text, expected):
    found = parse_calls(EMBEDDED, "", text + "<|im_end|>", TOOLS)
    shown = [call._replace(problem=re.sub(r"(?s)(call: ).+", r"\1...", call.problem)) for call in found]
    assert shown == [Call(*call) for call in expected]


def test_calls_by_a_response_template():
    tokenizer = copy.deepcopy(EMBEDDED)
    tokenizer.response_template = qwen3_template
    prefix = "<|im_start|>assistant\n"
    text = (
        "<think>\nHm.\n</think>\n\n" + hermes("say", text="a") + "\n" + hermes("say", text="b") + "<|im_end|>"
    )
    assert [call.arguments for call in parse_calls(tokenizer, prefix, text, TOOLS)] == [
        {"text": "a"},
        {"text": "b"},
    ]
    assert parse_calls(tokenizer, prefix, "Nothing.<|im_end|>", TOOLS) == []
    (call,) = parse_calls(tokenizer, prefix, '<tool_call>{"name"</tool_call><|im_end|>', TOOLS)
    assert call.problem.startswith("malformed tool call")
    tokenizer.response_template = llama3_template
    text = '{"name": "say", "parameters": {"text": "a"}}<|eot_id|>'
    prefix = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert parse_calls(tokenizer, prefix, text, TOOLS) == [Call("say", {"text": "a"})]


# ---- Environments that behave, and others ----------------------------------------------------------------------------


def test_results_and_errors_reach_the_model(echo):
    said = [
        hermes("go_wrong", how="raise")
        + hermes("go_wrong", how="exit")
        + hermes("go_wrong", how="")
        + hermes("shout"),
        hermes("say", words="a"),
        "<tool_call>{</tool_call>",
        hermes("go_wrong", how="end"),
        "never",
    ]
    groups, engine = play(echo, lambda key, turn: said[turn], num_samples=1)
    (episode,) = groups[0]
    contents = [m["content"] for m in episode.messages if m["role"] == "tool"]
    assert contents[:4] == [
        str({"error": "'gone'"}),
        str({"error": "1"}),
        "7",
        str({"error": "Tool shout not found."}),
    ]
    assert "unexpected keyword argument 'words'" in contents[4]
    assert contents[5].startswith("{'error': 'malformed tool call")
    assert (episode.turns, episode.calls, episode.failed_calls) == (4, 7, 5)
    assert episode.rollout.is_finished
    assert episode.messages[-1]["content"] == said[3]
    assert len(engine.seen) == 4


def test_calls_of_episodes_run_at_the_same_time_and_answers_keep_their_order(echo):
    turn_1 = "".join(hermes("later", text=str(n), seconds=s) for n, s in enumerate((0.3, 0.0, 0.1)))
    began = time.monotonic()
    groups, _ = play(echo, lambda key, turn: [turn_1, "Done."][turn], num_samples=20)
    assert time.monotonic() - began < 5  # one after the other they take 8 s
    for episode in groups[0]:
        contents = [m["content"] for m in episode.messages if m["role"] == "tool"]
        assert [content[10] for content in contents] == ["0", "1", "2"]


def test_a_group_has_one_seed_and_one_prompt(echo):
    rows = [{"start": "seed", "seed_of": "row"}, {"start": "seed"}, {"start": "seed", "seed": 99}]
    groups, engine = play(echo, lambda key, turn: "Done.", rows, seeds=[3, 4, 5], num_samples=3)
    said = [{episode.prompt[-1]["content"] for episode in group} for group in groups]
    assert said == [{"Go. seed 3"}, {"Go. seed 4"}, {"Go. seed 99"}]
    for of, _, prompt, _ in engine.seen:
        assert EMBEDDED.decode(prompt).startswith(f"<|im_start|>user\nGo. seed {(3, 4, 99)[of[2]]}<|im_end|>")


def test_what_fails_costs_its_episode(echo):
    groups, engine = play(
        echo,
        lambda key, turn: hermes("say", text="nan") if not turn else "Done.",
        rows=[{"start": "raise"}, {}],
    )
    assert {episode.failure for episode in groups[0]} == {"environment exception"}
    assert "no start" in echo.problem
    assert all(
        math.isnan(episode.reward) for group in groups for episode in group
    )  # a NaN is the reward's to judge
    assert {entry[0][2] for entry in engine.seen} == {1}
    long, _ = play(echo, lambda key, turn: "Done.", rows=[{"start": "x " * 700}], max_length=300)
    assert {episode.failure for episode in long[0]} == {"environment prompt too long"}


def test_a_refused_turn_ends_all_episodes(echo, monkeypatch):
    """The caller goes on with other prompts: nothing may stay in the process."""
    closed, run_jobs = [], echo.run

    def watch(jobs):
        answers = run_jobs(jobs)
        closed.extend(
            number
            for number in jobs
            if answers[number][-1] == ("ok", None) and jobs[number][-1][0] == "close"
        )
        return answers

    def turns(key, turn):
        if turn:
            raise RefusedError("too long")
        return hermes("say", text="a")

    monkeypatch.setattr(echo, "run", watch)
    with pytest.raises(RefusedError, match="too long"):
        play(echo, turns, rows=[{}, {"start": "raise"}])
    assert sorted(closed) == sorted(echo.living)
    assert len(closed) == 4


def test_a_hanging_call_fails_one_episode_and_its_process_is_replaced(hasty):
    def turns(key, turn):
        return hermes("go_wrong", how="hang" if key[3] == 1 else "") if not turn else "Done."

    first = hasty.process.pid
    groups, _ = play(hasty, turns, num_samples=3)
    assert [e.failure for e in groups[0]] == ["", "environment timeout", ""]
    assert [e.reward for e in groups[0]][::2] == [0, 0]
    groups, _ = play(hasty, lambda key, turn: "Done.")
    assert not any(e.failure for e in groups[0])
    assert hasty.process.pid != first


@pytest.mark.parametrize(("how", "kind"), [("crash", "crash"), ("freeze", "hang")])
def test_a_process_that_dies_or_freezes_is_replaced(hasty, how, kind):
    def turns(key, turn):
        return (
            (hermes("go_wrong", how=how if key[3] == 1 else "") if key[3] else "At once.")
            if turn == 0
            else "Done."
        )

    began = time.monotonic()
    groups, _ = play(hasty, turns, num_samples=3)
    assert time.monotonic() - began < 40
    failures = [e.failure for e in groups[0]]
    assert failures[1] == f"environment {kind}"
    assert failures[0] == "environment crash"  # it waited for its reward
    groups, _ = play(hasty, lambda key, turn: hermes("say", text="a") if not turn else "Done.")
    assert [e.reward for e in groups[0]] == [1, 1]


BAD = {
    "no_file.py:A": "it must be FILE.py:CLASS, and the file must exist",
    "{}:Nothing": "has no class Nothing",
    "{}:NoReset": "NoReset has no method `reset`",
    "{}:NoTools": "NoTools has no public method that is a tool",
    "{}:NoHints": "the tool f cannot be described: Argument x is missing a type hint",
    "{}:NoDocs": "the tool f cannot be described: .* it has no docstring",
}


@pytest.mark.parametrize("name", BAD)
def test_environments_that_are_none_are_refused(tmp_path, name):
    path = tmp_path / "bad.py"
    path.write_text(
        "class NoReset:\n    def f(self):\n        'd'\nclass NoTools:\n    def reset(self): ...\n    def _f(self): ...\n"
        "class NoHints(NoTools):\n    def f(self, x):\n        'd\\n\\nArgs:\\n    x: d'\n"
        "class NoDocs(NoTools):\n    def f(self, x: int): ...\n"
    )
    with pytest.raises(UserError, match=BAD[name]):
        EnvironmentWorker(name.format(path), 1)


# ---- 2048 ------------------------------------------------------------------------------------------------------------


def test_2048_slides_as_a_naive_loop():
    rng = random.Random(0)
    for _ in range(500):
        row = [rng.choice([0, 2, 2, 4, 8]) for _ in range(4)]
        made, gain = [], 0
        can_merge = False
        for tile in filter(None, row):
            if can_merge and made[-1] == tile:
                made[-1] *= 2
                gain += made[-1]
                can_merge = False
            else:
                made.append(tile)
                can_merge = True
        assert slide(row) == ((made + [0] * 4)[:4], gain)
    assert slide([2, 2, 2, 2]) == ([4, 4, 0, 0], 8)


@pytest.mark.parametrize("seed", range(5))
def test_2048_plays_to_its_end(seed):
    game, twin, rng, score = Game2048(), Game2048(), random.Random(seed), 0
    assert game.reset(seed=seed) == twin.reset(seed=seed)
    while not game.done:
        before = [tile for row in game.board for tile in row]
        direction = rng.choice(["left", "Right ", "up", "down"])
        said = game.move(direction)
        assert said == twin.move(direction)
        after = [tile for row in game.board for tile in row]
        assert f"score={game.score}\n" in said
        assert sum(after) - sum(before) in (0, 2, 4)  # merging keeps the sum; a new tile adds to it
        assert game.score >= score
        score = game.score
    tiles = [tile for row in game.board for tile in row]
    assert all(tiles)
    # A tile of 2^k made of twos is worth (k - 1) 2^k; each four that came as such saves 4.
    worth = sum((tile.bit_length() - 2) * tile for tile in tiles)
    assert worth - score >= 0
    assert (worth - score) % 4 == 0
    assert game.get_reward() == pytest.approx(math.log(1 + score) / math.log(20001))
    assert 0.4 < game.get_reward() < 1
    with pytest.raises(ValueError, match="Game over"):
        game.move("left")
    twin.done = False
    with pytest.raises(ValueError, match="must be left, right, up or down"):
        twin.move("north")


# ---- Whole runs ------------------------------------------------------------------------------------------------------


def train(output_dir, **flags):
    """grpo.py in this process, with few samples."""
    short = {"eval_dataset": (), "wandb": "disabled", "batch_size": 8, "num_generations": 4, "max_steps": 2}
    return grpo.main(grpo.replace(grpo.Args(output_dir=str(output_dir)), **{**short, **flags}))


def scripted(monkeypatch, turns):
    """Let the engine of grpo.py write a script, with the log-probs that the policy gives it."""
    engines = []
    monkeypatch.setattr(grpo, "check_engine", lambda *_: None)  # it asks for what no script has

    class Scripted(common.HFEngine):
        def generate(self, prompts, keys, num_samples, limits, temperature, stop_ids):
            groups = engines[0].generate(prompts, keys, num_samples, limits, temperature, stop_ids)
            for rollout in [rollout for group in groups for rollout in group]:
                documents = [
                    (
                        np.array(rollout.prompt_ids + rollout.ids),
                        np.arange(len(rollout.prompt_ids + rollout.ids)) > 0,
                    )
                ]
                with torch.no_grad():
                    batch = collate(documents)
                    logits = self.model(**batch.inputs).logits[0, batch.positions_N].log_softmax(-1)
                logps = logits.gather(1, batch.labels_N[:, None])[:, 0].tolist()
                rollout.logps = logps[len(rollout.prompt_ids) - 1 :]
            return groups

    engines.append(Script(turns))
    monkeypatch.setattr(grpo, "HFEngine", Scripted)
    return engines[0]


def test_a_run_trains_what_was_sampled_and_nothing_else(tmp_path, monkeypatch):
    def turns(key, turn):
        wrong = key[3] % 2
        return hermes("add", a=1, b=1 + wrong) + "x" * key[3] if turn == 0 else f"{2 + wrong}"

    engine = scripted(monkeypatch, turns)
    rows = [{"prompt": [{"role": "user", "content": f"1+1, {n}"}], "answer": "2"} for n in range(8)]
    train(tmp_path / "run", dataset=(write_rows(tmp_path / "rows.jsonl", rows),), max_completion_length=150,
          environment=f"{ASSETS / 'calculator.py'}:Calculator", micro_batch_tokens=300, max_length=300, beta=0.1, num_iterations=2,
          max_steps=4)  # fmt: skip
    metrics = read_metrics(tmp_path / "run")
    for row in metrics:
        # Only on the same tokens, after the same ones, do sampler and trainer agree.
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
    assert metrics[0]["tools/call_frequency"] == 1
    assert metrics[0]["tools/failure_frequency"] == 0
    assert metrics[0]["turns/mean"] == 2
    assert metrics[0]["rewards/environment/mean"] == 0.5
    sampled = [len(ids) for of, _, _, ids in engine.seen if of[1] == 0]
    assert metrics[0]["tokens"] == sum(sampled)
    assert metrics[0]["completions/mean_length"] == sum(sampled) / 8
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    said = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    call = hermes("add", a=1, b=1)
    assert said[0]["completion"] == (
        f"{call}<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    )
    assert said[0]["rewards"] == {"environment": 1.0}
    assert said[0]["advantage"] > 0 > said[1]["advantage"]


def test_failed_episodes_leave_the_loss_and_are_counted(tmp_path, monkeypatch):
    (tmp_path / "echo.py").write_text(ECHO)
    scripted(monkeypatch, lambda key, turn: hermes("go_wrong", how="hang") if key[3] == 3 else "nan"[key[3]:])  # fmt: skip
    flags = {"environment": f"{tmp_path / 'echo.py'}:Echo", "environment_timeout": 2.0, "max_steps": 1,
             "max_completion_length": 200, "beta": 0.1, "rewards": ("environment", f"{tmp_path / 'r.py'}:r")}  # fmt: skip
    (tmp_path / "r.py").write_text(
        "def r(completions, **_):\n    return [len(c[-1]['content']) for c in completions]\n"
    )
    rows = [{"prompt": [{"role": "user", "content": str(n)}]} for n in range(2)]
    train(tmp_path / "run", dataset=(write_rows(tmp_path / "rows.jsonl", rows),), **flags)
    (row,) = read_metrics(tmp_path / "run")
    assert row["failed_rewards"] == 2
    said = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [one["advantage"] is None for one in said] == [False, False, False, True] * 2
    assert said[0]["rewards"] == {"environment": 0.0, f"{tmp_path / 'r.py'}:r": 3.0}
    assert set(said[3]["rewards"].values()) == {None}
    with pytest.raises(UserError, match=r"failed \(\{'environment timeout': 2\}\)"):
        train(
            tmp_path / "strict",
            dataset=(write_rows(tmp_path / "rows.jsonl", rows),),
            max_failed_rewards=0.1,
            **flags,
        )


CALCULATOR = f"{ASSETS / 'calculator.py'}:Calculator"
BAD_FLAGS = {
    "no environment": ({"max_turns": 3}, "--max-turns does not apply .* it needs --environment"),
    "no reward": ({"rewards": ("environment",)}, "--rewards environment needs an --environment that has"),
    "no turns": ({"environment": CALCULATOR, "max_turns": 0}, "--max-turns is 0; it must be above 0"),
    "no class": ({"environment": "calculator.py"}, "it must be FILE.py:CLASS"),
    "text": (
        {"environment": CALCULATOR, "row": {"prompt": "a"}},
        "with --environment, `prompt` must be messages",
    ),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path, name):
    flags, message = BAD_FLAGS[name]
    row = flags.get("row", {"prompt": [{"role": "user", "content": "a"}]})
    flags = {key: value for key, value in flags.items() if key != "row"}
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", dataset=(write_rows(tmp_path / "rows.jsonl", [row] * 4),), **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_command_plays_2048(tmp_path, ranks):
    rows = [{"prompt": [{"role": "user", "content": "Play."}]}] * 6
    flags = flags_of(
        dataset=write_rows(tmp_path / "rows.jsonl", rows), environment=f"{ASSETS / 'game_2048.py'}:Game2048",
        batch_size=8, num_generations=4, max_steps=2, output_dir=tmp_path / "run",
    )  # fmt: skip
    result = run("grpo.py", *flags, ranks=ranks)
    assert result.returncode == 0, result.stderr[-3000:]
    said = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(said) == 16
    boards = [one["prompt"] for one in said]
    assert all("Play.\nscore=0\n" in board for board in boards)
    assert [len(set(boards[first : first + 4])) for first in range(0, 16, 4)] == [
        1
    ] * 4  # the same in a group
    assert len(set(boards)) == 4
    assert all(one["rewards"] == {"environment": 0.0} for one in said)  # the model has never seen a tool


@pytest.mark.learn
def test_grpo_teaches_the_calculator(tmp_path):
    """The commands of tests/assets/calculator.py: a start that is neither ignorant nor done, then reinforcement alone."""
    chats, start, end = tmp_path / "chats.jsonl", tmp_path / "start", tmp_path / "end"
    sft = ["--batch-size", 32, "--learning-rate", 3e-3, "--lr-schedule", "constant", "--max-steps", 150]
    rl = ["--max-completion-length", 100, "--temperature", 0.7, "--max-steps", 20]
    for script, flags in {
        "tests/assets/calculator.py": [chats],
        "sft.py": ["--dataset", chats, *sft, "--output-dir", start],
        "grpo.py": ["--model", start / "final", "--environment", CALCULATOR, *rl, "--output-dir", end],
    }.items():
        result = run(script, *flags, timeout=1200)
        assert result.returncode == 0, result.stderr[-2000:]
    evals = [row["eval/reward"] for row in read_metrics(end) if "eval/reward" in row]
    assert 0.05 < evals[0] < 0.6
    assert evals[-1] > evals[0] + 0.2
