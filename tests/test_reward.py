"""reward_model.py as it runs: losses and scores against independent ones, any split of the work, resume, scoring."""

import itertools
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import (
    ASSETS,
    SHORT,
    assert_same_curve,
    flags_of,
    kill,
    read_metrics,
    run,
    start,
    wait_for_step,
    weights,
    write_rows,
)  # fmt: skip
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
)

import reward_model as rm
from common import UserError, encode_ranking

QUESTIONS = [json.loads(line) for line in (ASSETS / "preferences.jsonl").read_text().splitlines()[:400]]


def ranking(rng, size):
    """A question with `size` answers, the nearer the better."""
    row = rng.choice(QUESTIONS)
    right = int(row["chosen"][0]["content"])
    errors = rng.sample(range(150), size)
    return {"prompt": row["prompt"], "completions": [str(right + error) for error in errors], "ranks": errors}


@pytest.fixture
def ragged(tmp_path):
    """21 pairs of conversations of several lengths, some with margins or probabilities."""
    rng, rows = random.Random(0), []
    for index in range(21):
        some = rng.sample(QUESTIONS, rng.randint(1, 3))
        prompt = sum((row["prompt"] + row["chosen"] for row in some[1:]), []) + some[0]["prompt"]
        row = {"prompt": prompt, "chosen": some[0]["chosen"], "rejected": some[0]["rejected"]}
        rows.append(row | [{}, {"margin": 0.5}, {"probability": 0.8}][index % 3])
    return write_rows(tmp_path / "ragged.jsonl", rows)


@pytest.fixture
def rankings(tmp_path):
    """17 rankings of 2 to 5 completions."""
    rng = random.Random(1)
    return write_rows(tmp_path / "rankings.jsonl", [ranking(rng, rng.randint(2, 5)) for _ in range(17)])


def train(output_dir, **flags):
    """Run reward_model.main in this process -> its metrics."""
    if isinstance(flags.get("dataset"), str):
        flags["dataset"] = (flags["dataset"],)
    rm.main(replace(rm.Args(output_dir=str(output_dir)), **{**SHORT, "learning_rate": 1e-3, **flags}))
    return read_metrics(output_dir)


# ---- Losses and metrics ----------------------------------------------------------------------------------------------


def table(*rows):
    """Rankings and random scores of rows of ranks."""
    ranks_RK = rm.padded([list(map(float, row)) for row in rows], math.inf)
    generator = torch.Generator().manual_seed(0)
    scores_RK = (
        torch.randn(ranks_RK.shape, generator=generator).masked_fill(ranks_RK.isinf(), 0).requires_grad_()
    )
    return scores_RK, rm.Rankings(ranks_RK, torch.zeros(len(rows)), torch.full((len(rows),), -1.0))


