"""GRPO: advantages, every loss against TRL's own code, the engine, invariance, resume, and learning."""

import json
import math
import time
from collections import Counter, defaultdict
from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ASSETS,
    assert_same_curve,
    flags_of,
    kill,
    read_metrics,
    run,
    start,
    wait_for_step,
    weights,
    write_rows,
)
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

import grpo
from common import HFEngine, UserError, collate, draw, load_tokenizer

# What depends on the clock, and a difference of roundings
TIMES = ("generate_seconds", "train_seconds", "generate_tokens_per_second", "train_tokens_per_second")
NOISE = (*TIMES, "sampling/sampling_logp_difference/max", "sampling/sampling_logp_difference/mean")


EVAL_ROWS = [json.loads(line) for line in (ASSETS / "prompts_eval.jsonl").read_text().splitlines()]


def train(output_dir, **flags):
    """Run grpo.py in this process -> the rows of metrics.jsonl without what depends on the clock."""
    short = {"eval_dataset": (), "wandb": "disabled", "batch_size": 16, "num_generations": 4, "max_steps": 3}
    grpo.main(replace(grpo.Args(output_dir=str(output_dir)), **{**short, **flags}))
    return metrics_of(output_dir, without=TIMES)


def metrics_of(output_dir, without=NOISE):
    return [
        {key: value for key, value in row.items() if key not in without} for row in read_metrics(output_dir)
    ]


# ---- Advantages ------------------------------------------------------------------------------------------------------


