"""Rewards: answers that are right and wrong, each function against hand-computed values and TRL's, and those that fail."""

import contextlib
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trl.rewards
from conftest import ASSETS, train, write_rows
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer

import common
import grpo
import reward_model as rm
from common import RewardWorker, Sample, UserError, accuracy, load_reward

REWARDS = str(ASSETS / "rewards.py")


def messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


# ---- Answers ---------------------------------------------------------------------------------------------------------

EQUAL = [  # what is said, what is right
    ("42", "42"), ("42.0", "42"), ("42.", "42"), ("$42$", "42"), ("$42", "42"), (r"\$42", "42"), (r"\(42\)", "42"), ("**42**", "42"),
    (r"\boxed{42}", "42"), (r"First 6 + 7 = 13, so \boxed{41}? No: $\boxed{42}$.", "42"), ("steps and steps. " * 100 + r"\boxed{42}", "42"),
    ("4.2e1", "42"), ("1/2", "0.5"), ("0.5", "1/2"), (r"\frac{1}{2}", ".5"), (r"\dfrac12", "0.5"), (r"-\frac{1}{2}", "-0.5"),
    (r"\boxed{\frac{3}{4}}", "0.75"), (r"3 \times 10^4", "30000"), (r"6\frac{1}{2}", "6.5"), ("84/2", "42"), ("-3", "-3.0"),
    ("\u22123", "-3"), ("1,234", "1234"), ("1,234,567.5", "1234567.5"), ("1{,}234", "1234"), (r"10\,000", "10000"), ("1,000", "1000"),
    ("work\n#### 42", "42"), ("42", "She has 6 * 7 = <<6*7=42>>42 eggs\n#### 42"), ("The answer is 42.", "42"),
    ("Let me see. **Answer:** 42", "42"), ("The answer is 1, no, the answer is 42", "42"), ("The answer is:\n\n$42$", "42"),
    ("The final answer to this is $\\frac{1}{2}$. I hope it is correct.", "0.5"), ("<think>7</think> 8", "8"),
    ("x = 42", "42"), ("12 + 30 = 42", "42"), ("42 cm", "42"), (r"42\text{ cm}", "42"), ("42", "42 meters"), (r"90^\circ", "90"),
    (r"\sqrt{25}", "5"), ("2^{10}", "1024"), ("42%", "42%"), (r"42\%", "42 percent"), ("42%", "42"), ("42", "42%"),
    (r"\{2,1\}", r"\{1,2\}"), ("{3, 1, 2}", "{1,2,3}"), ("2,1", "1,2"), (r"$5 \text{ and } 6$", "5,6"), (r"\emptyset", r"\{\}"),
    ("[0, 1)", "[0,1)"), (r"\left[0,1\right)", "[0,1)"), (r"(-\infty, 3]", r"(-\infty,3]"), (r"(3,4)\cup(1,2)", r"(1,2)\cup(3,4)"),
    ("(1, 2)", "(1,2)"), ("(x+1)^2", "x^2+2x+1"), ("1+2x", "2x+1"), ("y=1+2x", "y=2x+1"), ("4i+3", "3+4i"), ("2", "x=2"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"), (r"$\boxed{\frac{\pi}{4}}$", r"\frac{\pi}{4}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("42 dollars", "42"), ("The answer is $42$ dollars.", "42"), ("1,000 USD", "1000"), ("\u20ac42", "42"), ("42\u20ac", "42"),
    ("42 cm^2", "42"), (r"42\ \text{cm}^2", "42"), (r"42~\mathrm{m}^{3}", "42"), ("42 km/h", "42"), ("42\u00b0", "42"), ("\u201342", "-42"),
    ("42", r"42\text{ cm}^2"), ("42", "42 dollars"), ("1.5 \u00d7 10^3", "1500"), ("Paris", "paris"), (r"\boxed{\text{Paris}}", "Paris"), ("The answer is blue  whale.", "Blue whale"), ("}{", "}{"),
    ("<think>x</think><answer> 42 </answer>", "42"), ("<answer>41</answer> no, <answer>42</answer>", "42"), ("it is **42**.", "42"), ("**Note** the result: **42** ", "42"),
    (r"So it is \boxed{2}.", r"our answer is $\boxed 2$."), (r"So it is \boxed{2}.", r"thus $\boxed{2}$."), (r"\boxed{\frac{\sqrt{2^{3}}}{2}}", r"\sqrt{2}"),
    ("The answer is J.", "J"), ("(F) 12", "F"), ("(c)", "C"), ("C. Paris", "C"), ("C) A cat", "C"), (r"\boxed{\text{(C)}}", "C"), ("**Answer:** C, not B", "(c)"), ("C (not A)", "C"), ("C rather than A", "C"),
    ("### Answer\n42", "42"), ("## Final Answer\n\n$$42$$\n\nI hope it helps.", "42"), ("**Answer**\n42", "42"), ("<answer>The answer is 42.</answer>", "42"),
    ("So he has **42 apples**.", "42"), ("It is **$42**.", "42"), (r"$3\sqrt{2}$ cm", r"3\sqrt{2}"), (r"3\sqrt{2}\text{ cm}", r"3\sqrt{2}"), (r"5\pi cm^3", r"5\pi"),
    (r"\frac{\pi}{4} \text{ radians}", r"\frac{\pi}{4}"), ("42 miles per hour", "42"), ("2\\pi", r"2\pi \text{ square inches}"), (r"\log_2 8", r"\log_2 8"), (r"\log_2 8", "3"), (r"\log_{10} 1000", "3"),
    (r"\varnothing", r"\emptyset"), (r"\{\}", r"\varnothing"), ("2", r"so $\boxed 2$"), ("12+30", "12 + 30"), ("NaN", "nan"), ("42", r"6 + 7 = 13, so the answer is \boxed{42}"),
    ("The answer is B because A fails", "B"), ("The answer is option B, not A", "B"), ("C. Salt and water do not mix", "C"), ("The right one is C.", "C"), ("The answer is $1,000 + $505 = $1,505.", "1505"), ("Thus, x = 42", "42"), (r"\boxed{\gcd(12, 18) = 1,234}", "1234"), ("P(A and B) = 1,234", "1234"), ("The answer is 42. They answer 20 questions.", "42"), ("Use the <think> tag. The answer is 42", "42"),
    ("B. John F. Kennedy", "B"), ("A) Vitamin D: calciferol", "A"), ("I think it is B.", "B"), ("C, 4", "C"), ("Answer: C - 4", "C"), ("Answer: C (4)", "C"), ("The correct answer is option C: 4.", "C"),
    ("The answer is C, which is 4.", "C"), ("B is correct.", "B"), ("The best answer is B; the others fail.", "B"), ("The answer is not E but B.", "B"), ("It is not A, but C", "C"), ("E. coli", "E. coli"),
    (r"\boxed{p - q}", "p-q"), ("b+a", "a+b"), ("p/q", r"\frac{p}{q}"),
    ("A careful look says (E)", "E"), ("<think>A</think>B", "B"), ("#### Which one?\nAnswer: B", "B"), ("C", "C."), ("x", "x"),
]  # fmt: skip
UNEQUAL = [
    ("43", "42"), ("", "42"), (r"\boxed{}", "42"), ("...", "42"), ("no answer", "42"), ("no answer", "0"), ("=", "42"), ("nan", "42"),
    ("inf", "42"), ("1/0", "0"), ("0.333", "1/3"), ("0.333333", "1/3"), ("0.1", "0.10000001"), ("1e400", "42"), ("9" * 5000, "42"),
    ("1,2", "12"), ("1,00", "100"), ("4 2", "42"), ("4 2", "6"), ("one two", "12"), ("forty", "42"), (r"\frac{1}{2}", "2"),
    ("42%", "0.42"), ("0.42", "42%"), ("<think>42</think> 43", "42"),
    # Several candidates: the last one counts, and only if it ends; lists are one answer.
    (r"\boxed{42} or \boxed{43}", "42"), (r"\boxed{41} 42", "42"), (r"\boxed{42", "42"), (r"\boxed{42} then \boxed{4", "42"),
    ("The answer is 42. The answer is 43.", "42"), ("#### 42\n#### 43", "42"), ("41,42", "42"), ("41 or 42", "42"), (r"\pm 42", "42"),
    (r"\{41, 42\}", "42"), ("41 < x < 43", "42"), ("x >= 42", "42"), ("[42, 43]", "42"), ("41 or 42. " * 100, "42"),
    # Arithmetic left to do: no policy shall win by repeating the question.
    ("12 + 30", "42"), ("12 + 30 =", "42"), ("12 30", "42"), ("{12}+{30}", "42"), ("6\u00d77", "42"), ("84 \u00f7 2", "42"),
    ("6\u00b77", "42"), ("12\uff0b30", "42"), ("42^2", "42"), ("42 m 3", "42"), ("(12)(30)", "360"), (r"6 \cdot 7", "42"), ("43 - 1", "42"),
    ("(1,2)", "[1,2]"), ("[1,2]", "(1,2)"), (r"\{1,2\}", "(1,2)"), (r"\{1,3\}", r"\{1,2\}"), ("(2,1)", "(1,2)"), ("[0,1]", "[0,1)"),
    ("x^2+1", "(x+1)^2"), ("x", "y"), ("2x", "2"), ("Pairs", "Paris"), ("London", "Paris"), ("}", "}{"),
    ("<answer>42</answer> <answer>43</answer>", "42"), (r"<answer>42</answer> \boxed{43}", "42"), ("**42** or **43**", "42"), (r"\boxed 4 2", "42"), ("forty-two", "42"),
    (r"\log_2 8", "4"), (r"\log_2 8 + 1", "4"), (r"\varnothing", "0"), (r"3\sqrt{2} cm", r"3\sqrt{3}"), ("42 or more", "42"), ("the answer\nis not 42", "42"),
    # Of several named values or letters none counts, nor one that is denied.
    (r"\boxed{x=41 \text{ or } x=42}", "42"), (r"\boxed{x = 41, x = 42}", "42"), ("<answer>a = 1, b = 2, c = 42</answer>", "42"), (r"\boxed{x \not= 42}", "42"), ("The answer is not = 42", "42"),
    ("The answer is not C", "C"), ("It isn't C", "C"), ("Everything except C", "C"), ("None of A, B, C", "C"), ("A/B/C", "C"), ("A and C", "C"), ("C, or A", "C"), ("C) or A)", "C"),
    ("C: no. A: yes.", "C"), ("C. is wrong, A. is right", "C"), ("I don't know", "I"), ("A good question", "A"), ("<answer>A man</answer>", "A"), ("It could be A or B, but I take D", "A"),
    (r"<think>maybe \boxed{42}", "42"), ("<answer>" * 9, "42"), ("on - no", "no - on"), ("E. faecalis", "E. coli"), ("E", "E. coli"), ("A, B and C", "A"),
    ("The answer is B because A fails", "A"), ("The answer is option B, not A", "A"), ("A or B", "B"),
    ("A or B", "A"), ("Cat", "C"), ("I'D say", "D"), ("none of them", "N"), ("", "A"), (r"\boxed{", "B"), ("2x", "x"), ("C", "2"),
]  # fmt: skip


def test_choices_are_letters_or_indices_from_0():
    right = [
        ("J", "The answer is J."),
        (2, "C"),
        ("2", "(C) 12"),
        ("2.0", "C"),
        ("(C) Paris", "C"),
        ("Option C", "C"),
    ]
    cases = {**dict.fromkeys(right, 1.0), (0, "B"): 0.0, (None, "A"): None, (float("nan"), "A"): None}
    choice = load_reward("choice")
    for (gold, said), expected in cases.items():
        assert choice(completions=[said], answer=[gold]) == [expected]
        assert choice(completions=[said], solution=[gold]) == [expected]


@pytest.mark.parametrize(("said", "gold"), EQUAL)
def test_answers_that_are_right(said, gold):
    assert accuracy([said], answer=[gold]) == accuracy(messages(said), solution=[gold]) == [1.0]


@pytest.mark.parametrize(("said", "gold"), UNEQUAL)
def test_answers_that_are_wrong(said, gold):
    assert accuracy([said], answer=[gold]) == accuracy(messages(said), solution=[gold]) == [0.0]


def test_answer_or_else_solution_or_none():
    found = accuracy(["1", "2", "3", "4", "5"], [1, None, None, 5.0, ""], solution=[2, r"so \boxed{2}", None, 4, 5])  # fmt: skip
    assert found == [1, 1, None, 0, 1]
    assert accuracy(["1", "", "{'a': 1}"], answer=[None, "", {"a": 1}]) == [None] * 3
    assert common.as_number("0.1") * 3 == common.as_number("0.3")


def test_accuracy_equals_trls():
    """On boxed answers, where our own rules (arithmetic, decimals, tuples) play no part, nor \\frac12, which TRL cannot read."""
    pool = ["2", "-7", r"\frac{2}{4}", "0.5", r"\sqrt{8}", r"2\sqrt{2}", "x^2-1", "(x-1)(x+1)", r"\{1,2\}", r"\{2,1\}", "[0,1)",
            r"(0,1]", r"\pi", r"\frac{\pi}{2}", "2x+3", "y=2x+3", "3+2i", r"\frac{x}{2}", r"\frac{1}{2}x"]  # fmt: skip
    pairs = [(said, gold) for said in pool for gold in pool]
    said = [rf"So it is $\boxed{{{said}}}$." for said, _ in pairs]
    golds = [rf"$\boxed{{{gold}}}$" for _, gold in pairs]
    expected, found = trl.rewards.accuracy_reward(messages(*said), golds), accuracy(said, golds)
    assert [pair for pair, ours, theirs in zip(pairs, found, expected, strict=True) if ours != theirs] == []
    assert sum(found) > len(pool)


# ---- The other functions ---------------------------------------------------------------------------------------------


def test_format_equals_trls_and_wants_an_answer():
    """The opening tag may stand in the prompt."""
    rng, parts = random.Random(0), ["<think>", "</think>", "why", "\n", "42", " "]
    said = ["".join(rng.choices(parts, k=rng.randint(1, 6))) for _ in range(500)]
    theirs = trl.rewards.think_format_reward(messages(*("<think>" + text.removeprefix("<think>") for text in said)))  # fmt: skip
    answered = [bool(text.partition("</think>")[2].strip()) for text in said]
    found = common.think_format(said)
    assert found == [float(one and has) for one, has in zip(theirs, answered, strict=True)]
    assert 20 < sum(found) < 480
    assert common.think_format(messages("two and three\n</think>\n5", "5")) == [1, 0]
    said = messages("why</think>5", "why</think>5", "<think>why</think>5", "<think>why</think>5")
    ends = ["assistant\n<think>\n", "assistant\n"] * 2
    assert common.think_format(said, prompt_ends=ends) == [1, 0, 0, 1]
    assert load_reward("regex:<think>.*5")(completions=said, prompt_ends=ends) == [1, 0, 1, 1]


RNG = random.Random(0)
IDS = [[RNG.randrange(6) for _ in range(RNG.randint(0, 40))] for _ in range(200)]
HALVES = [rf"\boxed{{\frac{{1}}{{{2 + index % 2}}}}}" for index in range(len(IDS))]
THIRDS = [r"\frac{1}{3}"] * len(IDS)


@pytest.mark.parametrize(("name", "expected"), [
    ("repetition", trl.rewards.get_repetition_penalty_reward()(IDS)),
    ("repetition:1", trl.rewards.get_repetition_penalty_reward(1)(IDS)),
    ("repetition:5", trl.rewards.get_repetition_penalty_reward(5)(IDS)),
    ("overlong:1", trl.rewards.get_soft_overlong_punishment(30, 1)(IDS)),
    ("overlong:30", trl.rewards.get_soft_overlong_punishment(30, 30)(IDS)),
    ("cosine", trl.rewards.get_cosine_scaled_reward(30)(messages(*HALVES), THIRDS, IDS)),
])  # fmt: skip
def test_rewards_equal_trls(name, expected):
    found = load_reward(name, 30)(completions=HALVES, completion_ids=IDS, answer=THIRDS)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("name", "columns", "expected"), [
    ("repetition:2", {"completion_ids": [[1, 2, 3, 4], [5] * 5, []]}, [0, -0.75, 0]),
    ("overlong:20", {"completion_ids": [[1] * n for n in (80, 90, 100, 101)]}, [0, -0.5, -1, -1]),
    ("cosine", {"completions": ["1", "2", "2", "2"], "completion_ids": [[1] * n for n in (50, 50, 0, 7)], "answer": [1, 1, 2, None]}, [0.75, -0.75, 1, None]),
    (r"regex:<a>.*</a>:\d", {"completions": ["<a>x\ny</a>:1", "<a></a>:12", " <a></a>:1"]}, [1, 0, 0]),
    (r"regex:<a>.*</a>:\d", {"completions": messages("<a></a>:7", "", "7")}, [1, 0, 0]),
    ("environment", {"completions": ["a", "b"], "environment_reward": [0.5, math.inf]}, [0.5, math.inf]),
])  # fmt: skip
def test_rewards_by_hand(name, columns, expected):
    found = load_reward(name, 100)(**columns)
    assert [value if value is None else pytest.approx(value) for value in found] == expected


