"""GRPO: advantages, every loss against TRL's own code, the engine, invariance, resume, a lost engine, learning."""

import json
import math
import shutil
import time
from collections import defaultdict
from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ASSETS, assert_same_curve, flags_of, kill, read_metrics, run, start, wait_for_step, weights
from conftest import write_rows
from transformers import AutoModelForCausalLM

import grpo
from common import EngineError, HFEngine, Sample, UserError, collate, draw, load_tokenizer

EVAL_ROWS = [json.loads(line) for line in (ASSETS / "prompts_eval.jsonl").read_text().splitlines()]
GAP = "sampling/sampling_logp_difference/mean"


def train(output_dir, **flags):
    """Run grpo.py in this process. Returns the rows of metrics.jsonl without what depends on the clock."""
    short = {"eval_dataset": (), "wandb": "disabled", "batch_size": 16, "num_generations": 4, "max_steps": 3}
    grpo.main(replace(grpo.Args(output_dir=str(output_dir)), **{**short, **flags}))
    return metrics_of(output_dir)


def metrics_of(output_dir, without=("generate_seconds",)):
    return [{key: value for key, value in row.items() if key not in without} for row in read_metrics(output_dir)]


def completions_of(output_dir):
    return [json.loads(line) for line in (output_dir / "completions.jsonl").read_text().splitlines()]


def table(rewards):
    """Nested lists with None -> rewards_PGR."""
    return torch.tensor([[[math.nan if r is None else r for r in s] for s in group] for group in rewards]).double()


# ---- Advantages ------------------------------------------------------------------------------------------------------


def naive_advantages(rewards, weights, args):
    """Lists of lists of lists, None where there is no reward -> the same of advantages."""
    usable = [[any(r is not None for r in sample) for sample in group] for group in rewards]
    usable = [[u and sum(group) > 1 for u in group] for group in usable]

    def std(values):
        return np.std(values, ddof=1) if len(values) > 1 else 0.0

    def total(sample, mean=lambda k: 0, scale=lambda k: 1):
        return sum(w * (sample[k] - mean(k)) / scale(k) for k, w in enumerate(weights) if sample[k] is not None)

    totals = [[total(s) for s in group] for group in rewards]
    if args.baseline == "gdpo":
        for place, (group, use) in enumerate(zip(rewards, usable, strict=True)):
            known = [[s[k] for s, u in zip(group, use, strict=True) if u and s[k] is not None] for k in range(len(weights))]
            totals[place] = [total(s, lambda k: np.mean(known[k]), lambda k: std(known[k]) + 1e-4) for s in group]
    pick = [[t for t, u in zip(ts, use, strict=True) if u] for ts, use in zip(totals, usable, strict=True)]
    flat = sum(pick, [])
    result = []
    for ts, use, mine in zip(totals, usable, pick, strict=True):
        result.append([])
        for t, u in zip(ts, use, strict=True):
            if not u:
                result[-1].append(None)
                continue
            base = {"group": np.mean(mine), "leave_one_out": (sum(mine) - t) / (len(mine) - 1)}.get(args.baseline, np.mean(flat))
            scale = "batch" if args.baseline == "gdpo" else args.scale_rewards
            result[-1].append((t - base) / {"group": std(mine) + 1e-4, "batch": std(flat) + 1e-4, "none": 1}[scale])
    return result


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch", "gdpo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_a_naive_loop(baseline, scale):
    """With rewards that are missing for one function, for a whole sample, and for all but one of a group."""
    rewards = np.random.default_rng(0).normal(size=(5, 4, 2)).tolist()
    rewards[0][1][0] = None
    rewards[1][2] = [None, None]
    rewards[2][:3] = [[None, None]] * 3
    rewards[3] = [[0.25, 1.0]] * 4
    args = grpo.Args(rewards=("a", "b"), reward_weights=(1.0, 0.5), scale_rewards=scale, baseline=baseline)
    found, _ = grpo.advantages(table(rewards), args)
    expected = [[math.nan if a is None else a for a in group] for group in naive_advantages(rewards, (1.0, 0.5), args)]
    torch.testing.assert_close(found, torch.tensor(expected).double(), equal_nan=True, rtol=1e-6, atol=1e-9)
    assert found[2].isnan().all()