def naive_advantages(rewards, weights, args):
    """Lists of lists of lists, None where there is no reward -> the same of advantages."""
    usable = [[any(r is not None for r in sample) for sample in group] for group in rewards]
    usable = [[u and sum(group) > 1 for u in group] for group in usable]

    def std(values):
        return np.std(values, ddof=1) if len(values) > 1 else 0.0

    def total(sample):
        return sum(w * r for w, r in zip(weights, sample, strict=True) if r is not None)

    if args.multi_objective_aggregation == "normalize_then_sum":
        totals = []
        for group, use in zip(rewards, usable, strict=True):
            known = [
                [s[k] for s, u in zip(group, use, strict=True) if u and s[k] is not None]
                for k in range(len(weights))
            ]
            totals.append([
                sum(w * (s[k] - np.mean(known[k])) / (std(known[k]) + 1e-4) for k, w in enumerate(weights) if s[k] is not None)
                for s in group
            ])  # fmt: skip
        flat = [t for ts, use in zip(totals, usable, strict=True) for t, u in zip(ts, use, strict=True) if u]
        return [
            [(t - np.mean(flat)) / (std(flat) + 1e-4) if u else None for t, u in zip(ts, use, strict=True)]
            for ts, use in zip(totals, usable, strict=True)
        ]
    flat = [
        total(s)
        for group, use in zip(rewards, usable, strict=True)
        for s, u in zip(group, use, strict=True)
        if u
    ]
    result = []
    for group, use in zip(rewards, usable, strict=True):
        mine = [total(s) for s, u in zip(group, use, strict=True) if u]
        result.append([])
        for sample, u in zip(group, use, strict=True):
            if not u:
                result[-1].append(None)
                continue
            value = total(sample)
            baseline = {
                "group": np.mean(mine),
                "leave_one_out": (sum(mine) - value) / (len(mine) - 1),
                "batch": np.mean(flat),
            }[args.baseline]
            scale = {"group": std(mine) + 1e-4, "batch": std(flat) + 1e-4, "none": 1}[args.scale_rewards]
            result[-1].append((value - baseline) / scale)
    return result


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_a_naive_loop(baseline, scale):
    """With rewards that are missing for one function, for a whole sample, and for all but one of a group."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 4, 2)).tolist()
    rewards[0][1][0] = None
    rewards[1][2] = [None, None]
    rewards[2][:3] = [[None, None]] * 3
    rewards[3] = [[0.25, 1.0]] * 4
    args = grpo.Args(rewards=("a", "b"), reward_weights=(1.0, 0.5), scale_rewards=scale)
    aggregation = {"multi_objective_aggregation": baseline} if "sum" in baseline else {"baseline": baseline}
    args = replace(args, **aggregation)
    numbers = [[[math.nan if r is None else r for r in sample] for sample in group] for group in rewards]
    found, _ = grpo.advantages(torch.tensor(numbers, dtype=torch.float64), args)
    expected = torch.tensor(
        [
            [math.nan if a is None else a for a in group]
            for group in naive_advantages(rewards, (1.0, 0.5), args)
        ]
    )
    torch.testing.assert_close(found, expected.double(), equal_nan=True, rtol=1e-6, atol=1e-9)
    assert found[2].isnan().all()


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_the_divergence_in_the_reward_has_weight_beta_whatever_the_rewards_have(aggregation):
    """One reward is missing, one sample has none: the divergence is no reward by itself."""
    args = grpo.Args(rewards=("a", "b"), reward_weights=(0.0, 2.0), beta=0.3, kl_in_reward=True, scale_rewards="none",
                     multi_objective_aggregation=aggregation)  # fmt: skip
    rewards = [[[None, 1.0], [0.5, 0.0], [7.0, 3.0], [None, None]]]
    logps, ref_logps = [[-1.0, -2.0], [-0.5], [], [-1.0]], [[-1.5, -2.5], [-0.25], [], [-9.0]]
    group = [
        grpo.Sample(
            0, [1], [2] * len(own), [True] * len(own), own, [0] * len(own), True, [], "", ref_logps=ref
        )
        for own, ref in zip(logps, ref_logps, strict=True)
    ]
    numbers = [[[math.nan if r is None else r for r in sample] for sample in rewards[0]]]
    found, _ = grpo.advantages(*grpo.add_kl_reward(torch.tensor(numbers, dtype=torch.float64), [group], args))
    kl = [1.0, -0.25, 0.0]
    if aggregation == "sum_then_normalize":
        totals = [2.0 * b - 0.3 * k for b, k in zip([1.0, 0.0, 3.0], kl, strict=True)]
        expected = [[*(np.array(totals) - np.mean(totals)), math.nan]]
    else:
        three = [[[*sample, k] for sample, k in zip(rewards[0], kl, strict=False)] + [[None] * 3]]
        naive = naive_advantages(three, (0.0, 2.0, -0.3), args)
        expected = [[math.nan if a is None else a for a in naive[0]]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    group[0].old_logps = [-3.0, -3.0]  # the policy's, where they were computed again
    rewards_PGR, _ = grpo.add_kl_reward(torch.tensor(numbers, dtype=torch.float64), [group], args)
    assert rewards_PGR[0, 0, 2] == pytest.approx(-2.0)


def test_metrics_of_rewards_are_trls():
    """One group without any reward, one sample and one function without; std of the batch, and of a sample."""
    rewards = [
        [[1, None], [0, 2.0], [1, 1.0], [0, 3.0]],
        [[None, None]] * 4,
        [[1, 4.0], [1, 4.0], [1, 4.0], [None, None]],
    ]
    rewards_PGR = torch.tensor(
        [[[math.nan if r is None else r for r in s] for s in group] for group in rewards]
    ).double()
    args = grpo.Args(rewards=("a", "b.py:f"), reward_weights=(1.0, 0.5))
    flat = [s for group in rewards_PGR.tolist() for s in group]
    samples = [grpo.Sample(0, [1], [2], [True], [-1.0], [0], True, s, "") for s in flat]
    found = grpo.rollout_metrics(samples, grpo.advantages(rewards_PGR, args)[1], args)
    totals = [1, 1.0, 1.5, 1.5, 3, 3, 3]
    assert found["reward"] == pytest.approx(np.mean(totals))
    assert found["reward_std"] == pytest.approx(np.std(totals, ddof=1))  # grpo_trainer.py: nanstd(rewards)
    assert found["frac_reward_zero_std"] == pytest.approx(1 / 3)  # a group without rewards has no spread of 0
    assert found["rewards/a/mean"] == pytest.approx(5 / 7)
    assert found["rewards/a/std"] == pytest.approx(np.std([1, 0, 1, 0, 1, 1, 1], ddof=1))
    assert found["rewards/f/std"] == pytest.approx(np.std([2, 1, 3, 4, 4, 4], ddof=1))


# ---- Losses against TRL's own code -----------------------------------------------------------------------------------

VARIANTS = {
    **{name: {"loss_type": name} for name in ("dapo", "grpo", "bnpo", "dr_grpo", "sapo", "luspo")},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "vespo": {"loss_type": "vespo", "importance_sampling_mode": "token_truncate"},
    "vespo, no correction": {"loss_type": "vespo", "importance_sampling_mode": "none"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02},
    "luspo by sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "clip-higher": {"epsilon_high": 0.28},
    "two-sided": {"epsilon_high": 0.1, "delta": 1.3},
    "kl": {"beta": 0.1},
    "kl, not corrected": {"beta": 0.1, "use_bias_correction_kl": False},
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
    "entropy bonus": {"entropy_coef": 0.03},
    "top entropy": {"top_entropy_quantile": 0.4},
    "top entropy with bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.03},
    **{mode: {"importance_sampling_mode": mode, "importance_sampling_clip_max": 1.1}
       for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none")},
    "clip min": {"importance_sampling_mode": "token_truncate", "importance_sampling_clip_min": 0.95},
}  # fmt: skip


def trls_loss(logps_BT, entropy_BT, mask_BT, old_BT, sampler_BT, ref_BT, advantage_B, args):
    """GRPOTrainer._compute_loss, unchanged, with a stub for all that is not the loss."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True,
        pad_across_processes=lambda x, **_: x,
    )  # fmt: skip
    names = ("epsilon_high delta use_bias_correction_kl sapo_temperature_pos sapo_temperature_neg vespo_k_pos "
             "vespo_lambda_pos vespo_k_neg vespo_lambda_neg")  # fmt: skip
    corrects = args.importance_sampling_mode != "none"
    trainer = SimpleNamespace(
        args=SimpleNamespace(**{name: getattr(args, name) for name in names.split()}, steps_per_generation=1),
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        use_vllm=corrects,
        vllm_importance_sampling_correction=corrects,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=bool(args.entropy_coef),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps_BT, entropy_BT, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    for name in ("beta", "loss_type", "importance_sampling_level", "off_policy_mask_threshold", "entropy_coef",
                 "top_entropy_quantile", "max_completion_length"):  # fmt: skip
        setattr(trainer, name, getattr(args, name))
    trainer.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    difference_BT = (old_BT - sampler_BT) * mask_BT
    if args.importance_sampling_mode.startswith("sequence"):
        difference_BT = difference_BT.sum(-1, keepdim=True)
    ratio = difference_BT.exp()
    least, most = args.importance_sampling_clip_min, args.importance_sampling_clip_max
    if args.importance_sampling_mode.endswith("truncate"):
        ratio = ratio.clamp(least, most)
    else:
        ratio = ratio.masked_fill((ratio > most) | (ratio < (least or 0)), 0)
    inputs = {
        "prompt_ids": mask_BT[:, :0], "prompt_mask": mask_BT[:, :0],
        "completion_ids": torch.zeros_like(mask_BT), "completion_mask": mask_BT,
        "advantages": advantage_B, "old_per_token_logps": old_BT, "ref_per_token_logps": ref_BT,
        "sampling_per_token_logps": sampler_BT, "num_items_in_batch": mask_BT.sum(),
    } | ({"importance_sampling_ratio": ratio} if corrects else {})  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient_equal_trls(name):
    args = replace(grpo.Args(importance_sampling_mode="none", max_completion_length=9), **VARIANTS[name])
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 2, 5, 1, 7, 7]
    mask_BT = torch.tensor([[t < n for t in range(9)] for n in lengths]).long()
    base_BT = -torch.rand(6, 9, generator=generator, dtype=torch.float64) * 2

    def near():
        return base_BT + 0.15 * torch.randn(6, 9, generator=generator, dtype=torch.float64)

    old_BT, sampler_BT, ref_BT = near(), near(), near()
    advantage_B = torch.tensor([1.0, -1.2, 0.3, -0.4, 0.0, -2.0], dtype=torch.float64)
    entropy_BT = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    theirs = [tensor.clone().requires_grad_() for tensor in (base_BT, entropy_BT)]
    expected, metrics = trls_loss(*theirs, mask_BT, old_BT, sampler_BT, ref_BT, advantage_B, args)
    expected.backward()

    ours = [tensor.clone().requires_grad_() for tensor in (base_BT, entropy_BT)]
    chosen = mask_BT.bool()
    lengths_B = np.array(lengths, dtype=float)
    weight_B = torch.tensor(grpo.token_weights(lengths_B, lengths_B.sum(), args))
    sampled = grpo.Sampled(
        old_BT[chosen], sampler_BT[chosen], ref_BT[chosen] if args.beta else None,
        advantage_B[:, None].expand(6, 9)[chosen], weight_B[:, None].expand(6, 9)[chosen],
        torch.arange(6)[:, None].expand(6, 9)[chosen],
    )  # fmt: skip
    stats = SimpleNamespace(logps_N=ours[0][chosen], entropy_N=ours[1][chosen])
    floor = -math.inf
    if args.top_entropy_quantile < 1:
        floor = entropy_BT[chosen].float().quantile(1 - args.top_entropy_quantile).item()
    loss, is_trained_N, sums, most = grpo.grpo_loss(stats, sampled, args, floor)
    if args.entropy_coef:
        loss = loss - args.entropy_coef * (stats.entropy_N * is_trained_N).sum() / is_trained_N.sum()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad * mask_BT)
    assert theirs[0].grad.abs().max() > 0
    if args.entropy_coef:
        torch.testing.assert_close(ours[1].grad, theirs[1].grad)
    by_sample = grpo.sample_metrics(args)
    for metric in {name for name in metrics if not name.endswith(("min", "max"))} & sums.keys():
        count = len(lengths) if metric in by_sample else sum(lengths)
        assert sums[metric].item() / count == pytest.approx(metrics[metric][0], abs=1e-6)
    if args.importance_sampling_mode.startswith("sequence"):  # TRL's is the mean of a ratio for each sample
        gap_B = torch.stack(
            [row[chosen_T].sum() for row, chosen_T in zip(old_BT - sampler_BT, chosen, strict=True)]
        )
        ratio_B = gap_B.exp()
        most_B = 1.1 if args.importance_sampling_mode.endswith("truncate") else 0.0
        expected_B = [ratio if ratio <= 1.1 else most_B for ratio in ratio_B.tolist()]
        mean = sums["sampling/importance_sampling_ratio/mean"].item() / len(lengths)
        assert mean == pytest.approx(np.mean(expected_B), abs=1e-6)
    if args.loss_type in grpo.CLIPPED:
        assert -most["clip_ratio/low_min"].item() == pytest.approx(metrics["clip_ratio/low_min"][0], abs=1e-6)
        assert most["clip_ratio/high_max"].item() == pytest.approx(
            metrics["clip_ratio/high_max"][0], abs=1e-6
        )
    named = {"clip_ratio/", "cispo_clip_ratio", "vespo/phi_seq_mean"}
    expected = {name for name in metrics if name.startswith(tuple(named))}
    assert {name for name in {*sums, *most} if name.startswith(tuple(named))} == expected


