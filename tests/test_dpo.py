"""dpo.py as it runs: every loss against TRL or its paper, the right reference, any split of the work, resume."""

import functools
import math
import random

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ASSETS, assert_same_curve, read_rows, run_well, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo
from common import UserError, collate

QUESTIONS = read_rows(ASSETS / "preferences.jsonl")[:400]
SIGNS = ("rewards/accuracies",)  # signs of margins, which are rounding in the first step
train = functools.partial(conftest.train, dpo, learning_rate=1e-3)


@pytest.fixture
def ragged(tmp_path):
    return write_rows(tmp_path / "ragged.jsonl", conftest.ragged_pairs())


def with_noise(model, seed, size=0.005):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn(weight.shape, generator=generator)
    return model


# ---- Every loss against TRL, on the same weights and batch -----------------------------------------------------------

OF_TRL = [
    *({"loss_type": (name,)} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot")),
    *({"loss_type": (name,)} for name in ("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")),
    *({"loss_type": (name,), "label_smoothing": 0.1} for name in ("exo_pair", "robust", "aot", "aot_unpaired")),
    {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    *(
        {"loss_type": (name,), "f_divergence_type": kind}
        for name in ("sigmoid", "ipo", "sigmoid_norm", "discopop", "hinge")
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    {"loss_type": ("sigmoid",), "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
    *({"loss_type": (name,), "ld_alpha": 0.3} for name in ("sigmoid", "ipo", "apo_zero", "aot")),
    *({"loss_type": (name,), "use_weighting": True} for name in ("sigmoid", "sppo_hard")),
    {"loss_type": ("sigmoid",), "beta": 0.7, "ld_alpha": 0.5, "use_weighting": True},
]  # fmt: skip


@pytest.fixture(scope="module")
def trl_batch(tmp_path_factory):
    """Documents of ragged pairs, a policy, and TRL's trainer with another model as the reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    rng, documents = random.Random(1), []
    for row in rng.sample(QUESTIONS, 6):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"] + str(rng.randint(10, 99))[: rng.randint(0, 2)]
            answer = tokenizer(text + "<|im_end|>")["input_ids"]
            documents.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    policy = with_noise(AutoModelForCausalLM.from_pretrained(ASSETS / "model"), 1)
    reference = with_noise(AutoModelForCausalLM.from_pretrained(ASSETS / "model"), 2)
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "use_weighting": True}
    config = DPOConfig(output_dir=str(tmp_path_factory.mktemp("trl")), **options)
    one_row = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(policy, reference, args=config, train_dataset=one_row, processing_class=tokenizer)
    return documents, policy, reference, trainer


def gradient_of(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def trl_loss(trl_batch, args):
    """TRL's loss and the gradient of all weights."""
    documents, policy, _, trainer = trl_batch
    trainer.loss_types = list(args.loss_type)
    trainer.loss_weights = list(args.loss_weights) or [1.0] * len(args.loss_type)
    trainer.f_alpha_divergence_coef, trainer.args.discopop_tau = args.f_alpha_divergence_coef, 0.05
    for name in ("beta", "label_smoothing", "f_divergence_type", "ld_alpha", "use_weighting"):
        setattr(trainer, name, getattr(args, name))
    ordered = documents[0::2] + documents[1::2]
    width = max(len(ids) for ids, _ in ordered)
    rows = [(ids, [1] * len(ids), [int(m) for m in mask]) for ids, mask in ordered]
    columns = ([column + [0] * (width - len(column)) for column in some] for some in zip(*rows, strict=True))
    names = ("input_ids", "attention_mask", "completion_mask")
    policy.zero_grad()
    inputs = {name: torch.tensor(column) for name, column in zip(names, columns, strict=True)}
    loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    loss.backward()
    return loss.item(), gradient_of(policy)


def our_loss(trl_batch, args):
    """The same by the functions that main calls, each pair in a micro-batch of its own, but for losses that sort."""
    documents, policy, reference, _ = trl_batch
    size = len(documents) if {*dpo.SORTING} & {*args.loss_type} else 2
    policy.zero_grad()
    total, mean_length = 0.0, np.mean([sum(mask) for _, mask in documents[0::2]])
    for first in range(0, len(documents), size):
        batch = collate([(np.array(ids), np.array(mask)) for ids, mask in documents[first : first + size]])
        place = batch.documents_N, size // 2
        with torch.no_grad():
            ref_logps_P2 = dpo.sum_logps(dpo.token_stats(reference, batch)[0], *place, args.ld_alpha)
        function = dpo.with_sum_sq if args.use_weighting else dpo.PerToken.apply
        pairs = dpo.pair_stats(dpo.token_stats(policy, batch, function), place[0], ref_logps_P2, args)
        loss = dpo.dpo_loss(pairs, args, mean_length).sum() / (len(documents) // 2)
        loss.backward()
        total += loss.item()
    return total, gradient_of(policy)


@pytest.mark.parametrize("flags", OF_TRL, ids=lambda flags: "-".join(str(value) for value in flags.values()))
def test_loss_and_gradient_equal_trls(trl_batch, flags):
    loss, gradient = our_loss(trl_batch, dpo.Args(**flags))
    expected_loss, expected_gradient = trl_loss(trl_batch, dpo.Args(**flags))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()
    assert expected_gradient.norm() > 1e-4


@pytest.mark.parametrize("loss_type", [("sigmoid",), ("aot_unpaired", "sft")], ids="-".join)
def test_several_steps_equal_trls(tmp_path, loss_type):
    """The whole DPOTrainer on plain text, three steps of all pairs: every metric of one name."""
    rng, rows = random.Random(0), []
    for row in QUESTIONS[:8]:
        prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
        rows.append({"prompt": prompt + " ", "chosen": chosen, "rejected": rejected * rng.randint(1, 3)})
    names = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "logps/chosen", "logps/rejected"}
    names |= {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    flags = {"loss_type": loss_type, "loss_weights": (1.0,) * len(loss_type)}
    conftest.assert_steps_equal_trls(dpo, "DPO", names, tmp_path, str(ASSETS / "model"), rows, **flags)


# ---- What TRL has not, or has wrong, against closed forms ------------------------------------------------------------


def pairs_of(logps_w, logps_l, ref_w, ref_l, length_w, length_l):
    """Pairs without WPO's weights; the numbers that no loss reads are 0."""
    columns = [torch.as_tensor(column, dtype=torch.float64) for column in (logps_w, logps_l, ref_w, ref_l)]
    lengths = [torch.as_tensor(column, dtype=torch.float64) for column in (length_w, length_l)]
    zeros_P = torch.zeros(len(columns[0]))
    return dpo.Pairs(*columns, *lengths, columns[0], torch.ones_like(zeros_P), zeros_P, zeros_P)


@pytest.fixture
def some_pairs():
    """7 pairs, as a policy might have them after some training."""
    generator = torch.Generator().manual_seed(0)
    lengths_2P = torch.randint(1, 30, (2, 7), generator=generator).double()
    ref_2P = -lengths_2P * (0.2 + torch.rand(2, 7, generator=generator))
    logps_2P = (ref_2P + torch.randn(2, 7, generator=generator)).clamp(max=-0.01)
    return pairs_of(*logps_2P.requires_grad_(), *ref_2P, *lengths_2P)


def paper_loss(name, args, w, lo, rw, rl, nw, nl):
    """One pair's loss as its paper has it."""
    margin = args.beta * ((w - rw) - (lo - rl))
    match name:
        case "simpo":
            return -F.logsigmoid(args.beta / nw * w - args.beta / nl * lo - args.simpo_gamma)
        case "cpo":
            return -F.logsigmoid(args.beta * w - args.beta * lo) - w
        case "orpo":
            p_w, p_l = (w / nw).exp(), (lo / nl).exp()
            return -w / nw - args.beta * torch.sigmoid(((p_w / (1 - p_w)) / (p_l / (1 - p_l))).log()).log()
        case "rdpo":  # Bradley-Terry of the rewards beta log(pi / ref) + alpha |y|
            return -F.logsigmoid(margin + args.rdpo_alpha * nw - args.rdpo_alpha * nl)
        case "sigmoid":  # cDPO
            p, eps = torch.sigmoid(margin), args.label_smoothing
            return -(1 - eps) * p.log() - eps * (1 - p).log()


BEYOND_TRL = {
    "simpo": {"beta": 2.0, "simpo_gamma": 0.5},
    "cpo": {},
    "orpo": {"beta": 0.25},
    "rdpo": {"rdpo_alpha": 0.03},
    "sigmoid": {"label_smoothing": 0.2},
}


@pytest.mark.parametrize("name", BEYOND_TRL)
def test_losses_beyond_trl_equal_their_papers(some_pairs, name):
    args = dpo.Args(loss_type=(name,), **BEYOND_TRL[name])
    rows = zip(*(column.unbind() for column in some_pairs[:6]), strict=True)
    expected_P = torch.stack([paper_loss(name, args, *row) for row in rows])
    found_P = dpo.dpo_loss(some_pairs, args, None)
    torch.testing.assert_close(found_P, expected_P)
    found, expected = (torch.autograd.grad(x_P.sum(), some_pairs[:2]) for x_P in (found_P, expected_P))
    torch.testing.assert_close(found, expected)


def test_rdpo_allows_the_shorter_of_two_equally_good_answers():
    """Answers of 30 and 10 tokens that win as often as they lose: the loss is least where the log-ratio of the long
    one is below that of the short one by alpha * 20 / beta."""
    args = dpo.Args(loss_type=("rdpo",), rdpo_alpha=0.05, beta=0.1)
    long = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        w, lo = torch.stack([long, 0 * long]), torch.stack([0 * long, long])
        loss = dpo.dpo_loss(pairs_of(w, lo, [0, 0], [0, 0], [30, 10], [10, 30]), args, None).sum()
        (slope,) = torch.autograd.grad(loss, long)
        long = (long - 100 * slope).detach().requires_grad_()
    assert args.beta * long.item() == pytest.approx(-0.05 * 20, rel=1e-6)


def test_extremes_stay_finite():
    """discopop, where TRL's exponential overflows, and orpo, where the policy is certain of an answer."""
    logps_P = torch.tensor([-300.0, -0.5], dtype=torch.float64, requires_grad=True)
    pairs = pairs_of(logps_P, [-1.0] * 2, [-1.0] * 2, [-1.0] * 2, [5] * 2, [5] * 2)
    loss_P = dpo.dpo_loss(pairs, dpo.Args(loss_type=("discopop",)), None)
    loss_P.sum().backward()
    assert loss_P[0].item() == pytest.approx(29.9, abs=0.01)
    assert logps_P.grad[0].item() == pytest.approx(-0.1, abs=1e-3)
    logps_P = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss_P = dpo.dpo_loss(pairs_of(logps_P, [-4.0], [0], [0], [2], [2]), dpo.Args(loss_type=("orpo",)), None)
    loss_P.sum().backward()
    assert loss_P.isfinite().all()
    assert logps_P.grad.isfinite().all()


def test_rewards_are_means_by_token_only_where_every_loss_compares_those(some_pairs):
    free = some_pairs._replace(ref_logps_w_P=torch.zeros(7), ref_logps_l_P=torch.zeros(7))
    sums, means = ((0.1 * free.logps_w_P / n).mean().item() for n in (1, free.length_w_P))
    for losses, expected in (
        (("simpo", "sft"), means), (("orpo",), means), (("cpo",), sums), (("sft",), sums), (("simpo", "sigmoid"), sums)
    ):  # fmt: skip
        assert dpo.pair_metrics(free, dpo.Args(loss_type=losses))["rewards/chosen"] == pytest.approx(expected)


def test_long_sides_are_summed_without_loss():
    """4,096 log-probs a side: the sums equal Python's exact ones, which float32 misses by 2e-2."""
    values_N = -2 * torch.rand(2 * 4096, generator=torch.Generator().manual_seed(0))
    documents_N = torch.arange(2).repeat_interleave(4096)
    found = dpo.sum_sides(values_N, documents_N, 1).flatten().tolist()
    assert found == pytest.approx([math.fsum(side) for side in values_N.view(2, -1).tolist()], abs=1e-9)


# ---- The right reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["weights", "adapters"])
def test_first_step_is_ln_2_and_the_reference_stays(tmp_path, ragged, lora_rank):
    """At the start the policy is its own reference; at the end the reference is what the policy was. Precomputed
    log-probs of the reference give the same run."""
    flags = {"dataset": (ragged,), "eval_dataset": (ragged,), "max_steps": 4, "lora_rank": lora_rank}
    rows = train(tmp_path / "live", **flags)
    start, first, end = rows[0], rows[1], rows[-1]
    for row, prefix in ((start, "eval/"), (first, "")):
        assert row[f"{prefix}loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert row[f"{prefix}rewards/margins"] == pytest.approx(0, abs=1e-6)
    moved = 0.1 * (end["eval/logps/chosen"] - start["eval/logps/chosen"])  # what rewards must be
    assert end["eval/rewards/chosen"] == pytest.approx(moved, rel=1e-3, abs=1e-4)
    assert abs(moved) > 1e-3
    precomputed = train(tmp_path / "precomputed", precompute_ref_log_probs=True, **flags)
    assert_same_curve(precomputed, rows, rtol=1e-3, but=SIGNS)


# ---- Any split of the work, stopped and resumed ----------------------------------------------------------------------


def test_packed_pairs_equal_pairs_alone(ragged):
    """Sums of log-probs of 21 packed pairs against transformers' own forward of each side."""
    policy = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    tokenizer, documents = AutoTokenizer.from_pretrained(ASSETS / "model"), []
    for row in read_rows(ragged):
        row = dpo.encode_preference(row, tokenizer)
        cut = row["lengths"][0]
        for part in (slice(cut), slice(cut, None)):
            documents.append((np.array(row["input_ids"][part]), np.array(row["loss_mask"][part])))
    with torch.no_grad():
        policy.set_attn_implementation("varlen")
        batch = collate(documents, share_prompts=True)
        sums_P2 = dpo.sum_logps(dpo.token_stats(policy, batch)[0], batch.documents_N, 21, 1.0)
        policy.set_attn_implementation("eager")
        for (ids, mask), found in zip(documents, sums_P2.flatten().tolist(), strict=True):
            ids = torch.from_numpy(ids)
            logps_TV = policy(ids[None]).logits[0, :-1].log_softmax(-1)
            expected = logps_TV.gather(1, ids[1:, None]).squeeze(1)[torch.from_numpy(mask[1:])].sum().item()
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("loss_type", [("sigmoid",), ("aot", "sft")], ids="-".join)
def test_micro_batches_and_rows_do_not_change_the_curve(tmp_path, ragged, loss_type, monkeypatch):
    """TRL sorts, and averages chosen tokens, over whatever micro-batch a pair happens to be in."""
    flags = {"dataset": (ragged,), "eval_dataset": (ragged,), "loss_type": loss_type, "batch_size": 21}
    one = train(tmp_path / "one", **flags)
    assert one[1]["loss"] != pytest.approx(one[-2]["loss"], rel=1e-3)
    others = [train(tmp_path / "many", micro_batch_tokens=200, **flags)]
    monkeypatch.setattr(dpo, "self_check", lambda *_: False)  # each answer in its own row
    others += [train(tmp_path / "alone", **flags)]
    for curve in others:
        assert_same_curve(curve[:2], one[:2], rtol=1e-5, but=SIGNS)
        assert_same_curve(curve, one, rtol=5e-4, but=SIGNS)  # Adam's first steps amplify rounding


LORA = {"lora_rank": 4, "precompute_ref_log_probs": True}


@pytest.mark.parametrize("mode", [{"loss_type": ("aot", "sft")}, pytest.param(LORA, marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, ragged, mode):
    """21 pairs in batches of 5: the fifth batch has one pair, so that one rank runs a micro-batch without any."""
    flags = {"dataset": (ragged,), "eval_dataset": (ragged,), "batch_size": 5, "max_steps": 5, **mode}
    flags |= {"learning_rate": 3e-4, "micro_batch_tokens": 400}
    conftest.assert_two_ranks_train_as_one(dpo, tmp_path, 2e-3, SIGNS, **flags)


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["weights", "adapters"])
def test_final_is_the_trained_policy(tmp_path, ragged, lora_rank):
    """A run that begins with it has the log-probs with which the other ended."""
    flags = {"dataset": (ragged,), "eval_dataset": (ragged,)}
    ended = train(tmp_path / "run", lora_rank=lora_rank, **flags)[-1]
    begun = train(tmp_path / "again", model=str(tmp_path / "run" / "final"), max_steps=1, **flags)[0]
    assert begun["eval/logps/chosen"] == pytest.approx(ended["eval/logps/chosen"], rel=1e-4)


# ---- Rows and flags --------------------------------------------------------------------------------------------------


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


BAD = {
    "no loss": ({"loss_type": ()}, r"--loss.type"),
    "a loss twice": ({"loss_type": ("sft", "sft")}, r"--loss.type"),
    "weights of another number": ({"loss_weights": (1.0, 2.0)}, r"--loss.weights"),
    "negative weight": ({"loss_weights": (-1.0,)}, r"--loss.weights"),
    "beta nan": ({"beta": math.nan}, r"--beta"),
    "smoothing of a half": ({"loss_type": ("robust",), "label_smoothing": 0.5}, r"--label.smoothing"),
    "smoothing without use": ({"loss_type": ("ipo",), "label_smoothing": 0.1}, r"--label.smoothing"),
    "exo without smoothing": ({"loss_type": ("exo_pair",)}, r"exo_pair .*--label.smoothing"),
    "divergence without use": ({"loss_type": ("apo_zero",), "f_divergence_type": "forward_kl"}, r"--f.divergence.type"),
    "alpha without divergence": ({"f_alpha_divergence_coef": 2.0}, r"--f.alpha.divergence.coef"),
    "ld_alpha with simpo": ({"loss_type": ("simpo",), "ld_alpha": 0.5}, r"--ld.alpha"),
    "weighting with aot": ({"loss_type": ("aot",), "use_weighting": True}, r"--use.weighting"),
    "penalty without rdpo": ({"rdpo_alpha": 1.0}, r"--rdpo.alpha"),
    "precompute none": ({"loss_type": ("cpo", "sft"), "precompute_ref_log_probs": True}, r"--precompute.ref.log.probs"),
    "pairs too long": ({"micro_batch_tokens": 2, "dataset": pair("a", "b", "c")}, r"tokens.*--micro.batch.tokens"),
    "a row is a ranking": ({"dataset": {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 2, 3]}}, r"(?s)row 1.*chosen and rejected"),
    "all rows dropped": ({"dataset": pair("a", "b", "b")}, r"no row is left.*identical sides"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_and_rows(tmp_path, name):
    flags, message = BAD[name]
    if row := flags.get("dataset"):
        flags = flags | {"dataset": (write_rows(tmp_path / "rows.jsonl", [row]),)}
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


def test_what_is_odd_about_pairs_is_reported(tmp_path, capsys):
    """Rows 2 and 4 contradict each other, row 3 repeats row 1, row 5 has identical sides, row 6 an empty one."""
    rows = [pair("1+1=", "2", "3"), pair("2+2=", "4", "5"), pair("1+1=", "2", "3"), pair("2+2=", "5", "4")]
    rows += [pair("3+3=", "6", "6"), pair("3+3=", "6", "")]
    train(tmp_path / "run", max_steps=1, dataset=(write_rows(tmp_path / "rows.jsonl", rows),))
    printed = capsys.readouterr().out
    words = [
        "1 identical sides",
        "1 an empty side",
        "1 rows repeat another",
        "2 rows contradict another: row 2",
    ]
    assert [word for word in words if word not in printed] == []


@pytest.mark.learn
def test_default_run_learns(tmp_path):
    """No flags: many more of the held-out sums are right than before."""
    evals = [row for row in run_well("dpo.py", tmp_path / "run") if "eval/exact_match" in row]
    assert 0.35 < evals[0]["eval/exact_match"] < 0.65
    assert evals[-1]["eval/exact_match"] > evals[0]["eval/exact_match"] + 0.2
    assert evals[-1]["eval/rewards/accuracies"] > 0.7
