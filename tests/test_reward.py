"""reward_model.py as it runs: losses and scores against independent ones, any split of the work, resume, scoring."""

import functools
import itertools
import math
import random
from dataclasses import replace

import conftest
import datasets
import numpy as np
import pytest
import torch
from conftest import ASSETS, assert_same_curve, read_rows, run_well, weights, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import reward_model as rm
from common import UserError

QUESTIONS = read_rows(ASSETS / "preferences.jsonl")[:400]
train = functools.partial(conftest.train, rm, learning_rate=1e-3)


@pytest.fixture
def ragged(tmp_path):
    """Pairs, some with margins or probabilities."""
    kinds = itertools.cycle([{}, {"margin": 0.5}, {"probability": 0.8}])
    rows = [row | more for row, more in zip(conftest.ragged_pairs(), kinds, strict=False)]
    return write_rows(tmp_path / "ragged.jsonl", rows)


@pytest.fixture
def rankings(tmp_path):
    """17 rankings of 2 to 5 answers, the nearer to the right number the better."""
    rng, rows = random.Random(1), []
    for _ in range(17):
        row, errors = rng.choice(QUESTIONS), rng.sample(range(150), rng.randint(2, 5))
        answers = [str(int(row["chosen"][0]["content"]) + error) for error in errors]
        rows.append({"prompt": row["prompt"], "completions": answers, "ranks": errors})
    return write_rows(tmp_path / "rankings.jsonl", rows)


# ---- Losses and metrics ----------------------------------------------------------------------------------------------


def table(*rows):
    """Random scores, and Rankings, of rows of ranks."""
    ranks_RK = torch.full((len(rows), max(map(len, rows))), math.inf)
    for ranks_K, row in zip(ranks_RK, rows, strict=True):
        ranks_K[: len(row)] = torch.tensor(row)
    scores_RK = torch.randn(ranks_RK.shape, generator=torch.Generator().manual_seed(0))
    scores_RK = scores_RK.masked_fill(ranks_RK.isinf(), 0).requires_grad_()
    return scores_RK, rm.Rankings(ranks_RK, torch.zeros(len(rows)), torch.full((len(rows),), -1.0))


def test_pairs_equal_bradley_terry():
    scores_RK, pairs = table(*[(0, 1)] * 4)
    margins, probabilities = torch.tensor([0.0, 0.7, 0.0, 0.3]), torch.tensor([-1.0, -1.0, 0.8, 0.0])
    pairs = pairs._replace(margin_R=margins, probability_R=probabilities)
    found_R = rm.reward_loss(scores_RK, pairs, 0.1, 0.01)
    for row, (margin, wins) in enumerate([(0.0, 0.9), (0.7, 0.9), (0.0, 0.8), (0.3, 0.0)]):
        w, lo = scores_RK[row].double().tolist()
        p = 1 / (1 + math.exp(-(w - lo - margin)))
        expected = -wins * math.log(p) - (1 - wins) * math.log(1 - p) + 0.01 * (w + lo) ** 2
        assert found_R[row].item() == pytest.approx(expected, rel=1e-5)


def test_rankings_equal_plackett_luce():
    """Against the product of the probabilities of each pick, and its gradient by autograd in float64."""
    scores_RK, rows = table((0, 1, 2, 3), (0, 1, 2), (0, 1), (5, 7, 9, 11))
    found_R = rm.reward_loss(scores_RK, rows, 0.0, 0.0)
    doubles, expected = scores_RK.detach().double().requires_grad_(), []
    for row, size in enumerate([4, 3, 2, 4]):
        strengths = doubles[row, :size].exp()
        picks = [strengths[pick] / strengths[pick:].sum() for pick in range(size)]
        expected.append(-torch.stack(picks).prod().log())
    expected_R = torch.stack(expected)
    torch.testing.assert_close(found_R.double(), expected_R, rtol=1e-5, atol=1e-6)
    found, expected = (torch.autograd.grad(loss_R.sum(), x)[0] for loss_R, x in ((found_R, scores_RK), (expected_R, doubles)))  # fmt: skip
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_ties_are_not_compared():
    """Of ranks 0, 1, 1, 2 the middle ones each beat the last, and are not compared with each other."""
    scores_RK, rows = table((0, 1, 1, 2))
    a, b, c, d = scores_RK[0].exp().tolist()
    expected = -math.log(a / (a + b + c + d)) - math.log(b / (b + d)) - math.log(c / (c + d))
    assert rm.reward_loss(scores_RK, rows, 0.0, 0.0).item() == pytest.approx(expected, rel=1e-5)
    a, b, c, d = scores_RK[0].tolist()
    gaps = rm.score_gaps(scores_RK, rows.ranks_RK).tolist()
    assert gaps == pytest.approx([a - b, a - c, a - d, b - d, c - d])


