"""Rewards: answers that are right and wrong, each function against hand-computed values and TRL's, and those that fail."""

import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ASSETS, SHORT, read_metrics, write_rows
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForSequenceClassification,
)
from trl.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)

import common
import grpo
import reward_model as rm
from common import (
    RewardWorker,
    UserError,
    accuracy,
    as_number,
    check_reward_columns,
    choice,
    load_reward,
    number_in_words,
    think_format,
)


def messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


# ---- Answers ---------------------------------------------------------------------------------------------------------

EQUAL = [  # what is said, what is right
    ("42", "42"), ("42.0", "42"), ("42.", "42"), ("$42$", "42"), ("$42", "42"), (r"\$42", "42"), (r"\(42\)", "42"), ("**42**", "42"),
    (r"\boxed{42}", "42"), (r"First 6 + 7 = 13, so \boxed{41}? No: $\boxed{42}$.", "42"), ("steps and steps. " * 100 + r"\boxed{42}", "42"),
    ("4.2e1", "42"), ("1/2", "0.5"), ("0.5", "1/2"), (r"\frac{1}{2}", ".5"), (r"\dfrac12", "0.5"), (r"-\frac{1}{2}", "-0.5"),
    (r"\boxed{\frac{3}{4}}", "0.75"), (r"3 \times 10^4", "30000"), (r"6\frac{1}{2}", "6.5"), ("84/2", "42"), ("-3", "-3.0"),
    ("\u22123", "-3"), ("1,234", "1234"), ("1,234,567.5", "1234567.5"), ("1{,}234", "1234"), (r"10\,000", "10000"), ("1,000", "1000"),
    ("forty-two", "42"), ("Forty two", "42"), (r"\text{forty-two}", "42"), ("minus three", "-3"), ("zero", "0"),
    ("two million three hundred and forty-two", "2000342"), ("42", "forty-two"),
    ("work\n#### 42", "42"), ("42", "She has 6 * 7 = <<6*7=42>>42 eggs\n#### 42"), ("The answer is 42.", "42"),
    ("Let me see. **Answer:** 42", "42"), ("The answer is 1, no, the answer is 42", "42"), ("The answer is:\n\n$42$", "42"),
    ("The final answer to this is $\\frac{1}{2}$. I hope it is correct.", "0.5"), ("<think>7</think> 8", "8"),
    ("x = 42", "42"), ("12 + 30 = 42", "42"), ("42 cm", "42"), (r"42\text{ cm}", "42"), ("42", "42 meters"), (r"90^\circ", "90"),
    (r"\sqrt{25}", "5"), ("2^{10}", "1024"), ("42%", "42%"), (r"42\%", "42 percent"),
    (r"\{2,1\}", r"\{1,2\}"), ("{3, 1, 2}", "{1,2,3}"), ("2,1", "1,2"), (r"$5 \text{ and } 6$", "5,6"), (r"\emptyset", r"\{\}"),
    ("[0, 1)", "[0,1)"), (r"\left[0,1\right)", "[0,1)"), (r"(-\infty, 3]", r"(-\infty,3]"), (r"(3,4)\cup(1,2)", r"(1,2)\cup(3,4)"),
    ("(1, 2)", "(1,2)"), ("(x+1)^2", "x^2+2x+1"), ("1+2x", "2x+1"), ("y=1+2x", "y=2x+1"), ("4i+3", "3+4i"), ("2", "x=2"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"), (r"$\boxed{\frac{\pi}{4}}$", r"\frac{\pi}{4}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("42 dollars", "42"), ("The answer is $42$ dollars.", "42"), ("1,000 USD", "1000"), ("\u20ac42", "42"), ("42\u20ac", "42"),
    ("42 cm^2", "42"), (r"42\ \text{cm}^2", "42"), (r"42~\mathrm{m}^{3}", "42"), ("42 km/h", "42"), ("42\u00b0", "42"), ("\u201342", "-42"),
    ("42", r"42\text{ cm}^2"), ("42", "42 dollars"), ("1.5 \u00d7 10^3", "1500"), ("Paris", "paris"), (r"\boxed{\text{Paris}}", "Paris"), ("The answer is blue  whale.", "Blue whale"), ("}{", "}{"),
]  # fmt: skip
UNEQUAL = [
    ("43", "42"), ("", "42"), (r"\boxed{}", "42"), ("...", "42"), ("no answer", "42"), ("no answer", "0"), ("=", "42"), ("nan", "42"),
    ("inf", "42"), ("1/0", "0"), ("0.333", "1/3"), ("0.333333", "1/3"), ("0.1", "0.10000001"), ("1e400", "42"), ("9" * 5000, "42"),
    ("1,2", "12"), ("1,00", "100"), ("4 2", "42"), ("4 2", "6"), ("one two", "12"), ("forty", "42"), (r"\frac{1}{2}", "2"),
    ("42%", "42"), ("42", "42%"), ("42%", "0.42"), ("0.42", "42%"), ("<think>42</think> 43", "42"),
    # Several candidates: the last one counts, and only if it ends; lists are one answer.
    (r"\boxed{42} or \boxed{43}", "42"), (r"\boxed{41} 42", "42"), (r"\boxed{42", "42"), (r"\boxed{42} then \boxed{4", "42"),
    ("The answer is 42. The answer is 43.", "42"), ("#### 42\n#### 43", "42"), ("41,42", "42"), ("41 or 42", "42"), (r"\pm 42", "42"),
    (r"\{41, 42\}", "42"), ("41 < x < 43", "42"), ("x >= 42", "42"), ("[42, 43]", "42"), ("41 or 42. " * 100, "42"),
    # Arithmetic left to do: no policy shall win by repeating the question.
    ("12 + 30", "42"), ("12 + 30 =", "42"), ("12 30", "42"), ("{12}+{30}", "42"), ("6\u00d77", "42"), ("84 \u00f7 2", "42"),
    ("6\u00b77", "42"), ("12\uff0b30", "42"), ("42^2", "42"), ("42 m 3", "42"), ("(12)(30)", "360"), (r"6 \cdot 7", "42"), ("43 - 1", "42"),
    ("(1,2)", "[1,2]"), ("[1,2]", "(1,2)"), (r"\{1,2\}", "(1,2)"), (r"\{1,3\}", r"\{1,2\}"), ("(2,1)", "(1,2)"), ("[0,1]", "[0,1)"),
    ("x^2+1", "(x+1)^2"), ("x", "y"), ("2x", "2"), ("Pairs", "Paris"), ("London", "Paris"), ("}", "}{"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "gold"), EQUAL)
def test_answers_that_are_right(said, gold):
    assert accuracy([said], answer=[gold]) == accuracy(messages(said), solution=[gold]) == [1.0]


@pytest.mark.parametrize(("said", "gold"), UNEQUAL)
def test_answers_that_are_wrong(said, gold):
    assert accuracy([said], answer=[gold]) == accuracy(messages(said), solution=[gold]) == [0.0]


def test_percent_where_the_data_says_so():
    said, golds = (
        ["42%", "42%", "0.42", "42", "0.42", "42%", r"\boxed{1/2\%}"],
        ["42", "0.42", "42%", "42%", "42", "4200", "0.5"],
    )
    assert accuracy(said, golds, percent=[True] * 7) == [1, 1, 1, 1, 0, 0, 1]
    assert accuracy(said, golds, percent=[None, False] + [None] * 5) == [0] * 7


def test_answer_or_else_solution_or_none():
    assert accuracy(
        ["1", "2", "3", "4"], answer=[1, None, None, 5.0], solution=[2, r"so \boxed{2}", None, 4]
    ) == [1, 1, None, 0]
    assert accuracy(["1"]) == choice(["A"]) == [None]


def test_accuracy_equals_trls():
    """On boxed answers, where our own rules (arithmetic, decimals, tuples) play no part, nor \\frac12, which TRL cannot read."""
    pool = ["2", "-7", r"\frac{2}{4}", "0.5", r"\sqrt{8}", r"2\sqrt{2}", "x^2-1", "(x-1)(x+1)", r"\{1,2\}", r"\{2,1\}", "[0,1)",
            r"(0,1]", r"\pi", r"\frac{\pi}{2}", "2x+3", "y=2x+3", "3+2i", r"\frac{x}{2}", r"\frac{1}{2}x"]  # fmt: skip
    pairs = [(said, gold) for said in pool for gold in pool]
    said, golds = (
        [rf"So it is $\boxed{{{said}}}$." for said, _ in pairs],
        [rf"$\boxed{{{gold}}}$" for _, gold in pairs],
    )
    expected = accuracy_reward(messages(*said), golds)
    found = accuracy(said, golds)
    assert [pair for pair, mine, theirs in zip(pairs, found, expected, strict=True) if mine != theirs] == []
    assert sum(found) > len(pool)


def test_numbers():
    assert as_number("0.1") * 3 == as_number("0.3")
    assert as_number("fortytwo") is None
    rng = random.Random(0)
    for n in [*range(1, 120), *(rng.randrange(10**9) for _ in range(200))]:
        assert number_in_words(spelled(n)) == n
        assert number_in_words("minus " + spelled(n, joint=" ")) == -n
    for text in (
        "",
        "and",
        "forty forty",
        "two one",
        "million",
        "one thousand two million",
        "one thousand two thousand",
        "ten hundred",
        "x",
    ):
        assert number_in_words(text) is None


ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def spelled(n, joint="-"):
    """By recursion, as one learns it."""
    if n < 20:
        return f"{ONES} eighteen nineteen".split()[n]
    if n < 100:
        tens = TENS.split()[n // 10 - 2]
        return tens + (joint + ONES.split()[n % 10] if n % 10 else "")
    size, name = next(
        (size, name) for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")) if n >= size
    )
    rest = (" and " if size == 100 else ", ") + spelled(n % size, joint) if n % size else ""
    return f"{spelled(n // size, joint)} {name}{rest}"


# ---- The other functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "letter"), [
    (r"\boxed{C}", "C"), (r"\boxed{\text{(C)}}", "C"), ("Answer: (C)", "C"), ("The answer is C.", "C"), ("C", "C"), ("(c)", "C"),
    ("C. Paris", "C"), ("C) A cat", "C"), ("**Answer:** C, not B", "C"), ("It could be A or B, but I take D", "D"),
    ("A, B, C, D, E \\boxed{B}", "B"), ("A careful look says (E)", "E"), ("#### B", "B"), ("<think>A</think>B", "B"),
    ("#### Which one?\nAnswer: B", "B"), ("", ""), ("none of them", ""), ("Cat", ""), ("F", ""), (r"\boxed{", ""), ("I'D say", ""),
])  # fmt: skip
def test_choice(said, letter):
    golds = ["A", "(b)", "C.", r"\boxed{D}", "E", "none", None]
    assert choice([said] * 7, answer=golds) == [*[float(letter == x) for x in "ABCDE"], 0, None]