def groups_of(rewards, **fields):
    return [[Sample([1], ids=[2], mask=[True], logps=[-1.0], versions=[0], is_finished=True, rewards=s,
                    failure="exception" if all(map(math.isnan, s)) else "", prompt=p, **fields) for s in group]
            for p, group in enumerate(table(rewards).tolist())]  # fmt: skip


def test_judge_leaves_out_what_teaches_nothing_after_the_statistics():
    """The example of its docstring; with --baseline batch the skipped group still counts in the mean."""
    groups = groups_of([[[1], [0], [None]], [[1], [1], [1]], [[0], [1], [2]]])
    args = grpo.Args(rewards=("a",), scale_rewards="none", zero_variance="skip")
    assert [s.advantage for s in grpo.judge(groups, args)] == [0.5, -0.5, -1, 0, 1]
    found = [s.advantage for s in grpo.judge(groups, replace(args, baseline="batch"))]
    assert found == pytest.approx([reward - 7 / 8 for reward in (1, 0, 0, 1, 2)])
    assert len(grpo.judge(groups, replace(args, zero_variance="keep"))) == 8


def test_metrics_of_rewards_are_trls():
    """One group without any reward, one sample and one function without; std of the batch, and of a sample."""
    groups = groups_of([[[1, None], [0, 2.0], [1, 1.0], [0, 3.0]], [[None, None]] * 4,
                        [[1, 4.0], [1, 4.0], [1, 4.0], [None, None]]])  # fmt: skip
    found = grpo.rollout_metrics(groups, grpo.Args(rewards=("a", "b.py:f"), reward_weights=(1.0, 0.5)))
    totals = [1, 1.0, 1.5, 1.5, 3, 3, 3]
    assert found["reward"] == pytest.approx(np.mean(totals))
    assert found["reward_std"] == pytest.approx(np.std(totals, ddof=1))  # grpo_trainer.py: nanstd(rewards)
    assert found["frac_reward_zero_std"] == pytest.approx(1 / 3)  # a group without rewards has no spread of 0
    assert found["rewards/a/mean"] == pytest.approx(5 / 7)
    assert found["rewards/f/mean"] == pytest.approx(3)
    assert found["failed_rewards"] == 5


# ---- Losses against TRL's own code -----------------------------------------------------------------------------------