def test_metrics_equal_naive_ones():
    scores_RK, rows = table((0, 1, 2), (0, 1), (3, 3, 4))
    found, gaps, all_scores = rm.reward_metrics(scores_RK.detach(), rows, rm.Args()), [], []
    for scores, ranks in zip(scores_RK.tolist(), rows.ranks_RK.tolist(), strict=True):
        size = sum(map(math.isfinite, ranks))
        all_scores += scores[:size]
        pairs = itertools.permutations(range(size), 2)
        gaps += [scores[i] - scores[j] for i, j in pairs if ranks[i] < ranks[j]]
    gaps, all_scores = np.array(gaps), np.array(all_scores)
    expected = {"accuracy": (gaps > 0).mean(), "margin": gaps.mean(), "mean_reward": all_scores.mean()}
    expected |= {"min_reward": all_scores.min(), "max_reward": all_scores.max()}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_several_steps_equal_trls(tmp_path):
    """The whole RewardTrainer on plain text with margins and centring, three steps: all metrics of one name."""
    rng, rows = random.Random(0), []
    for index, row in enumerate(QUESTIONS[:8]):
        prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
        row = {"prompt": prompt + " ", "chosen": chosen, "rejected": rejected * rng.randint(1, 3)}
        rows.append({**row, "margin": 0.1 * index})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(ASSETS / "model", num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.05)
    for part in (model, AutoTokenizer.from_pretrained(ASSETS / "model")):
        part.save_pretrained(tmp_path / "model")
    names = ("loss", "grad_norm", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    flags = {"model": str(tmp_path / "model"), "center_rewards_coefficient": 0.05}
    conftest.assert_steps_equal_trls(rm, "Reward", names, tmp_path, rows=rows, **flags)


# ---- Scores ----------------------------------------------------------------------------------------------------------


def scores_of(path, rows, batch_size):
    """transformers' own scores of the better answer of each row, right-padded."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False) for row in rows]
    options, found = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}, []
    for index in range(0, len(texts), batch_size):
        with torch.no_grad():
            found += model(**tokenizer(texts[index : index + batch_size], **options)).logits[:, 0].tolist()
    return found


def score(output_dir, model, rows):
    """Run --score in this process -> the lines of scores.jsonl."""
    file, args = write_rows(output_dir.with_suffix(".jsonl"), rows), rm.Args(output_dir=str(output_dir))
    rm.main(replace(args, model=str(model), score=file, micro_batch_tokens=2000))
    return read_rows(output_dir / "scores.jsonl")


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["weights", "adapters"])
def test_final_gives_the_same_scores_in_any_batch_and_by_score(tmp_path, ragged, lora_rank):
    """Also where the tokenizer's pad token is its EOS token, so that a new one gets a row of embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    tokenizer.pad_token = tokenizer.eos_token
    for part in (tokenizer, AutoModelForCausalLM.from_pretrained(ASSETS / "model")):
        part.save_pretrained(tmp_path / "model")
    rows, final = read_rows(ragged), tmp_path / "run" / "final"
    flags = {"dataset": (ragged,), "eval_dataset": (ragged,), "learning_rate": 1e-2}
    flags["model"] = str(tmp_path / "model")
    metrics = train(tmp_path / "run", lora_rank=lora_rank, **flags)
    assert AutoTokenizer.from_pretrained(final).pad_token_id != tokenizer.eos_token_id
    alone, batched = scores_of(final, rows, 1), scores_of(final, rows, 21)
    assert batched == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 1e-2
    torch.manual_seed(0)  # which draws the head that the run began with
    begun = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1).score.weight
    assert (weights(tmp_path / "run")["score.weight"] - begun).abs().max() > 1e-3  # trained, with LoRA too
    chats = [{"messages": row["prompt"] + row["chosen"], "id": 3} for row in rows]
    scored = score(tmp_path / "scored", final, chats)
    assert [row.pop("score") for row in scored] == pytest.approx(alone, abs=1e-5)
    assert scored == chats
    again = train(tmp_path / "again", **{**flags, "model": str(final), "max_steps": 1})
    assert again[0]["eval/loss"] == pytest.approx(metrics[-1]["eval/loss"], rel=1e-5)