# ---- A reward model --------------------------------------------------------------------------------------------------


def scores_of(model, path, prompts, completions):
    """One by one, by transformers' own forward."""
    tokenizer, values = AutoTokenizer.from_pretrained(path), []
    for prompt, said in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            ids = [*tokenizer(prompt)["input_ids"], *tokenizer(said)["input_ids"], tokenizer.eos_token_id]
        else:
            text = tokenizer.apply_chat_template(prompt + said, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            values.append(model(torch.tensor([ids])).logits.item())
    return values


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """final/ of reward_model.py after three steps, and that model as transformers loads it."""
    run = tmp_path_factory.mktemp("judge") / "run"
    train(rm, run, learning_rate=1e-2)
    return str(run / "final"), Classifier.from_pretrained(run / "final").eval()


def test_reward_model_equals_transformers(judge):
    path, model = judge
    rows = [json.loads(line) for line in (ASSETS / "prompts.jsonl").read_text().splitlines()[:40]]
    rng = random.Random(0)
    prompts = [row["prompt"] if index % 3 else "1+1=" * rng.randint(1, 9) for index, row in enumerate(rows)]
    texts = [str(rng.randrange(10 ** rng.randint(1, 30))) for _ in rows]
    pairs = zip(prompts, texts, strict=True)
    said = [text if isinstance(prompt, str) else messages(text)[0] for prompt, text in pairs]
    expected = scores_of(model, path, prompts, said)
    assert max(expected) - min(expected) > 0.01
    reward = load_reward(f"reward-model:{path}")
    assert reward(prompts=prompts, completions=said, answer=None) == pytest.approx(expected, abs=1e-5)
    values = reward(prompts=["1+1=", "1+1=", "1 " * 5000], completions=["2", "", "2"])
    assert [math.isnan(value) for value in values] == [False, True, True]
    assert np.isnan(reward(prompts=["1"], completions=[""])).all()


# ---- Names, columns, runs --------------------------------------------------------------------------------------------

KNOWN = "Name FILE.py:FUNCTION or .'accuracy', 'choice', 'cosine', 'format', "


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere.py:f", f"--rewards nowhere.py:f: .*there is no file.* {KNOWN}"),
    ("accurate", f"--rewards accurate: .*there is no file.* {KNOWN}"),
    ("accuracy:1", f"--rewards accuracy:1: .*takes no argument.* {KNOWN}"),
    (f"{REWARDS}:missing", "KeyError..missing"),
    ("{}:f", "SyntaxError"),
    ("regex:(", r"--rewards regex:\(: .*missing \)"),
    ("repetition:0", "N must be 1 or more"),
    ("repetition:two", "invalid literal for int"),
    ("overlong", "invalid literal for int"),
    ("overlong:65", "CACHE must be from 1 to 64"),
    ("reward-model:nowhere", "--rewards reward-model:nowhere: "),
    (f"reward-model:{ASSETS / 'model'}", "it is no model with one label"),
])  # fmt: skip
def test_rewards_that_do_not_exist_are_refused(tmp_path, name, message):
    bad = tmp_path / "bad.py"
    bad.write_text("def f(:")
    with pytest.raises(UserError, match=message):
        load_reward(name.format(bad), 64)