VARIANTS = {
    **{name: {"loss_type": name} for name in ("dapo", "grpo", "bnpo", "dr_grpo", "sapo", "luspo")},
    **{f"{name}, two samples masked": {"loss_type": name, "mask_truncated_completions": True}
       for name in ("dapo", "grpo", "bnpo", "dr_grpo", "sapo", "luspo")},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "vespo": {"loss_type": "vespo", "importance_sampling_mode": "token_truncate"},
    "vespo, no correction": {"loss_type": "vespo", "importance_sampling_mode": "none"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02},
    "luspo by sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "clip-higher": {"epsilon_high": 0.28},
    "two-sided": {"epsilon_high": 0.1, "delta": 1.3},
    "kl": {"beta": 0.1},
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
    "entropy bonus": {"entropy_coef": 0.03},
    "top entropy with bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.03},
    **{mode: {"importance_sampling_mode": mode, "importance_sampling_clip_max": 1.1}
       for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")},
}  # fmt: skip


def trls_loss(logps_BT, entropy_BT, mask_BT, old_BT, sampler_BT, ref_BT, advantage_B, args):
    """GRPOTrainer._compute_loss, unchanged, with a stub for all that is not the loss."""
    from trl import GRPOTrainer

    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True,
        pad_across_processes=lambda x, **_: x,
    )  # fmt: skip
    corrects = args.importance_sampling_mode != "none"
    constants = {"use_bias_correction_kl": True, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0,
                 "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "steps_per_generation": 1}  # fmt: skip
    trainer = SimpleNamespace(
        args=SimpleNamespace(epsilon_high=args.epsilon_high, delta=args.delta if args.delta < math.inf else None, **constants),
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        use_vllm=corrects,
        vllm_importance_sampling_correction=corrects,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        off_policy_mask_threshold=args.off_policy_mask_threshold if args.off_policy_mask_threshold < math.inf else None,
        _entropy_bonus_enabled=bool(args.entropy_coef),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps_BT, entropy_BT, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    for name in ("beta", "loss_type", "importance_sampling_level", "entropy_coef", "top_entropy_quantile", "max_completion_length"):
        setattr(trainer, name, getattr(args, name))
    trainer.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    difference_BT = (old_BT - sampler_BT) * mask_BT
    if args.importance_sampling_mode.startswith("sequence"):
        difference_BT = difference_BT.sum(-1, keepdim=True)
    ratio, most = difference_BT.exp(), args.importance_sampling_clip_max
    ratio = ratio.clamp(max=most) if args.importance_sampling_mode.endswith("truncate") else ratio.masked_fill(ratio > most, 0)
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
    generator, lengths = torch.Generator().manual_seed(0), [9, 2, 5, 1, 7, 7]
    mask_BT = torch.tensor([[t < n for t in range(9)] for n in lengths]).long()
    if args.mask_truncated_completions:  # TRL sets their masks to 0
        mask_BT[[0, 3]] = 0
    base_BT = -torch.rand(6, 9, generator=generator, dtype=torch.float64) * 2
    old_BT, sampler_BT, ref_BT = (
        base_BT + 0.15 * torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    advantage_B = torch.tensor([1.0, -1.2, 0.3, -0.4, 0.0, -2.0], dtype=torch.float64)
    entropy_BT = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    theirs = [tensor.clone().requires_grad_() for tensor in (base_BT, entropy_BT)]
    expected, metrics = trls_loss(*theirs, mask_BT, old_BT, sampler_BT, ref_BT, advantage_B, args)
    expected.backward()

    ours = [tensor.clone().requires_grad_() for tensor in (base_BT, entropy_BT)]
    chosen, lengths_S = mask_BT.bool(), mask_BT.sum(1).double().numpy()
    lengths_S = lengths_S[lengths_S > 0]
    sizes = torch.from_numpy(lengths_S).long()
    weight_S = torch.tensor(grpo.token_weights(lengths_S, 6, lengths_S.sum(), args))
    sampled = grpo.Sampled(
        sampler_BT[chosen], old_BT[chosen], ref_BT[chosen] if args.beta else None, advantage_B[:, None].expand(6, 9)[chosen],
        weight_S.repeat_interleave(sizes), torch.arange(len(sizes)).repeat_interleave(sizes),
    )  # fmt: skip
    entropy_N, floor = ours[1][chosen], -math.inf
    if args.top_entropy_quantile < 1:
        floor = entropy_BT[chosen].float().quantile(1 - args.top_entropy_quantile).item()
    loss, is_trained_N, sums = grpo.grpo_loss(ours[0][chosen], entropy_N, sampled, args, floor)
    if args.entropy_coef:
        loss = loss - args.entropy_coef * (entropy_N * is_trained_N).sum() / is_trained_N.sum()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad * mask_BT)
    assert theirs[0].grad.abs().max() > 0
    if args.entropy_coef:
        torch.testing.assert_close(ours[1].grad, theirs[1].grad)
    if not args.mask_truncated_completions:  # TRL's means over samples have a 0 for each masked one
        for metric in metrics.keys() & sums.keys():
            assert (sums[metric][0] / sums[metric][1]).item() == pytest.approx(metrics[metric][0], abs=1e-6), metric
        named = "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"
        assert {*named} & metrics.keys() == {*named} & sums.keys()


@pytest.mark.parametrize("mode", ["sequence_mask", "token_mask"])
def test_a_ratio_beyond_float32_is_masked(mode):
    """A long sample on which sampler and trainer disagree: exp(0.5 * 200) is infinite; that of a token, exp(100), too."""
    long, sample_N = mode == "sequence_mask", torch.tensor([0] * 200 + [1] * 3)
    sampler_N = torch.full((203,), -1.0)
    sampler_N[:200] -= 0.5 if long else torch.tensor([100.0] * 199 + [0.0])
    sampled = grpo.Sampled(sampler_N, None, None, torch.ones(203), torch.full((203,), 0.1), sample_N)
    logps_N = torch.full((203,), -1.0, requires_grad=True)
    loss, _, sums = grpo.grpo_loss(logps_N, torch.ones(203), sampled, grpo.Args(importance_sampling_mode=mode))
    loss.backward()
    kept, mean = (3, 1 / 2) if long else (4, 4 / 203)  # over two samples, of which one is masked, or over tokens
    assert loss.item() == pytest.approx(-0.1 * kept)
    assert logps_N.grad.count_nonzero() == kept
    total, count = sums["sampling/importance_sampling_ratio/mean"].tolist()
    assert total / count == pytest.approx(mean)


def test_sums_over_a_sample_are_exact():
    """A first token of -1e6 and 4096 of 1e-3: added in float32, the small ones would be lost."""
    n = 4097
    mismatch_N = torch.full((n,), 1e-3)
    mismatch_N[0], mismatch_N[-1] = -(2.0**20), 2.0**20
    sampled = grpo.Sampled(-1 - mismatch_N, None, None, torch.ones(n), torch.ones(n) / n, torch.zeros(n).long())
    args = grpo.Args(importance_sampling_mode="sequence_truncate", importance_sampling_clip_max=1e9)
    logps_N = torch.full((n,), -1.0, dtype=torch.float64)
    loss, *_ = grpo.grpo_loss(logps_N, torch.ones(n), sampled, args)
    assert loss.item() == pytest.approx(-math.exp(sampled.sampler_logps_N.double().neg().sub(1).sum()), rel=1e-3)


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
    (expected,) = torch.autograd.grad((logps_V.exp() * (logps_V - ref_V)).sum(), theta_V, retain_graph=True)
    old_V = (logits_V + 0.5 * noise_V).log_softmax(-1) if moved else logps_V.detach()
    for level in ("token", "sequence"):  # all tokens are one sample
        args = grpo.Args(beta=1.0, kl_estimator=estimator, importance_sampling_clip_max=99.0, importance_sampling_level=level)
        near_V = old_V if proximal == "sampler" else None
        sampled = grpo.Sampled(old_V, near_V, ref_V, torch.zeros(7).double(), old_V.exp(), torch.zeros(7).long())
        loss, *_ = grpo.grpo_loss(logps_V, torch.ones(7), sampled, args)
        (found,) = torch.autograd.grad(loss, theta_V, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# ---- The embedded engine ---------------------------------------------------------------------------------------------


def embedded():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", attn_implementation="varlen")
    for method in (grpo.head_inputs, grpo.token_stats):
        setattr(model, method.__name__, MethodType(method, model))
    return model


PROMPTS = [[5, 9, 13], [40] * 30, [7], list(range(20, 60)), [100, 3, 100]]


@pytest.mark.parametrize("window", [None, 6])
def test_the_engines_log_probs_are_the_trainers(window):
    model, engine_model = embedded(), embedded()
    for layer in [*model.model.layers, *engine_model.model.layers] if window else ():
        layer.self_attn.sliding_window = window
    keys, limits = [(0, 0, index) for index in range(len(PROMPTS))], [12, 40, 1, 25, 12]
    groups = HFEngine(engine_model).generate(PROMPTS, keys, 3, limits, 0.7, [11])
    for prompt, limit, group in zip(PROMPTS, limits, groups, strict=True):
        assert len(group) == 3
        for sample in group:
            ids = np.array(prompt + sample.ids)
            logps_N, *_ = model.token_stats(collate([(ids, np.arange(len(ids)) >= len(prompt))]), temperature=0.7)
            torch.testing.assert_close(logps_N.tolist(), sample.logps, rtol=1e-4, atol=1e-4)
            assert sample.is_finished == (sample.ids[-1] == 11)
            assert len(sample.ids) == limit or sample.is_finished
            assert 11 not in sample.ids[:-1]


def test_greedy_decoding_equals_transformers():
    model, tokenizer = embedded(), load_tokenizer(str(ASSETS / "model"))
    stop, texts = tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for row in EVAL_ROWS[:4]:
        texts.append(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True))
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    groups = HFEngine(embedded()).generate(prompts, [(0,)] * 4, 1, 8, 0, [stop])
    for prompt, (sample,) in zip(prompts, groups, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=stop)
        assert sample.ids == expected[0, len(prompt) :].tolist()


def test_samples_do_not_depend_on_what_is_generated_with_them():
    """They are keyed by (seed, version, prompt), their number in the group, and the position."""
    engine, keys = HFEngine(embedded()), [(0, 3, index) for index in range(len(PROMPTS))]
    together = engine.generate(PROMPTS, keys, 4, 16, 1.0, [11])
    alone = [engine.generate([p], [key], 2, 9, 1.0, [11])[0] for p, key in zip(PROMPTS, keys, strict=True)]
    for group, others in zip(together, alone, strict=True):
        assert [sample.ids[:9] for sample in group[:2]] == [sample.ids for sample in others]
    assert len({tuple(sample.ids) for group in together for sample in group}) > 15
    other = engine.generate(PROMPTS, [(0, 4, index) for index in range(5)], 4, 16, 1.0, [11])
    assert [[s.ids for s in group] for group in other] != [[s.ids for s in group] for group in together]


def test_draws_follow_the_distribution():
    logits_V, n = torch.tensor([0.0, 2.0, -torch.inf, 1.0, -torch.inf]), 20_000
    token_S, logp_S = draw(logits_V.expand(n, 5), 0.5, (np.arange(n) + 0.5) / n)
    expected_V = (logits_V / 0.5).softmax(-1)
    torch.testing.assert_close(torch.bincount(token_S, minlength=5) / n, expected_V, atol=2e-4, rtol=0)
    torch.testing.assert_close(logp_S.exp(), expected_V[token_S])
    edge_S, _ = draw(logits_V.expand(2, 5), 1.0, np.array([0.0, 1 - 2**-53]))
    assert edge_S.tolist() == [0, 3]


# ---- The step --------------------------------------------------------------------------------------------------------


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_the_sampler_agrees(tmp_path, capsys):
    """And what a run writes: completions.jsonl, and samples in the terminal at each evaluation."""
    rows = train(tmp_path / "run", eval_dataset=(write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:4]),))
    evals, rows = [row for row in rows if "eval/reward" in row], [row for row in rows if "loss" in row]
    assert [row["step"] for row in evals] == [0, 3]
    assert capsys.readouterr().out.count("    completion ") == 4
    said, tokenizer = completions_of(tmp_path / "run"), load_tokenizer(str(ASSETS / "model"))
    for row in rows:
        mine = [one for one in said if one["step"] == row["step"]]
        assert len(mine) == 16
        assert {one["version"] for one in mine} == {row["step"] - 1}
        assert mine[0]["prompt"].startswith("<|im_start|>user\nWhat is")
        assert row[GAP] < 1e-5
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
        assert row["clip_ratio/low_mean"] == row["clip_ratio/high_mean"] == 0
        assert row["reward"] == pytest.approx(np.mean([one["rewards"]["accuracy"] for one in mine]))
    first = said[:16]
    tokens = [len(tokenizer(row["completion"])["input_ids"]) + 1 for row in first]
    expected = -sum(n * row["advantage"] for n, row in zip(tokens, first, strict=True)) / sum(tokens)
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("flags", [
    {"loss_type": "grpo", "steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "top_entropy_quantile": 0.5,
     "entropy_coef": 0.01, "max_steps": 4},
    {"loss_type": "bnpo", "zero_variance": "skip", "mask_truncated_completions": True, "max_completion_length": 3},
], ids=["several steps a generation", "skipped groups"])  # fmt: skip
def test_micro_batches_and_shared_prompts_do_not_change_the_curve(tmp_path, monkeypatch, flags):
    for name, tokens in (("one", 8192), ("many", 45)):
        train(tmp_path / name, micro_batch_tokens=tokens, **flags)
    plan = grpo.plan_samples
    monkeypatch.setattr(grpo, "plan_samples", lambda *given, packing, **more: plan(*given, packing="packed", **more))
    train(tmp_path / "apart", **flags)  # a copy of the prompt for each sample
    for name in ("many", "apart"):
        assert_same_curve(metrics_of(tmp_path / name), metrics_of(tmp_path / "one"), rtol=1e-3)


