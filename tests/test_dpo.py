"""dpo.py as it runs: every loss against TRL or its paper, the right reference, any split of the work, resume."""

import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import dpo
import sft
from common import UserError, collate

QUESTIONS = [json.loads(line) for line in (ASSETS / "preferences.jsonl").read_text().splitlines()[:400]]


@pytest.fixture
def ragged(tmp_path):
    """21 pairs of conversations, with completions of 1 to 12 tokens on each side."""
    rng, rows = random.Random(0), []
    for _ in range(21):
        some = rng.sample(QUESTIONS, rng.randint(1, 3))
        prompt = sum((row["prompt"] + row["chosen"] for row in some[1:]), []) + some[0]["prompt"]
        rejected = " or ".join(
            rng.choice(QUESTIONS)["rejected"][0]["content"] for _ in range(rng.randint(1, 3))
        )
        chosen = some[0]["chosen"][0]["content"] + rng.choice(["", ".", " it is", " of course it is"])
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return write_rows(tmp_path / "ragged.jsonl", rows)


def train(output_dir, **flags):
    """Run dpo.main in this process -> its metrics."""
    if isinstance(flags.get("dataset"), str):
        flags["dataset"] = (flags["dataset"],)
    dpo.main(replace(dpo.Args(output_dir=str(output_dir)), **{**SHORT, "learning_rate": 1e-3, **flags}))
    return read_metrics(output_dir)


def with_noise(model, seed, size=0.005):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn(weight.shape, generator=generator)
    return model


# ---- Every loss against TRL, on the same weights and batch -----------------------------------------------------------

OF_TRL = [
    *(
        {"loss_type": (name,)}
        for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot")
    ),
    *(
        {"loss_type": (name,)}
        for name in ("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
    ),
    *(
        {"loss_type": (name,), "label_smoothing": 0.1}
        for name in ("exo_pair", "robust", "aot", "aot_unpaired")
    ),
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
]


@pytest.fixture(scope="module")
def trl_batch(tmp_path_factory):
    """Documents of ragged pairs, a policy, and TRL's trainer with another model as the reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    rng, documents = random.Random(1), []
    for row in rng.sample(QUESTIONS, 6):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True)[
            "input_ids"
        ]
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"] + "".join(
                rng.choice("0123456789") for _ in range(rng.randint(0, 2))
            )
            completion = tokenizer(text + "<|im_end|>")["input_ids"]
            documents.append((prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    policy = with_noise(AutoModelForCausalLM.from_pretrained(ASSETS / "model"), 1)
    reference = with_noise(AutoModelForCausalLM.from_pretrained(ASSETS / "model"), 2)
    config = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        report_to="none",
        use_weighting=True,
    )
    one_row = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(policy, reference, args=config, train_dataset=one_row, processing_class=tokenizer)
    return documents, policy, reference, trainer


def trl_loss(trl_batch, flags):
    """TRL's loss and the gradient of all weights."""
    documents, policy, _, trainer = trl_batch
    args = dpo.Args(**flags)
    trainer.loss_types, trainer.loss_weights = (
        list(args.loss_type),
        list(args.loss_weights) or [1.0] * len(args.loss_type),
    )
    trainer.f_alpha_divergence_coef, trainer.args.discopop_tau = (
        args.f_alpha_divergence_coef,
        args.discopop_tau,
    )
    for name in ("beta", "label_smoothing", "f_divergence_type", "ld_alpha", "use_weighting"):
        setattr(trainer, name, getattr(args, name))
    ordered = documents[0::2] + documents[1::2]
    width = max(len(ids) for ids, _ in ordered)
    inputs = {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in ordered]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in ordered]),
        "completion_mask": torch.tensor(
            [[int(m) for m in mask] + [0] * (width - len(mask)) for _, mask in ordered]
        ),
    }
    policy.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in policy.parameters()])