GOLDS = ["42", 42, 0, r"$\boxed 2$", "so\n#### 42", "J", "12 + 30"]
GOLDS += [float("nan"), "", None, {"a": 1}, ["42"], r"\boxed{4"]  # six that no answer agrees with
NONE = "rows have no right answer for rewards to find, for example"


@pytest.mark.parametrize(("names", "rows", "message"), [
    (["accuracy", "cosine"], [{"question": "a", "answer": None}, {"solution": 3}], f'1 of 2 {NONE} {{"question": "a", "answer": null}}'),
    (["format", "regex:a"], [{"question": "a"}], ""),
    (["accuracy"], [{"answer": "", "solution": "so 42"}, {"answer": {}, "solution": "42"}], f"1 of 2 {NONE} {{\"answer\": {{}}"),
    (["accuracy"], [{"answer": gold} for gold in GOLDS], f"6 of 13 {NONE} {{\"answer\": NaN}}"),
    (["format", "accuracy"], [{"question": "a", "answer": None}], UserError(f"1 of 1 {NONE} {{\"question\": .* need a column `answer` or `solution`")),
    (["cosine"], [{}], UserError("1 of 1 .* need a column")),
    (["accuracy"], [{"answer": {"a": 1}}, {"answer": r"\boxed{4"}], UserError("2 of 2 .*with text or a number")),
    (["format"], [{"answer": "1"}, {"prompts": "x"}], UserError("rename them")),
    (["format"], [{"completions": "x"}], UserError("rename them")),
])  # fmt: skip
def test_columns_that_rewards_need(capsys, names, rows, message):
    is_refused = isinstance(message, UserError)
    with pytest.raises(UserError, match=str(message)) if is_refused else contextlib.nullcontext():
        common.check_reward_columns(names, [json.dumps(row) for row in rows])
    printed = capsys.readouterr().out
    assert is_refused or (message in printed if message else not printed)