def test_pairs_equal_bradley_terry():
    scores_RK, pairs = table(*[(0, 1)] * 4)
    pairs = pairs._replace(
        margin_R=torch.tensor([0.0, 0.7, 0.0, 0.3]), probability_R=torch.tensor([-1.0, -1.0, 0.8, 0.0])
    )
    found_R = rm.reward_loss(scores_RK, pairs, 0.1, 0.01)
    for row, (margin, wins) in enumerate([(0.0, 0.9), (0.7, 0.9), (0.0, 0.8), (0.3, 0.0)]):
        w, lo = scores_RK[row].double().tolist()
        p = 1 / (1 + math.exp(-(w - lo - margin)))
        expected = -wins * math.log(p) - (1 - wins) * math.log(1 - p) + 0.01 * (w + lo) ** 2
        assert found_R[row].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_several_steps_equal_trls(tmp_path):
    """The whole RewardTrainer on plain text with margins and centring, four steps: all metrics of one name."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rng, rows = random.Random(0), []
    for index, row in enumerate(QUESTIONS[:12]):
        prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
        row = {"prompt": prompt + " ", "chosen": chosen, "rejected": rejected * rng.randint(1, 3)}
        rows.append({**row, "margin": 0.1 * index})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(ASSETS / "model", num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.05)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    config = RewardConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=12,
        num_train_epochs=4, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, max_grad_norm=1.0,
        center_rewards_coefficient=0.05, gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    trainer = RewardTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    expected = [row for row in trainer.state.log_history if "loss" in row]
    found = train(
        tmp_path / "ours", model=str(tmp_path / "model"), dataset=write_rows(tmp_path / "rows.jsonl", rows),
        batch_size=12, epochs=4, max_steps=None, lr_schedule="constant", warmup_steps=0, micro_batch_tokens=128,
        center_rewards_coefficient=0.05,
    )  # fmt: skip
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
            assert ours[name] == pytest.approx(float(theirs[name]), rel=1e-3, abs=2e-4), (name, ours, theirs)


def test_rankings_equal_plackett_luce():
    """Against the product of the probabilities of each pick, and its gradient by autograd in float64."""
    scores_RK, rows = table((0, 1, 2, 3), (0, 1, 2), (0, 1), (5, 7, 9, 11))
    found_R = rm.reward_loss(scores_RK, rows, 0.0, 0.0)
    doubles = scores_RK.detach().double().requires_grad_()
    likelihoods = []
    for row, size in enumerate([4, 3, 2, 4]):
        strengths, likelihood = doubles[row, :size].exp(), 1.0
        for pick in range(size):
            likelihood = likelihood * strengths[pick] / strengths[pick:].sum()
        likelihoods.append(-likelihood.log())
    expected_R = torch.stack(likelihoods)
    assert found_R.tolist() == pytest.approx(expected_R.tolist(), rel=1e-5)
    found = torch.autograd.grad(found_R.sum(), scores_RK)[0]
    expected = torch.autograd.grad(expected_R.sum(), doubles)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_ties_are_not_compared():
    """Of ranks 0, 1, 1, 2 the middle ones each beat the last, and are not compared with each other."""
    scores_RK, rows = table((0, 1, 1, 2))
    a, b, c, d = scores_RK[0].exp().tolist()
    expected = -math.log(a / (a + b + c + d)) - math.log(b / (b + d)) - math.log(c / (c + d))
    assert rm.reward_loss(scores_RK, rows, 0.0, 0.0).item() == pytest.approx(expected, rel=1e-5)
    _, (_, better_M, worse_M) = rm.compared_pairs(scores_RK, rows)
    assert list(zip(better_M.tolist(), worse_M.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 3),
        (2, 3),
    ]


def test_metrics_equal_naive_ones():
    scores_RK, rows = table((0, 1, 2), (0, 1), (3, 3, 4))
    targets_RK = torch.tensor([[5, 3, 5], [2, 4, 0], [1, 2, 2]])
    args = rm.Args()
    found = rm.heldout_metrics(scores_RK.detach(), rows, targets_RK, args)
    gaps, buckets, all_scores = [], {"shorter": [], "same_length": [], "longer": []}, []
    for scores, ranks, targets in zip(
        scores_RK.tolist(), rows.ranks_RK.tolist(), targets_RK.tolist(), strict=True
    ):
        size = sum(map(math.isfinite, ranks))
        all_scores += scores[:size]
        for i, j in itertools.permutations(range(size), 2):
            if ranks[i] < ranks[j]:
                gaps.append(scores[i] - scores[j])
                length = targets[i] - targets[j]
                buckets["shorter" if length < 0 else "longer" if length else "same_length"].append(
                    gaps[-1] > 0
                )
    accuracy = np.mean([gap > 0 for gap in gaps])
    assert found["eval/accuracy"] == pytest.approx(accuracy)
    assert found["eval/margin"] == pytest.approx(np.mean(gaps), rel=1e-5)
    assert found["eval/mean_reward"] == pytest.approx(np.mean(all_scores), rel=1e-5)
    assert found["eval/std_reward"] == pytest.approx(np.std(all_scores), rel=1e-5)
    assert (found["eval/min_reward"], found["eval/max_reward"]) == pytest.approx(
        (min(all_scores), max(all_scores))
    )
    for name, hits in buckets.items():
        assert found.get(f"eval/accuracy_{name}", -1) == pytest.approx(np.mean(hits) if hits else -1)
    # The Wilson interval solves (accuracy - p)^2 = z^2 p (1 - p) / n.
    for bound in (found["eval/accuracy_low"], found["eval/accuracy_high"]):
        assert (accuracy - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / len(gaps))
    assert found["eval/accuracy_low"] < found["eval/accuracy_high"]


def test_calibration_error():
    """Scores whose differences are the true log odds are calibrated; twice as large ones are over-confident."""
    generator = torch.Generator().manual_seed(0)
    logits_M = 2 * torch.randn(20000, generator=generator)
    wins_M = torch.rand(20000, generator=generator) < torch.sigmoid(logits_M)
    gap_M = torch.where(wins_M, logits_M, -logits_M)  # of the side that won
    ones_M = torch.ones(20000)
    assert rm.calibration_error(gap_M, ones_M) < 0.02
    # Where the data says how likely each is to win, that is what is hit or missed, whoever is the favourite.
    assert rm.calibration_error(logits_M, torch.sigmoid(logits_M)) < 1e-6
    missed_M = torch.sigmoid(2 * logits_M.abs()) - torch.sigmoid(logits_M.abs())
    assert rm.calibration_error(2 * logits_M, torch.sigmoid(logits_M)) == pytest.approx(
        missed_M.mean().item(), rel=1e-3
    )
    confidence_M, right_M = torch.sigmoid(2 * gap_M.abs()), (gap_M > 0).float()
    expected = 0.0
    for index in range(10):
        low, high = 0.5 + index / 20, 0.5 + (index + 1) / 20
        inside = (confidence_M >= low) & ((confidence_M < high) | (index == 9))
        if inside.any():
            expected += (
                inside.float().mean().item()
                * abs(right_M[inside].mean() - confidence_M[inside].mean()).item()
            )
    assert rm.calibration_error(2 * gap_M, ones_M) == pytest.approx(expected, rel=1e-3)
    assert expected > 0.05


# ---- Scores ----------------------------------------------------------------------------------------------------------


def scores_of(path, rows, batch_size):
    """transformers' own scores of the best completion of each row, right-padded."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False) for row in rows]
    found = []
    for index in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[index : index + batch_size], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.no_grad():
            found += model(**batch).logits[:, 0].tolist()
    return found


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}], ids=["full", "LoRA"])
def test_final_gives_the_same_scores_in_any_batch_and_by_score(tmp_path, ragged, flags):
    rows = [json.loads(line) for line in Path(ragged).read_text().splitlines()]
    train(tmp_path / "run", dataset=ragged, **flags)
    final = tmp_path / "run" / "final"
    alone, batched = scores_of(final, rows, 1), scores_of(final, rows, 21)
    assert batched == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 1e-2
    file = write_rows(
        tmp_path / "chats.jsonl", [{"messages": row["prompt"] + row["chosen"], "id": 3} for row in rows]
    )
    rm.main(
        replace(
            rm.Args(output_dir=str(tmp_path / "scored")), model=str(final), score=file, micro_batch_tokens=200
        )
    )
    scored = [json.loads(line) for line in (tmp_path / "scored" / "scores.jsonl").read_text().splitlines()]
    assert [row["score"] for row in scored] == pytest.approx(alone, abs=1e-5)
    assert all(row["id"] == 3 and row["messages"] for row in scored)