def test_the_variants_differ():
    """A comparison of losses that were all the same would show nothing."""
    rng = torch.Generator().manual_seed(1)
    stats = SimpleNamespace(logps_N=-torch.rand(20, generator=rng), entropy_N=torch.rand(20, generator=rng))
    near = [stats.logps_N + 0.3 * torch.randn(20, generator=rng) for _ in range(3)]
    documents_N = torch.arange(4).repeat_interleave(5)
    sampled = grpo.Sampled(
        *near, torch.tensor([1.0, -1, 0.5, -0.5])[documents_N], torch.full((20,), 0.05), documents_N
    )
    losses = {}
    for name, flags in VARIANTS.items():
        args = replace(grpo.Args(importance_sampling_mode="none"), **flags)
        if (
            not args.entropy_coef
            and args.top_entropy_quantile == 1
            and args.loss_type not in ("grpo", "bnpo", "dr_grpo", "luspo")
        ):
            losses[name] = grpo.grpo_loss(stats, sampled, args)[0].item()
    repeated = [
        name for name, count in Counter(round(loss, 9) for loss in losses.values()).items() if count > 1
    ]
    assert len(repeated) <= 1, losses  # "dapo" and "none" are one


@pytest.mark.parametrize("mode", ["sequence_mask", "token_mask"])
def test_a_ratio_beyond_float32_is_masked(mode):
    """A long sample on which sampler and trainer disagree: exp(0.5 * 200) is infinite; that of a token, exp(100), too."""
    long, documents_N = mode == "sequence_mask", torch.tensor([0] * 200 + [1] * 3)
    sampler_N = torch.full((203,), -1.0)
    sampler_N[:200] -= 0.5 if long else torch.tensor([100.0] * 199 + [0.0])
    sampled = grpo.Sampled(None, sampler_N, None, torch.ones(203), torch.full((203,), 0.1), documents_N)
    stats = SimpleNamespace(logps_N=torch.full((203,), -1.0, requires_grad=True), entropy_N=torch.ones(203))
    loss, _, sums, _ = grpo.grpo_loss(stats, sampled, grpo.Args(importance_sampling_mode=mode))
    loss.backward()
    kept = 3 if long else 4
    assert loss.item() == pytest.approx(-0.1 * kept)
    assert stats.logps_N.grad.count_nonzero() == kept
    means = {
        "sequence_mask": 1,
        "token_mask": 4,
    }  # summed over two samples, of which one is masked, or over tokens
    assert sums["sampling/importance_sampling_ratio/mean"].item() == pytest.approx(means[mode])