def test_format_equals_trls_and_wants_an_answer():
    rng, parts = random.Random(0), ["<think>", "</think>", "why", "\n", "42", " "]
    said = ["".join(rng.choices(parts, k=rng.randint(1, 6))) for _ in range(500)]
    said = ["<think>" * (index % 2) + text for index, text in enumerate(said)]
    theirs = think_format_reward(messages(*said))
    answered = [bool(text.partition("</think>")[2].strip()) for text in said]
    found = think_format(said)
    assert found == [float(one and has) for one, has in zip(theirs, answered, strict=True)]
    assert 20 < sum(found) < 480
    assert load_reward("format") is think_format


def random_ids(n=200, longest=40, vocabulary=6):
    rng = random.Random(0)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(0, longest))] for _ in range(n)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_repetition_equals_trls(size):
    ids = random_ids()
    assert load_reward(f"repetition:{size}")(completion_ids=ids) == pytest.approx(
        get_repetition_penalty_reward(size)(ids)
    )
    assert load_reward("repetition")(completion_ids=ids) == pytest.approx(
        get_repetition_penalty_reward()(ids)
    )
    assert load_reward("repetition:2")(completion_ids=[[1, 2, 3, 4], [5] * 5, []]) == [0, -0.75, 0]


@pytest.mark.parametrize("cache", [1, 10, 30])
def test_overlong_equals_trls(cache):
    ids = random_ids()
    found = load_reward(f"overlong:{cache}", 30)(completion_ids=ids)
    assert found == pytest.approx(get_soft_overlong_punishment(30, cache)(ids))
    assert load_reward("overlong:20", 100)(completion_ids=[[1] * n for n in (80, 90, 100, 101)]) == [
        0,
        -0.5,
        -1,
        -1,
    ]


