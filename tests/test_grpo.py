"""GRPO: advantages, every loss against TRL's own code, the engine, invariance, resume, a lost engine, learning."""

import functools
import math
from collections import defaultdict
from dataclasses import replace
from types import MethodType, SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import ASSETS, read_completions, read_metrics, read_rows, run_well, write_rows
from transformers import AutoModelForCausalLM

import grpo
from common import EngineError, HFEngine, Sample, UserError, collate, draw, load_tokenizer

EVAL_ROWS = read_rows(ASSETS / "prompts_eval.jsonl")
GAP = "sampling/sampling_logp_difference/mean"
train = functools.partial(conftest.train, grpo, batch_size=16, num_generations=4)


# ---- Advantages ------------------------------------------------------------------------------------------------------


def table(rewards):
    """Nested lists with None -> rewards_PGR."""
    numbers = [[[math.nan if r is None else r for r in s] for s in group] for group in rewards]
    return torch.tensor(numbers, dtype=torch.float64)


def groups_of(rewards):
    fields = {"ids": [2], "mask": [True], "logps": [-1.0], "versions": [0], "is_finished": True}
    groups = [[Sample([1], rewards=s, **fields) for s in group] for group in table(rewards).tolist()]
    for prompt, group in enumerate(groups):
        for sample in group:
            sample.prompt, sample.failure = prompt, "none" * all(map(math.isnan, sample.rewards))
    return groups


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch", "gdpo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_numpys(baseline, scale):
    """With rewards that are missing for one function, for a whole sample, and for all but one of a group."""
    rewards_PGR, by_group = np.random.default_rng(0).normal(size=(5, 4, 2)), {"axis": 1, "keepdims": True}
    rewards_PGR[0, 1, 0] = rewards_PGR[1, 2] = rewards_PGR[2] = math.nan
    rewards_PGR[3] = 0.25, 1.0
    own_PGR, deviation_PGR = rewards_PGR.copy(), np.nanstd(rewards_PGR, ddof=1, **by_group) + 1e-4
    if baseline == "gdpo":
        own_PGR = (rewards_PGR - np.nanmean(rewards_PGR, **by_group)) / deviation_PGR
    total_PG = np.nansum(own_PGR * (1.0, 0.5), 2)
    total_PG[np.isnan(rewards_PGR).all(2)] = math.nan
    rewards_PGR[2, 3] = 1.0, 2.0  # a reward alone in its group takes no part
    others_PG = (np.nansum(total_PG, **by_group) - total_PG) / ((~np.isnan(total_PG)).sum(**by_group) - 1)
    shifts = {"group": np.nanmean(total_PG, **by_group), "leave_one_out": others_PG}
    scales = {"group": np.nanstd(total_PG, ddof=1, **by_group) + 1e-4, "none": 1}
    scales["batch"] = np.nanstd(total_PG, ddof=1) + 1e-4
    expected_PG = total_PG - shifts.get(baseline, np.nanmean(total_PG))
    expected_PG /= scales["batch" if baseline == "gdpo" else scale]
    args = grpo.Args(rewards=("a", "b"), reward_weights=(1.0, 0.5), scale_rewards=scale, baseline=baseline)
    found_PG, _ = grpo.advantages(torch.from_numpy(rewards_PGR), args)
    np.testing.assert_allclose(found_PG.numpy(), expected_PG, rtol=1e-6, atol=1e-9)


def test_judge_leaves_out_what_teaches_nothing_after_the_statistics():
    """The example of its docstring; with --baseline batch the skipped group still counts in the mean."""
    groups = groups_of([[[1], [0], [None]], [[1], [1], [1]], [[0], [1], [2]]])
    args = grpo.Args(rewards=("a",), scale_rewards="none", zero_variance="skip")
    assert [s.advantage for s in grpo.judge(groups, args)] == [0.5, -0.5, -1, 0, 1]
    found = [s.advantage for s in grpo.judge(groups, replace(args, baseline="batch"))]
    assert found == pytest.approx([reward - 7 / 8 for reward in (1, 0, 0, 1, 2)])
    assert len(grpo.judge(groups, replace(args, zero_variance="keep"))) == 8