def our_loss(trl_batch, flags):
    """The same of ours, by the functions that main calls: each pair in a micro-batch of its own, but to sort."""
    documents, policy, reference, _ = trl_batch
    args = dpo.Args(**flags)
    size = len(documents) if dpo.SORTING & {*args.loss_type} else 2
    policy.zero_grad()
    total, mean_length = 0.0, np.mean([sum(mask) for _, mask in documents[0::2]])
    for first in range(0, len(documents), size):
        some = [(np.array(ids), np.array(mask)) for ids, mask in documents[first : first + size]]
        batch = collate(some)
        with torch.no_grad():
            ref_N = dpo.token_stats(reference, batch).logps_N
            ref_P2 = dpo.sum_logps(ref_N, batch.documents_N, len(some) // 2, args.ld_alpha)
        stats = dpo.token_stats(policy, batch, want_sum_sq=args.use_weighting)
        pairs = dpo.pair_stats(stats, batch.documents_N, ref_P2, args)
        loss = dpo.dpo_loss(pairs, args, mean_length).sum() / (len(documents) // 2)
        loss.backward()
        total += loss.item()
    return total, torch.cat([weight.grad.flatten() for weight in policy.parameters()])


@pytest.mark.parametrize("flags", OF_TRL, ids=lambda flags: "-".join(str(value) for value in flags.values()))
def test_loss_and_gradient_equal_trls(trl_batch, flags):
    loss, gradient = our_loss(trl_batch, flags)
    expected_loss, expected_gradient = trl_loss(trl_batch, flags)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()
    assert expected_gradient.norm() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"loss_type": ("sigmoid",)},
        {"loss_type": ("ipo",)},
        {"loss_type": ("sigmoid", "bco_pair"), "loss_weights": (1.0, 0.5)},
        {"loss_type": ("aot_unpaired", "sft"), "loss_weights": (1.0, 0.5)},  # by way of main's two passes
        {"loss_type": ("sigmoid",), "sync_ref_model": True, "ref_model_sync_steps": 2},
    ],
    ids=lambda flags: "-".join(
        [*flags["loss_type"], *("moving" for name in flags if name == "sync_ref_model")]
    ),
)
def test_several_steps_equal_trls(tmp_path, flags):
    """The whole DPOTrainer on plain text, four steps of all pairs: loss, gradient norm and all metrics of one name."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rng, rows = random.Random(0), []
    for row in QUESTIONS[:12]:
        prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
        rows.append({"prompt": prompt + " ", "chosen": chosen, "rejected": rejected * rng.randint(1, 3)})
    moving = {name: value for name, value in flags.items() if "ref_model" in name}
    config = DPOConfig(
        **moving, output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=12,
        num_train_epochs=4, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, max_grad_norm=1.0,
        loss_type=list(flags["loss_type"]), loss_weights=list(flags.get("loss_weights", (1.0,))), beta=0.1,
        gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}, save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(str(ASSETS / "model"), args=config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    expected = [row for row in trainer.state.log_history if "loss" in row]
    found = train(
        tmp_path / "ours", dataset=write_rows(tmp_path / "rows.jsonl", rows), batch_size=12, epochs=4, max_steps=None,
        lr_schedule="constant", warmup_steps=0, micro_batch_tokens=128, **flags,
    )  # fmt: skip
    names = ["loss", "grad_norm", "entropy", "mean_token_accuracy", "logps/chosen", "logps/rejected"]
    names += ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        for name in names:
            assert ours[name] == pytest.approx(float(theirs[name]), rel=1e-3, abs=2e-4), (name, ours, theirs)


# ---- What TRL has not, or has wrong, against naive implementations ---------------------------------------------------


def naive(name, pairs, args):
    """One pair at a time, in float64, from the papers' own quantities."""
    losses = []
    for w, lo, rw, rl, nw, nl in torch.stack(pairs[:6], 1).double():
        margin = args.beta * ((w - rw) - (lo - rl))
        match name:
            case "simpo":
                losses.append(-F.logsigmoid(args.beta / nw * w - args.beta / nl * lo - args.simpo_gamma))
            case "cpo":
                losses.append(-F.logsigmoid(args.beta * w - args.beta * lo) - w)
            case "orpo":
                p_w, p_l = (w / nw).exp(), (lo / nl).exp()
                ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
                losses.append(-w / nw - args.beta * torch.sigmoid(ratio.log()).log())
            case "rdpo":
                losses.append(-F.logsigmoid(margin - args.rdpo_alpha * (nw - nl)))
            case "sigmoid":  # cDPO
                p = torch.sigmoid(margin)
                losses.append(-(1 - args.label_smoothing) * p.log() - args.label_smoothing * (1 - p).log())
    return torch.stack(losses)


@pytest.fixture
def some_pairs():
    """PairStats of 7 pairs, as a policy after some training might have them."""
    generator = torch.Generator().manual_seed(0)
    lengths_2P = torch.randint(1, 30, (2, 7), generator=generator).float()
    ref_2P = -lengths_2P * (0.2 + torch.rand(2, 7, generator=generator))
    logps_2P = (ref_2P + torch.randn(2, 7, generator=generator)).clamp(max=-0.01)
    ones_P = torch.ones(7)
    return dpo.PairStats(*logps_2P, *ref_2P, *lengths_2P, logps_2P[0], ones_P, ones_P, ones_P)


@pytest.mark.parametrize(
    "flags",
    [
        {"loss_type": ("simpo",), "beta": 2.0, "simpo_gamma": 0.5},
        {"loss_type": ("cpo",)},
        {"loss_type": ("orpo",), "beta": 0.25},
        {"loss_type": ("rdpo",), "rdpo_alpha": 0.03},
        {"loss_type": ("sigmoid",), "label_smoothing": 0.2},
    ],
    ids=lambda flags: flags["loss_type"][0],
)
def test_losses_beyond_trl_equal_their_papers(some_pairs, flags):
    args = dpo.Args(**flags)
    ours = [column.clone().requires_grad_(index in (0, 1)) for index, column in enumerate(some_pairs)]
    ours[6] = ours[0]
    naives = [column.detach().clone().requires_grad_(index in (0, 1)) for index, column in enumerate(ours)]
    found_P, expected_P = (
        dpo.dpo_loss(dpo.PairStats(*ours), args, None),
        naive(flags["loss_type"][0], naives, args),
    )
    assert found_P.tolist() == pytest.approx(expected_P.tolist(), rel=1e-5)
    found = torch.autograd.grad(found_P.sum(), ours[:2])
    expected = torch.autograd.grad(expected_P.sum(), naives[:2])
    assert torch.stack(found).flatten().tolist() == pytest.approx(
        torch.stack(expected).flatten().tolist(), rel=1e-4
    )