def test_cosine_equals_trls():
    ids = random_ids()
    said = [rf"\boxed{{\frac{{1}}{{{2 + index % 2}}}}}" for index in range(len(ids))]
    golds = [r"\frac{1}{3}"] * len(ids)
    found = load_reward("cosine", 30)(completions=said, completion_ids=ids, answer=golds)
    assert found == pytest.approx(get_cosine_scaled_reward(30)(messages(*said), golds, ids))
    half = load_reward("cosine", 100)(
        ["1", "2", "2", "2"], completion_ids=[[1] * n for n in (50, 50, 0, 7)], answer=[1, 1, 2, None]
    )
    assert half == [pytest.approx(0.75), pytest.approx(-0.75), 1, None]


def test_regex():
    reward = load_reward(r"regex:<a>.*</a>:\d")
    assert (
        reward(completions=["<a>x\ny</a>:1", "<a></a>:12", " <a></a>:1"])
        == reward(completions=messages("<a></a>:7", "", "7"))
        == [1, 0, 0]
    )


def test_json_schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(
        json.dumps(
            {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 1}}}
        )
    )
    said = ['{"n": 1}', '{"n": 0}', "{}", "n", '{"n": NaN}', '[{"n": 1}]', '<think>{</think>{"n": 2}', "[" * 100_000,
            'Here:\n```json\n{"n": "x"}\n```\nor\n```json\n{"n": 3}\n```\nDone', '```json\n{"n": 3}\n```\n```json\n{}\n```']  # fmt: skip
    assert load_reward(f"json-schema:{path}")(completions=said) == [1, 0, 0, 0, 0, 0, 1, 0, 1, 0]