def test_groups_have_a_signal_where_their_advantages_differ():
    """gdpo scales each reward by itself, so that it tells [1, 0, 0] and [0, .5, .5], of one sum, apart."""
    groups = groups_of([[[1, 0, 0], [0, 0.5, 0.5]], [[1, 1, 1]] * 2])
    args = grpo.Args(rewards=("a", "b", "c"))
    assert grpo.have_signal(groups, args) == [False, False]
    assert grpo.have_signal(groups, replace(args, baseline="gdpo")) == [True, False]


def test_metrics_of_rewards_are_trls():
    """One group without any reward, one sample and one function without; std of the batch, and of a sample."""
    rewards = [[[1, None], [0, 2.0], [1, 1.0], [0, 3.0]], [[None, None]] * 4, [[1, 4.0]] * 3 + [[None, None]]]
    args, totals = grpo.Args(rewards=("a", "b.py:f"), reward_weights=(1.0, 0.5)), [1, 1.0, 1.5, 1.5, 3, 3, 3]
    found = grpo.rollout_metrics(groups_of(rewards), args)
    expected = {"reward": np.mean(totals), "reward_std": np.std(totals, ddof=1), "failed_rewards": 5}
    expected |= {"frac_reward_zero_std": 1 / 3, "rewards/a/mean": 5 / 7, "rewards/f/mean": 3}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


# ---- Losses against TRL's own code -----------------------------------------------------------------------------------