def test_rewards_are_means_by_token_only_where_every_loss_compares_those(some_pairs):
    sums, means = (
        (0.1 * some_pairs.logps_w_P / length_P).mean().item() for length_P in (1, some_pairs.length_w_P)
    )
    free = some_pairs._replace(ref_logps_w_P=torch.zeros(7), ref_logps_l_P=torch.zeros(7))
    for losses, expected in (
        (("simpo", "sft"), means), (("orpo",), means), (("cpo",), sums), (("sft",), sums), (("simpo", "sigmoid"), sums)
    ):  # fmt: skip
        found = dpo.pair_metrics(free, dpo.Args(loss_type=losses))["rewards/chosen"]
        assert found == pytest.approx(expected, rel=1e-5)


def test_discopop_stays_finite_where_trls_exponential_overflows(some_pairs):
    """TRL computes sigmoid(z / tau) exp(-z) as a product: 0 x inf for a margin of -100. The limit is the logistic part."""
    args = dpo.Args(loss_type=("discopop",), beta=1.0)
    logps_P = torch.tensor([-300.0, -0.5], requires_grad=True)
    pairs = dpo.PairStats(
        logps_P, *(torch.full((2,), value) for value in (-1.0, -1.0, -1.0, 5, 5, 0, 1, 0, 0))
    )
    loss_P = dpo.dpo_loss(pairs, args, None)
    loss_P.sum().backward()
    assert loss_P[0].item() == pytest.approx(299.0)
    assert logps_P.grad[0].item() == pytest.approx(-1.0)


def test_orpo_is_finite_where_the_policy_is_certain():
    args, logps_P = dpo.Args(loss_type=("orpo",)), torch.zeros(1, requires_grad=True)
    pairs = dpo.PairStats(logps_P, *(torch.full((1,), value) for value in (-4.0, 0, 0, 2, 2, 0, 1, 0, 0)))
    loss_P = dpo.dpo_loss(pairs, args, None)
    loss_P.sum().backward()
    assert loss_P.isfinite().all()
    assert logps_P.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss_type", [("aot",), ("aot_unpaired",), ("sft",), ("sigmoid", "aot", "sft")], ids="-".join
)
def test_whole_step_losses_do_not_depend_on_micro_batches(tmp_path, ragged, loss_type):
    """TRL sorts, and averages chosen tokens, over whatever micro-batch a pair happens to be in."""
    flags = {"dataset": ragged, "loss_type": loss_type, "batch_size": 21, "max_steps": 3}
    one = train(tmp_path / "one", **flags)
    many = train(tmp_path / "many", micro_batch_tokens=200, **flags)
    assert_same_curve(many[:1], one[:1], rtol=1e-5)
    assert_same_curve(many, one, rtol=5e-4)  # Adam's first steps amplify rounding
    assert one[0]["loss"] != pytest.approx(one[-1]["loss"], rel=1e-3)
    for name, weight in weights(tmp_path / "one").items():
        # Adam's first steps turn the rounding of a gradient near 0 into a part of the learning rate, 1e-4.
        torch.testing.assert_close(weights(tmp_path / "many")[name], weight, rtol=1e-3, atol=1e-4)


# ---- The right reference ---------------------------------------------------------------------------------------------


def lora_adapter(tmp_path):
    """A LoRA adapter that sft.py trained."""
    flags = {"eval_dataset": (), "wandb": "disabled", "max_steps": 2, "lora_rank": 4, "learning_rate": 1e-2}
    sft.main(replace(sft.Args(output_dir=str(tmp_path / "adapter")), **flags))
    return str(tmp_path / "adapter" / "final")


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("trained", ["weights", "new adapter", "continued adapter"])
def test_first_step_is_ln_2_and_the_reference_stays(tmp_path, ragged, trained, precompute, monkeypatch):
    """At the start the policy is its own reference; at the end the reference is what the policy was."""
    monkeypatch.setattr(dpo.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags = {
        "dataset": ragged,
        "eval_dataset": (ragged,),
        "max_steps": 4,
        "precompute_ref_log_probs": precompute,
    }
    flags["model"] = lora_adapter(tmp_path) if trained == "continued adapter" else str(ASSETS / "model")
    rows = train(tmp_path / "run", lora_rank=0 if trained == "weights" else 4, **flags)
    start, first, end = rows[0], rows[1], rows[-1]
    for row, prefix in ((start, "eval/"), (first, "")):
        assert row[f"{prefix}loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert row[f"{prefix}rewards/margins"] == pytest.approx(0, abs=1e-6)
    moved = 0.1 * (
        end["eval/logps/chosen"] - start["eval/logps/chosen"]
    )  # rewards are differences to the start
    assert end["eval/rewards/chosen"] == pytest.approx(moved, rel=1e-3, abs=1e-4)
    assert abs(moved) > 1e-3


def other_adapter(path, **config):
    """An adapter that PEFT made."""
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    policy = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config)
    )
    with_noise(policy, 1, 0.02).save_pretrained(path)
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(path)
    return str(path)