# ---- A reward model --------------------------------------------------------------------------------------------------


def scores_of(model, path, prompts, completions):
    """One by one, by transformers' own forward."""
    tokenizer, values = AutoTokenizer.from_pretrained(path), []
    for prompt, said in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            ids = [*tokenizer(prompt)["input_ids"], *tokenizer(said)["input_ids"], tokenizer.eos_token_id]
        else:
            ids = tokenizer(
                tokenizer.apply_chat_template(prompt + said, tokenize=False), add_special_tokens=False
            )["input_ids"]
        with torch.no_grad():
            values.append(model(torch.tensor([ids])).logits.item())
    return values


@pytest.fixture(scope="module", params=[0, 4], ids=["full", "adapter"])
def judge(request, tmp_path_factory):
    """final/ of reward_model.py after three steps, and that model as transformers (and peft) load it."""
    run = tmp_path_factory.mktemp("judge") / "run"
    lora = {"lora_rank": request.param, "lora_merge": False} if request.param else {}
    rm.main(replace(rm.Args(output_dir=str(run)), **SHORT, learning_rate=1e-2, **lora))
    rm.dist.destroy_process_group() if rm.dist.is_initialized() else None
    if not request.param:
        return str(run / "final"), AutoModelForSequenceClassification.from_pretrained(run / "final").eval()
    base = AutoModelForSequenceClassification.from_pretrained(ASSETS / "model", num_labels=1)
    return str(run / "final"), rm.PeftModel.from_pretrained(base, run / "final").eval()