# fmt: off
CLIPPED_OR_SAPO = "dapo", "grpo", "bnpo", "dr_grpo", "sapo", "luspo"
VARIANTS = {
    **{name: {"loss_type": name} for name in CLIPPED_OR_SAPO},
    **{f"{name}, two masked": {"loss_type": name, "mask_truncated_completions": True} for name in CLIPPED_OR_SAPO},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "vespo": {"loss_type": "vespo", "importance_sampling_mode": "token_truncate"},
    "vespo, no correction": {"loss_type": "vespo", "importance_sampling_mode": "none"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02},
    "luspo by sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "two-sided": {"epsilon_high": 0.1, "delta": 1.3},
    "kl": {"beta": 0.1},
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
    "entropy bonus": {"entropy_coef": 0.03},
    "top entropy with bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.03},
    **{mode: {"importance_sampling_mode": mode, "importance_sampling_clip_max": 1.1}
       for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")},
}


def trls_loss(logps_BT, entropy_BT, mask_BT, old_BT, sampler_BT, ref_BT, advantage_B, args):
    """GRPOTrainer._compute_loss, unchanged, with a stub for all that is not the loss -> loss, metrics."""
    from trl import GRPOTrainer

    mode, most = args.importance_sampling_mode, args.importance_sampling_clip_max
    corrects, known = mode != "none", {name: value if value != math.inf else None for name, value in vars(args).items()}
    constants = {"use_bias_correction_kl": True, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
                 "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    settings = {**known, **constants, "steps_per_generation": 1}
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True,
                                  pad_across_processes=lambda x, **_: x)
    stub = {"args": SimpleNamespace(**settings), "accelerator": accelerator, "model": SimpleNamespace(training=True),
            "epsilon_low": args.epsilon, "epsilon_high": args.epsilon if args.epsilon_high is None else args.epsilon_high,
            "use_vllm": corrects, "vllm_importance_sampling_correction": corrects, "current_gradient_accumulation_steps": 1,
            "aux_loss_enabled": False, "use_adaptive_entropy": False, "_entropy_bonus_enabled": bool(args.entropy_coef),
            "_metrics": {"train": defaultdict(list)},
            "_get_per_token_logps_and_entropies": lambda *_, **__: (logps_BT, entropy_BT, None),
            "get_off_policy_mask": GRPOTrainer.get_off_policy_mask, "get_gamma_weights": GRPOTrainer.get_gamma_weights}
    trainer = SimpleNamespace(**{**settings, **stub})
    trainer.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    difference_BT = (old_BT - sampler_BT) * mask_BT
    ratio = (difference_BT.sum(-1, keepdim=True) if mode.startswith("sequence") else difference_BT).exp()
    ratio = ratio.clamp(max=most) if mode.endswith("truncate") else ratio.masked_fill(ratio > most, 0)
    inputs = {"prompt_ids": mask_BT[:, :0], "prompt_mask": mask_BT[:, :0], "completion_ids": torch.zeros_like(mask_BT),
              "completion_mask": mask_BT, "advantages": advantage_B, "old_per_token_logps": old_BT,
              "ref_per_token_logps": ref_BT, "sampling_per_token_logps": sampler_BT, "num_items_in_batch": mask_BT.sum()}
    inputs |= {"importance_sampling_ratio": ratio} if corrects else {}
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]
# fmt: on


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_gradient_and_metrics_equal_trls(name):
    args = replace(grpo.Args(importance_sampling_mode="none", max_completion_length=9), **VARIANTS[name])
    generator, lengths_B = torch.Generator().manual_seed(0), torch.tensor([9, 2, 5, 1, 7, 7])
    if args.mask_truncated_completions:  # TRL sets their masks to 0
        lengths_B[[0, 3]] = 0
    mask_BT = (torch.arange(9) < lengths_B[:, None]).long()
    base_BT = -torch.rand(6, 9, generator=generator, dtype=torch.float64) * 2
    noise_3BT = 0.15 * torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)
    old_BT, sampler_BT, ref_BT = base_BT + noise_3BT
    advantage_B = torch.tensor([1.0, -1.2, 0.3, -0.4, 0.0, -2.0], dtype=torch.float64)
    entropy_BT = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    theirs = [tensor.clone().requires_grad_() for tensor in (base_BT, entropy_BT)]
    expected, metrics = trls_loss(*theirs, mask_BT, old_BT, sampler_BT, ref_BT, advantage_B, args)
    expected.backward()

    ours = [tensor.clone().requires_grad_() for tensor in (base_BT, entropy_BT)]
    chosen, sizes_S = mask_BT.bool(), lengths_B[lengths_B > 0]
    weight_S = torch.tensor(grpo.token_weights(sizes_S.double().numpy(), 6, sizes_S.sum().item(), args))
    logps = sampler_BT[chosen], old_BT[chosen], ref_BT[chosen] if args.beta else None
    by_sample = advantage_B[lengths_B > 0], weight_S, torch.arange(len(sizes_S))
    sampled = grpo.Sampled(*logps, *(values_S.repeat_interleave(sizes_S) for values_S in by_sample))
    entropy_N, floor = ours[1][chosen], -math.inf
    if args.top_entropy_quantile < 1:
        floor = entropy_BT[chosen].float().quantile(1 - args.top_entropy_quantile).item()
    loss, is_trained_N, sums = grpo.grpo_loss(ours[0][chosen], entropy_N, sampled, args, floor)
    loss = loss - args.entropy_coef * (entropy_N * is_trained_N).sum() / is_trained_N.sum()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad * mask_BT)
    assert theirs[0].grad.abs().max() > 0
    if args.entropy_coef:
        torch.testing.assert_close(ours[1].grad, theirs[1].grad)
    if not args.mask_truncated_completions:  # TRL's means over samples have a 0 for each masked one
        for metric in metrics.keys() & sums.keys():
            assert (sums[metric][0] / sums[metric][1]).item() == pytest.approx(metrics[metric][0], abs=1e-6)
        named = {"entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"}
        assert named & metrics.keys() == named & sums.keys()


def test_a_ratio_beyond_float32_is_masked():
    """Sampler and trainer disagree on one of two tokens: exp(100) is infinite."""
    logps_N = torch.full((2,), -1.0, requires_grad=True)
    gaps_N, ones_N, sample_N = torch.tensor([-101.0, -1.0]), torch.ones(2), torch.tensor([0, 0])
    sampled = grpo.Sampled(gaps_N, None, None, ones_N, 0.1 * ones_N, sample_N)
    args = grpo.Args(importance_sampling_mode="token_mask")
    loss, _, sums = grpo.grpo_loss(logps_N, ones_N, sampled, args)
    loss.backward()
    assert loss.item() == pytest.approx(-0.1)
    assert logps_N.grad.tolist() == pytest.approx([0, -0.1])
    assert sums["sampling/importance_sampling_ratio/mean"].tolist() == [1, 2]