def expected_gradient(logits_V, args, ref_V, old_V=None, proximal="sampler"):
    """Of the KL term over all tokens of a vocabulary, weighed by their probability under the policy or an old one, to
    which ratios are taken, or to the policy itself."""
    logits_V = logits_V.clone().requires_grad_()
    logps_V = logits_V.log_softmax(-1)
    n, old_V = len(logits_V), logps_V.detach() if old_V is None else old_V
    near_V = old_V if proximal == "sampler" else None
    sampled = grpo.Sampled(near_V, old_V, ref_V, torch.zeros(n).double(), old_V.exp(), torch.arange(n))
    stats = SimpleNamespace(logps_N=logps_V, entropy_N=torch.ones(n))
    (gradient,) = torch.autograd.grad(grpo.grpo_loss(stats, sampled, args)[0], logits_V)
    return gradient


def test_gradients_of_the_kl_estimators_in_expectation():
    """With the ratio all have the reverse KL's, off policy, too; on policy k2 has it without, plain k3 has the forward
    KL's and plain k1 none."""
    generator = torch.Generator().manual_seed(0)
    logits_V, ref_V, noise_V = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    ref_V, old_V = ref_V.log_softmax(-1), (logits_V + 0.5 * noise_V).log_softmax(-1)
    theta_V = logits_V.clone().requires_grad_()
    logps_V = theta_V.log_softmax(-1)
    (reverse,) = torch.autograd.grad((logps_V.exp() * (logps_V - ref_V)).sum(), theta_V, retain_graph=True)
    (forward,) = torch.autograd.grad(-(ref_V.exp() * logps_V).sum(), theta_V)
    for estimator, corrected, old, expected in (
        ("k1", True, None, reverse), ("k2", True, None, reverse), ("k3", True, None, reverse),
        ("k1", True, old_V, reverse), ("k2", True, old_V, reverse), ("k3", True, old_V, reverse),
        ("k2", False, None, reverse), ("k3", False, None, forward), ("k1", False, None, torch.zeros_like(reverse)),
    ):  # fmt: skip
        args = grpo.Args(beta=1.0, kl_estimator=estimator, use_bias_correction_kl=corrected)
        args = replace(args, importance_sampling_clip_max=99.0)
        for proximal in ("sampler", "trainer"):
            found = expected_gradient(logits_V, args, ref_V, old, proximal)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# ---- The embedded engine ---------------------------------------------------------------------------------------------


def embedded(**kwargs):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", attn_implementation="varlen", **kwargs)
    model.token_stats = MethodType(grpo.token_stats, model)
    return model


PROMPTS = [[5, 9, 13], [40] * 30, [7], list(range(20, 60)), [100, 3, 100]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("window", [None, 6])
def test_the_engines_log_probs_are_the_trainers(temperature, window):
    model = embedded()
    for layer in model.model.layers if window else ():
        layer.self_attn.sliding_window = window
    keys = [(0, 0, index) for index in range(len(PROMPTS))]
    groups = HFEngine(model).generate(PROMPTS, keys, 3, [12, 40, 1, 25, 12], temperature, [11])
    for prompt, limit, group in zip(PROMPTS, [12, 40, 1, 25, 12], groups, strict=True):
        assert len(group) == 3
        for rollout in group:
            ids = np.array(prompt + rollout.ids)
            stats = model.token_stats(collate([(ids, np.arange(len(ids)) >= len(prompt))]), temperature)
            torch.testing.assert_close(stats.logps_N.tolist(), rollout.logps, rtol=1e-4, atol=1e-4)
            assert rollout.is_finished == (rollout.ids[-1] == 11)
            assert len(rollout.ids) == limit or rollout.is_finished
            assert 11 not in rollout.ids[:-1]


def test_greedy_decoding_equals_transformers():
    model = embedded()
    tokenizer = load_tokenizer(str(ASSETS / "model"))
    rows = [json.loads(line) for line in (ASSETS / "prompts_eval.jsonl").read_text().splitlines()[:6]]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompts = [
        tokenizer(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True))[
            "input_ids"
        ]
        for row in rows
    ]
    groups = HFEngine(model).generate(prompts, [(0,)] * 6, 1, [8] * 6, 0, [stop])
    for prompt, (rollout,) in zip(prompts, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=stop
        )
        assert rollout.ids == expected[0, len(prompt) :].tolist()