@pytest.mark.parametrize("rope", [None, "dynamic"], ids=["packed", "alone"])
def test_reward_model_equals_transformers(judge, monkeypatch, rope):
    path, model = judge
    rows = [json.loads(line) for line in (ASSETS / "prompts.jsonl").read_text().splitlines()[:40]]
    rng = random.Random(0)
    prompts = [row["prompt"] if index % 3 else "1+1=" * rng.randint(1, 9) for index, row in enumerate(rows)]
    texts = [str(rng.randrange(10 ** rng.randint(1, 30))) for _ in rows]
    said = [
        text if isinstance(prompt, str) else messages(text)[0]
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    expected = scores_of(model, path, prompts, said)
    assert max(expected) - min(expected) > 0.01
    if rope:  # an embedding that depends on the length of its row
        load = AutoModelForSequenceClassification.from_pretrained
        monkeypatch.setattr(
            AutoModelForSequenceClassification, "from_pretrained", lambda *a, **k: marked(load(*a, **k))
        )
    packings, split = set(), common.split_batch
    monkeypatch.setattr(common, "split_batch", lambda *args: packings.add(args[3]) or split(*args))
    reward = load_reward(f"reward-model:{path}")
    assert reward(prompts=prompts, completions=said, completion_ids=None, answer=None) == pytest.approx(
        expected, abs=1e-5
    )
    values = reward(prompts=["1+1=", "1+1=", "1 " * 5000], completions=["2", "", "2"])
    assert [math.isnan(value) for value in values] == [False, True, True]
    assert packings == {rope is not None}
    assert np.isnan(reward(prompts=["1"], completions=[""])).all()


def test_reward_model_that_leaks_between_rows_scores_each_alone(tmp_path):
    """BLOOM's own attention does, and a new head's scores hide it from any tolerance for rounding."""
    config = BloomConfig(
        vocab_size=512, hidden_size=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=0, eos_token_id=2
    )
    torch.manual_seed(0)
    BloomForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    prompts, said = ["1+1=", "20+22=", "3+4="] * 4, [str(n) for n in range(12)]
    values = load_reward(f"reward-model:{tmp_path}")(prompts=prompts, completions=said)
    assert values == pytest.approx(scores_of(model, tmp_path, prompts, said), abs=1e-6)


def marked(model):
    model.config.rope_parameters["rope_type"] = "dynamic"
    return model


@pytest.mark.slow
def test_reward_model_in_its_process(judge):
    path, model = judge
    worker = RewardWorker([f"reward-model:{path}"], timeout=60)
    try:
        prompts = [[{"role": "user", "content": "1+1="}]] * 2
        rewards_SR, failures = worker(prompts, messages("2", "33"), [[1], [1, 1]], {"answer": ["2", "2"]})
        assert rewards_SR[:, 0].tolist() == pytest.approx(
            scores_of(model, path, prompts, messages("2", "33")), abs=1e-5
        )
        assert not failures
    finally:
        worker.stop()


# ---- Names, columns, runs --------------------------------------------------------------------------------------------

KNOWN = (
    "accuracy, choice, format, environment, cosine, json-schema, overlong, regex, repetition, reward-model"
)


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere.py:f", f"neither FILE.py:FUNCTION nor one of {KNOWN}"),
    ("accurate", f"--rewards accurate: neither FILE.py:FUNCTION nor one of {KNOWN}"),
    ("accuracy:1", f"--rewards accuracy:1: neither FILE.py:FUNCTION nor one of {KNOWN}"),
    ("think-format", f"nor one of {KNOWN}"),
    ("{}:missing", "has no function missing"),
    ("{}:wants_environments", "asks for `environments`; give the environment a `get_reward` instead"),
    ("regex:(", r"--rewards regex:\(: the pattern does not compile: missing \)"),
    ("regex", "regex needs a pattern"),
    ("repetition:0", "'0' is not a whole number from 1"),
    ("repetition:two", "'two' is not a whole number from 1"),
    ("overlong", "'' is not a whole number from 1 to 64"),
    ("overlong:65", "'65' is not a whole number from 1 to 64"),
    ("overlong:-1", "'-1' is not a whole number"),
    ("cosine:3", "cosine takes no argument"),
    ("json-schema:nowhere.json", "nowhere.json is no JSON schema: .*No such file"),
    ("json-schema:{}", "rewards.py is no JSON schema: Expecting value"),
    ("json-schema:{}.json", "is no JSON schema: 'numbr' is not valid"),
    ("reward-model:nowhere", "--rewards reward-model:nowhere: nowhere cannot be loaded as a reward model"),
    (f"reward-model:{ASSETS / 'model'}", "it is Qwen3ForCausalLM with 2 labels; a reward model scores with one"),
])  # fmt: skip
def test_rewards_that_do_not_exist_are_refused(bad_rewards, name, message):
    bad_rewards.with_name("rewards.py.json").write_text('{"type": "numbr"}')
    with pytest.raises(UserError, match=message):
        load_reward(name.format(bad_rewards), 64)