def test_sums_over_a_sample_do_not_lose_small_terms():
    """2**24, 1000 times 1, -2**24: added up in float32, the ones would be lost."""
    gap_N = torch.tensor([2.0**24, *[2**-8] * 1000, -(2.0**24)])
    sampled = grpo.Sampled(
        -gap_N, torch.zeros(1002), None, torch.ones(1002), torch.ones(1002) / 1002, torch.zeros(1002).long()
    )
    args = grpo.Args(importance_sampling_mode="sequence_truncate", importance_sampling_clip_max=1e9)
    loss, *_ = grpo.grpo_loss(torch.zeros(1002), torch.ones(1002), sampled, args)
    assert loss.item() == pytest.approx(-math.exp(1000 / 256), rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("moved", [False, True], ids=["on policy", "off policy"])
@pytest.mark.parametrize("proximal", ["sampler", "trainer"])
def test_the_kl_term_has_the_gradient_of_the_divergence_in_expectation(estimator, moved, proximal):
    """Over all tokens of a vocabulary, weighed by their probability under the policy or an old one, to which ratios are
    taken, or to the policy itself. Whatever --importance-sampling-level is, each token has its own ratio."""
    generator = torch.Generator().manual_seed(0)
    logits_V, ref_V, noise_V = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    ref_V, theta_V = ref_V.log_softmax(-1), logits_V.clone().requires_grad_()
    logps_V = theta_V.log_softmax(-1)
    divergence = (logps_V.exp() * (logps_V - ref_V)).sum()
    (expected,) = torch.autograd.grad(divergence, theta_V, retain_graph=True)
    old_V = (logits_V + 0.5 * noise_V).log_softmax(-1) if moved else logps_V.detach()
    sampled = grpo.Sampled(
        sampler_logps_N=old_V,
        old_logps_N=old_V if proximal == "sampler" else None,
        ref_logps_N=ref_V,
        advantage_N=torch.zeros(7).double(),
        weight_N=old_V.exp(),
        sample_N=torch.zeros(7).long(),  # all of one sample
    )
    for level in ("token", "sequence"):
        args = grpo.Args(beta=1.0, kl_estimator=estimator, importance_sampling_level=level)
        args = replace(args, importance_sampling_clip_max=99.0)
        loss, *_ = grpo.grpo_loss(logps_V, torch.ones(7), sampled, args)
        (found,) = torch.autograd.grad(loss, theta_V, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# ---- The embedded engine ---------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 13], [40] * 30, [7], list(range(20, 60)), [100, 3, 100]]


@pytest.mark.parametrize("window", [None, 6])
def test_the_engines_log_probs_are_the_trainers(window):
    model, engine_model = (conftest.embedded_model(grpo, window) for _ in range(2))
    keys, limits = [(0, 0, index) for index in range(len(PROMPTS))], [12, 40, 1, 25, 12]
    groups = HFEngine(engine_model).generate(PROMPTS, keys, 3, limits, 0.7, [11])
    for prompt, limit, group in zip(PROMPTS, limits, groups, strict=True):
        assert len(group) == 3
        for sample in group:
            ids = np.array(prompt + sample.ids)
            batch = collate([(ids, np.arange(len(ids)) >= len(prompt))])
            logps_N = model.token_stats(batch, temperature=0.7)[0]
            torch.testing.assert_close(logps_N.tolist(), sample.logps, rtol=1e-4, atol=1e-4)
            assert sample.is_finished == (sample.ids[-1] == 11)
            assert len(sample.ids) == limit or sample.is_finished
            assert 11 not in sample.ids[:-1]


def test_samples_do_not_depend_on_what_is_generated_with_them(monkeypatch):
    """They are keyed by (seed, version, prompt), their number in the group, and the position."""
    engine, keys = HFEngine(conftest.embedded_model(grpo)), [(0, 3, index) for index in range(len(PROMPTS))]
    together = engine.generate(PROMPTS, keys, 4, 16, 1.0, [11])
    alone = [engine.generate([p], [key], 2, 9, 1.0, [11])[0] for p, key in zip(PROMPTS, keys, strict=True)]
    for group, others in zip(together, alone, strict=True):
        assert [sample.ids[:9] for sample in group[:2]] == [sample.ids for sample in others]
    monkeypatch.setattr(HFEngine, "CACHE_TOKENS", (100, 100))
    in_parts = engine.generate(PROMPTS, keys, 4, 16, 1.0, [11])
    other = engine.generate(PROMPTS, [(0, 4, index) for index in range(5)], 4, 16, 1.0, [11])
    ids = [[tuple(s.ids) for group in groups for s in group] for groups in (together, in_parts, other)]
    assert ids[0] == ids[1] != ids[2]
    assert len({*ids[0]}) > 15


def test_draws_follow_the_distribution():
    logits_V, n = torch.tensor([0.0, 2.0, -torch.inf, 1.0, -torch.inf]), 20_000
    token_S, logp_S = draw(logits_V.expand(n, 5), 0.5, torch.from_numpy((np.arange(n) + 0.5) / n))
    expected_V = (logits_V / 0.5).softmax(-1)
    torch.testing.assert_close(torch.bincount(token_S, minlength=5) / n, expected_V, atol=2e-4, rtol=0)
    torch.testing.assert_close(logp_S.exp(), expected_V[token_S])
    edge_S, _ = draw(logits_V.expand(2, 5), 1.0, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert edge_S.tolist() == [0, 3]


# ---- The step --------------------------------------------------------------------------------------------------------


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_the_sampler_agrees(tmp_path, capsys):
    """And what a run writes: completions.jsonl, and samples in the terminal at each evaluation."""
    rows = train(tmp_path / "run", eval_dataset=(write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:4]),))
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 3]
    assert capsys.readouterr().out.count("    completion ") == 4
    said, tokenizer = read_completions(tmp_path / "run"), load_tokenizer(str(ASSETS / "model"))
    rows = [row for row in rows if "loss" in row]
    for row in rows:
        mine = [one for one in said if one["step"] == row["step"]]
        assert len(mine) == 16
        assert {one["version"] for one in mine} == {row["step"] - 1}
        assert mine[0]["prompt"].startswith("<|im_start|>user\nWhat is")
        assert row[GAP] < 1e-5
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
        assert row["clip_ratio/low_mean"] == row["clip_ratio/high_mean"] == 0
        assert row["reward"] == pytest.approx(np.mean([one["rewards"]["accuracy"] for one in mine]))
    tokens = [len(tokenizer(row["completion"])["input_ids"]) + 1 for row in said[:16]]
    expected = -np.dot(tokens, [row["advantage"] for row in said[:16]]) / sum(tokens)
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_two_ranks_and_other_micro_batches_give_the_same_curve(tmp_path):
    flags = {
        "batch_size": 24,
        "num_generations": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "beta": 0.05,
    }
    flags |= {"loss_type": "grpo", "top_entropy_quantile": 0.5, "entropy_coef": 0.01, "max_steps": 5}
    flags |= {"eval_every": 0, "eval_dataset": (write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:5]),)}
    conftest.assert_two_ranks_train_as_one(grpo, tmp_path, 1e-2, elsewhere={"micro_batch_tokens": 45}, **flags)  # fmt: skip
    texts = [[row["completion"] for row in read_completions(tmp_path / ranks)] for ranks in "12"]
    assert texts[0] == texts[1]