def test_two_ranks_give_the_curve_of_one(tmp_path):
    heldout = write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:5])
    flags = {"batch_size": 24, "num_generations": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 5,
             "beta": 0.05, "eval_every": 0, "eval_dataset": (heldout,)}  # fmt: skip
    result = run("grpo.py", *flags_of(output_dir=tmp_path / "2", **flags), ranks=2)
    assert result.returncode == 0, result.stderr[-2000:]
    expected = train(tmp_path / "1", **flags)
    assert_same_curve(metrics_of(tmp_path / "2"), expected, rtol=1e-2)
    texts = [[row["completion"] for row in completions_of(tmp_path / ranks)] for ranks in "12"]
    assert texts[0] == texts[1]


def naive_steps(batches, parts, args):
    """Train the embedded model on captured samples, one at a time, by transformers' own logits -> loss and gradient
    norm of each step. batches: the groups of each generation; parts: the prompts of each step."""
    model, ref = (AutoModelForCausalLM.from_pretrained(ASSETS / "model") for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, (0.9, 0.99), weight_decay=0)

    def tokens(model, sample):
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        logps_TV = (model(ids).logits[0] / args.temperature).log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
        entropies = -(logps_TV.exp() * logps_TV).sum(-1)
        return logps_TV.gather(1, ids[0, -len(sample.ids) :, None])[:, 0], entropies

    steps, per_batch = [], args.steps_per_generation * args.num_iterations
    for step, prompts in enumerate(parts):
        if step % per_batch == 0:
            judged = []
            for group in batches[step // per_batch]:
                rewards = [s.rewards[0] for s in group]
                for s in group if args.zero_variance == "keep" or len(set(rewards)) > 1 else ():
                    s.advantage = (s.rewards[0] - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-4)
                    judged.append(s)
            batch = [s for s in judged if s.is_finished or not args.mask_truncated_completions]
            with torch.no_grad():
                old, reference = ({id(s): tokens(m, s)[0] for s in batch} for m in (model, ref))
        mine, count = [s for s in batch if s.prompt in prompts], sum(s.prompt in prompts for s in judged)
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
            loss = loss + losses.sum() / {
                "dapo": sum(len(other.ids) for other in batch) / args.steps_per_generation,
                "bnpo": sum(len(other.ids) for other in mine),
                "grpo": count * len(s.ids),
                "dr_grpo": count * args.max_completion_length,
            }[args.loss_type]  # fmt: skip
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
    """Advantages, old and reference log-probs, denominators, masks, floors, minibatches and steps without samples."""
    batches, parts, roll_out, take = [], [], grpo.roll_out, grpo.Rollouts.__next__

    def rolled(*given, **options):
        groups = roll_out(*given, **options)
        batches.append([[replace(s) for s in group] for group in groups])
        return groups

    def taken(rollouts):
        batch = take(rollouts)
        parts.append({s.prompt for s in batch.samples})
        return batch

    monkeypatch.setattr(grpo, "roll_out", rolled)
    monkeypatch.setattr(grpo.Rollouts, "__next__", taken)
    flags = {"learning_rate": 2e-4, "warmup_steps": 0, "max_steps": 6, "batch_size": 16, "num_generations": 4, **flags}
    rows, args = train(tmp_path / "run", **flags), replace(grpo.Args(), **flags)
    for step in range(0, 6, args.steps_per_generation):  # each pass over a batch sees each of its prompts once
        own = parts[step : step + args.steps_per_generation]
        assert sum(map(len, own)) == len(set().union(*own))
    expected = naive_steps(batches, parts, args)
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in expected], rel=2e-3, abs=2e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([norm for _, norm in expected], rel=2e-3)