def test_a_continued_adapters_reference_is_all_of_it_and_has_no_dropout(tmp_path, ragged, monkeypatch):
    """As precomputed: nothing of what the adapter trains whole is the policy's, nor is its own dropout at work."""
    monkeypatch.setattr(dpo.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags = {"dataset": ragged, "lora_rank": 4, "learning_rate": 1e-2, "batch_size": 21}
    flags["model"] = other_adapter(
        tmp_path / "given", lora_dropout=0.5, modules_to_save=["embed_tokens", "norm"]
    )
    live = train(tmp_path / "live", **flags)
    assert live[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    computed = train(tmp_path / "computed", precompute_ref_log_probs=True, **flags)
    for curve in (live, computed):
        assert curve[-1]["rewards/margins"] != pytest.approx(0, abs=1e-2)
        del curve[0]["rewards/accuracies"]  # the signs of margins that are rounding
    assert_same_curve(live, computed, rtol=1e-3)


def test_an_adapter_that_trains_biases_has_no_reference_beside_it(tmp_path, ragged, monkeypatch):
    monkeypatch.setattr(dpo.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags = {"dataset": ragged, "lora_rank": 4, "model": other_adapter(tmp_path / "given", bias="all")}
    first = train(tmp_path / "computed", precompute_ref_log_probs=True, **flags)[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    with pytest.raises(UserError, match=r"trains the base's biases \(all\).*add --precompute-ref-log-probs"):
        train(tmp_path / "live", **flags)


def test_precomputed_log_probs_are_those_of_the_copy_and_are_kept(tmp_path, ragged, capsys, monkeypatch):
    monkeypatch.setattr(dpo.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    copied = train(tmp_path / "copied", dataset=ragged)
    computed = train(tmp_path / "computed", dataset=ragged, precompute_ref_log_probs=True)
    for curve in (computed, copied):
        assert curve[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
        del curve[0]["rewards/accuracies"]  # the signs of margins that are rounding
    assert_same_curve(computed, copied)
    assert "computed, and kept in" in capsys.readouterr().out
    assert train(tmp_path / "read", dataset=ragged, precompute_ref_log_probs=True)[1:] == computed[1:]
    assert "read from" in capsys.readouterr().out
    # Whatever changes them has a file of its own: a flag, the data, the weights, the config, an adapter's scale.
    train(tmp_path / "flag", dataset=ragged, precompute_ref_log_probs=True, ld_alpha=0.5)
    train(tmp_path / "data", dataset=ragged, precompute_ref_log_probs=True, max_length=60)
    other = str(tmp_path / "copied" / "final")
    train(tmp_path / "weights", dataset=ragged, precompute_ref_log_probs=True, model=other)
    edited, given = (
        shutil.copytree(ASSETS / "model", tmp_path / "edited"),
        other_adapter(tmp_path / "adapter"),
    )
    text = (edited / "config.json").read_text()
    (edited / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 500.0'))
    train(tmp_path / "config", dataset=ragged, precompute_ref_log_probs=True, model=str(edited))
    for alpha in (8, 80):
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {
            "lora_alpha": alpha
        }
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        train(tmp_path / f"{alpha}", dataset=ragged, precompute_ref_log_probs=True, model=given, lora_rank=4)
    assert "read from" not in capsys.readouterr().out
    assert len(list((tmp_path / "cache").rglob("reference-*.npy"))) == 7
    # Under another path it is the same model.
    train(
        tmp_path / "moved",
        dataset=ragged,
        precompute_ref_log_probs=True,
        model=str(edited.rename(tmp_path / "m")),
    )
    assert "read from" in capsys.readouterr().out


def test_a_signal_stops_precomputing(tmp_path, ragged, capsys, monkeypatch):
    """It may take hours. Nothing is kept of a part, and nothing is trained."""
    monkeypatch.setattr(dpo.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    forwards, real = [], dpo.forward_pairs

    def forward_pairs(*given, **wanted):
        forwards.append(given)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **wanted)

    monkeypatch.setattr(dpo, "forward_pairs", forward_pairs)
    flags = SHORT | {"dataset": (ragged,), "eval_dataset": (ragged,), "micro_batch_tokens": 200}
    dpo.main(replace(dpo.Args(output_dir=str(tmp_path / "run")), precompute_ref_log_probs=True, **flags))
    assert len(forwards) == 1
    assert "stopped by a signal before training: nothing to save" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("reference-*"))
    assert not (tmp_path / "run").exists()


def test_reference_free(tmp_path, ragged):
    """Without a reference the first loss is that of the policy's own margin."""
    first = train(tmp_path / "run", dataset=ragged, reference_free=True, batch_size=21)[0]
    assert first["rewards/chosen"] == pytest.approx(0.1 * first["logps/chosen"], rel=1e-5)
    assert first["loss"] > 0.7


def test_tr_dpo_moves_the_reference(tmp_path, ragged):
    """With share 1 the reference becomes the policy at each move, so that the next step begins at ln 2 again."""
    flags = {
        "dataset": ragged,
        "batch_size": 21,
        "max_steps": 5,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
    }
    losses = [row["loss"] for row in train(tmp_path / "all", ref_model_mixup_alpha=1.0, **flags)]
    at_start = [loss == pytest.approx(math.log(2), rel=1e-6) for loss in losses]
    assert at_start == [True, False, True, False, True]
    # With half of it, rewards after the move are those to the mean of the two weights.
    part = train(tmp_path / "part", ref_model_mixup_alpha=0.5, **{**flags, "max_steps": 2}, save_every=2)
    assert part[1]["loss"] != pytest.approx(math.log(2), rel=1e-3)
    reference = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "part" / "final")
    dpo.move_reference(reference, policy, 0.5)
    begun = dict(AutoModelForCausalLM.from_pretrained(ASSETS / "model").named_parameters())
    for (name, moved), ended in zip(reference.named_parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(moved, (begun[name] + ended) / 2)


# ---- Any split of the work, stopped and resumed ----------------------------------------------------------------------


def test_packed_pairs_equal_pairs_alone(ragged):
    """Sums of log-probs of 21 packed pairs against transformers' own forward of each side."""
    policy, tokenizer = (
        AutoModelForCausalLM.from_pretrained(ASSETS / "model"),
        AutoTokenizer.from_pretrained(ASSETS / "model"),
    )
    rows = [
        dpo.encode_preference(json.loads(line), tokenizer) for line in Path(ragged).read_text().splitlines()
    ]
    documents = []
    for row in rows:
        cut = row["lengths"][0]
        for part in (slice(cut), slice(cut, None)):
            documents.append((np.array(row["input_ids"][part]), np.array(row["loss_mask"][part])))
    policy.set_attn_implementation("varlen")
    with torch.no_grad():
        batch = collate(documents)
        sums_P2 = dpo.sum_logps(dpo.token_stats(policy, batch).logps_N, batch.documents_N, len(rows), None)
        policy.set_attn_implementation("eager")
        for (ids, mask), found in zip(documents, sums_P2.flatten().tolist(), strict=True):
            ids = torch.from_numpy(ids)
            logps_TV = policy(ids[None]).logits[0, :-1].log_softmax(-1)
            expected = logps_TV.gather(1, ids[1:, None]).squeeze(1)[torch.from_numpy(mask[1:])].sum().item()
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"save_every": 0},
        {"loss_type": ("aot", "sft"), "lora_rank": 4},
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
        {"precompute_ref_log_probs": True, "use_weighting": True, "ld_alpha": 0.5},
    ],
    ids=["weights", "lora-aot", "moving reference", "precomputed"],
)
def test_two_ranks_equal_one(tmp_path, ragged, flags, monkeypatch):
    """21 pairs in batches of 5: the last batch has one, so that one of the ranks runs a micro-batch that trains nothing."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    flags = {
        "dataset": (ragged,),
        "eval_dataset": (ragged,),
        "batch_size": 5,
        "max_steps": 6,
        "eval_every": 3,
        **flags,
    }
    flags |= {"learning_rate": 3e-4, "micro_batch_tokens": 400}
    one = train(tmp_path / "one", **flags)
    result = run("dpo.py", *flags_of(output_dir=tmp_path / "two", **flags), ranks=2)
    assert result.returncode == 0, result.stderr[-6000:]
    two = read_metrics(tmp_path / "two")
    for rows in (
        one,
        two,
    ):  # at first the policy is its reference: roundings decide which side is rewarded more
        assert rows[1]["step"] == 1
        rows[1].pop("rewards/accuracies")
    assert_same_curve(two, one, rtol=2e-3)


@pytest.mark.slow
def test_two_ranks_continue_an_adapter(tmp_path, ragged):
    flags = {
        "dataset": (ragged,),
        "model": lora_adapter(tmp_path),
        "lora_rank": 4,
        "max_steps": 4,
        "learning_rate": 3e-4,
    }
    one = train(tmp_path / "one", **flags)
    result = run("dpo.py", *flags_of(output_dir=tmp_path / "two", **flags), ranks=2)
    assert result.returncode == 0, result.stderr[-6000:]
    assert_same_curve(read_metrics(tmp_path / "two"), one, rtol=2e-3)
    assert one[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_at_random_instants_then_resume_is_exact(tmp_path, ragged, ranks):
    """The moving reference is part of what is resumed; 3 steps an epoch, so that epochs end everywhere."""
    flags = {
        "dataset": (ragged,),
        "eval_dataset": (ragged,),
        "max_steps": 60,
        "save_every": 2,
        "eval_every": 10,
    }
    flags |= {"sync_ref_model": True, "ref_model_sync_steps": 3, "learning_rate": 1e-4}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = run("dpo.py", *flags_of(output_dir=straight, **flags), ranks=ranks)
    assert result.returncode == 0, result.stderr[-6000:]
    rng = random.Random(ranks)
    for attempt, step in enumerate([4, 22]):
        process = start("dpo.py", *flags_of(output_dir=killed, resume=attempt > 0, **flags), ranks=ranks)
        wait_for_step(process, killed, step)
        time.sleep(rng.random() * 0.3)
        kill(process, killed)
    result = run("dpo.py", *flags_of(output_dir=killed, resume=True, **flags), ranks=ranks)
    assert result.returncode == 0, result.stderr[-6000:]
    assert "resuming after step" in result.stdout
    assert read_metrics(killed) == read_metrics(straight)
    assert all(torch.equal(weight, weights(killed)[name]) for name, weight in weights(straight).items())


# ---- Modes -----------------------------------------------------------------------------------------------------------


def test_one_completion_a_row_where_attention_cannot_pack(tmp_path, ragged, capsys, monkeypatch):
    flags = {"dataset": ragged, "eval_dataset": (ragged,), "max_steps": 2}
    packed = train(tmp_path / "packed", **flags)
    monkeypatch.setattr(dpo, "self_check", lambda *_: "alone")
    alone = train(tmp_path / "alone", **flags)
    assert "one completion a row" in capsys.readouterr().out
    assert_same_curve(alone, packed)


def test_mixture_of_experts_aux_loss(tmp_path, ragged):
    """It joins the loss that is trained and has a metric of its own; the preference loss is reported without it."""
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(tmp_path / "moe")
    flags = {"dataset": ragged, "model": str(tmp_path / "moe"), "max_steps": 1}
    with_aux = train(tmp_path / "with", router_aux_loss_coef=0.5, **flags)[0]
    without = train(tmp_path / "without", router_aux_loss_coef=0.0, **flags)[0]
    assert with_aux["loss"] == pytest.approx(without["loss"], rel=1e-5)
    assert 1 < with_aux["aux_loss"] < 4
    assert "aux_loss" not in without
    assert with_aux["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_final_is_the_trained_policy(tmp_path, ragged, kind):
    """A run that begins with it has the log-probs with which the other ended."""
    flags = {"dataset": ragged, "eval_dataset": (ragged,)}
    adapter = {} if kind == "full" else {"model": lora_adapter(tmp_path), "lora_rank": 4, "lora_merge": True}
    ended = train(tmp_path / "run", **flags, **adapter)[-1]
    begun = train(tmp_path / "again", model=str(tmp_path / "run" / "final"), **flags)[0]
    assert begun["eval/logps/chosen"] == pytest.approx(ended["eval/logps/chosen"], rel=1e-4)


def test_a_continued_adapter_is_exported_alone(tmp_path, ragged):
    """Not with the frozen copy that was its reference; and it is another one than it was."""
    given = lora_adapter(tmp_path)
    train(tmp_path / "run", dataset=ragged, model=given, lora_rank=4)
    final = tmp_path / "run" / "final"
    assert sorted(path.name for path in final.rglob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    before, after = (load_file(Path(path) / "adapter_model.safetensors") for path in (given, final))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


# ---- Rows and flags --------------------------------------------------------------------------------------------------


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def says(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "model")


def marked(tokenizer, row, **flags):
    """Both sides as text, what is trained in [[ ]]; or why the row is dropped."""
    encoded = dpo.encode_preference(row, tokenizer, **flags)
    if encoded["dropped"]:
        return encoded["dropped"]
    ids, mask, cut = encoded["input_ids"], encoded["loss_mask"], encoded["lengths"][0]
    assert encoded["targets"] == [sum(mask[:cut]), sum(mask[cut:])]
    assert encoded["num_targets"] == sum(mask)
    assert encoded["length"] == len(ids) == sum(encoded["lengths"])
    return [dpo.mark_trained(tokenizer, ids[part], mask[part]) for part in (slice(cut), slice(cut, None))]


CHAT = ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[good<|im_end|>]]\n",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[bad<|im_end|>]]\n"]  # fmt: skip


def test_every_form_of_a_row_gives_the_same_pair(tokenizer):
    user, good, bad = says("user", "q"), says("assistant", "good"), says("assistant", "bad")
    for row in (
        pair([user], [good], [bad]),
        pair([user], "good", "bad"),
        pair("q", [good], [bad]),
        {"chosen": [user, good], "rejected": [user, bad]},  # an implicit prompt
        pair("q", [user, good], [user, bad]),  # as in UltraFeedback
        pair([user], [user, good], [user, bad]),
        {
            "chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}],
            "rejected": [user, bad],
        },
    ):
        assert marked(tokenizer, row) == CHAT
    assert marked(tokenizer, pair("1+1=", "2", "3")) == ["1+1=[[2<|im_end|>]]", "1+1=[[3<|im_end|>]]"]
    implicit = {"chosen": "1+1=2", "rejected": "1+1=3"}
    assert marked(tokenizer, implicit) == ["1+1=[[2<|im_end|>]]", "1+1=[[3<|im_end|>]]"]


def test_the_prompt_is_the_same_where_a_token_spans_its_end(tokenizer):
    """`on` is one token: a prompt that ends in `o` begins both completions before it, and `o` is learnt on both sides."""
    assert len(tokenizer("on")["input_ids"]) == 1
    assert marked(tokenizer, pair("1o", "n", "1")) == ["1[[on<|im_end|>]]", "1[[o1<|im_end|>]]"]


def test_the_prompt_ends_where_its_text_has_other_tokens(tokenizer):
    """`nise` is n, i, se before a digit, and n, i, s, en before an `n`: se and s are the completions' own, too."""
    assert tokenizer.tokenize("nise1")[:3] == ["n", "i", "se"]
    assert tokenizer.tokenize("nisen") == ["n", "i", "s", "en"]
    row = pair("nise", "1", "n")
    assert marked(tokenizer, row) == ["ni[[se1<|im_end|>]]", "ni[[sen<|im_end|>]]"]
    assert dpo.encode_preference(row, tokenizer)["prompt_length"] == 2
    # Where even the first tokens differ nothing is shared; what follows nothing is not learnt.
    nothing = dpo.encode_preference(pair("", "abc", "xyz"), tokenizer)
    assert nothing["prompt_length"] == 0
    assert nothing["targets"] == [length - 1 for length in nothing["lengths"]]


def test_tools_and_several_turns(tokenizer):
    user, good, bad = says("user", "q"), says("assistant", "good"), says("assistant", "bad")
    row = pair([user], [bad, user, good], [bad, user, bad])
    chosen, rejected = marked(tokenizer, row)
    assert chosen.count("[[") == rejected.count("[[") == 2
    template = (
        "{% for tool in tools or [] %}<tool>{{ tool.name }}</tool>{% endfor %}" + tokenizer.chat_template
    )
    with_tools = AutoTokenizer.from_pretrained(ASSETS / "model")
    with_tools.chat_template = template
    chosen, rejected = marked(with_tools, {**pair([user], [good], [bad]), "tools": [{"name": "look_up"}]})
    assert chosen.startswith("<tool>look_up</tool>")
    assert rejected.startswith("<tool>look_up</tool>")
    assert not dpo.encode_preference(row | {"tools": [{"name": "look_up"}]}, with_tools)["unused"]
    text = {**pair("q", "good", "bad"), "tools": [{"name": "look_up"}]}  # which no template renders
    assert dpo.encode_preference(text, with_tools)["unused"] == "tools"


def test_both_sides_are_cut_or_none(tokenizer):
    digits = "0123456789" * 2
    prompt, same = "1+1=", {"max_length": 10, "overflow": "truncate"}  # the prompt has 4 tokens
    assert marked(tokenizer, pair(prompt, digits, "9" + digits), **same) == [
        "1+1=[[012345]]",
        "1+1=[[901234]]",
    ]
    assert marked(tokenizer, pair(prompt, digits, "3"), **same) == "only one side longer than --max-length 10"
    assert (
        marked(tokenizer, pair(prompt, digits, digits + "1"), **same)
        == "identical sides within --max-length 10"
    )
    assert (
        marked(tokenizer, pair(prompt * 3, digits, "9" + digits), **same)
        == "nothing to train within --max-length 10"
    )
    assert marked(tokenizer, pair(prompt, digits, "3"), max_length=10) == "longer than --max-length 10"
    with pytest.raises(UserError, match="a side has 25 tokens, more than --max-length 10"):
        marked(tokenizer, pair(prompt, digits, "3"), max_length=10, overflow="error")
    long = "1" * 30
    near = pair(prompt, long + "2" + long, long[:-1] + "3" + long + long)
    encoded = dpo.encode_preference(near, tokenizer, max_length=40, overflow="truncate")
    assert encoded["near_tie"]
    assert not dpo.encode_preference(pair(prompt, digits, "9" + digits), tokenizer, **same)["near_tie"]


BAD_ROWS = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, r"`rejected` is null, neither text nor a list of messages"),
    "a number": (pair("a", 1, "b"), r"`chosen` is 1, neither text nor a list"),
    "text and messages": (pair("a", "b", [says("assistant", "c")]), r"`chosen` and `rejected` must be all text or all mess"),
    "no common prompt": ({"chosen": [says("user", "a"), says("assistant", "b")], "rejected": [says("user", "c"), says("assistant", "b")]}, r"share no prompt"),
    "text beside a system turn": (pair("a", *([says("system", "s"), says("user", "a"), says("assistant", x)] for x in "bc")), r"a side begins with a system message, but not all sides repeat `prompt`"),
    "one side repeats the prompt": (pair([says("user", "a")], [says("user", "a"), says("assistant", "b")], [says("assistant", "c")]), r"begins with a user message, but not all sides repeat"),
    "no assistant turn": (pair([says("user", "a"), says("assistant", "x")], [says("user", "b")], [says("user", "c")]), r"a side has no assistant turn to learn from"),
    "unknown role": (pair([says("robot", "a")], "b", "c"), r"`prompt\[0\]` has the role \"robot\""),
    "prompt is a number": (pair(3, "b", "c"), r"`prompt` is 3"),
    "images": ({**pair("a", "b", "c"), "images": ["x.png"]}, r"the row has images, which are not supported"),
    "tools not JSON": ({**pair([says("user", "a")], "b", "c"), "tools": "x"}, r"`tools` is text but not JSON"),
    "all dropped": (pair("a", "b", "b"), r"no row is left to train of 1 in .*: \{'identical sides': 1\}"),
    "empty side": (pair("a", "b", " "), r"no row is left to train of 1 in .*: \{'an empty side': 1\}"),
    "no messages": (pair([says("user", "a")], [], [says("assistant", "c")]), r"\{'an empty side': 1\}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path, name):
    row, message = BAD_ROWS[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", dataset=write_rows(tmp_path / "rows.jsonl", [row]))
    assert not (tmp_path / "run").exists()


BAD_FLAGS = {
    "no loss": ({"loss_type": ()}, r"name one loss or several, each once"),
    "a loss twice": ({"loss_type": ("sft", "sft")}, r"each once"),
    "weights of another number": ({"loss_weights": (1.0, 2.0)}, r"has 2 weights for --loss-type sigmoid; give one for each"),
    "negative weight": ({"loss_weights": (-1.0,)}, r"--loss-weights must be above 0"),
    "beta 0": ({"beta": 0.0}, r"--beta is 0.0; it must be above 0"),
    "beta nan": ({"beta": math.nan}, r"--beta is nan; it must be above 0"),
    "smoothing of a half": ({"loss_type": ("robust",), "label_smoothing": 0.5}, r"at least 0 and below 0.5"),
    "smoothing without use": ({"loss_type": ("ipo",), "label_smoothing": 0.1}, r"--label-smoothing does not apply to --loss-type ipo"),
    "exo without smoothing": ({"loss_type": ("exo_pair",)}, r"exo_pair needs --label-smoothing above 0"),
    "divergence without use": ({"loss_type": ("apo_zero",), "f_divergence_type": "forward_kl"}, r"--f-divergence-type does not apply"),
    "alpha without divergence": ({"f_alpha_divergence_coef": 2.0}, r"needs --f-divergence-type alpha_divergence"),
    "ld_alpha above 1": ({"ld_alpha": 1.5}, r"--ld-alpha is 1.5; it must be from 0 to 1"),
    "ld_alpha with simpo": ({"loss_type": ("simpo",), "ld_alpha": 0.5}, r"--ld-alpha does not apply to --loss-type simpo"),
    "weighting with aot": ({"loss_type": ("aot",), "use_weighting": True}, r"--use-weighting does not apply to --loss-type aot"),
    "tau without discopop": ({"discopop_tau": 0.1}, r"--discopop-tau .* needs --loss-type discopop"),
    "gamma without simpo": ({"simpo_gamma": 1.0}, r"--simpo-gamma .* needs --loss-type simpo"),
    "penalty without rdpo": ({"rdpo_alpha": 1.0}, r"--rdpo-alpha .* needs --loss-type rdpo"),
    "free of no reference": ({"loss_type": ("simpo",), "reference_free": True}, r"--reference-free .* needs a loss that has a reference"),
    "precompute none": ({"loss_type": ("cpo", "sft"), "precompute_ref_log_probs": True}, r"--precompute-ref-log-probs does not apply"),
    "moving a precomputed": ({"sync_ref_model": True, "precompute_ref_log_probs": True}, r"--sync-ref-model does not apply .*nothing precomputed"),
    "moving with LoRA": ({"sync_ref_model": True, "lora_rank": 4}, r"--sync-ref-model does not apply .*no LoRA"),
    "share without moving": ({"ref_model_mixup_alpha": 0.5}, r"needs --sync-ref-model"),
    "share of 0": ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, r"must be above 0 and at most 1"),
    "aot with dropout": ({"loss_type": ("aot",), "lora_rank": 4, "lora_dropout": 0.1}, r"set --lora-dropout 0"),
    "all too long": ({"max_length": 4}, r"no row is left to train of 4000 in"),
    "pairs too long": ({"micro_batch_tokens": 20}, r"has \d+ tokens, more than --micro-batch-tokens 20; the smallest value that works"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path, name):
    flags, message = BAD_FLAGS[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


def test_contradictions_and_duplicates_are_reported(tmp_path, capsys):
    """Rows 2 and 4 contradict each other, row 3 repeats row 1; a weight of 2 makes no duplicates."""
    rows = [pair("1+1=", "2", "3"), pair("2+2=", "4", "5"), pair("1+1=", "2", "3"), pair("2+2=", "5", "4")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = {"max_steps": 1, "dataset": (f"{path}:2",)}
    train(tmp_path / "warn", **flags)
    said = capsys.readouterr().out
    assert (
        f"1 duplicated, 0 near-ties after cutting, 2 contradictory (row 2 of {path}; row 4 of {path})" in said
    )
    assert "the chosen side is longer in 0%" in said
    assert "4 rows, 8 used" in said
    train(tmp_path / "drop", contradictions="drop", **flags)
    said = capsys.readouterr().out
    assert "removed" in said
    assert "4 rows, 4 used" in said
    with pytest.raises(
        UserError, match=r"2 pairs contradict others, which prefer the reverse: row 2 of .*; row 4 of"
    ):
        train(tmp_path / "error", contradictions="error", **flags)
    write_rows(tmp_path / "rows.jsonl", rows[1::2])
    with pytest.raises(UserError, match="no pair is left: all 2 contradict others"):
        train(tmp_path / "none", contradictions="drop", **flags)


@pytest.mark.learn
def test_default_run_learns(tmp_path):
    """No flags: at most two minutes, and many more of the held-out sums are right than before."""
    began = time.time()
    result = run("dpo.py", "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr[-6000:]
    assert time.time() - began < 180 * float(os.environ.get("TIME_FACTOR", 1))
    evals = [row for row in read_metrics(tmp_path / "run") if "eval/exact_match" in row]
    assert 0.35 < evals[0]["eval/exact_match"] < 0.65
    assert evals[-1]["eval/exact_match"] > evals[0]["eval/exact_match"] + 0.2
    assert evals[-1]["eval/rewards/accuracies"] > 0.7
    assert f"eval/exact_match: {evals[0]['eval/exact_match']:.4f} before training" in result.stdout