def naive_steps(batches, parts, args):
    """Train the embedded model on captured samples, one at a time, by transformers' own logits -> loss and gradient
    norm of each step. batches: the groups of each generation; parts: of each step its prompts, and its samples with those masked."""
    model, ref = (AutoModelForCausalLM.from_pretrained(ASSETS / "model") for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, (0.9, 0.99), weight_decay=0)

    def tokens(model, sample):
        ids, first = torch.tensor([sample.prompt_ids + sample.ids]), len(sample.prompt_ids)
        logps_TV = (model(ids).logits[0, first - 1 : -1] / args.temperature).log_softmax(-1)
        return logps_TV.gather(1, ids[0, first:, None])[:, 0], -(logps_TV.exp() * logps_TV).sum(-1)

    steps, per_batch = [], args.steps_per_generation * args.num_iterations
    for step, (prompts, count) in enumerate(parts):
        if step % per_batch == 0:
            judged = []
            for group in batches[step // per_batch]:
                rewards = [s.rewards[0] for s in group]
                for s in group if args.zero_variance == "keep" or len({*rewards}) > 1 else ():
                    s.advantage = (s.rewards[0] - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-4)
                    judged.append(s)
            batch = [s for s in judged if s.is_finished or not args.mask_truncated_completions]
            one_pass = parts[step : step + args.steps_per_generation]  # it sees each prompt once
            assert sum(count for _, count in one_pass) == len(judged)
            assert sum(len(own) for own, _ in one_pass) == len({s.prompt for s in batch})
            with torch.no_grad():
                old, reference = ({id(s): tokens(m, s)[0] for s in batch} for m in (model, ref))
        mine = [s for s in batch if s.prompt in prompts]
        if not mine:  # all groups alike
            steps.append((0, 0))
            continue
        found = [tokens(model, s) for s in mine]
        entropies = torch.cat([entropy for _, entropy in found])
        floor = entropies.detach().quantile(1 - args.top_entropy_quantile)
        loss = -args.entropy_coef * entropies[entropies >= floor].mean()
        denominators = {"dapo": sum(len(s.ids) for s in batch) / args.steps_per_generation}
        denominators |= {"bnpo": sum(len(s.ids) for s in mine), "dr_grpo": count * args.max_completion_length}
        for s, (logps, entropy) in zip(mine, found, strict=True):
            ratio, gap = (logps - old[id(s)]).exp(), reference[id(s)] - logps
            clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
            losses = -torch.minimum(ratio * s.advantage, clipped * s.advantage) * (entropy >= floor)
            losses = losses + args.beta * ratio * (gap.exp() - gap - 1)
            loss = loss + losses.sum() / (denominators | {"grpo": count * len(s.ids)})[args.loss_type]
        loss.backward()
        steps.append((loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()))
        optimizer.step()
        optimizer.zero_grad()
    return steps


STEPS = {
    "dapo": {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.5, "temperature": 0.8},
    "grpo": {"zero_variance": "skip", "mask_truncated_completions": True, "max_completion_length": 3}
    | {"steps_per_generation": 2},
    "bnpo": {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "num_iterations": 3, "micro_batch_tokens": 60},
    "dr_grpo": {"steps_per_generation": 2, "num_iterations": 2, "epsilon": 0.05},
}


@pytest.mark.parametrize("loss_type", STEPS)
def test_the_steps_are_those_of_a_naive_loop(tmp_path, monkeypatch, loss_type):
    """Advantages, old and reference log-probs, denominators, masks, floors, minibatches and steps without samples."""
    batches, parts, roll_out, take = [], [], grpo.roll_out, grpo.Rollouts.__next__

    def rolled(*given, **options):
        groups = roll_out(*given, **options)
        batches.append([[replace(s) for s in group] for group in groups])
        return groups

    def taken(rollouts):
        batch = take(rollouts)
        parts.append(({s.prompt for s in batch.samples}, batch.num_samples))
        return batch

    monkeypatch.setattr(grpo, "roll_out", rolled)
    monkeypatch.setattr(grpo.Rollouts, "__next__", taken)
    flags = {"learning_rate": 2e-4, "warmup_steps": 0, "max_steps": 6, "batch_size": 16, "num_generations": 4}
    flags |= {"loss_type": loss_type, **STEPS[loss_type]}
    rows, args = train(tmp_path / "run", **flags), replace(grpo.Args(), **flags)
    losses, norms = zip(*naive_steps(batches, parts, args), strict=True)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=2e-3, abs=2e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=2e-3)