def test_a_run_without_the_column_is_refused(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "label": "2"}])
    with pytest.raises(UserError, match="need a column"):
        train(grpo, tmp_path / "run", dataset=(data,))


def test_a_run_with_several_rewards(tmp_path):
    rewards = ("accuracy", "overlong:8", "cosine", "repetition:2", "regex:[0-9]+")
    (row,) = train(grpo, tmp_path, rewards=rewards, batch_size=64, max_steps=1)
    assert row["failed_rewards"] == 0
    means = {name: row[f"rewards/{name}/mean"] for name in rewards}
    assert row["reward"] == pytest.approx(sum(means.values()))
    samples = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert means["regex:[0-9]+"] == np.mean([sample["completion"].isdecimal() for sample in samples])
    assert 0 < means["accuracy"] < 1


# ---- Rewards that fail -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def judging(*names, timeout=10.0):
    worker = RewardWorker(names, timeout, 64)
    yield worker
    worker.stop()
    assert not worker.process.is_alive()


def judged(worker, texts, **columns):
    """Judge completions -> rewards, and failures without the reward's name."""
    samples = [Sample([1], [1] * len(text), raw_prompt="p", raw_completion=text) for text in texts]
    worker([{name: values[place] for name, values in columns.items()} for place in range(len(texts))], samples)  # fmt: skip
    return [s.rewards for s in samples], [re.sub(r"^(.*:)?\w+: ", "", s.failure) for s in samples]