def test_architectures_that_cannot_be_packed_or_scored(tmp_path, ragged, capsys):
    """BLOOM's varlen attention sees later tokens and other rows, its eager one other rows: with a new head that changes
    scores by less than any tolerance for rounding. BERT has another head."""
    small = {"vocab_size": 512, "hidden_size": 32, "pad_token_id": 0, "eos_token_id": 2}
    bloom = BloomForCausalLM(BloomConfig(**small, n_layer=2, n_head=2))
    bert = BertForMaskedLM(
        BertConfig(**small, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    for name, model in (("bloom", bloom), ("bert", bert)):
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(tmp_path / name)
    train(tmp_path / "eager", dataset=ragged, model=str(tmp_path / "bloom"), attention="eager")
    assert "in one completion a row" in capsys.readouterr().out
    for name, message in (
        ("bloom", "bloom lets tokens see later ones with this --attention; use --attention eager"),
        ("bert", "bert is built in a way that `scores` does not know"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", dataset=ragged, model=str(tmp_path / name))
        torch.distributed.destroy_process_group()


def test_lora_trains_the_score_head_and_exports_it(tmp_path, ragged):
    flags = {"dataset": ragged, "lora_rank": 4, "lora_merge": False}
    train(tmp_path / "run", **flags)
    saved = rm.unwrap(rm.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(ASSETS / "model", num_labels=1), tmp_path / "run" / "final"
    ))  # fmt: skip
    torch.manual_seed(0)
    begun = AutoModelForSequenceClassification.from_pretrained(ASSETS / "model", num_labels=1)
    trained = saved.score.modules_to_save["default"].weight
    assert trained.shape == begun.score.weight.shape
    assert (trained - begun.score.weight).abs().max() > 1e-4
    # Trained further, and used by --score, which needs no rank.
    final, eval_dataset = str(tmp_path / "run" / "final"), (ragged,)
    more = train(tmp_path / "more", model=final, eval_dataset=eval_dataset, **flags)
    last = train(tmp_path / "again", eval_dataset=eval_dataset, **flags)[-1]
    assert more[0]["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    file = write_rows(tmp_path / "texts.jsonl", [{"text": "1+1=2"}, {"text": "1+1=3"}])
    rm.main(replace(rm.Args(output_dir=str(tmp_path / "scored")), model=final, score=file))
    tokenizer, saved = AutoTokenizer.from_pretrained(final), saved.eval()
    for row in map(json.loads, (tmp_path / "scored" / "scores.jsonl").read_text().splitlines()):
        ids = tokenizer(row["text"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        assert row["score"] == pytest.approx(saved(ids).logits.item(), abs=1e-5)


def test_every_form_of_a_training_row_is_scored_as_it_is_trained(tmp_path, ragged):
    """By the tokens that encode_ranking makes of it, in transformers."""
    train(tmp_path / "run", dataset=ragged, max_steps=1)
    final = tmp_path / "run" / "final"
    user, answer = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "12"}]
    forms = [("q", "12"), ("q", answer), (user, "12"), (user, answer)]
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in forms])
    rm.main(replace(rm.Args(output_dir=str(tmp_path / "scored")), model=str(final), score=file))
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(final),
        AutoTokenizer.from_pretrained(final),
    )
    lines = (tmp_path / "scored" / "scores.jsonl").read_text().splitlines()
    for (prompt, completion), row in zip(forms, map(json.loads, lines), strict=True):
        other = "3" if isinstance(completion, str) else [{"role": "assistant", "content": "3"}]
        trained = encode_ranking({"prompt": prompt, "chosen": completion, "rejected": other}, tokenizer)
        ids = torch.tensor([trained["input_ids"][: trained["lengths"][0]]])
        assert row["score"] == pytest.approx(model(ids).logits.item(), abs=1e-5)
        assert (row["prompt"], row["completion"]) == (prompt, completion)


def test_scoring_says_what_is_wrong_with_a_row(tmp_path, ragged):
    train(tmp_path / "run", dataset=ragged, max_steps=1)
    rows = [
        {"text": "hello"},
        {"nothing": 1},
        {"prompt": "1+1=", "completion": "2"},
        {"text": "long " * 3000},
    ]
    flags = {"model": str(tmp_path / "run" / "final"), "score": write_rows(tmp_path / "rows.jsonl", rows)}
    rm.main(replace(rm.Args(output_dir=str(tmp_path / "scored")), **flags))
    scored = [json.loads(line) for line in (tmp_path / "scored" / "scores.jsonl").read_text().splitlines()]
    assert [isinstance(row["score"], float) for row in scored] == [True, False, True, False]
    assert "it needs one of" in scored[1]["problem"]
    assert scored[3]["problem"] == "longer than --max-length 2048"
    with pytest.raises(UserError, match=r"scores.jsonl exists; name another --output-dir"):
        rm.main(replace(rm.Args(output_dir=str(tmp_path / "scored")), **flags))


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}], ids=["full", "LoRA"])
def test_pad_token_occurs_in_no_row(tmp_path, ragged, flags):
    """Where pad is eos, as many tokenizers have it, a token is added and the embeddings grow."""
    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    tokenizer.pad_token = tokenizer.eos_token
    rm.AutoModelForCausalLM.from_pretrained(ASSETS / "model").save_pretrained(model)
    tokenizer.save_pretrained(model)
    train(tmp_path / "run", dataset=ragged, model=str(model), **flags)
    final = tmp_path / "run" / "final"
    pad = AutoTokenizer.from_pretrained(final).pad_token_id
    assert pad != tokenizer.eos_token_id
    rows = [json.loads(line) for line in Path(ragged).read_text().splitlines()]
    assert scores_of(final, rows, 21) == pytest.approx(scores_of(final, rows, 1), abs=1e-5)
    with pytest.raises(
        UserError, match="no pad token that is free, and an adapter brings none; leave out --no-lora-m"
    ):
        train(tmp_path / "adapter", dataset=ragged, model=str(model), lora_rank=4, lora_merge=False)


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