def test_the_engine_gets_every_steps_adapters_and_the_reference_stays(tmp_path):
    """Else sampler and trainer would disagree from the second step on."""
    rows = train(tmp_path / "run", beta=0.1, lora_rank=4, learning_rate=1e-3)
    assert rows[-1]["grad_norm"] > 0
    assert max(row[GAP] for row in rows) < 1e-5
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["kl"] > 1e-6


REWARDS = """
def correct(completions, **_):
    return [float(len(c[0]["content"]) > 2) for c in completions]

def never(completions, **_):
    return [None for _ in completions]

def broken(completions, **_):
    return [float("nan") for _ in completions]

def raises(completions, **_):
    raise RuntimeError("on purpose")
"""


def test_evaluation_by_samples_and_failing_rewards(tmp_path):
    """pass@k is of the first reward, whatever the others can reach; what fails counts once; JSON has no NaN."""
    path, heldout = tmp_path / "rewards.py", write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:6])
    path.write_text(REWARDS)
    flags = {"eval_dataset": (heldout,), "eval_generations": 3, "max_steps": 1}
    named = (f"{path}:correct", "overlong:4", f"{path}:never")
    rows = train(tmp_path / "run", rewards=named, reward_weights=(1.0, 2.0, 3.0), **flags)
    assert rows[0]["eval/pass@3"] > 0.2
    assert rows[0]["eval/failed_rewards"] == 0
    assert rows[1]["rewards/never/mean"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"step 1: 16 of 16 rewards failed: .*on purpose"):
        train(tmp_path / "raises", rewards=(f"{path}:raises", "accuracy", f"{path}:broken"), **flags)
    assert "NaN" not in (tmp_path / "raises" / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path / "raises")[0]["eval/failed_rewards"] == 18  # though two rewards failed
    with pytest.raises(UserError, match="step 1: 16 of 16 rewards failed: None from every reward"):
        train(tmp_path / "silent", rewards=(f"{path}:never",), **flags)