def test_rewards_that_fail_cost_only_the_samples_to_blame():
    """Each sample has one failure, however many rewards fail on it."""
    names = [f"{REWARDS}:{name}" for name in ("good", "bad", "slow_but_right", "bad")]
    with judging(*names, timeout=1.0) as worker:
        process, said = (
            worker.process.pid,
            ["fine", "hang", "crash", "raise", "nan", "none", "inf", "count", "x"],
        )
        rewards, failures = judged(worker, said, bonus=range(9))
        too_many = "TypeError('it returned [0.5, 0.0]; it must be a list, a number for each completion')"
        assert failures == ["", "timeout", "crash", "RuntimeError('no')", "nan", "", "inf", too_many, ""]
        assert rewards[0] == [4 + 0, 0.5, 1, 0.5]
        assert rewards[8] == [1 + 8, 0.5, 1, 0.5]
        np.testing.assert_array_equal(rewards[5], [4 + 5, np.nan, 1, np.nan])  # None is no failure
        assert np.isnan([rewards[place] for place in (1, 2, 3, 4, 6, 7)]).all()
        assert "missing 1 required positional argument: 'bonus'" in judged(worker, ["fine"])[1][0]
        assert worker.process.pid != process


def test_workers_have_no_cuda_nor_libraries_that_initialize_it(tmp_path):
    """bitsandbytes, which peft imports, would: then no process that is forked from that one could use CUDA."""
    code = "import sys, torch\ndef f(completions, **_):\n    found = {'peft', 'bitsandbytes', 'vllm'} & {*sys.modules}\n"
    (tmp_path / "r.py").write_text(f"{code}    return [float(torch.cuda.is_initialized() or bool(found))]\n")
    with judging(f"{tmp_path}/r.py:f") as worker:
        assert judged(worker, ["x"]) == ([[0.0]], [""])