def test_micro_batches_do_not_change_the_curve(tmp_path, rankings, monkeypatch):
    flags = {"dataset": rankings, "eval_dataset": (rankings,), "batch_size": 17}
    one = train(tmp_path / "one", **flags)
    assert_same_curve(train(tmp_path / "many", micro_batch_tokens=250, **flags), one)
    monkeypatch.setattr(rm, "score_check", lambda *_: "alone")  # one completion a row
    assert_same_curve(train(tmp_path / "alone", **flags), one)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}], ids=["weights", "lora"])
def test_two_ranks_equal_one(tmp_path, rankings, flags):
    """17 rankings in batches of 4: the last batch has one, so that one of the ranks runs an empty micro-batch."""
    flags = {
        "dataset": (rankings,),
        "eval_dataset": (rankings,),
        "batch_size": 4,
        "max_steps": 6,
        "eval_every": 3,
        **flags,
    }
    flags |= {"learning_rate": 3e-4, "micro_batch_tokens": 400}
    one = train(tmp_path / "one", **flags)
    result = run("reward_model.py", *flags_of(output_dir=tmp_path / "two", **flags), ranks=2)
    assert result.returncode == 0, result.stderr[-6000:]
    assert_same_curve(read_metrics(tmp_path / "two"), one, rtol=2e-3)