@pytest.mark.slow
def test_what_a_worker_refuses():
    """In its process, at the start."""
    for name in ("overlong:4", "cosine"):
        with pytest.raises(
            UserError, match=f"--rewards {name}: .* give RewardWorker a max_completion_length"
        ):
            RewardWorker([name], timeout=1.0)
    with pytest.raises(UserError, match=r"neither FILE\.py:FUNCTION"):
        RewardWorker(["accurate"], timeout=1.0)


def test_reward_model_of_three_labels_and_adapter_without_score(tmp_path):
    three = AutoModelForSequenceClassification.from_pretrained(ASSETS / "model", num_labels=3)
    three.save_pretrained(tmp_path / "three")
    with pytest.raises(
        UserError, match="it is Qwen3ForSequenceClassification with 3 labels; a reward model scores with one"
    ):
        load_reward(f"reward-model:{tmp_path / 'three'}")
    causal = rm.AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    rm.get_peft_model(
        causal, rm.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    ).save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match="it is CAUSAL_LM with 1 labels"):
        load_reward(f"reward-model:{tmp_path / 'lora'}")


def test_columns_that_rewards_need(tmp_path):
    rows = [json.dumps({"question": "a", "answer": None}), json.dumps({"solution": 3})]
    check_reward_columns(["accuracy", "choice"], rows)
    check_reward_columns(["format", "regex:a"], rows[:1])
    for name in ("accuracy", "choice", "cosine"):
        with pytest.raises(
            UserError,
            match=f"--rewards {name} needs a column `answer` or `solution`; .* has answer, question",
        ):
            check_reward_columns(["format", name], rows[:1])
    data = (write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "label": "2"}]),)
    args = replace(
        grpo.Args(output_dir=str(tmp_path / "run")), eval_dataset=(), dataset=data, model="nowhere"
    )
    with pytest.raises(UserError, match="--model nowhere"):
        grpo.main(args)
    with pytest.raises(
        UserError,
        match="--rewards accuracy needs a column `answer` or `solution`; besides `prompt` the data has label",
    ):
        grpo.main(replace(args, model=str(ASSETS / "model")))
    assert not (tmp_path / "run").exists()


def test_a_run_with_several_rewards(tmp_path):
    rewards = ("accuracy", "overlong:8", "cosine", "repetition:2", "regex:[0-9]+")
    grpo.main(
        replace(
            grpo.Args(output_dir=str(tmp_path)),
            rewards=rewards,
            eval_dataset=(),
            wandb="disabled",
            max_steps=1,
        )
    )
    (row,) = read_metrics(tmp_path)
    assert row["failed_rewards"] == 0
    means = {name: row[f"rewards/{name}/mean"] for name in rewards}
    assert row["reward"] == pytest.approx(sum(means.values()))
    samples = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert means["regex:[0-9]+"] == np.mean([sample["completion"].isdecimal() for sample in samples])
    assert 0 < means["accuracy"] < 1


@pytest.mark.slow
def test_a_bomb_costs_one_sample_and_its_deadline():
    worker = RewardWorker(["accuracy"], timeout=2.0)
    try:
        began = time.perf_counter()
        said = ["42", r"\boxed{9^{9^{9^{9}}}}", "forty-two", "43"]
        rewards_SR, failures = worker(["p"] * 4, said, [[1]] * 4, {"answer": ["42"] * 4})
        assert failures == {"timeout": 1}
        assert rewards_SR[[0, 2, 3], 0].tolist() == [1, 1, 0]
        assert np.isnan(rewards_SR[1, 0])
        assert time.perf_counter() - began < 100
    finally:
        worker.stop()