def test_samples_do_not_depend_on_what_is_generated_with_them(monkeypatch):
    engine = HFEngine(embedded())
    keys = [(0, 3, index) for index in range(len(PROMPTS))]
    together = engine.generate(PROMPTS, keys, 4, [16] * 5, 1.0, [11])
    alone = [engine.generate([p], [key], 4, [16], 1.0, [11])[0] for p, key in zip(PROMPTS, keys, strict=True)]
    monkeypatch.setattr(HFEngine, "CACHE_TOKENS", 100)
    in_parts = engine.generate(PROMPTS, keys, 4, [16] * 5, 1.0, [11])
    ids = [[[one.ids for one in group] for group in groups] for groups in (together, alone, in_parts)]
    assert ids[0] == ids[1] == ids[2]
    assert len({tuple(one) for group in ids[0] for one in group}) > 15
    other = engine.generate(PROMPTS, [(0, 4, index) for index in range(5)], 4, [16] * 5, 1.0, [11])
    assert [[one.ids for one in group] for group in other] != ids[0]


def test_draws_follow_the_distribution():
    logits_V = torch.tensor([0.0, 2.0, -torch.inf, 1.0, -torch.inf])
    n = 20_000
    uniform_S = torch.from_numpy((np.arange(n) + 0.5) / n)
    token_S, logp_S = draw(logits_V.expand(n, 5), 0.5, uniform_S)
    expected_V = (logits_V / 0.5).softmax(-1)
    torch.testing.assert_close(torch.bincount(token_S, minlength=5) / n, expected_V, atol=2e-4, rtol=0)
    torch.testing.assert_close(logp_S.exp(), expected_V[token_S])
    edge_S, _ = draw(logits_V.expand(2, 5), 1.0, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert edge_S.tolist() == [0, 3]


# ---- Rewards (test_rewards.py has those of each function) -------------------------------------------------------------


def test_a_run_stops_where_too_many_rewards_fail(tmp_path):
    path = tmp_path / "raises.py"
    path.write_text("def reward(completions, **_):\n    raise RuntimeError('never')\n")
    with pytest.raises(
        UserError, match=r"step 1: the rewards of 100% of the samples failed \(\{'exception': 16\}\)"
    ):
        train(tmp_path / "run", rewards=(f"{path}:reward",))


# ---- The step --------------------------------------------------------------------------------------------------------


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_the_sampler_agrees(tmp_path):
    rows = train(tmp_path / "run")
    said = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [len([row for row in said if row["step"] == step]) for step in (1, 2, 3)] == [16, 16, 16]
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
        assert row["clip_ratio/region_mean"] == 0
        mine = [one["rewards"]["accuracy"] for one in said if one["step"] == row["step"]]
        assert row["reward"] == pytest.approx(np.mean(mine))
    tokenizer = load_tokenizer(str(ASSETS / "model"))
    mine = [row for row in said if row["step"] == 1]
    tokens = [len(tokenizer(row["completion"])["input_ids"]) + 1 for row in mine]
    expected = -sum(n * row["advantage"] for n, row in zip(tokens, mine, strict=True)) / sum(tokens)
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("flags", [
    {},
    {"loss_type": "grpo", "steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "top_entropy_quantile": 0.5,
     "entropy_coef": 0.01, "max_steps": 4},
    {"loss_type": "bnpo", "zero_variance": "skip", "mask_truncated_completions": True},
], ids=["defaults", "several steps a generation", "skipped groups"])  # fmt: skip
def test_micro_batches_do_not_change_the_curve(tmp_path, flags):
    for name, tokens in (("one", 8192), ("many", 40)):
        train(tmp_path / name, micro_batch_tokens=tokens, **flags)
    assert_same_curve(metrics_of(tmp_path / "many"), metrics_of(tmp_path / "one"), rtol=1e-3)


@pytest.mark.slow
def test_two_ranks_give_the_curve_of_one(tmp_path):
    flags = {
        "batch_size": 24,
        "num_generations": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 8,
        "beta": 0.05,
        "eval_every": 0,
        "eval_dataset": (write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:5]),),
    }
    for ranks in (1, 2):
        result = run("grpo.py", *flags_of(output_dir=tmp_path / str(ranks), **flags), ranks=ranks)
        assert result.returncode == 0, result.stderr[-2000:]
    assert_same_curve(metrics_of(tmp_path / "2"), metrics_of(tmp_path / "1"), rtol=1e-2)
    said = [(tmp_path / ranks / "completions.jsonl").read_text().splitlines() for ranks in "12"]
    texts = [[json.loads(line)["completion"] for line in lines] for lines in said]
    assert texts[0] == texts[1]
    assert result.stdout.count("step 0: eval/reward") == 1
    assert result.stdout.count("rewards 1, advantage") == 1