@pytest.mark.slow
def test_kill_at_random_instants_then_resume_is_exact(tmp_path, ragged):
    flags = {
        "dataset": (ragged,),
        "eval_dataset": (ragged,),
        "max_steps": 60,
        "save_every": 2,
        "eval_every": 10,
    }
    flags["learning_rate"] = 1e-4
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = run("reward_model.py", *flags_of(output_dir=straight, **flags))
    assert result.returncode == 0, result.stderr[-6000:]
    rng = random.Random(0)
    for attempt, step in enumerate([4, 22]):
        process = start("reward_model.py", *flags_of(output_dir=killed, resume=attempt > 0, **flags))
        wait_for_step(process, killed, step)
        time.sleep(rng.random() * 0.3)
        kill(process, killed)
    result = run("reward_model.py", *flags_of(output_dir=killed, resume=True, **flags))
    assert result.returncode == 0, result.stderr[-6000:]
    assert "resuming after step" in result.stdout
    assert read_metrics(killed) == read_metrics(straight)
    assert all(torch.equal(weight, weights(killed)[name]) for name, weight in weights(straight).items())


# ---- Rows and flags --------------------------------------------------------------------------------------------------


def test_rankings_are_sorted_best_first():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    row = {"prompt": "1+1=", "completions": ["4", "2", "3"]}
    by_rank = encode_ranking({**row, "ranks": [3, 1, 2]}, tokenizer)
    by_score = encode_ranking({**row, "scores": [-2, 0, -1]}, tokenizer)
    close = encode_ranking(
        {**row, "scores": [-1e38, 16777217, 16777216]}, tokenizer
    )  # float32 has not the like
    for found in (by_rank, by_score, close):
        ends = np.cumsum(found["lengths"])[:-1]
        texts = [tokenizer.decode(part) for part in np.split(np.array(found["input_ids"]), ends)]
        assert texts == ["1+1=2<|im_end|>", "1+1=3<|im_end|>", "1+1=4<|im_end|>"]
        assert found["ranks"] == [0, 1, 2]
        assert not found["unused"]
    assert encode_ranking({**row, "scores": [0.5, 7, 0.5]}, tokenizer)["ranks"] == [0, 1, 1]
    tied = encode_ranking({**row, "scores": [1, 1, 1]}, tokenizer)
    assert (tied["dropped"], tied["ranks"]) == ("all completions tie", [])
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert encode_ranking(pair, tokenizer)["probability"] == -1.0
    # Whichever side a row calls chosen, the likelier one is the better one.
    likely = encode_ranking({**pair, "margin": 2, "probability": 0.75}, tokenizer)
    assert (likely["margin"], likely["probability"]) == (2.0, 0.75)
    turned = {"prompt": "a", "chosen": "c", "rejected": "b", "margin": -2, "probability": 0.25}
    assert encode_ranking(turned, tokenizer) == likely


def test_soft_labels_say_the_same_either_way_round(tmp_path, capsys):
    """Rows that call the likelier side rejected train and measure as those that call it chosen."""
    rows = [{"prompt": f"1+{i}=", "chosen": "2", "rejected": "34", "probability": 0.75} for i in range(9)]
    turned = [{**row, "chosen": "34", "rejected": "2", "probability": 0.25} for row in rows]
    curves = []
    for name, some in (("rows", rows), ("turned", turned)):
        path = write_rows(tmp_path / f"{name}.jsonl", some)
        curves.append(train(tmp_path / name, dataset=path, eval_dataset=(path,)))
    assert curves[0] == curves[1]
    assert "eval/accuracy_shorter" in curves[0][0]
    assert "eval/accuracy_longer" not in curves[0][0]
    capsys.readouterr()
    both = [*rows, *turned, {**rows[0], "probability": 0.2}]
    train(tmp_path / "both", dataset=write_rows(tmp_path / "both.jsonl", both), max_steps=1)
    assert "2 contradictory" not in (said := capsys.readouterr().out)
    assert "3 contradictory" in said  # rows 1 and 10, which agree, with the last