BAD_REWARD = """
from __future__ import annotations
import asyncio, math, multiprocessing, os, subprocess, time
from dataclasses import dataclass

def good(completions, bonus, **_):
    return [len(text) + extra for text, extra in zip(completions, bonus)]

async def slow_but_right(completions, **_):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)

def bad(completions, **_):
    values = []
    for text in completions:
        if text == "hang":
            time.sleep(60)
        if text == "crash":
            os._exit(3)
        if text == "raise":
            raise RuntimeError("no")
        values += [{"nan": math.nan, "inf": math.inf, "none": None}.get(text, 0.5)]
    return values + [0.0] * completions.count("count")

def text(completions, **_):
    return ["0.5"] * len(completions)

def mapping(completions, **_):
    return {index: 1.0 for index in range(len(completions))}

def forks(completions, **_):
    os.fork()
    return [float(len(text)) for text in completions]

def has_processes(completions, **_):
    with multiprocessing.Pool(1) as pool:
        return pool.map(float, [len(text) for text in completions])

def leaves_a_process(completions, **_):
    if os.path.exists(completions[0]):
        return [1.0] * len(completions)
    with open(completions[0], "w") as file:
        file.write(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)

@dataclass
class Row:
    x: int

def wants_environments(completions, environments):
    return [0.0] * len(completions)
"""


@pytest.fixture
def bad_rewards(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(BAD_REWARD)
    return path


def test_rewards_that_fail_cost_only_the_samples_to_blame(bad_rewards):
    worker = RewardWorker(
        [f"{bad_rewards}:good", f"{bad_rewards}:bad", f"{bad_rewards}:slow_but_right"], timeout=1.0
    )
    try:
        said = ["fine", "hang", "crash", "raise", "nan", "none", "inf", "count", "also fine"]
        n = len(said)
        rewards_SR, failures = worker(["p"] * n, said, [[1]] * n, {"bonus": list(range(n))})
        assert failures == {"timeout": 1, "crash": 1, "exception": 1, "count": 1, "not finite": 2}
        assert rewards_SR[0].tolist() == [4, 0.5, 1]
        assert rewards_SR[8].tolist() == [9 + 8, 0.5, 1]
        assert rewards_SR[5, [0, 2]].tolist() == [4 + 5, 1]
        assert np.isnan(rewards_SR[5, 1])
        assert np.isnan(rewards_SR[[1, 2, 3, 4, 6, 7]]).all()
    finally:
        worker.stop()
    assert not worker.process.is_alive()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid, seconds=20):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not is_running(pid)


@pytest.mark.slow
def test_rewards_that_start_processes(bad_rewards, tmp_path):
    """A fork that comes back does not answer in its parent's place; what a function has started ends with its worker."""
    names = ["forks", "leaves_a_process", "has_processes", "text", "mapping"]
    worker = RewardWorker([f"{bad_rewards}:{name}" for name in names], timeout=3.0)
    try:
        said = [str(tmp_path / "pid"), "four", "three"]
        for index, size in ((0, [len(text) for text in said]), (2, [len(text) for text in said])):
            for _ in range(2):
                assert worker.call(index, {"completions": said}) == (size, "")
        assert worker.call(1, {"completions": said}) == (None, "timeout")
        assert ends(int((tmp_path / "pid").read_text()))
        for index, message in ((3, "returned the text '0.5'"), (4, "returned a dict")):
            assert worker.call(index, {"completions": said}) == (None, "exception")
            assert message in worker.problem
    finally:
        worker.stop()


@pytest.mark.slow
def test_a_worker_that_hangs_ends_with_its_trainer(tmp_path):
    """Even where the interpreter's lock is held."""
    (tmp_path / "r.py").write_text("def spin(completions, **_):\n    return 9**9**9\n")
    (tmp_path / "trainer.py").write_text(
        f"import os, sys, threading\nsys.path.insert(0, {str(Path(common.__file__).parent)!r})\n"
        "from common import RewardWorker\n"
        "if __name__ == '__main__':\n"
        f"    worker = RewardWorker([{str(tmp_path / 'r.py:spin')!r}], timeout=600)\n"
        "    print(worker.process.pid, flush=True)\n"
        "    threading.Timer(1, os.kill, (os.getpid(), 9)).start()\n"
        "    worker([''], [''], [[]], {})\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "trainer.py"], stdout=subprocess.PIPE, timeout=120, check=False
    )
    assert done.returncode == -9
    assert ends(int(done.stdout))


def test_a_column_cannot_stand_for_what_was_said():
    for name in ("prompts", "completions", "completion_ids"):
        with pytest.raises(UserError, match=f"a column `{name}`"):
            check_reward_columns(["format"], [json.dumps({"answer": "1"}), json.dumps({name: "x"})])