def naive_steps(batches, parts, args):
    """Train the embedded model on captured samples, one at a time, by transformers' own logits -> loss and gradient
    norm of each step. batches: the groups of each generation; parts: the prompts of each step."""
    model, ref = (AutoModelForCausalLM.from_pretrained(ASSETS / "model") for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, (0.9, 0.99), weight_decay=0)

    def tokens(model, sample):
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        logps_TV = (model(ids).logits[0] / args.temperature).log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
        return logps_TV.gather(1, ids[0, -len(sample.ids) :, None])[:, 0], -(logps_TV.exp() * logps_TV).sum(
            -1
        )

    steps, per_batch = [], args.steps_per_generation * args.num_iterations
    for step, cursors in enumerate(parts):
        if step % per_batch == 0:
            batch = []
            for group in batches[step // per_batch]:
                rewards = [s.rewards[0] for s in group]
                if args.zero_variance == "skip" and len(set(rewards)) == 1:
                    continue
                for s in group:
                    s.advantage = (s.rewards[0] - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-4)
                    if s.is_finished or not args.mask_truncated_completions:
                        batch.append(s)
            with torch.no_grad():
                old, reference = ({id(s): tokens(m, s)[0] for s in batch} for m in (model, ref))
        mine = [s for s in batch if s.cursor in cursors]
        if not mine:  # all groups alike
            steps.append((0, 0))
            continue
        found = [tokens(model, s) for s in mine]
        entropies = torch.cat([entropy for _, entropy in found])
        floor = entropies.detach().quantile(1 - args.top_entropy_quantile)
        loss = -args.entropy_coef * entropies[entropies >= floor].mean()
        for s, (logps, entropy) in zip(mine, found, strict=True):
            ratio = (logps - old[id(s)]).exp()
            clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
            losses = -torch.minimum(ratio * s.advantage, clipped * s.advantage) * (entropy >= floor)
            gap = reference[id(s)] - logps
            losses = losses + args.beta * ratio * (gap.exp() - gap - 1)
            loss = (
                loss
                + losses.sum()
                / {
                    "dapo": sum(len(other.ids) for other in batch) / args.steps_per_generation,
                    "bnpo": sum(len(other.ids) for other in mine),
                    "grpo": len(mine) * len(s.ids),
                    "dr_grpo": len(mine) * args.max_completion_length,
                }[args.loss_type]
            )
        loss.backward()
        steps.append((loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()))
        optimizer.step()
        optimizer.zero_grad()
    return steps


@pytest.mark.parametrize("flags", [
    {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.5, "temperature": 0.8},
    {"loss_type": "grpo", "zero_variance": "skip", "mask_truncated_completions": True, "max_completion_length": 3,
     "steps_per_generation": 2},
    {"loss_type": "bnpo", "top_entropy_quantile": 0.5, "entropy_coef": 0.1, "num_iterations": 3, "micro_batch_tokens": 60},
    {"loss_type": "dr_grpo", "steps_per_generation": 2, "num_iterations": 2, "epsilon": 0.05},
], ids=["dapo", "grpo", "bnpo", "dr_grpo"])  # fmt: skip
def test_the_steps_are_those_of_a_naive_loop(tmp_path, monkeypatch, flags):
    """Advantages, old and reference log-probs, normalisers, masks, floors, minibatches and steps without samples."""
    batches, planned = [], []
    roll_out, plan_samples = grpo.roll_out, grpo.plan_samples

    def rolled(*given):
        groups, failures = roll_out(*given)
        batches.append([[replace(s) for s in group] for group in groups])
        return groups, failures

    def plan(samples, *others):
        planned.append({s.cursor for s in samples})
        return plan_samples(samples, *others)

    monkeypatch.setattr(grpo, "roll_out", rolled)
    monkeypatch.setattr(grpo, "plan_samples", plan)
    args = replace(
        grpo.Args(),
        learning_rate=2e-4,
        warmup_steps=0,
        batch_size=16,
        num_generations=4,
        max_steps=6,
        **flags,
    )
    given = {"learning_rate": 2e-4, "warmup_steps": 0, "max_steps": 6, **flags}
    rows = train(tmp_path / "run", **given)
    per_batch = args.steps_per_generation * args.num_iterations
    drawn = planned[:: per_batch + 1]  # of a whole batch; then come its steps
    parts = [cursors for place, cursors in enumerate(planned) if place % (per_batch + 1)]
    for step in range(
        0, 6, args.steps_per_generation
    ):  # each pass over a batch sees each of its prompts once
        some = parts[step : step + args.steps_per_generation]
        assert sum(map(len, some)) == len(set().union(*some))
        assert set().union(*some) == drawn[step // per_batch] or args.mask_truncated_completions
    expected = naive_steps(batches, parts, args)
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in expected], rel=2e-3, abs=2e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([norm for _, norm in expected], rel=2e-3)


def test_zero_variance_groups_are_replaced_by_new_prompts(tmp_path):
    """With the accuracy reward some groups of four are all right or all wrong."""
    kept = train(tmp_path / "kept", max_steps=4)
    replaced = train(tmp_path / "replaced", max_steps=4, zero_variance="replace", max_replacements=5)
    assert all(row["drawn_prompts"] == 4 for row in kept)
    assert max(row["drawn_prompts"] for row in replaced) > 4
    assert [row["cursor"] for row in replaced] == np.cumsum(
        [row["drawn_prompts"] for row in replaced]
    ).tolist()


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4, "learning_rate": 1e-3}], ids=["full", "lora"])
def test_the_engine_gets_every_steps_weights(tmp_path, lora):
    """Else sampler and trainer would disagree from the second step on."""
    rows = train(tmp_path / "run", **lora)
    assert rows[-1]["grad_norm"] > 0
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4


def test_the_reference_is_the_model_as_given(tmp_path):
    for name, lora in (("full", {}), ("lora", {"lora_rank": 4})):
        rows = train(tmp_path / name, beta=0.1, **lora)
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert rows[2]["kl"] > 1e-6