THREE = {"prompt": "a", "completions": ["b", "c", "d"]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD_ROWS = {
    "no ranks": (THREE, r"the row has 3 completions and 0 ranks or scores"),
    "ranks of another number": ({**THREE, "ranks": [1, 2]}, r"3 completions and 2 ranks or scores; it needs two or more"),
    "one completion": ({"prompt": "a", "completions": ["b"], "ranks": [1]}, r"1 completions and 1 ranks"),
    "ranks and scores": ({**THREE, "ranks": [1, 2, 3], "scores": [1, 2, 3]}, r"leave one of them out"),
    "ranks are text": ({**THREE, "ranks": ["a", "b", "c"]}, r"must be finite numbers"),
    "scores with a margin": ({**THREE, "scores": [1, 2, 3], "margin": 1}, r"without `margin` and `probability`"),
    "completions mixed": ({**THREE, "completions": ["b", [{"role": "assistant", "content": "c"}], "d"], "ranks": [1, 2, 3]}, r"must be all text or all messages"),
    "a score beyond all floats": ({**THREE, "scores": [1, 2, 10**400]}, r"must be finite numbers"),
    "a margin beyond float32": ({**PAIR, "margin": 1e39}, r"`margin` is 1e\+39, not a finite number"),
    "margin is text": ({**PAIR, "margin": "x"}, r"`margin` is \"x\", not a finite number"),
    "probability above 1": ({**PAIR, "probability": 1.5}, r"`probability` is 1.5, not a number from 0 to 1"),
    "identical": ({**PAIR, "rejected": "b"}, r"\{'identical sides': 1\}"),
    "all tie": ({**THREE, "ranks": [1, 1, 1]}, r"\{'all completions tie': 1\}"),
    "an empty completion": ({**THREE, "completions": ["b", "", "c"], "ranks": [1, 2, 3]}, r"\{'an empty side': 1\}"),
    "no chosen": ({"prompt": "a", "rejected": "c"}, r"`chosen` is null, neither text nor a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path, name):
    row, message = BAD_ROWS[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", dataset=write_rows(tmp_path / "rows.jsonl", [row]))
    assert not (tmp_path / "run").exists()


def test_bad_flags(tmp_path, rankings):
    causal = str(ASSETS / "model")
    for flags, message in (
        ({"label_smoothing": 0.5}, r"--label-smoothing is 0.5; it must be at least 0 and below 0.5"),
        (
            {"label_smoothing": 0.1, "dataset": rankings},
            r"--label-smoothing applies to pairs, but the data has rankings",
        ),
        ({"center_rewards_coefficient": -1.0}, r"--center-rewards-coefficient is -1.0"),
        ({"score": "nowhere.jsonl"}, r"--score nowhere.jsonl: no such file"),
        ({"score": __file__}, r"test_reward.py must be a .jsonl file, with one conversation a line"),
        (
            {"score": rankings, "model": causal, "learning_rate": 1e-5},
            r" does not apply to --score, which trains nothing",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", **flags)
    with pytest.raises(
        UserError, match=r"--score needs a trained reward model; --model .* is \['Qwen3ForCausalLM'\]"
    ):
        rm.main(replace(rm.Args(output_dir=str(tmp_path / "run")), model=causal, score=rankings))
    three = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=3)
    three.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(causal).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match=r"has 3 labels; a reward model has one"):
        train(tmp_path / "run", model=str(tmp_path / "three"))
    assert not (tmp_path / "run").exists()


@pytest.mark.learn
def test_default_run_learns(tmp_path):
    """No flags: at most two minutes to 95 % of held-out pairs, from about half."""
    result = run("reward_model.py", "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr[-6000:]
    evals = [row for row in read_metrics(tmp_path / "run") if "eval/accuracy" in row]
    assert 0.35 < evals[0]["eval/accuracy"] < 0.65
    assert evals[-1]["eval/accuracy"] >= 0.95
    assert f"eval/accuracy: {evals[0]['eval/accuracy']:.4f} before training" in result.stdout