def test_a_reward_that_always_hangs_ends_soon():
    with judging(f"{REWARDS}:hangs", timeout=0.05) as worker:
        began = time.perf_counter()
        assert judged(worker, ["x"] * 300)[1] == ["timeout"] * 300
        assert time.perf_counter() - began < 10  # 15 seconds of deadlines alone, else


def test_rewards_that_start_processes_or_return_no_list():
    with judging(f"{REWARDS}:has_processes", f"{REWARDS}:mapping") as worker:
        assert "returned {0: 1.0}" in judged(worker, ["four"])[1][0]
        assert worker.ask((0, {"completions": ["four", "three"]}), 10.0) == ("ok", [4, 5])


def test_a_formula_that_never_ends_costs_one_sample_and_its_deadline():
    with judging("accuracy", timeout=2.0) as worker:
        worker.ask((0, {"completions": ["x^2"], "answer": ["y^2"]}), 60.0)  # imports math-verify
        said = ["42", r"\boxed{9^{9^{9^{9}}}}", "$42$", "43"]
        rewards, failures = judged(worker, said, answer=["42"] * 4)
        assert failures == ["", "timeout", "", ""]
        assert [row[0] for row in rewards if row[0] == row[0]] == [1, 1, 0]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_that_hangs_ends_with_its_trainer(tmp_path):
    """And so does what it started, where the trainer is killed and the worker holds the interpreter's lock."""
    code = "import subprocess\ndef spin(completions, **_):\n    print(subprocess.Popen(['sleep', '600']).pid, flush=True)\n    return 9**9**9\n"
    (tmp_path / "r.py").write_text(code)
    (tmp_path / "trainer.py").write_text(
        f"import os, sys, threading\nsys.path.insert(0, {str(Path(common.__file__).parent)!r})\n"
        "from common import RewardWorker, Sample\n"
        "if __name__ == '__main__':\n"
        f"    worker = RewardWorker([{str(tmp_path / 'r.py:spin')!r}], 600, 64)\n"
        "    print(worker.process.pid, flush=True)\n"
        "    threading.Timer(1, os.kill, (os.getpid(), 9)).start()\n"
        "    worker([{}], [Sample([1])])\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "trainer.py"], stdout=subprocess.PIPE, timeout=120, check=False)  # fmt: skip
    assert done.returncode == -9
    pids, deadline = [int(pid) for pid in done.stdout.split()], time.monotonic() + 20
    assert len(pids) == 2
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))