def test_a_run_with_the_divergence_in_the_reward(tmp_path):
    """With rewards that weigh nothing, advantages are the divergence's, from the second step on."""
    flags = {"rewards": ("accuracy",), "reward_weights": (1e-9,), "learning_rate": 1e-3, "max_steps": 2}
    rows = train(tmp_path / "run", beta=1.0, kl_in_reward=True, **flags)
    said = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    largest = [max(abs(row["advantage"]) for row in said if row["step"] == step) for step in (1, 2)]
    assert largest[0] < 0.1 < 0.5 < largest[1]
    assert rows[1]["kl"] > 1e-6


def test_every_rollout_is_in_a_row(tmp_path):
    """Also where --log-every and the steps a generation have a common divisor; resumed within a batch, too."""
    flags = {"steps_per_generation": 2, "log_every": 2, "max_steps": 4}
    each = train(tmp_path / "each", **flags | {"log_every": 1})
    some = train(tmp_path / "some", save_every=1, keep_checkpoints=9, **flags)
    assert [row["step"] for row in some] == [2, 4]
    for row, (first, second) in zip(some, (each[:2], each[2:]), strict=True):
        assert "reward" not in second
        assert row == {**first, **second}
    for step in (2, 3, 4):
        (tmp_path / "some" / f"checkpoint-{step:08d}" / "progress.json").unlink()
    assert train(tmp_path / "some", save_every=1, keep_checkpoints=9, resume=True, **flags) == some


def test_evaluation_by_samples(tmp_path):
    """pass@k is of the first reward, whatever the others can reach; what fails is counted; JSON has no NaN."""
    path = tmp_path / "rewards.py"
    path.write_text("""
def correct(completions, **_):
    return [float(len(c[0]["content"]) > 2) for c in completions]

def never(completions, **_):
    return [None for _ in completions]

def broken(completions, **_):
    return [float("nan") if len(c[0]["content"]) > 2 else 0.0 for c in completions]
""")
    flags = {
        "eval_dataset": (write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:6]),),
        "eval_generations": 3,
        "max_steps": 1,
    }
    named = (f"{path}:correct", "overlong:4", f"{path}:never")
    rows = train(tmp_path / "run", rewards=named, reward_weights=(1.0, 2.0, 3.0), **flags)
    assert rows[0]["eval/pass@3"] > 0.2
    assert rows[0]["eval/failed_rewards"] == 0
    assert rows[1]["rewards/never/mean"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = train(tmp_path / "broken", rewards=(f"{path}:broken",), max_failed_rewards=1.0, **flags)
    assert 0 < rows[0]["eval/failed_rewards"] <= 18
    assert rows[0]["eval/pass@3"] == 0


@pytest.mark.parametrize("save_every", [1, 2])
def test_resume_is_exact_within_a_generation_batch_too(tmp_path, save_every, capsys):
    flags = {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "beta": 0.1,
        "eval_dataset": (write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:8]),),
        "eval_every": 2,
    }
    straight = train(tmp_path / "straight", max_steps=8, **flags)
    args = {**flags, "save_every": save_every, "keep_checkpoints": 9}
    train(tmp_path / "resumed", max_steps=8, **args)
    for checkpoint in (tmp_path / "resumed").glob("checkpoint-*"):
        if int(checkpoint.name[-2:]) > 3:
            (checkpoint / "progress.json").unlink()
    capsys.readouterr()
    assert train(tmp_path / "resumed", max_steps=8, resume=True, **args) == straight
    assert "before training" in capsys.readouterr().out
    assert (tmp_path / "resumed" / "completions.jsonl").read_text() == (
        tmp_path / "straight" / "completions.jsonl"
    ).read_text()
    for name, weight in weights(tmp_path / "straight").items():
        assert torch.equal(weights(tmp_path / "resumed")[name], weight)


def test_an_adapter_is_trained_further(tmp_path):
    """The engine starts from it, and --beta holds the policy by it; dropout is for the gradient alone."""
    flags = {"lora_rank": 4, "learning_rate": 1e-2, "max_steps": 2}
    train(tmp_path / "first", **flags)
    again = {"model": str(tmp_path / "first" / "final"), **flags}
    rows = train(tmp_path / "second", num_iterations=2, lora_dropout=0.3, **again)
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    rows = train(tmp_path / "third", beta=0.1, **again)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4


def test_a_reference_that_follows_the_policy_is_resumed_where_it_was(tmp_path):
    """TR-DPO's: after each move with share 1, the policy is its own reference again."""
    flags = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 3}
    straight = train(tmp_path / "straight", max_steps=8, ref_model_mixup_alpha=0.5, **flags)
    args = {**flags, "ref_model_mixup_alpha": 0.5, "save_every": 4}
    train(tmp_path / "resumed", max_steps=8, **args)
    (tmp_path / "resumed" / "checkpoint-00000008" / "progress.json").unlink()
    assert train(tmp_path / "resumed", max_steps=8, resume=True, **args) == straight
    copied = train(tmp_path / "copied", max_steps=5, ref_model_mixup_alpha=1.0, **flags)
    kl = [row["kl"] for row in copied]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] > 1e-6
    assert kl[3] == pytest.approx(0, abs=1e-6)
    assert kl[4] > 1e-6