def test_score_says_what_is_wrong_with_a_row(tmp_path, ragged):
    train(tmp_path / "run", dataset=(ragged,), max_steps=1)
    rows = [{"text": "hello"}, {"no": 1}, {"prompt": "1+1=", "completion": "2"}, {"text": "long " * 3000}]
    scored = score(tmp_path / "scored", tmp_path / "run" / "final", rows)
    assert [isinstance(row["score"], float) for row in scored] == [True, False, True, False]
    assert scored[1]["problem"]
    assert "longer than" in scored[3]["problem"]
    with pytest.raises(UserError, match="is there already"):
        score(tmp_path / "scored", tmp_path / "run" / "final", rows)
    with pytest.raises(UserError, match="no model with one label"):
        score(tmp_path / "policy", ASSETS / "model", rows)


def test_the_first_free_reserved_token_becomes_the_pad_token():
    """Not any, which another run or rank would choose otherwise; and not one that a row has."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    reserved = [f"<|reserved_{index}|>" for index in range(20)]
    tokenizer.add_special_tokens({"additional_special_tokens": reserved, "pad_token": tokenizer.eos_token})
    first = tokenizer.convert_tokens_to_ids(reserved[0])
    data = datasets.Dataset.from_dict({"input_ids": [[5, first], [first + 2]]})
    assert rm.choose_pad(tokenizer, data) == first + 1
    assert tokenizer.pad_token == reserved[1]


# ---- Any split of the work, stopped and resumed ----------------------------------------------------------------------


def test_micro_batches_and_rows_do_not_change_the_curve(tmp_path, rankings, monkeypatch):
    flags = {"dataset": (rankings,), "eval_dataset": (rankings,), "batch_size": 17}
    one = train(tmp_path / "one", **flags)
    assert_same_curve(train(tmp_path / "many", micro_batch_tokens=250, **flags), one)
    monkeypatch.setattr(rm, "score_check", lambda *_: False)  # each answer in its own row
    assert_same_curve(train(tmp_path / "alone", **flags), one)


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, rankings, lora_rank):
    """17 rankings in batches of 4: the fifth batch has one, so that one rank runs a micro-batch without any."""
    flags = {"dataset": (rankings,), "eval_dataset": (rankings,), "batch_size": 4, "max_steps": 5}
    flags |= {"learning_rate": 3e-4, "micro_batch_tokens": 400, "lora_rank": lora_rank}
    conftest.assert_two_ranks_train_as_one(rm, tmp_path, 2e-3, **flags)


# ---- Rows and flags --------------------------------------------------------------------------------------------------

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
RANKING = {"prompt": "1+1=", "completions": ["4", "2", "3"]}
BAD = {
    "identical": ([{**PAIR, "rejected": "b"}], {}, r"identical sides"),
    "all tie": ([{**RANKING, "ranks": [1, 1, 1]}], {}, r"all completions tie"),
    "smoothing of rankings": ([{**RANKING, "ranks": [3, 1, 2]}], {"label_smoothing": 0.1}, r"applies to pairs"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_and_flags(tmp_path, name):
    rows, flags, message = BAD[name]
    with pytest.raises(UserError, match=f"(?s){message}"):
        train(tmp_path / "run", dataset=(write_rows(tmp_path / "rows.jsonl", rows),), **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.learn
def test_default_run_learns(tmp_path):
    """No flags: from about half of the held-out pairs to at least 95 %."""
    evals = [row for row in run_well("reward_model.py", tmp_path / "run") if "eval/accuracy" in row]
    assert 0.35 < evals[0]["eval/accuracy"] < 0.65
    assert evals[-1]["eval/accuracy"] >= 0.95