# ---- A lost engine ---------------------------------------------------------------------------------------------------


def test_a_lost_engine_stops_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    """In the second round of a draw, of which nothing must be counted; --resume goes on as if nothing had been. Groups
    whose samples are all right or all wrong are replaced by new prompts."""
    flags, generate, calls = {"zero_variance": "replace"}, HFEngine.generate, []
    rows = train(tmp_path / "straight", **flags)
    drawn = [row["drawn_prompts"] for row in rows]
    assert max(drawn) > 4
    assert [row["epoch"] for row in rows] == pytest.approx(np.cumsum(drawn) / 7600)

    def lose(*given):
        calls.append(given)
        if len(calls) == 5:
            raise EngineError("the server is gone")
        return generate(*given)

    monkeypatch.setattr(HFEngine, "generate", lose)
    with pytest.raises(UserError, match=r"the server is gone\n.*--resume"):
        train(tmp_path / "lost", **flags)
    monkeypatch.setattr(HFEngine, "generate", generate)
    assert list((tmp_path / "lost").glob("checkpoint-*/progress.json"))
    assert not (tmp_path / "lost" / "final").exists()
    train(tmp_path / "lost", resume=True, **flags)
    conftest.assert_same_run(tmp_path / "lost", tmp_path / "straight")


# ---- Flags, and the default run ----------------------------------------------------------------------------------------

# fmt: off
BAD_FLAGS = {
    "indivisible": ({"batch_size": 18}, "--batch-size: take a multiple of --num-generations"),
    "vespo by sequence": ({"loss_type": "vespo"}, "vespo needs --importance-sampling-mode token_mask"),
    "estimator without beta": ({"kl_estimator": "k2"}, "--kl-estimator has no effect without --beta"),
    "delta below": ({"delta": 1.1}, r"--delta must be above 1 \+ epsilon, 1.2"),
    "weights": ({"reward_weights": (1.0, 2.0)}, "--reward-weights: give one for each reward"),
    "cispo's bound": ({"loss_type": "cispo", "epsilon_high": 0.28}, "--epsilon-high is cispo's largest weight"),
    "gdpo": ({"baseline": "gdpo", "scale_rewards": "none"}, "--scale-rewards has no effect without --baseline group or leave_one_out or batch"),
    "no environment": ({"rewards": ("environment",)}, "environment needs --environment with get_reward"),
    "all at once": ({"batch_size": 18, "delta": 1.1}, r"(?s)--batch-size.*--delta"),
}
# fmt: on


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path, name):
    flags, message = BAD_FLAGS[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.learn
def test_default_run_learns(tmp_path):
    rows = run_well("grpo.py", tmp_path / "run", timeout=1800)
    rows = [row["eval/reward"] for row in rows if "eval/reward" in row]
    assert rows[0] < 0.6
    assert rows[-1] >= 0.85