@pytest.mark.slow
def test_kill_then_resume_is_exact(tmp_path):
    flags = {
        "max_steps": 30,
        "save_every": 3,
        "batch_size": 16,
        "num_generations": 4,
        "steps_per_generation": 2,
    }
    result = run("grpo.py", *flags_of(output_dir=tmp_path / "straight", **flags))
    assert result.returncode == 0, result.stderr[-2000:]
    for attempt, step in enumerate([4, 17]):
        process = start("grpo.py", *flags_of(output_dir=tmp_path / "killed", resume=attempt > 0, **flags))
        wait_for_step(process, tmp_path / "killed", step)
        time.sleep(0.05 * attempt)
        kill(process, tmp_path / "killed")
    result = run("grpo.py", *flags_of(output_dir=tmp_path / "killed", resume=True, **flags))
    assert result.returncode == 0, result.stderr[-2000:]
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "straight")


def test_a_non_finite_loss_names_the_rows(tmp_path, monkeypatch):
    """That of the second prompt's samples: nothing is updated, and no other rows are named."""
    rows = [{"prompt": f"What is {n}+1?", "answer": str(n + 1)} for n in (3, 4, 5, 6)]
    honest, seen = grpo.grpo_loss, []

    def broken(stats, sampled, args, floor):
        loss, *others = honest(stats, sampled, args, floor)
        seen.append(loss)
        return (loss * math.nan if len(seen) == 2 else loss), *others

    monkeypatch.setattr(grpo, "grpo_loss", broken)
    flags = {"dataset": (write_rows(tmp_path / "rows.jsonl", rows),), "micro_batch_tokens": 60}
    with pytest.raises(
        UserError, match=r"step 1: the loss is nan.*Look at the [123] rows concerned.*: \d of .*rows.jsonl"
    ):
        train(tmp_path / "run", **flags)
    assert len(seen) > 2


def test_mixture_of_experts_aux_loss(tmp_path):
    """With the config's weight, or the flag's; test_sft.py compares the loss itself with transformers'."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        tie_word_embeddings=True, router_aux_loss_coef=0.3,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "moe")
    load_tokenizer(str(ASSETS / "model")).save_pretrained(tmp_path / "moe")
    flags = {
        "model": str(tmp_path / "moe"),
        "max_steps": 1,
        "max_completion_length": 4,
        "max_failed_rewards": 1.0,
    }
    (plain,) = train(tmp_path / "plain", router_aux_loss_coef=0.0, **flags)
    (config_s,) = train(tmp_path / "config", **flags)
    (given,) = train(tmp_path / "given", router_aux_loss_coef=0.1, **flags)
    assert "aux_loss" not in plain
    assert config_s["aux_loss"] == given["aux_loss"] > 1  # about top-k, where experts are used alike
    assert config_s["loss"] == pytest.approx(plain["loss"] + 0.3 * config_s["aux_loss"], abs=1e-5)
    assert given["loss"] == pytest.approx(plain["loss"] + 0.1 * given["aux_loss"], abs=1e-5)
    assert given["grad_norm"] != plain["grad_norm"]


# ---- Bad input -------------------------------------------------------------------------------------------------------

BAD_FLAGS = {
    "one sample": ({"num_generations": 1}, "--num-generations must be 2 or more"),
    "indivisible": ({"batch_size": 18}, "must be a multiple of --num-generations 4"),
    "no room": ({"max_completion_length": 9000}, "--max-completion-length 9000 leaves no room for a prompt"),
    "vespo by sequence": ({"loss_type": "vespo"}, "vespo corrects by token; add --importance-sampling-mode token_truncate"),
    "plain k1": ({"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False}, "no expected gradient"),
    "estimator without beta": ({"kl_estimator": "k2"}, "--kl-estimator does not apply .* it needs --beta above 0"),
    "delta with sapo": ({"loss_type": "sapo", "delta": 2.0}, "--delta does not apply"),
    "delta below": ({"delta": 1.1}, r"--delta 1.1 must be above 1 \+ epsilon, 1.2"),
    "weights": ({"reward_weights": (1.0, 2.0)}, "--reward-weights has 2 weights for 1 rewards"),
    "quantile": ({"top_entropy_quantile": 1.5}, "it must be at most 1"),
    "router loss without experts": ({"router_aux_loss_coef": 0.1}, "--router-aux-loss-coef needs a mixture of experts"),
    "router loss": ({"router_aux_loss_coef": -0.1}, "--router-aux-loss-coef is -0.1; it must be 0 or more"),
    "cispo's bound": ({"loss_type": "cispo", "epsilon_high": 0.28}, "cispo's largest weight, not a distance from 1"),
    "vespo": ({"loss_type": "vespo", "importance_sampling_mode": "none", "vespo_k_neg": math.nan}, "must be 0 or more"),
    "threshold": ({"off_policy_mask_threshold": math.nan}, "it must be finite"),
    "pass@k of nothing": ({"eval_generations": 4}, "--eval-generations does not apply .* it needs --eval-dataset"),
    "temperature": ({"temperature": 0.0}, "--temperature is 0.0; it must be above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path, name):
    flags, message = BAD_FLAGS[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


BAD_ROWS = {
    "no prompt": ({"question": "a"}, "`prompt` is null, not non-empty text"),
    "an answer at the end": (
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "`prompt` ends with an assistant message",
    ),
    "empty": ({"prompt": ""}, "not non-empty text"),
    "images": ({"prompt": "a", "images": ["x"]}, "the row has images"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path, name):
    row, message = BAD_ROWS[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", dataset=(write_rows(tmp_path / "rows.jsonl", [row]),))


@pytest.mark.learn
def test_default_run_learns(tmp_path):
    result = run("grpo.py", "--output-dir", tmp_path / "run", timeout=1200)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = {row["step"]: row for row in metrics_of(tmp_path / "run") if "eval/reward" in row}
    assert rows[0]["eval/reward"] < 0.6
    assert rows[max(rows)]["eval/reward"] >= 0.85