def test_zero_variance_groups_are_replaced_by_new_prompts(tmp_path):
    """With the accuracy reward some groups of four are all right or all wrong."""
    kept = train(tmp_path / "kept")
    replaced = train(tmp_path / "replaced", zero_variance="replace")
    assert all(row["drawn_prompts"] == 4 for row in kept)
    assert max(row["drawn_prompts"] for row in replaced) > 4
    drawn = np.cumsum([row["drawn_prompts"] for row in replaced])
    assert [row["epoch"] for row in replaced] == pytest.approx(drawn / 7600)


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4, "learning_rate": 1e-3}], ids=["full", "lora"])
def test_the_engine_gets_every_steps_weights_and_the_reference_stays(tmp_path, lora):
    """Else sampler and trainer would disagree from the second step on."""
    rows = train(tmp_path / "run", beta=0.1, **lora)
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
    return [float("nan") if len(c[0]["content"]) > 2 else 0.0 for c in completions]

def raises(completions, **_):
    raise RuntimeError("on purpose")
"""


def test_evaluation_by_samples_and_failing_rewards(tmp_path):
    """pass@k is of the first reward, whatever the others can reach; what fails counts once; JSON has no NaN."""
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    flags = {"eval_dataset": (write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:6]),), "eval_generations": 3, "max_steps": 1}
    named = (f"{path}:correct", "overlong:4", f"{path}:never")
    rows = train(tmp_path / "run", rewards=named, reward_weights=(1.0, 2.0, 3.0), **flags)
    assert rows[0]["eval/pass@3"] > 0.2
    assert rows[0]["eval/failed_rewards"] == 0
    assert rows[1]["rewards/never/mean"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"step 1: the rewards of 16 of 16 samples failed.*RuntimeError.*on purpose"):
        train(tmp_path / "raises", rewards=(f"{path}:raises", "accuracy", f"{path}:broken"), **flags)
    rows = read_metrics(tmp_path / "raises")
    assert rows[0]["eval/failed_rewards"] == 18  # though two rewards failed on some


# ---- Resume, a lost engine, a loss that is not finite ------------------------------------------------------------------


def cut_back(run, step):
    """As if the run had been killed after that step."""
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name[-8:]) > step:
            shutil.rmtree(checkpoint)


def assert_same_run(found, expected):
    assert metrics_of(found) == metrics_of(expected)
    assert (found / "completions.jsonl").read_text() == (expected / "completions.jsonl").read_text()
    for name, weight in weights(expected).items():
        assert torch.equal(weights(found)[name], weight)


def test_resume_is_exact_within_a_generation_batch_too(tmp_path):
    flags = {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "eval_every": 2, "max_steps": 6,
             "eval_dataset": (write_rows(tmp_path / "heldout.jsonl", EVAL_ROWS[:8]),)}  # fmt: skip
    train(tmp_path / "straight", **flags)
    train(tmp_path / "resumed", save_every=3, **flags)
    cut_back(tmp_path / "resumed", 3)
    train(tmp_path / "resumed", save_every=3, resume=True, **flags)
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")


def test_a_lost_engine_stops_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    """In the second round of a draw, of which nothing must be counted; --resume goes on as if nothing had been."""
    flags, generate, calls = {"zero_variance": "replace", "max_steps": 3}, HFEngine.generate, []
    train(tmp_path / "straight", **flags)

    def lose(*given):
        calls.append(given)
        if len(calls) == 5:
            raise EngineError("the server is gone")
        return generate(*given)

    monkeypatch.setattr(HFEngine, "generate", lose)
    with pytest.raises(UserError, match=r"the server is gone\n.*--resume"):
        train(tmp_path / "lost", **flags)
    torch.distributed.destroy_process_group()
    monkeypatch.setattr(HFEngine, "generate", generate)
    assert list((tmp_path / "lost").glob("checkpoint-*/progress.json"))
    assert not (tmp_path / "lost" / "final").exists()
    train(tmp_path / "lost", resume=True, **flags)
    assert_same_run(tmp_path / "lost", tmp_path / "straight")


@pytest.mark.slow
def test_kill_then_resume_is_exact(tmp_path):
    flags = {"max_steps": 20, "save_every": 3, "batch_size": 16, "num_generations": 4, "steps_per_generation": 2}
    train(tmp_path / "straight", **flags)
    for attempt, step in enumerate([4, 13]):
        process = start("grpo.py", *flags_of(output_dir=tmp_path / "killed", resume=attempt > 0, **flags))
        wait_for_step(process, tmp_path / "killed", step)
        time.sleep(0.05 * attempt)
        kill(process, tmp_path / "killed")
    train(tmp_path / "killed", resume=True, **flags)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path, monkeypatch):
    honest, calls = grpo.grpo_loss, []

    def broken(*given):
        loss, *others = honest(*given)
        calls.append(loss)
        return (loss * math.nan if len(calls) == 2 else loss), *others

    monkeypatch.setattr(grpo, "grpo_loss", broken)
    with pytest.raises(UserError, match="step 2: the loss is nan"):
        train(tmp_path / "run", save_every=2)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# ---- Bad input -------------------------------------------------------------------------------------------------------

BAD_FLAGS = {
    "one sample": ({"num_generations": 1}, "--num-generations is 1"),
    "indivisible": ({"batch_size": 18}, "--batch-size: take a multiple of --num-generations"),
    "vespo by sequence": ({"loss_type": "vespo"}, "vespo needs --importance-sampling-mode token_truncate"),
    "estimator without beta": ({"kl_estimator": "k2"}, "--kl-estimator needs --beta"),
    "delta with sapo": ({"loss_type": "sapo", "delta": 2.0}, "--delta needs --loss-type"),
    "delta below": ({"delta": 1.1}, r"--delta must be above 1 \+ epsilon, 1.2"),
    "weights": ({"reward_weights": (1.0, 2.0)}, "--reward-weights: give one for each reward"),
    "quantile": ({"top_entropy_quantile": 1.5}, "--top-entropy-quantile is 1.5"),
    "cispo's bound": ({"loss_type": "cispo", "epsilon_high": 0.28}, "--epsilon-high is cispo's largest weight"),
    "gdpo": ({"baseline": "gdpo", "scale_rewards": "none"}, "--scale-rewards has no effect on --baseline gdpo"),
    "temperature": ({"temperature": 0.0}, "--temperature is 0.0"),
    "no environment": ({"rewards": ("environment",)}, "--rewards environment needs an --environment"),
    "all at once": ({"batch_size": 18, "delta": 1.1}, r"(?s)--batch-size.*--delta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path, name):
    flags, message = BAD_FLAGS[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.learn
def test_default_run_learns(tmp_path):
    result = run("grpo.py", "--output-dir", tmp_path / "run", timeout=1800)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = {row["step"]: row for row in metrics_of(tmp_path / "run") if "eval/reward" in row}
    assert rows[0]["eval/reward"] < 0.6
    assert rows[max(rows)]["eval/reward"] >= 0.85
