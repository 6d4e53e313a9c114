"""Asynchronous GRPO: a rollout process samples and judges while the trainer trains.

The loss and all that leads to it are grpo.py's. What is added, and where implementations differ:
1. No token that is trained is older than --max-staleness optimizer steps (K), by pacing: see Pacer. Nothing
   that was sampled is thrown away for its age (arXiv:2505.24298 and TRL drop it, or bound only the average).
2. New weights reach vLLM servers while requests run, as in PipelineRL (arXiv:2509.19128): each token has the
   log-prob and the version of the weights that sampled it. The embedded engine takes them between calls.
3. Ratios are taken to the policy of the step's beginning, and the sampler's age is corrected by importance
   sampling: AReaL's decoupled PPO (arXiv:2505.24298). As a batch is trained in one step, that policy's
   log-probs are the forward's own, so ratios are 1, --epsilon clips nothing, and the correction alone bounds
   what old tokens count. --proximal sampler takes ratios to the sampler, which --epsilon then clips.
4. --max-staleness 0 samples and trains in turn, and does what grpo.py does with the same flags.

Shapes, alignment and policies: see grpo.py. K: --max-staleness; version: the optimizer steps that made some
weights; a slot is the place of a group among those that are sampled, waiting or trained.

Metrics beside grpo.py's: sample/staleness_mean, /staleness_max and staleness/<n> (share of tokens), in steps;
sample/rollout_queue_size, sample/time_in_queue_s of finished groups; rollout/inflight (prompts),
rollout/generated_tok_s, rollout/dropped/<reason>, rollout/retried/<reason>; perf/rollout_wait_s,
perf/weight_sync_s, perf/weight_sync_pause_s; utilisation/trainer, utilisation/generation (shares of time).

CPU:    python async_grpo.py                         (the embedded model and data, in four minutes)
1 GPU:  python async_grpo.py --engine vllm --model Qwen/Qwen3-0.6B --dataset prompts.jsonl
            --learning-rate 1e-6 --max-completion-length 1024
apart:  torchrun --nproc-per-node 8 async_grpo.py --engine vllm --vllm-url http://HOST:8000 --model ...
"""

import asyncio
import atexit
import copy
import ctypes
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from common import (
    PROMPT_FEATURES,
    EngineError,
    EnvironmentWorker,
    HFEngine,
    RefusedError,
    RewardWorker,
    ServerNeeds,
    UserError,
    VLLMEngine,
    VLLMServer,
    check_reward_columns,
    check_tools,
    collate,
    encode_prompt,
    load_tokenizer,
    parse_source,
    play_episodes,
    prepare_data,
    prepare_workers,
    receive_all,
    send_all,
    split_batch,
)

ASSETS = Path(__file__).resolve().parent / "tests" / "assets"
TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen weights are not in checkpoints
# A resumed run may change these: they do not change what is learnt, but to rounding.
RUN_FLAGS = ["output_dir", "resume", "save_every", "keep_checkpoints", "eval_every", "log_every", "wandb"]
RUN_FLAGS += ["run_name", "micro_batch_tokens", "gradient_checkpointing", "compile"]
RUN_FLAGS += ["vllm_url", "vllm_timeout", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"]
RUN_FLAGS += ["reward_timeout", "environment_timeout", "max_failed_rewards", "rollout_timeout"]
CLIPPED = {"grpo", "bnpo", "dr_grpo", "dapo", "luspo"}


LossType = Literal["dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"]


@dataclass(frozen=True)
class Args:
    # --- model
    model: str = str(ASSETS / "model")
    """A directory with a causal language model, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; auto: bfloat16 on CUDA, float32 on CPU. Trained weights are float32."""
    attention: str = "varlen"
    """Attention implementation; varlen keeps packed documents apart. One that cannot gets a row for each."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all weights."""
    lora_alpha: float = 32
    """Adapters are scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapters."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names (or ends of names) of the modules that get adapters; lm_head cannot."""
    lora_rslora: bool = False
    """Scale adapters by alpha / sqrt(rank) (rsLoRA)."""
    lora_merge: bool = False
    """Export final/ as one model with the adapters merged, rather than as an adapter."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""

    # --- data
    dataset: tuple[str, ...] = (str(ASSETS / "prompts.jsonl"),)
    """Files, directories or hub ids; PATH:2 takes the rows twice an epoch, PATH:0.5 half of them."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    dataset_split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    eval_dataset: tuple[str, ...] = (str(ASSETS / "prompts_eval.jsonl"),)
    """Held-out data, as --dataset; none with --eval-dataset alone, or if only --dataset is given."""
    eval_split: str = "test"
    """Split of the held-out data, as --dataset-split."""
    max_length: int | None = None
    """Most tokens of an example; the model's context if not given."""
    chat_template: str | None = None
    """A file with a Jinja chat template to use in place of the tokenizer's own."""
    # --- optimization
    batch_size: int = 256
    """Examples an optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: int = 8192
    """Most packed tokens in one forward on one rank. Out of memory? Lower it: the maths does not change."""
    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; takes precedence over --epochs."""
    learning_rate: float = 1e-4
    """Peak learning rate. The default suits the embedded 1M model: see the README for larger ones."""
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Decay after warm-up, to 0 after the last step; wsd is constant, then linear over the last fifth."""
    warmup_steps: float = 0.05
    """Steps over which the learning rate rises linearly from 0; below 1, a share of all steps."""
    weight_decay: float = 0.0
    """AdamW's decay, on matrices only."""
    adam_beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: float = 0.99
    """AdamW's decay rate of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 never clips."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward: about a third slower, much less memory."""
    compile: bool = False
    """torch.compile each decoder layer."""
    seed: int = 0
    """Seeds the data order, adapters and noise."""

    # --- run
    output_dir: str | None = None
    """Where everything goes; runs/<script>-<time> if not given."""
    resume: bool = False
    """Continue the run in --output-dir from its newest complete checkpoint."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only when stopped by a signal."""
    keep_checkpoints: int = 2
    """The newest so many checkpoints are kept."""
    eval_every: int = 50
    """Steps between evaluations; there is always one before the first step and one after the last. 0: only
    those."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl; a row holds that step's values."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases logging; offline needs no account: see the curves with `wandb leet
    OUTPUT_DIR/wandb/latest-run`."""
    run_name: str | None = None
    """Name of the run in wandb; the output directory's if not given."""

    # --- generation
    num_generations: int = 8
    """Samples of each prompt; --batch-size counts samples. An epoch's last step is filled from the next."""
    max_completion_length: int = 16
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs that are trained."""
    eval_generations: int = 1
    """Samples of each held-out prompt; 1 is greedy. pass@k: for one of them the first reward is 1 or more."""
    engine: Literal["hf", "vllm"] = "hf"
    """What generates: a copy of the policy, or vLLM servers."""
    vllm_url: tuple[str, ...] = ()
    """Servers that run already, such as http://10.0.0.2:8000; without, each rank starts one."""
    vllm_timeout: float = 600.0
    """Seconds that a server may take to start, to generate a batch or to take new weights."""
    vllm_gpu_memory_utilization: float = 0.4
    """Share of the GPU's memory for the server that is started on it."""
    vllm_tensor_parallel_size: int = 1
    """Ranks, and their GPUs, that share a started server."""

    # --- rewards
    rewards: tuple[str, ...] = ()
    """Ours (accuracy, choice, cosine, format, json-schema:FILE, overlong:TOKENS, regex:PATTERN, repetition,
    reward-model:PATH), path/to/file.py:function, or environment, for its get_reward; they are summed. None
    given: environment where it has a get_reward, else accuracy."""
    reward_weights: tuple[float, ...] = ()
    """A weight for each of --rewards; 1 if not given."""
    reward_timeout: float = 30.0
    """Seconds that a reward may take for a batch; where it takes longer, for each of its completions."""
    max_failed_rewards: float = 0.5
    """The run stops at a step with a larger share of samples whose reward failed."""

    # --- environment
    environment: str | None = None
    """path/to/file.py:Class with tools to call, over several turns; common.py says what it must have."""
    max_turns: int = 8
    """Most turns of the model in an episode; --max-completion-length counts the tokens of all, tools' too."""
    environment_timeout: float = 30.0
    """Seconds that a call of the environment may take; the sample fails, as if its reward had."""

    # --- asynchrony
    max_staleness: int = 1
    """Most optimizer steps between the weights that sampled a token and those that it trains; 0: in turn."""
    in_order: bool = False
    """Train groups in the order of their prompts, rather than in that in which they are finished."""
    keep_kv: bool = False
    """Requests that run go on with the keys and values of older weights, rather than compute them again."""
    proximal: Literal["trainer", "sampler"] = "trainer"
    """What ratios are taken to: the policy at the step's beginning, or what sampled the tokens."""
    rollout_timeout: float = 1200.0
    """Seconds in which some group, or an evaluation, must be done; else the run stops with a checkpoint."""

    # --- algorithm
    loss_type: LossType = "dapo"
    """How ratios become losses, and what they are divided by."""
    epsilon: float = 0.2
    """Ratios are clipped at 1 - epsilon."""
    epsilon_high: float | None = None
    """And at 1 + epsilon_high (epsilon if not given); the bound of cispo's weights, 5 if not given."""
    delta: float | None = None
    """Two-sided clipping: no ratio counts for more (arXiv:2505.07291); above 1 + epsilon."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios of tokens, or of sequences by length (GSPO, arXiv:2507.18071)."""
    baseline: Literal["group", "leave_one_out", "batch"] = "group"
    """What rewards are compared with: their group's mean, that of the others in it (RLOO), or the batch's."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation by which advantages are divided. REINFORCE++ is batch here and in --baseline."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Whether rewards are summed before advantages are made of them, or each has its own (GDPO,
    arXiv:2601.05242)."""
    zero_variance: Literal["keep", "skip", "replace"] = "keep"
    """What becomes of groups whose rewards are all alike: keep them in the normalisers, skip them, or replace
    them by new prompts (dynamic sampling, arXiv:2503.14476)."""
    max_replacements: int = 2
    """Times that new prompts are drawn for those still missing in a batch."""
    mask_truncated_completions: bool = False
    """Do not train completions that were cut at their length."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference, the model as given; 0 loads none."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the KL divergence, http://joschu.net/blog/kl-approx.html; k1 only with one of the next two."""
    use_bias_correction_kl: bool = True
    """Multiply it by policy over sampler: its gradient is then the divergence's own, off policy, too."""
    kl_in_reward: bool = False
    """Subtract beta times a sample's k1 from its reward, rather than add the estimator to the loss."""
    sync_ref_model: bool = False
    """TR-DPO: move the reference towards the policy every --ref-model-sync-steps."""
    ref_model_mixup_alpha: float = 0.6
    """The policy's share when the reference moves; 1 copies it."""
    ref_model_sync_steps: int = 512
    """Steps between two moves of the reference."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy of trained tokens, which is raised."""
    top_entropy_quantile: float = 1.0
    """Share of a step's tokens, those of highest entropy, that train the policy (arXiv:2506.01939)."""
    off_policy_mask_threshold: float | None = None
    """Leave out worse samples that the policy is this much less likely to write than the sampler, by token
    (DeepSeek-V3.2, arXiv:2512.02556)."""
    importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"
    ] = "sequence_mask"
    """How the loss is weighed by the policy's probability of tokens or sequences over the sampler's."""
    importance_sampling_clip_max: float = 3.0
    """Where such weights are truncated, or above which they count as 0."""
    importance_sampling_clip_min: float | None = None
    """The same from below."""
    sapo_temperature_pos: float = 1.0
    """Of sapo's gate, at positive advantages."""
    sapo_temperature_neg: float = 1.05
    """At others."""
    vespo_k_pos: float = 2.0
    """Exponent of vespo's weights at positive advantages."""
    vespo_lambda_pos: float = 3.0
    """Their decay."""
    vespo_k_neg: float = 3.0
    """At negative ones."""
    vespo_lambda_neg: float = 2.0
    """At negative ones."""
    router_aux_loss_coef: float | None = None
    """Weight of a mixture-of-experts model's load-balancing loss; its config's if not given, 0 is none."""


# ---- Maths -------------------------------------------------------------------------------------------------


def lr_factor(step, total_steps, warmup_steps, schedule):
    """Share of the peak learning rate in step `step`, counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = (total_steps - step) / (total_steps - warmup_steps)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return left
        case "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * left)
        case "wsd":  # warm-up, stable, decay: arXiv:2404.06395
            return min(1.0, 5 * left)


def advantages(rewards_PGR, args):
    """Rewards of P prompts' G samples by R functions, NaN where there is none -> advantage_PG and reward_PG,
    the weighted sums; NaN where a sample takes part in nothing: without reward, or alone in its group."""
    weights_R = torch.tensor(args.reward_weights or (1.0,) * len(args.rewards), dtype=rewards_PGR.dtype)
    has_reward_PG = (~rewards_PGR.isnan()).any(2)
    has_reward_PG &= has_reward_PG.sum(1, keepdim=True) > 1
    rewards_PGR = rewards_PGR.masked_fill(~has_reward_PG[:, :, None], math.nan)
    reward_PG = (rewards_PGR * weights_R).nansum(2).masked_fill(~has_reward_PG, math.nan)
    if (
        args.multi_objective_aggregation == "normalize_then_sum"
    ):  # GDPO: each reward by its group, then the batch
        centered_PGR = rewards_PGR - rewards_PGR.nanmean(1, keepdim=True)
        scaled_PGR = centered_PGR / (nanstd(rewards_PGR, 1) + 1e-4)
        total_PG = (scaled_PGR * weights_R).nansum(2).masked_fill(~has_reward_PG, math.nan)
        return (total_PG - total_PG.nanmean()) / (nanstd(total_PG) + 1e-4), reward_PG
    count_P1 = has_reward_PG.sum(1, keepdim=True)
    match args.baseline:
        case "group":  # GRPO, arXiv:2402.03300
            baseline_PG = reward_PG.nanmean(1, keepdim=True)
        case "leave_one_out":  # RLOO, arXiv:2402.14740
            baseline_PG = (reward_PG.nansum(1, keepdim=True) - reward_PG) / (count_P1 - 1)
        case "batch":  # REINFORCE++, arXiv:2501.03262
            baseline_PG = reward_PG.nanmean()
    match args.scale_rewards:
        case "group":
            scale_PG = nanstd(reward_PG, 1) + 1e-4
        case "batch":
            scale_PG = nanstd(reward_PG) + 1e-4
        case "none":  # Dr. GRPO, arXiv:2503.20783
            scale_PG = 1.0
    return (reward_PG - baseline_PG) / scale_PG, reward_PG


def add_kl_reward(rewards_PGR, groups, args):
    """--kl-in-reward: the divergence from the reference, k1 of each sample, as one more reward, of weight
    -beta -> rewards_PGR, args; NaN where there is no other."""
    kl_PG = torch.tensor(
        [[sum(s.old_logps or s.logps) - sum(s.ref_logps) for s in group] for group in groups]
    )
    kl_PG = kl_PG.to(rewards_PGR).masked_fill(rewards_PGR.isnan().all(2), math.nan)
    weights_R = (*(args.reward_weights or (1.0,) * len(args.rewards)), -args.beta)
    args = replace(args, rewards=(*args.rewards, "kl"), reward_weights=weights_R)
    return torch.cat([rewards_PGR, kl_PG[:, :, None]], 2), args


def nanstd(values, dim=None):
    """Standard deviation (of a sample) of what is not NaN, over one kept dimension or all; NaN of nothing."""
    dims = {} if dim is None else {"dim": dim, "keepdim": True}
    count = (~values.isnan()).sum(**dims)
    variance = (values - values.nanmean(**dims)).square().nansum(**dims) / (count - 1).clamp(min=1)
    return variance.where(count > 0, math.nan).sqrt()


class Sampled(NamedTuple):
    """What is known of each trained token beside the policy's own log-prob, (N,) each."""

    old_logps_N: torch.Tensor | None
    """The policy's when its batch was drawn; None where that is the policy itself."""
    sampler_logps_N: torch.Tensor
    ref_logps_N: torch.Tensor | None
    advantage_N: torch.Tensor
    """Its sample's."""
    weight_N: torch.Tensor
    """Its share of the loss: see token_weights."""
    documents_N: torch.Tensor
    """Its sample, counted from 0 in the micro-batch."""


def grpo_loss(stats, sampled, args, entropy_floor=-math.inf):
    """Loss of a micro-batch of whole samples, a share of the step's; which tokens train it; and what to log,
    name -> sum over tokens (over samples, where `sample_metrics` names it), and name -> maximum over tokens
    or samples (of the negative, for a minimum).
    entropy_floor: tokens below it do not train the policy."""
    advantage_N, documents_N = sampled.advantage_N, sampled.documents_N
    num_documents = int(documents_N.max()) + 1 if len(documents_N) else 0
    length_B = torch.bincount(documents_N, minlength=num_documents).clamp(min=1)

    def sum_samples(values_N):
        return values_N.new_zeros(num_documents).index_add_(0, documents_N, values_N)

    logps_N, sampler_N = stats.logps_N, sampled.sampler_logps_N
    old_N = logps_N.detach() if sampled.old_logps_N is None else sampled.old_logps_N
    log_ratio_N = logps_N - old_N
    if args.importance_sampling_level == "sequence":
        level_N = (sum_samples(log_ratio_N) / length_B)[documents_N]
    else:
        level_N = log_ratio_N
    ratio_N = level_N.exp()  # policy over old
    low, high = 1 - args.epsilon, clip_high(args)

    mismatch_N = old_N - sampler_N
    if args.importance_sampling_mode.startswith("sequence"):
        sampler_ratio_N = sum_samples(mismatch_N).exp()[documents_N]
    else:
        sampler_ratio_N = mismatch_N.exp()  # old over sampler
    least, most = args.importance_sampling_clip_min or 0.0, args.importance_sampling_clip_max
    if args.importance_sampling_mode.endswith("truncate"):
        correction_N = sampler_ratio_N.clamp(least, most)
    elif args.importance_sampling_mode.endswith("mask"):
        is_kept_N = (sampler_ratio_N >= least) & (sampler_ratio_N <= most)
        correction_N = sampler_ratio_N.where(is_kept_N, 0)  # no product: the ratio of a long one may be inf
    else:
        correction_N = torch.ones_like(sampler_ratio_N)

    match args.loss_type:
        case "grpo" | "bnpo" | "dr_grpo" | "dapo" | "luspo":  # PPO's clipping; they differ in token_weights
            capped_N = ratio_N if args.delta is None else ratio_N.clamp(max=args.delta)
            losses_N = -torch.minimum(capped_N * advantage_N, ratio_N.clamp(low, high) * advantage_N)
        case "cispo":  # MiniMax-M1, arXiv:2506.13585 eq. 4
            losses_N = -ratio_N.clamp(max=high).detach() * advantage_N * logps_N
        case "sapo":  # SAPO, arXiv:2511.20347
            tau_N = torch.where(advantage_N > 0, args.sapo_temperature_pos, args.sapo_temperature_neg)
            losses_N = -torch.sigmoid(tau_N * (ratio_N - 1)) * 4 / tau_N * advantage_N
        case "vespo":  # VESPO: gamma weights of whole sequences, policy over sampler
            with torch.no_grad():
                floor = math.log(1e-8)
                log_w_B = sum_samples(log_ratio_N.clamp(-20, 20))
                if args.importance_sampling_mode != "none":
                    log_w_B = log_w_B + sum_samples(correction_N.log().clamp(floor, 20))
                log_w_N = log_w_B.clamp(floor, 20)[documents_N]
                k_N = torch.where(advantage_N >= 0, args.vespo_k_pos, args.vespo_k_neg)
                lambda_N = torch.where(advantage_N >= 0, args.vespo_lambda_pos, args.vespo_lambda_neg)
                phi_N = (lambda_N + k_N * log_w_N - lambda_N * log_w_N.exp()).exp()
            losses_N = -phi_N * advantage_N * logps_N
    if args.off_policy_mask_threshold is not None:
        drift_N = (sum_samples(sampler_N - logps_N.detach()) / length_B)[documents_N]
        losses_N = losses_N * ((advantage_N >= 0) | (drift_N <= args.off_policy_mask_threshold))
    is_trained_N = stats.entropy_N.detach() >= entropy_floor
    losses_N = losses_N * is_trained_N
    if args.loss_type != "vespo":
        losses_N = losses_N * correction_N
    sums = {}
    if sampled.ref_logps_N is not None:
        ref_ratio_N = sampled.ref_logps_N - logps_N
        match args.kl_estimator:
            case "k1":
                kl_N = -ref_ratio_N
            case "k2":
                kl_N = ref_ratio_N.square() / 2
            case "k3":
                kl_N = torch.expm1(ref_ratio_N) - ref_ratio_N
        if args.use_bias_correction_kl:  # the gradient of the ratio is part of it, but in k2
            kl_N = kl_N * (ratio_N.detach() if args.kl_estimator == "k2" else ratio_N)
            if args.importance_sampling_mode != "none":
                kl_N = kl_N * mismatch_N.exp().clamp(max=most)
        losses_N = losses_N if args.kl_in_reward else losses_N + args.beta * kl_N
        sums["kl"] = kl_N
    is_low_N, is_high_N = (ratio_N < low) & (advantage_N < 0), (ratio_N > high) & (advantage_N > 0)
    most_of = {
        "sampling/sampling_logp_difference/max": mismatch_N.abs(),
        "sampling/importance_sampling_ratio/max": correction_N,
        "sampling/importance_sampling_ratio/min": -correction_N,
    }
    sums |= {"entropy": stats.entropy_N, "sampling/sampling_logp_difference/mean": mismatch_N.abs()}
    sums |= {"sampling/importance_sampling_ratio/mean": correction_N}
    if args.loss_type in CLIPPED:
        sums |= {"clip_ratio/low_mean": is_low_N, "clip_ratio/high_mean": is_high_N}
        sums |= {"clip_ratio/region_mean": is_low_N | is_high_N}
        most_of["clip_ratio/low_min"] = -sum_samples(is_low_N.to(logps_N)) / length_B
        most_of["clip_ratio/high_max"] = sum_samples(is_high_N.to(logps_N)) / length_B
    elif args.loss_type == "cispo":
        sums["cispo_clip_ratio"] = is_high_N
    elif args.loss_type == "vespo":
        sums["vespo/phi_seq_mean"] = phi_N
    share_N = 1 / length_B[documents_N]  # so that a sample has one value
    shares = {name: share_N if name in sample_metrics(args) else 1 for name in sums}
    sums = {name: (values_N.detach().float() * shares[name]).sum() for name, values_N in sums.items()}
    none = logps_N.new_full((1,), -math.inf)
    extremes = {name: torch.cat([values.detach(), none]).max() for name, values in most_of.items()}
    return (losses_N * sampled.weight_N).sum(), is_trained_N, sums, extremes


def sample_metrics(args):
    """Metrics that are means over samples, as TRL's: a whole sample has one value of them."""
    names = {"vespo/phi_seq_mean"}
    if args.importance_sampling_level == "sequence":
        names |= {f"clip_ratio/{part}_mean" for part in ("low", "high", "region")} | {"cispo_clip_ratio"}
    if args.importance_sampling_mode.startswith("sequence"):
        names |= {"sampling/importance_sampling_ratio/mean"}
    return names


def clip_high(args):
    """1 + epsilon_high; cispo's bound is no distance from 1, and larger by default: arXiv:2506.13585."""
    if args.loss_type == "cispo":
        return 5.0 if args.epsilon_high is None else args.epsilon_high
    return 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)


def token_weights(lengths_B, batch_tokens, args):
    """What each token of a step's samples counts for, (B,). batch_tokens: trained tokens of the generation
    batch, over its steps."""
    match args.loss_type:
        case "dapo" | "cispo" | "vespo":  # as DAPO eq. 8, over all that was generated together
            return np.full(len(lengths_B), 1 / batch_tokens)
        case "bnpo":
            return np.full(len(lengths_B), 1 / lengths_B.sum())
        case "grpo" | "sapo":
            return 1 / (lengths_B * len(lengths_B))
        case "luspo":  # LUSPO, arXiv:2602.05261
            return np.full(len(lengths_B), 1 / len(lengths_B))
        case "dr_grpo":
            return np.full(len(lengths_B), 1 / (len(lengths_B) * args.max_completion_length))


class TokenStats(NamedTuple):
    """What a forward says of each trained position, (N,) each; None where it was not asked for."""

    logps_N: torch.Tensor
    entropy_N: torch.Tensor
    is_top1_N: torch.Tensor
    mean_logps_N: torch.Tensor | None
    log_sum_sq_N: torch.Tensor | None
    aux_loss: torch.Tensor | None


class Head(NamedTuple):
    """What a model does to its logits after the matrix product, and the sampling temperature."""

    scale: float
    softcap: float
    temperature: float


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probs of labels, entropy, arg-max hits and, if asked, mean log-probs and the log of the sum of
    squared probabilities, without holding logits (N, V).

    logits = softcap tanh(scale (hidden_ND @ weight_VD.T + bias_V) / softcap) / temperature, a chunk of
    positions at a time. The backward computes them again, but for the last chunk of the newest forward, which
    is kept: its backward comes next. The log-sum-exp is fp32; weight gradients accumulate in fp32. Log-probs,
    their means and entropy can be differentiated; p is a position's softmax, H its entropy:
        d logp / d logits = onehot - p,  d mean_logp / d logits = 1/V - p,  d H / d logits = -p (log p + H).
    """

    CHUNK_ELEMENTS = 2**25, 2**28  # logits held at a time: on CPU 128 MiB, on CUDA 1 GiB
    newest = None, None  # a mark of the newest forward, and its last chunk's logits

    @staticmethod
    def slices(hidden_ND, weight_VD):
        """Chunks of positions, about as long as each other."""
        limit, n = ChunkedLogProbs.CHUNK_ELEMENTS[hidden_ND.is_cuda], len(hidden_ND)
        size = max(1, -(-n // max(1, math.ceil(n * len(weight_VD) / limit))))
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    @staticmethod
    def new_buffer(slices, weight_VD):
        """For the logits of a chunk: they share it, as fresh memory is slow."""
        size = max((rows.stop - rows.start for rows in slices), default=0)
        return torch.empty(size, len(weight_VD), dtype=torch.float32, device=weight_VD.device)

    @staticmethod
    def logits(hidden_CD, weight_VD, bias_V, head, out_CV):
        """Write one chunk's logits to out_CV."""
        if hidden_CD.dtype == torch.float32:
            torch.mm(hidden_CD, weight_VD.T, out=out_CV)
        elif hidden_CD.is_cuda:
            torch.mm(hidden_CD, weight_VD.T, out_dtype=torch.float32, out=out_CV)
        else:
            out_CV.copy_(hidden_CD @ weight_VD.T)
        if bias_V is not None:
            out_CV += bias_V
        if head.scale != 1:
            out_CV *= head.scale
        if head.softcap:
            out_CV.div_(head.softcap).tanh_().mul_(head.softcap)
        if head.temperature != 1:
            out_CV /= head.temperature

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, head, want_mean, want_sum_sq):
        new_N = functools.partial(hidden_ND.new_empty, len(hidden_ND))
        logps_N, lse_N, entropy_N, mean_N, log_sum_sq_N = (new_N(dtype=torch.float32) for _ in range(5))
        is_top1_N = new_N(dtype=torch.bool)
        slices = ChunkedLogProbs.slices(hidden_ND, weight_VD)
        buffers = [ChunkedLogProbs.new_buffer(slices, weight_VD) for _ in range(2)]
        for rows in slices:
            logits_CV, probs_CV = (buffer_CV[: rows.stop - rows.start] for buffer_CV in buffers)
            ChunkedLogProbs.logits(hidden_ND[rows], weight_VD, bias_V, head, logits_CV)
            torch.softmax(logits_CV, -1, out=probs_CV)
            label_C1, best_C1 = labels_N[rows, None], logits_CV.argmax(-1, keepdim=True)
            lse_C1 = logits_CV.gather(1, best_C1) - probs_CV.gather(1, best_C1).log()  # log p = logit - lse
            lse_N[rows] = lse_C1.squeeze(1)
            logps_N[rows] = (logits_CV.gather(1, label_C1) - lse_C1).squeeze(1)
            is_top1_N[rows] = (label_C1 == best_C1).squeeze(1)
            entropy_N[rows] = lse_N[rows] - torch.bmm(probs_CV[:, None], logits_CV[:, :, None]).flatten()
            if want_mean:
                mean_N[rows] = logits_CV.mean(-1) - lse_N[rows]
            if want_sum_sq:
                log_sum_sq_N[rows] = probs_CV.square_().sum(-1).log()
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, lse_N, entropy_N)
        ctx.head, ctx.mark = head, object()
        ChunkedLogProbs.newest = (ctx.mark, buffers[0]) if any(ctx.needs_input_grad) else (None, None)
        ctx.mark_non_differentiable(is_top1_N, log_sum_sq_N)
        ctx.set_materialize_grads(False)
        optional = (mean_N if want_mean else None, log_sum_sq_N if want_sum_sq else None)
        return logps_N, entropy_N, is_top1_N, *optional

    @staticmethod
    def backward(ctx, grad_logps_N, grad_entropy_N, _top1, grad_mean_N, _sum_sq):
        hidden_ND, weight_VD, bias_V, labels_N, lse_N, entropy_N = ctx.saved_tensors
        head, want_weight, want_bias = ctx.head, ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        grad_logps_N = torch.zeros_like(lse_N) if grad_logps_N is None else grad_logps_N
        pull_N = grad_logps_N if grad_mean_N is None else grad_logps_N + grad_mean_N
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if want_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if want_bias else None
        slices = ChunkedLogProbs.slices(hidden_ND, weight_VD)
        (mark, buffer_CV), ChunkedLogProbs.newest = ChunkedLogProbs.newest, (None, None)
        has_last = mark is ctx.mark
        buffer_CV = buffer_CV if has_last else ChunkedLogProbs.new_buffer(slices, weight_VD)
        for rows in reversed(slices):
            grad_CV = buffer_CV[: rows.stop - rows.start]
            if rows != slices[-1] or not has_last:
                ChunkedLogProbs.logits(hidden_ND[rows], weight_VD, bias_V, head, grad_CV)
            slope_CV = 1 - (grad_CV * (head.temperature / head.softcap)) ** 2 if head.softcap else 1
            grad_CV -= lse_N[rows, None]  # now log p
            if grad_entropy_N is None:
                grad_CV.exp_().mul_(-pull_N[rows, None])
            else:
                push_CV = (grad_CV + entropy_N[rows, None]) * grad_entropy_N[rows, None] + pull_N[rows, None]
                grad_CV.exp_().mul_(-push_CV)
            if grad_mean_N is not None:
                grad_CV += grad_mean_N[rows, None] / len(weight_VD)
            grad_CV.scatter_add_(1, labels_N[rows, None], grad_logps_N[rows, None])
            if head != Head(1, 0, 1):
                grad_CV *= slope_CV * (head.scale / head.temperature)
            if want_bias:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[rows])
            if want_weight and grad_CV.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_CV.T, hidden_ND[rows])
            elif want_weight and grad_CV.is_cuda:
                grad_weight_VD += torch.mm(grad_CV.T, hidden_ND[rows], out_dtype=torch.float32)
            elif want_weight:
                grad_weight_VD += grad_CV.T @ hidden_ND[rows]
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, None, None, None, None


def token_stats(self, batch, temperature=1.0, want_mean=False, want_sum_sq=False, want_aux_loss=False):
    """A method for causal language models: MicroBatch -> TokenStats at its trained positions.

    Honours what architectures do to logits: bias, multipliers (Cohere, Granite, Falcon-H1), soft-cap (Gemma).
    `self_check` compares it with the model's own forward at every start.
    """
    config = self.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    head = Head(scale, getattr(config, "final_logit_softcapping", None) or 0.0, temperature)
    extra = {"output_router_logits": True} if want_aux_loss else {}
    outputs = self.base_model(**batch.inputs, **extra)
    lm_head = self.get_output_embeddings()
    hidden_ND = outputs.last_hidden_state[0].index_select(0, batch.positions_N).to(lm_head.weight.dtype)
    weights, wanted = (lm_head.weight, lm_head.bias), (want_mean, want_sum_sq)
    stats = ChunkedLogProbs.apply(hidden_ND, *weights, batch.labels_N, head, *wanted)
    aux_loss = None
    if want_aux_loss:  # the load-balancing loss of this micro-batch, by the architecture's own function
        balance = sys.modules[type(self.base_model).__module__].load_balancing_loss_func
        experts = getattr(config, "num_experts", None) or config.num_local_experts
        aux_loss = balance(outputs.router_logits, experts, config.num_experts_per_tok)
    return TokenStats(*stats, aux_loss)


# ---- Data --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def epoch_order(num_rows, seed, epoch):
    """The order of an epoch's rows: the same on every rank and for any number of ranks."""
    generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
    return torch.randperm(num_rows, generator=generator).numpy()


def rows_digest(data):
    """A hash of all encoded rows, in their order."""
    return hashlib.sha256("".join(data["digest"]).encode()).hexdigest()[:16]


# ---- Shared with the other scripts: checks and model -------------------------------------------------------


def check_shared_args(args):
    """Refuse, before anything is loaded, values out of range and flags that the chosen mode would ignore."""
    bounds = {"above 0": lambda value: 0 < value < 2**63, "0 or more": lambda value: 0 <= value < 2**63,
              "at least 0 and below 1": lambda value: 0 <= value < 1}  # fmt: skip
    fields = {
        "above 0": "batch_size micro_batch_tokens epochs max_steps max_length learning_rate lora_alpha "
                   "keep_checkpoints log_every",
        "0 or more": "lora_rank warmup_steps weight_decay max_grad_norm save_every eval_every seed",
        "at least 0 and below 1": "adam_beta1 adam_beta2 lora_dropout",
    }  # fmt: skip
    for bound, names in fields.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not bounds[bound](value):
                raise UserError(f"{flag(name)} is {value}; it must be {bound}")
    defaults = asdict(type(args)())
    for name, default in defaults.items():
        needs_lora = name.startswith("lora_") or name == "load_in_4bit"
        if needs_lora and args.lora_rank == 0 and getattr(args, name) != default:
            raise UserError(f"{flag(name)} needs adapters: add --lora-rank 16, or leave it out")
    if args.warmup_steps > 1 and args.warmup_steps % 1:
        raise UserError(f"--warmup-steps {args.warmup_steps} must be whole, or below 1: a share of all steps")
    if not args.lora_targets:
        raise UserError("--lora-targets names no module; leave it out for all linear layers")
    if any("lm_head" in target for target in args.lora_targets):
        raise UserError("--lora-targets lm_head is refused: log-probs are computed in chunks from its weight")
    if not args.dataset:
        raise UserError("--dataset is empty; name at least one file, directory or hub id")
    given = asdict(args)
    for name, sources in (("dataset_split", args.dataset), ("eval_split", args.eval_dataset)):
        paths = [Path(parse_source(source)[0]) for source in sources]
        whole = all(path.is_file() or (path / "state.json").exists() for path in paths)
        if given[name] != defaults[name] and whole:
            raise UserError(
                f"{flag(name)} {given[name]} does not apply to files and saved data; leave it out"
            )
    if args.dataset_config and any(Path(parse_source(source)[0]).exists() for source in args.dataset):
        raise UserError(f"--dataset-config {args.dataset_config} applies to hub datasets only; leave it out")
    if args.wandb == "online":
        import wandb  # slow to import

        if not wandb.api.api_key:
            raise UserError("--wandb online needs an account: run `wandb login`, or use --wandb offline")
    if args.run_name and args.wandb == "disabled":
        raise UserError("--run-name is the run's name in wandb, which is disabled; leave it out")
    if args.batch_size < (ranks := int(os.environ.get("WORLD_SIZE", 1))):
        raise UserError(f"--batch-size {args.batch_size} is below the number of ranks, {ranks}; raise it")
    if args.resume and not args.output_dir:
        raise UserError("--resume needs --output-dir, the directory of the run to continue")
    output_dir = Path(args.output_dir or "runs").absolute()
    if args.output_dir and not args.resume and (output_dir / "args.json").exists():
        raise UserError(f"--output-dir {args.output_dir} holds a run already; add --resume, or name another")
    ours = ("final", "metrics.jsonl", "script.py", "common.py", "checkpoint-*")
    if not (output_dir / "args.json").exists() and (found := [*itertools.chain(*map(output_dir.glob, ours))]):
        raise UserError(f"--output-dir {output_dir} has {found[0].name}, but no run; name another directory")
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"--output-dir {output_dir} cannot be written: {existing} is no writable directory")


def without_foreign_eval(args):
    """The flags without the embedded held-out data, which say nothing of other data."""
    defaults = type(args)()
    own = args.dataset != defaults.dataset and args.eval_dataset == defaults.eval_dataset
    return replace(args, eval_dataset=()) if own else args


def flag(name):
    """A field of Args as it is typed."""
    return f"--{name.replace('_', '-')}"


def adapter_config(args):
    """The config of the LoRA adapter that --model is, to be trained further; None if it is a model."""
    if not (Path(args.model) / "adapter_config.json").exists():
        return None
    try:
        adapter = LoraConfig.from_pretrained(args.model)
    except Exception as error:  # not LoRA, or no valid JSON
        raise UserError(f"--model {args.model}: its adapter config cannot be loaded: {error}") from error
    if args.lora_rank != adapter.r:
        raise UserError(
            f"--model {args.model} is a LoRA adapter; add --lora-rank {adapter.r}, its rank, to train it "
            "further. A model that holds it comes from --lora-merge"
        )
    for name in ("lora_alpha", "lora_targets", "lora_rslora"):
        if getattr(args, name) != getattr(type(args)(), name):
            raise UserError(f"{flag(name)}: the adapter {args.model} brings its own; leave it out")
    return adapter


def base_model(args):
    """--model, or what the adapter that it is belongs to."""
    adapter = adapter_config(args)
    return adapter.base_model_name_or_path if adapter else args.model


def load_config(args):
    """The model's config, every dropout set to 0; UserError where there is no model."""
    try:
        config = AutoConfig.from_pretrained(base_model(args), trust_remote_code=args.trust_remote_code)
    except Exception as error:  # hub, file and format errors alike
        raise UserError(f"--model {args.model}: its config cannot be loaded: {error}") from error
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def check_lengths(args, config):
    """The most tokens of an example; UserError where that is more than the model's context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if args.max_length and context and args.max_length > context:
        raise UserError(f"--max-length {args.max_length} is above the model's context of {context} tokens")
    return args.max_length or context or args.micro_batch_tokens


def longest_sample(args, max_length, datasets):
    """Most tokens of a prompt and its completion; UserError if they do not fit into a micro-batch."""
    lengths = [length for rows in datasets for length in rows["length"]]
    longest = max_length if args.environment else max(lengths) + args.max_completion_length
    if longest > args.micro_batch_tokens:
        raise UserError(
            f"a prompt and its completion may have {longest} tokens, more than --micro-batch-tokens "
            f"{args.micro_batch_tokens}; the smallest value that works is {longest}. Or lower --max-length"
        )
    return longest


def compute_dtype(args, device):
    """What the model computes in."""
    automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
    return automatic if args.dtype == "auto" else getattr(torch, args.dtype)


def load_policy(args, config, device, kind=AutoModelForCausalLM):
    """The model to train: float32 weights; with LoRA, frozen in --dtype or 4 bits, with float32 adapters."""
    dtype, quantization = compute_dtype(args, device) if args.lora_rank else torch.float32, None
    if getattr(args, "load_in_4bit", False):
        if not find_spec("bitsandbytes"):
            raise UserError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes==0.50.2")
        nf4 = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
        quantization = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    if "flex" in args.attention and device.type == "cpu":
        raise UserError(f"--attention {args.attention} cannot train on a CPU; take varlen, sdpa or eager")
    try:
        policy = kind.from_pretrained(
            base_model(args),
            config=config,
            dtype=dtype,
            attn_implementation=args.attention,
            quantization_config=quantization,
            trust_remote_code=args.trust_remote_code,
            device_map={"": device} if quantization else None,
        )
    except Exception as error:  # hub, file and format errors alike
        raise UserError(
            f"--model {args.model} cannot be loaded with --attention {args.attention}: {error}; if it is the "
            "attention that it lacks, try eager or sdpa"
        ) from error
    for module in policy.modules():  # bitsandbytes would repack weights in eval, for good: gradients go wrong
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    try:
        if policy.can_generate():
            policy.generation_config.validate(strict=True)
    except ValueError:  # it could not be saved at the end: keep only what is certain
        kept = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {name: getattr(policy.generation_config, name) for name in kept}
        policy.generation_config = GenerationConfig(**kept)
    if score := getattr(policy, "score", None):  # a reward model's head stays float32 with LoRA, too
        score.float()
    if args.gradient_checkpointing:
        if not policy.supports_gradient_checkpointing:
            raise UserError(
                f"--gradient-checkpointing: {config.model_type} does not support it; leave it out"
            )
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    if args.lora_rank:
        policy = add_adapters(args, policy)
        adapted = not isinstance(unwrap(policy).get_input_embeddings(), torch.nn.Embedding)
        merges = args.lora_merge or (hasattr(args, "engine") and getattr(args, "lmbda", 1))
        if merges and adapted and config.tie_word_embeddings and unwrap(policy).can_generate():
            raise UserError(
                "merged, by --lora-merge or to sample, the adapter of the embeddings would change the output "
                "head too, which is tied to them; take other --lora-targets"
            )
    return policy


def add_adapters(args, policy):
    """The model with new LoRA adapters, or with those that --model names."""
    if adapter := adapter_config(args):
        adapter.lora_dropout = args.lora_dropout
        return PeftModel.from_pretrained(policy, args.model, is_trainable=True, config=adapter)
    targets = () if args.lora_targets == ("all-linear",) else args.lora_targets
    weighted = [(name, m) for name, m in policy.named_modules() if hasattr(m, "weight")]
    names = [name for name, m in weighted if m.weight.ndim == 2]
    linear = {name.split(".")[-1] for name, m in policy.named_modules() if isinstance(m, torch.nn.Linear)}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise UserError(
                f"--lora-targets {target} matches no linear layer; there are {', '.join(sorted(linear))}. "
                "all-linear, which takes all of these but lm_head, stands alone"
            )
    if args.lora_rank > (size := policy.config.get_text_config().hidden_size):
        raise UserError(f"--lora-rank {args.lora_rank} is above the model's hidden size, {size}; lower it")
    lora = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(targets) or "all-linear",
        use_rslora=args.lora_rslora,
        task_type="SEQ_CLS" if hasattr(policy, "score") else "CAUSAL_LM",  # SEQ_CLS trains the score head
    )
    try:
        policy = get_peft_model(policy, lora)
    except ValueError as error:
        raise UserError(f"--lora-targets {' '.join(args.lora_targets)}: {error}") from error
    if hasattr(unwrap(policy).get_output_embeddings(), "lora_A"):
        raise UserError(
            f"--lora-targets {' '.join(args.lora_targets)} takes the output head, which is refused: log-"
            "probs are computed in chunks from its weight"
        )
    return policy


def unwrap(policy):
    """The model itself, which LoRA wraps."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def shard(policy, args, device, forward_methods):
    """FSDP2 over decoder layers and root, in place: float32 shards and reductions, computed in --dtype."""
    model = unwrap(policy)
    names = model._no_split_modules or ()  # the classes of decoder layers
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if args.compile:
        for layer in layers:
            layer.compile(dynamic=True)
    dtype, world_size = compute_dtype(args, device), dist.get_world_size()
    if world_size > 1 or dtype != torch.float32:  # else there is nothing to shard or to cast
        options = {"mesh": init_device_mesh(device.type, (world_size,))}
        options |= {"mp_policy": MixedPrecisionPolicy(dtype, torch.float32)}
        if getattr(args, "load_in_4bit", False):  # 4-bit weights cannot be sharded
            options["ignored_params"] = {weight for weight in model.parameters() if not weight.requires_grad}
        if score := getattr(model, "score", None):
            fully_shard(score, **options | {"mp_policy": MixedPrecisionPolicy(torch.float32, torch.float32)})
        for module in (*layers, model):
            fully_shard(module, **options)
        for method in forward_methods:
            register_fsdp_forward_method(model, method)
    policy.to(device)


@torch.no_grad()
def self_check(policy, device, dtype):
    """Compare log-probs with the model's own forward, on short documents -> what they bear: standing in one
    row ("packed"), and with a prompt that they share ("shared"), or neither ("alone").

    Raises UserError if a later token changes those before it (the architecture does not honour --attention),
    or if the log-probs of a document alone differ from the model's own: then token_stats does not know what
    the architecture does between hidden states and logits. Where only packing differs, or one document
    changes the other, each must have its own row.
    """
    model, tolerance = unwrap(policy), 1e-3 if dtype == torch.float32 else 0.2
    name, text = model.config.model_type, model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(text.vocab_size, (n,), generator=generator).numpy() for n in (7, 12))
    branch = np.append(first[:4], second)

    def log_probs(*documents):
        return model.token_stats(collate([(ids, np.ones(len(ids))) for ids in documents], device)).logps_N

    def branch_log_probs(start):
        documents = (start, np.ones(len(start))), (branch, np.arange(len(branch)) >= 4)
        return model.token_stats(collate(documents, device, share_prompts=True)).logps_N[len(start) - 1 :]

    def own_log_probs(ids):
        ids_BT = torch.from_numpy(ids).to(device)[None]
        logps_TV = model(input_ids=ids_BT, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return logps_TV.gather(1, ids_BT[0, 1:, None]).squeeze(1)

    policy.eval()
    try:
        packed_N, alone_N = log_probs(first, second), torch.cat([log_probs(first), log_probs(second)])
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise UserError(f"{name} is built in a way that token_stats does not know: {error!r}") from error
    expected_N = torch.cat([own_log_probs(first), own_log_probs(second)])
    shared_error = (branch_log_probs(first) - own_log_probs(branch)[3:]).abs().max().item()
    other_end, other_first = second.copy(), (first + 1) % text.vocab_size
    other_end[-1] = (second[-1] + 1) % text.vocab_size
    # What a token cannot see changes its log-prob by nothing at all, whatever the dtype rounds.
    leak_back = (log_probs(second) - log_probs(other_end))[:-1].abs().max().item()
    leak_across = (packed_N - log_probs(other_first, second))[len(first) - 1 :].abs().max().item()
    sibling = np.append(first[:4], other_first[4:])
    leak_beside = (branch_log_probs(first) - branch_log_probs(sibling)).abs().max().item()
    policy.train()
    if leak_back > 1e-5:
        raise UserError(f"{name} lets tokens see later ones with this --attention; use --attention eager")
    if (error := (alone_N - expected_N).abs().max().item()) > tolerance:
        raise UserError(
            f"{name}: log-probs from hidden states differ from its own by {error:.3g}; "
            "it transforms logits in a way that token_stats lacks: add it there"
        )
    rope = json.dumps(getattr(text, "rope_parameters", None) or {}, default=str)
    length_dependent = "longrope" in rope or "dynamic" in rope  # which two short documents do not show
    packed_error = (packed_N - expected_N).abs().max().item()
    if packed_error > tolerance or leak_across > 1e-5 or length_dependent:
        return "alone"
    return "packed" if shared_error > tolerance or leak_beside > 1e-5 else "shared"


def make_optimizer(args, parameters):
    """AdamW with weight decay on matrices only; the learning rate is set at every step."""
    groups = [
        {"params": [weight for weight in parameters if weight.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [weight for weight in parameters if weight.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, args.learning_rate, (args.adam_beta1, args.adam_beta2), fused=True)


# ---- Shared with the other scripts: ranks, signals, checkpoints, logs --------------------------------------


def init_distributed():
    """Join the process group (of one without torchrun) -> rank, world size, device. gloo: see any_rank."""
    cuda, timeout = torch.cuda.is_available(), timedelta(minutes=30)
    if not cuda and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX, M_TRIM_THRESHOLD: keep the memory that is freed. A tenth of a step
        libc.mallopt(-1, -1)  # would go by on page faults in what was just given back
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout, **alone)
    return dist.get_rank(), dist.get_world_size(), device


def catch_signals():
    """A list to which SIGTERM and SIGINT are added from now on, in place of ending the process."""
    caught = []

    def note(number, frame):
        caught.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return caught


def any_rank(condition):
    """Whether `condition` is true on any rank. By gloo, so that a GPU's queue is not drained for it."""
    votes = torch.tensor(int(bool(condition)))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def check_same_data(*digests):
    """UserError where ranks, such as those of several machines, have read different rows."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, digests)
    if different := [rank for rank, theirs in enumerate(gathered) if theirs != gathered[0]]:
        raise UserError(f"the rows of ranks 0 and {different[0]} differ: give all machines the same data")


def full(tensor):
    """The whole of a tensor that FSDP may have sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def stop_non_finite(step, loss, grad_norm, data, rows, plan, micro_losses):
    """End the run before the optimizer sees a NaN, naming the rows of the micro-batches whose loss is one."""
    mine = [rows[chosen] for chosen, value in zip(plan, micro_losses, strict=True) if not value.isfinite()]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    bad = np.concatenate([some for part in gathered for some in part] or [rows])
    places = data.with_format(None, ["row", "source"])[bad[:8]]
    names = [f"{row} of {source}" for row, source in zip(places["row"], places["source"], strict=True)]
    raise UserError(
        f"step {step}: the loss is {loss}, the gradient norm {grad_norm}; nothing was updated. Look at the "
        f"{len(bad)} rows concerned, or lower --learning-rate. The first: {', '.join(names)}"
    )


def choose_output_dir(args):
    """--output-dir, or a new name that rank 0 chooses for all."""
    name = [args.output_dir or f"runs/{Path(__file__).stem}-{datetime.now():%Y%m%d-%H%M%S}"]
    while not args.output_dir and Path(name[0]).exists():  # a run that began in the same second
        name[0] += "-2"
    dist.broadcast_object_list(name)
    return Path(name[0])


def complete_checkpoints(output_dir):
    """From the oldest to the newest."""
    return sorted(path for path in output_dir.glob("checkpoint-*") if (path / "progress.json").exists())


def training_state(policy, optimizer, frozen):
    """What a checkpoint holds: trained weights, the optimizer's state, `frozen` models by name."""
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=TRAINABLE)
    trained = {
        name for name, weight in policy.named_parameters(remove_duplicate=False) if weight.requires_grad
    }
    model_state = {name: weight for name, weight in model_state.items() if name in trained}
    others = {name: get_model_state_dict(model) for name, model in frozen.items()}
    return {"model": model_state, "optimizer": optimizer_state, **others}


def save_checkpoint(output_dir, progress, policy, optimizer, keep, **frozen):
    """Write checkpoint-<step> aside, then rename it: complete or absent. Delete all but the newest `keep`."""
    final = output_dir / f"checkpoint-{progress['step']:08d}"
    aside, rank = output_dir / f".{final.name}.partial", dist.get_rank()
    if final in complete_checkpoints(output_dir):
        return
    if rank == 0:
        for rest in (final, *output_dir.glob(".checkpoint-*.partial")):  # of runs that were killed
            shutil.rmtree(rest, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save(training_state(policy, optimizer, frozen), checkpoint_id=aside)
        if rank == 0:
            (aside / "progress.json").write_text(json.dumps(progress))
            aside.rename(final)
    except (OSError, CheckpointException) as error:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        kept = ", ".join(path.name for path in complete_checkpoints(output_dir)) or "none"
        raise UserError(
            f"the checkpoint of step {progress['step']} cannot be written to {output_dir}: "
            f"{first_failure(error)}. Is the disk full? Complete are: {kept}. Free space, then --resume"
        ) from error
    if rank == 0:
        for old in complete_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old.rename(output_dir / f".{old.name}.partial"))
    dist.barrier()


def first_failure(error):
    """What went wrong on the first rank that failed: DCP's own text is the traceback of every rank."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def load_checkpoint(path, policy, optimizer, **frozen):
    """Restore weights and optimizer in place, on any number of ranks -> the saved progress."""
    state = training_state(policy, optimizer, frozen)
    try:
        dcp.load(state, checkpoint_id=path)
        progress = json.loads((path / "progress.json").read_text())
        progress["step"], progress["tokens"]
    except (OSError, ValueError, KeyError, RuntimeError, CheckpointException) as error:
        raise UserError(
            f"{path} cannot be read ({first_failure(error)!r}); delete it to resume from the one before"
        ) from error
    both = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(policy, optimizer, **both, options=TRAINABLE)
    for name, model in frozen.items():
        set_model_state_dict(model, state[name])
    return progress


def check_resumable(output_dir, args, data_digest, may_change=RUN_FLAGS):
    """Refuse to resume a run whose data, or flags but those that may change, make it another training."""
    if not (output_dir / "args.json").exists():
        return
    try:
        before, now = json.loads((output_dir / "args.json").read_text()), json.loads(json.dumps(asdict(args)))
        given, data_before = before["args"], before["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {output_dir / 'args.json'} is damaged: {error!r}") from error
    changed = [name for name in now if name not in may_change and given.get(name) != now[name]]
    if changed:
        lines = "\n".join(f"  {flag(name)} was {given.get(name)}, is {now[name]}" for name in changed)
        raise UserError(f"--resume: {output_dir} was begun with other flags; give the same:\n{lines}")
    if data_before != data_digest:
        raise UserError(f"--resume: the data that {output_dir} was begun with has changed; begin a new run")


def write_whole(path, text):
    """Write a file that is never seen in part."""
    aside = path.with_suffix(".partial")
    aside.write_text(text)
    aside.replace(path)


class RunLog:
    """args.json, copies of the code, metrics.jsonl and wandb, by rank 0. evals: step -> held-out metrics."""

    def __init__(self, args, output_dir, data_digest, keep_until):
        self.evals, self.wandb, self.path = {}, None, output_dir / "metrics.jsonl"
        if dist.get_rank() != 0:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        if not (output_dir / "args.json").exists():
            self.write_args(args, output_dir, data_digest)
        text = self.path.read_text() if self.path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # what follows the last newline was cut by a kill
        try:
            rows = [row for row in map(json.loads, lines) if row["step"] <= keep_until]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--resume: {self.path} is damaged: {error!r}; mend or delete it") from error
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.evals = {row["step"]: row for row in rows if {"eval/loss", "eval/reward"} & row.keys()}
        if args.wandb != "disabled":
            import wandb  # slow to import, and not needed where it is disabled

            self.wandb = wandb.init(
                project="post-training",
                name=args.run_name or output_dir.name,
                id=json.loads((output_dir / "args.json").read_text())["wandb_id"],
                resume="allow",
                mode=args.wandb,
                dir=output_dir,
                config=asdict(args),
                settings=wandb.Settings(silent=True),
            )

    @staticmethod
    def write_args(args, output_dir, data_digest):
        script, revision = Path(__file__), ["git", "rev-parse", "HEAD"]
        git = subprocess.run(revision, cwd=script.parent, capture_output=True, text=True, check=False)
        packages = ("torch", "transformers", "datasets", "peft", "tyro", "wandb")
        record = {
            "args": asdict(args),
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
            "git_commit": git.stdout.strip() or None,
            "world_size": dist.get_world_size(),
            "data": data_digest,
            "wandb_id": f"{script.stem}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}",
        }
        write_whole(output_dir / "args.json", json.dumps(record, indent=2))
        shutil.copy(script, output_dir / "script.py")
        shutil.copy(script.parent / "common.py", output_dir / "common.py")

    def write(self, row):
        """Append one row of metrics."""
        if dist.get_rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=row["step"])

    def finish(self):
        if self.wandb:
            self.wandb.finish()


def export(args, output_dir, policy, tokenizer, stop_ids, dtype):
    """Write final/ -> its path, and what went wrong, or None: the same on every rank."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=args.lora_rank > 0
    )
    weights = get_model_state_dict(policy, options=options)  # every rank takes part
    final, aside, problem = output_dir / "final", output_dir / ".final.partial", [None]
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        try:
            write_model(args, aside, policy, weights, stop_ids, dtype)
            tokenizer.save_pretrained(aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
        except Exception as error:  # other ranks wait: all of them must learn of it
            problem = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(problem)
    return final, problem[0]


def write_model(args, path, policy, weights, stop_ids, dtype):
    """Save the model in the type it computed in, or its adapter, or both merged.

    stop_ids, the tokens trained to end a turn, join the generation config's EOS ids: generation stops there.
    """
    model = unwrap(policy)
    if model.can_generate():
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        model.generation_config.eos_token_id = eos + [token for token in stop_ids if token not in eos]
    if args.lora_rank:
        policy.save_pretrained(path, state_dict=weights, selected_adapters=["default"])
        if model.can_generate():
            model.generation_config.save_pretrained(path)
    else:
        model.config.dtype = dtype
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tied = names - {name for name, _ in model.named_parameters()}  # saved once, under the first name
        weights = {
            name: weight.to(dtype) if name in names else weight  # buffers keep their type
            for name, weight in weights.items()
            if name not in tied
        }
        model.save_pretrained(path, state_dict=weights)
    if args.lora_rank and args.lora_merge:  # into the weights as given, also where training held 4 bits
        options = {"dtype": dtype, "trust_remote_code": args.trust_remote_code}
        options |= {} if model.can_generate() else {"num_labels": model.num_labels}
        base = type(model).from_pretrained(base_model(args), **options)
        if not model.can_generate():  # a reward model, which may have a row of embeddings for a pad token
            base.resize_token_embeddings(model.config.get_text_config().vocab_size, mean_resizing=False)
        base.config.pad_token_id = model.config.pad_token_id
        merged = PeftModel.from_pretrained(base, path).merge_and_unload()
        if model.can_generate():
            merged.generation_config = model.generation_config
        shutil.rmtree(path)
        merged.save_pretrained(path)


# ---- The reference and the sampler -------------------------------------------------------------------------


def copy_reference(args, policy, dtype):
    """What --beta holds the policy, not sharded yet, by: a frozen copy of its weights; with LoRA the name of
    an adapter, "" for none; None without --beta."""
    if not args.beta:
        return None
    if not args.lora_rank:
        reference = copy.deepcopy(policy).eval().requires_grad_(False)
        return reference if args.sync_ref_model else reference.to(dtype)
    if adapter_config(args):
        policy.load_adapter(args.model, "reference")
        return "reference"
    return ""


@contextmanager
def adapter(policy, name):
    """Compute with the adapter `name` ("" is none), without its dropout, for a while. PEFT's own way changes
    requires_grad, which FSDP has read by then."""
    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper  # the latter holds what is trained whole, as embeddings
    layers = [module for module in policy.modules() if isinstance(module, kinds)]
    before = [(layer._active_adapter, layer._disable_adapters, layer.training) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name], not name
        layer.eval()
    try:
        yield
    finally:
        for layer, (active, disabled, training) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
            layer.train(training)


@torch.no_grad()
def move_reference(reference, policy, share):
    """reference <- share * policy + (1 - share) * reference, on this rank's shards."""
    for model in (reference, policy):
        if isinstance(model, FSDPModule):
            model.reshard()  # a forward without backward leaves FSDP's root unsharded
    for ours, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
        ours.lerp_(theirs.to(ours.dtype), share)


def plain_copy(args, policy, dtype, device):
    """The model alone, for an engine: LoRA merged, "varlen" attention, in the dtype that is computed in."""
    model = copy.deepcopy(policy)
    model = model.merge_and_unload() if args.lora_rank else model
    model.set_attn_implementation("varlen")
    return model.to(device, dtype)


@torch.no_grad()
def whole_weights(policy):
    """(name, whole tensor) of all weights of the model itself; with LoRA W + delta. All ranks take part.

    All, as vLLM fuses some: it cannot load q_proj without k_proj.
    """
    model = unwrap(policy)
    for name, weight in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        if ".original_module." in name:  # what an adapter has whole, to be trained
            owner, _, kind = name.rpartition(".original_module.")
            trained = model.get_submodule(owner).modules_to_save
            weight = trained["default"].get_parameter(kind) if "default" in trained else weight
            yield f"{owner}.{kind}", full(weight)
            continue
        owner, is_base, kind = name.rpartition(".base_layer.")
        weight, module = full(weight), model.get_submodule(owner) if is_base else None
        if is_base and kind == "weight" and "default" in module.lora_A:
            down, up = (full(side["default"].weight) for side in (module.lora_A, module.lora_B))
            weight = weight + module.scaling["default"] * (up.float() @ down.float())
        elif is_base and kind == "weight" and "default" in module.lora_embedding_A:
            down, up = (full(side["default"]) for side in (module.lora_embedding_A, module.lora_embedding_B))
            weight = weight + module.scaling["default"] * (up.float() @ down.float()).T
        yield f"{owner}.{kind}" if is_base else name, weight


def find_servers(args, device, dtype, max_length, output_dir):
    """The vLLM servers that this rank asks: given, or started, by each rank or the first of a group."""
    if args.engine == "hf":
        return []
    rank, world_size, urls = dist.get_rank(), dist.get_world_size(), args.vllm_url
    flags, size, transport = (), args.vllm_tensor_parallel_size, "gloo"
    if device.type == "cuda":
        transport = "nccl" if urls else "ipc"
        memory = str(args.vllm_gpu_memory_utilization)
        flags = () if urls else ("--gpu-memory-utilization", memory, "--tensor-parallel-size", str(size))
    if args.trust_remote_code:
        flags += ("--trust-remote-code",)
    needs = ServerNeeds(base_model(args), str(dtype).removeprefix("torch."), max_length, transport, flags)
    make = functools.partial(VLLMServer, needs, timeout=args.vllm_timeout)
    if urls:  # several to a rank, or several ranks to one, which the first of them controls
        mine = urls[rank::world_size] or (urls[rank % len(urls)],)
        return [make(url.rstrip("/"), is_owner=rank < len(urls)) for url in mine]
    output_dir.mkdir(parents=True, exist_ok=True)
    log_path, first = output_dir / f"vllm-{rank}.log", rank % size == 0
    gpus = range(device.index, device.index + size) if device.type == "cuda" else None
    servers = [make(log_path=log_path, gpus=gpus)] if first else []
    gathered = [None] * world_size
    dist.all_gather_object(gathered, servers[0].url if first else None)
    return servers or [make(gathered[rank - rank % size], is_owner=False)]


def try_engine(function, *given):
    """-> what function(*given) returns, or the EngineError that it raises; the other is None."""
    try:
        return function(*given), None
    except EngineError as error:
        return None, error


def check_engine(args, engine, model, row, stop_ids, device):
    """Compare log-probs of a few samples of a row's prompt, of each server. All ranks take part."""
    n = max(1, math.ceil(len(args.vllm_url) / dist.get_world_size()))  # the same on all ranks
    remedy = "try --engine vllm"
    if args.engine == "vllm":  # each of a rank's servers gets one, the least busy
        server = engine.servers[0]
        remedy = f"does each server have {base_model(args)}? Start it with\n{server.needs.shell(server.url)}"
    keys = [(args.seed, 2**31)] * n
    asked = [row["input_ids"]] * n, keys, 4, [16] * n, args.temperature, stop_ids
    groups, problem = try_engine(engine.generate, *asked)
    if any_rank(problem):
        raise problem or UserError("the engine of another rank failed")
    check_log_probs(args, [*itertools.chain(*groups)], model, device, remedy)


def check_log_probs(args, rollouts, model, device, remedy):
    """UserError where the trainer gives other log-probs than the engine to what that sampled, with the
    trainer's own weights. All ranks take part."""
    theirs, ours = [], []
    model.eval()  # without LoRA's dropout
    for rollout in rollouts:
        ids, mask = rollout.prompt_ids + rollout.ids, rollout.mask or [True] * len(rollout.ids)
        document = np.array(ids), np.array([False] * len(rollout.prompt_ids) + mask)
        with torch.no_grad():
            stats = model.token_stats(collate([document], device), args.temperature)
        ours += stats.logps_N.tolist()
        theirs += rollout.logps
    model.train()
    difference = np.abs(np.subtract(ours, theirs)).mean()
    bound = 0.1 if compute_dtype(args, device) != torch.float32 else 0.001 if device.type == "cpu" else 0.01
    if any_rank(not difference <= bound):
        raise UserError(
            f"the {args.engine} engine and the trainer do not agree on the log-probs of the same tokens. "
            f"They are {difference:.4f} apart on average, at most {bound} is rounding\n"
            f"engine   {' '.join(f'{logp:.4f}' for logp in theirs[:12])}\n"
            f"trainer  {' '.join(f'{logp:.4f}' for logp in ours[:12])}\n{remedy}"
        )


# ---- Rollouts ----------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """A completion on the CPU, known to every rank."""

    cursor: int
    """Which prompt it answers, counted from the run's beginning."""
    prompt_ids: list
    ids: list
    mask: list
    """Which of ids the sampler drew, so which are trained; the others are a tool's."""
    logps: list
    """The sampler's, of those that it drew; all log-probs here are of those alone."""
    versions: list
    """The optimizer step whose weights drew each of those."""
    is_finished: bool
    rewards: list
    """A value for each reward, NaN where there is none."""
    text: str
    turns: int = 1
    calls: int = 0
    """Of tools."""
    failed_calls: int = 0
    advantage: float = math.nan
    old_logps: list | None = None
    ref_logps: list | None = None


def roll_out(
    args, engine, worker, play, tokenizer, rows, cursors, num_samples, temperature, stop_ids, task=0
):
    """Sample and judge the prompts of some rows -> [[Sample, ...] of each], Counter of failed rewards."""
    groups = sample_groups(args, engine, play, rows, cursors, num_samples, temperature, stop_ids, task)
    return judge(args, worker, tokenizer, rows, cursors, groups)


def sample_groups(args, engine, play, rows, cursors, num_samples, temperature, stop_ids, task=0):
    """The prompts of some rows -> [[Rollout, ...] of each], or Episodes where `play`, play_episodes with its
    keywords, is not None: the samples of a prompt get one seed, drawn from --seed, its cursor and `task`."""
    keys = [(args.seed, engine.version, cursor) for cursor in cursors]
    if play is None:
        prompts, limits = [row["input_ids"] for row in rows], [args.max_completion_length] * len(rows)
        return engine.generate(prompts, keys, num_samples, limits, temperature, stop_ids)
    seeds = [int(np.random.SeedSequence((args.seed, c, task)).generate_state(1)[0]) for c in cursors]
    return play(rows, keys, seeds, num_samples, temperature, stop_ids)


def judge(args, worker, tokenizer, rows, cursors, groups):
    """Rollouts or Episodes of some rows -> [[Sample, ...] of each], Counter of failed rewards."""
    pairs = list(zip(rows, groups, strict=True))
    columns = [json.loads(row["columns"]) for row, group in pairs for _ in group]
    judged, failures, counts = range(len(columns)), Counter(), [{}] * len(columns)
    if not args.environment:
        asked = [json.loads(row["prompt"]) for row, group in pairs for _ in group]
        rollouts = [rollout for group in groups for rollout in group]
        texts = [tokenizer.decode(rollout.ids, skip_special_tokens=True) for rollout in rollouts]
        said = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(asked, texts, strict=True)
        ]
    else:
        episodes = [episode for group in groups for episode in group]
        asked, said = [e.prompt for e in episodes], [e.messages for e in episodes]
        rollouts = [e.rollout for e in episodes]
        texts = [tokenizer.decode(rollout.ids) for rollout in rollouts]
        counts = [{name: getattr(e, name) for name in ("turns", "calls", "failed_calls")} for e in episodes]
        columns = [{**row, "environment_reward": e.reward} for row, e in zip(columns, episodes, strict=True)]
        judged = [index for index, e in enumerate(episodes) if not e.failure]
        failures = Counter(e.failure for e in episodes if e.failure)
    names = sorted({name for row in columns for name in row})
    columns = {name: [columns[i].get(name) for i in judged] for name in names}
    rewards_SR = np.full((len(rollouts), len(args.rewards)), np.nan)
    ids = [rollouts[i].ids for i in judged]
    rewards_SR[judged], failed = worker([asked[i] for i in judged], [said[i] for i in judged], ids, columns)
    answered = [cursor for cursor, group in zip(cursors, groups, strict=True) for _ in group]
    samples = []
    for cursor, one, rewards, text, count in zip(
        answered, rollouts, rewards_SR.tolist(), texts, counts, strict=True
    ):
        mask = [True] * len(one.ids) if one.mask is None else one.mask
        logps, versions = (list(itertools.compress(each, mask)) for each in (one.logps, one.versions))
        own = (cursor, one.prompt_ids, one.ids, mask, logps, versions, one.is_finished, rewards, text)
        samples.append(Sample(*own, **count))
    samples = iter(samples)
    return [[next(samples) for _ in group] for group in groups], failures + failed


def rewards_of(groups):
    """Groups of samples -> rewards_PGR."""
    return torch.tensor([[s.rewards for s in group] for group in groups], dtype=torch.float64)


def have_signal(groups, args):
    """Whether each group's rewards differ, so that it teaches something."""
    _, reward_PG = advantages(rewards_of(groups), args)
    return (nanstd(reward_PG, 1).nan_to_num(0) > 1e-8).flatten().tolist()


def set_advantages(groups, args):
    """Give each sample its advantage, with --kl-in-reward less of a divergence from the reference."""
    if not groups:
        return
    judged = rewards_of(groups), args
    if args.kl_in_reward:
        judged = add_kl_reward(judged[0], groups, args)
    advantage_PG, _ = advantages(*judged)
    for group, values in zip(groups, advantage_PG.tolist(), strict=True):
        for s, value in zip(group, values, strict=True):
            s.advantage = value


def check_failures(step, failures, num_samples, args, problem):
    """UserError where too many samples of a step have no reward; `problem`: what an exception said."""
    if (share := sum(failures.values()) / num_samples) > args.max_failed_rewards:
        raise UserError(
            f"step {step}: the rewards of {share:.0%} of the samples failed ({dict(failures)}), more than "
            f"--max-failed-rewards {args.max_failed_rewards}; mend the reward, or raise --reward-timeout. "
            f"{problem}"
        )


def gather_lists(mine):
    """The lists of all ranks, interleaved as range(n)[rank::world_size] takes them apart."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    turns = itertools.zip_longest(*gathered, fillvalue=gathered)
    return [item for turn in turns for item in turn if item is not gathered]


def plan_samples(samples, world_size, budget, packing):
    """Cut a step's samples into micro-batches: plan[rank][micro-batch] -> indices into `samples`. Samples of
    one prompt stay together, as far as `budget` tokens allow, where they can share it. Environments may give
    them different ones."""
    units, lengths, last = [], [], (None, None)
    for index, sample in enumerate(samples):
        own, whole = len(sample.ids), len(sample.prompt_ids) + len(sample.ids)
        prompt = (sample.cursor, sample.prompt_ids)
        if packing == "shared" and own and prompt == last and lengths[-1] + own <= budget:
            units[-1].append(index)
            lengths[-1] += own
        else:
            units.append([index])
            lengths.append(whole)
        last = prompt
    plan = split_batch(lengths, world_size, budget, packing == "alone") if units else [[[]]] * world_size
    return [[[i for unit in batch for i in units[unit]] for batch in batches] for batches in plan]


def collate_samples(samples, device, packing):
    """The MicroBatch of some samples, what the sampler drew trained."""
    documents = [
        (np.array(s.prompt_ids + s.ids), np.array([False] * len(s.prompt_ids) + s.mask)) for s in samples
    ]
    return collate(documents, device, packing == "shared")


@torch.no_grad()
def recompute(model, samples, plan, device, packing, temperature):
    """Log-probs and entropies of all samples' tokens under a model -> [logps, ...], [entropies, ...], a list
    of numbers for each sample."""
    mine, was_training = [], model.training
    model.eval()  # without LoRA's dropout
    for chosen in plan[dist.get_rank()]:
        stats = model.token_stats(collate_samples([samples[i] for i in chosen], device, packing), temperature)
        sizes = [len(samples[i].logps) for i in chosen]
        parts = (values_N.split(sizes) if chosen else () for values_N in (stats.logps_N, stats.entropy_N))
        mine += [(i, logps_n.tolist(), h_n.tolist()) for i, logps_n, h_n in zip(chosen, *parts, strict=True)]
    model.train(was_training)
    everything = sorted(gather_lists(mine))
    return [logps for _, logps, _ in everything], [entropies for _, _, entropies in everything]


def stack_tokens(samples, weights_B, device):
    """What is known of the trained tokens of a micro-batch, beside the policy's log-probs -> Sampled."""
    lengths = [len(s.logps) for s in samples]

    def tokens(lists):
        values = [value for values in lists for value in values]
        return torch.tensor(values, dtype=torch.float32, device=device)

    def optional(lists):
        return None if not lists or lists[0] is None else tokens(lists)

    return Sampled(
        old_logps_N=optional([s.old_logps for s in samples]),
        sampler_logps_N=tokens(s.logps for s in samples),
        ref_logps_N=optional([s.ref_logps for s in samples]),
        advantage_N=tokens([s.advantage] * n for s, n in zip(samples, lengths, strict=True)),
        weight_N=tokens([weight] * n for weight, n in zip(weights_B, lengths, strict=True)),
        documents_N=torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], device=device).long(),
    )


def rollout_metrics(samples, reward_PG, args):
    """Metrics of a generation batch, by TRL's names."""
    rewards_SR = torch.tensor([s.rewards for s in samples], dtype=torch.float64)
    lengths, finished = [len(s.logps) for s in samples], [len(s.logps) for s in samples if s.is_finished]
    spread_P = nanstd(reward_PG, 1)
    metrics = {
        "reward": reward_PG.nanmean().item(),
        "reward_std": nanstd(reward_PG).item(),
        "frac_reward_zero_std": (spread_P < 1e-8).double().mean().item(),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(finished) / len(lengths),
        "completions/mean_terminated_length": float(np.mean(finished)) if finished else 0.0,
        "completions/min_terminated_length": min(finished, default=0),
        "completions/max_terminated_length": max(finished, default=0),
    }
    if args.environment:
        calls = sum(s.calls for s in samples)
        metrics["tools/call_frequency"] = calls / len(samples)
        metrics["tools/failure_frequency"] = sum(s.failed_calls for s in samples) / max(1, calls)
        metrics["turns/mean"] = float(np.mean([s.turns for s in samples]))
    for name, values_S in zip(args.rewards, rewards_SR.T, strict=True):
        short = name.rpartition(".py:")[2]
        metrics[f"rewards/{short}/mean"] = values_S.nanmean().item()
        metrics[f"rewards/{short}/std"] = nanstd(values_S).item()
    return metrics


def eval_metrics(groups, failures, args):
    """Held-out metrics of --eval-generations samples of each prompt. failures: a Counter."""
    k, rewards_PKR = args.eval_generations, rewards_of(groups)
    weights_R = torch.tensor(args.reward_weights or (1.0,) * len(args.rewards), dtype=torch.float64)
    reward_PK = (rewards_PKR * weights_R).nansum(2).masked_fill(rewards_PKR.isnan().all(2), math.nan)
    metrics = {"eval/reward": reward_PK.nanmean().item()}
    if k > 1:
        metrics[f"eval/pass@{k}"] = (rewards_PKR[:, :, 0] >= 1).any(1).double().mean().item()
    lengths = [len(s.logps) for group in groups for s in group]
    metrics["eval/failed_rewards"] = failures.total()
    return metrics | {"eval/completions/mean_length": float(np.mean(lengths))}


def finite(value):
    """For JSON, which has no NaN."""
    return None if math.isnan(value) else value


def describe_prompts(name, data, report):
    """Print what is used of a dataset, and why the rest is not."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "none"
    print(f"{name:<9} {', '.join(data.unique('source'))}: {report['rows']} rows, {len(data)} used")
    print(f"{'':<9} dropped: {dropped}; the longest prompt has {max(data['length'])} tokens")


def show_samples(samples, tokenizer):
    """Two samples of a step as text: the best and the worst."""
    ranked = sorted((s for s in samples if not math.isnan(s.advantage)), key=lambda s: -s.advantage)
    lines = []
    for s in [ranked[0], ranked[-1]] if ranked else []:
        said = [f"{value:g}" for value in s.rewards]
        lines += [f"  rewards {' '.join(said)}, advantage {s.advantage:+.2f}, {len(s.logps)} tokens"]
        for name, text in (("prompt", tokenizer.decode(s.prompt_ids)), ("completion", s.text)):
            text = text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
            lines += [f"    {name:<10} {text!r}"]
    return "\n".join(lines)


def log_samples(path, step, samples, names, tokenizer):
    """Append a step's samples to completions.jsonl."""
    with open(path, "a", encoding="utf-8") as file:
        for s in samples:
            row = {"step": step, "version": min(s.versions, default=None)}
            row |= {"prompt": tokenizer.decode(s.prompt_ids), "completion": s.text}
            row |= {"rewards": dict(zip(names, map(finite, s.rewards), strict=True))}
            row |= {"advantage": finite(s.advantage)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def cut_completions(path, step):
    """Drop what completions.jsonl has of later steps than the one that is resumed from."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_whole(path, "".join(kept))


# ---- Pacing ------------------------------------------------------------------------------------------------


class Pacer:
    """Which groups a step trains on, so that none is older than K = max_staleness steps and none is lost.

    A group that began with version f must be in the step from version f + K at the latest. At most (K + 1) P
    groups are open: sampled, waiting or trained. A step takes the P oldest of those that are finished, once
    enough old ones are among them: of the open groups that are due within the next j steps it may leave j P.
    So those that are due next always fit into the next step. It is not enough to wait for what is due now:
    where newer groups are finished first, more than P would become due at once.
    """

    def __init__(self, per_step, max_staleness, total_steps, first_step=0, in_order=False):
        self.per_step, self.max_staleness, self.in_order = per_step, max_staleness, in_order
        self.total_steps, self.opened_steps = total_steps, first_step  # of those there are slots, or were
        self.next_slot = 0
        self.began = {}  # open slot -> the version with which its group began, or an older one
        self.finished = {}  # slot -> its group, in the order in which they were finished

    def open(self, version):
        """-> new slots, for groups that begin with `version` or a newer one: as many as the K + 1 steps from
        there train."""
        until = min(self.total_steps, version + self.max_staleness + 1)
        count, self.opened_steps = (until - self.opened_steps) * self.per_step, until
        slots = list(range(self.next_slot, self.next_slot + count))
        self.next_slot += count
        self.began |= dict.fromkeys(slots, version)
        return slots

    def take(self, version):
        """-> the groups of the step from `version`, by slot, which are closed; None: it must wait."""
        oldest = sorted(self.finished, key=(lambda slot: slot) if self.in_order else self.began.__getitem__)
        chosen = oldest[: self.per_step]
        if len(chosen) < self.per_step or (self.in_order and chosen != sorted(self.began)[: self.per_step]):
            return None
        left = sorted(self.began[slot] for slot in self.began.keys() - chosen)
        for place, began in enumerate(left, 1):  # so many are due within as many steps as this one
            if place > (began + self.max_staleness - version) * self.per_step:
                return None
        for slot in chosen:
            del self.began[slot]
        return [self.finished.pop(slot) for slot in sorted(chosen)]


# ---- The rollout process -----------------------------------------------------------------------------------


class SharedWeights:
    """The trainer's newest weights, in memory that the first rank shares with the embedded engine."""

    def __init__(self, weights, dtype):
        """weights: (name, whole tensor) pairs, as given to `write` later; all ranks take part."""
        self.shapes = {name: weight.shape for name, weight in weights}
        size = sum(shape.numel() for shape in self.shapes.values()) if dist.get_rank() == 0 else 0
        try:
            self.flat = torch.empty(size, dtype=dtype).share_memory_()
        except RuntimeError as error:
            raise UserError(
                f"--engine hf needs shared memory for {size:,} weights: {error}; enlarge /dev/shm, or take "
                "--engine vllm"
            ) from error
        self.version = multiprocessing.get_context("forkserver").Value("q", -1, lock=False)
        self.lock = None  # each rollout process has its own

    def views(self):
        """(name, tensor) pairs, as they were given."""
        begin = 0
        for name, shape in self.shapes.items():
            end = begin + shape.numel()
            yield name, self.flat[begin:end].view(shape)
            begin = end

    @torch.no_grad()
    def write(self, weights, version):
        """All ranks take part. EngineError where the rollout process does not let go of them."""
        has_lock = dist.get_rank() == 0 and self.lock.acquire(timeout=60)
        views = self.views()
        for _, weight in weights:  # all ranks gather all of them, whatever becomes of it
            if has_lock:
                next(views)[1].copy_(weight)
        if has_lock:
            self.version.value = version
            self.lock.release()
        elif dist.get_rank() == 0:
            raise EngineError("the rollout process reads weights for more than 60 s")

    def give(self, engine):
        """To an engine that has others."""
        with self.lock:
            if engine.version != self.version.value:
                engine.load_weights(self.views(), self.version.value)


class RolloutWork(NamedTuple):
    """What the rollout process must know."""

    args: Args
    data: object
    eval_data: object
    stop_ids: list
    limits: tuple
    """As play_episodes wants them."""
    urls: list
    """Of all vLLM servers."""
    weights: SharedWeights | None
    device: torch.device
    dtype: torch.dtype
    num_threads: int


def serve_rollouts(pipe, beat, work, first, skip):
    """The rollout process. It ends with its trainer."""
    os.setsid()  # signals to the trainer's group are the trainer's to handle
    prepare_workers()  # before the next line: rewards and environments may have the GPU
    if work.args.engine == "vllm":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(work.num_threads)
    asyncio.run(RolloutLoop(pipe, beat, work, first, skip).run())


class RolloutLoop:
    """Samples and judges prompts in their order, a group for each slot that the trainer grants.

    From the trainer: ("grant", slots, version), ("evaluate", version), ("stop",). To it: ("ready",),
    ("judged", messages) of ("group", slot, group, failures) or ("again", slot, version, cursor, group,
    failures, why) where another prompt takes the slot, ("evaluated", version, (groups, failures)),
    ("news", what is logged of it), ("refused", text), ("error", traceback).
    """

    PLAYERS = 8  # environment processes beside vLLM; each plays a group at a time
    JUDGES = 2  # reward processes beside vLLM: a call that hangs in one does not hold up the other

    def __init__(self, pipe, beat, work, first, skip):
        """first, skip: where the prompts go on, and those after it that are done with."""
        self.pipe, self.beat, self.work, self.args, self.version = pipe, beat, work, work.args, 0
        self.cursors = (cursor for cursor in itertools.count(first) if cursor not in skip)
        self.sending, self.problem = threading.Lock(), ""
        self.in_flight, self.num_tokens, self.busy_seconds, self.busy_since = 0, 0, 0.0, 0.0
        self.retries = {}  # of requests, by reason

    async def run(self):
        """Until it fails, of which the trainer hears at once: threads may go on for long."""
        try:
            await self.serve()
        except* UserError as group:
            may_be_mended = type(group.exceptions[0]) is EngineError
            self.send("error" if may_be_mended else "refused", str(group.exceptions[0]))
        except* Exception:
            self.send("error", traceback.format_exc())
        finally:  # even if there is no trainer any more
            os._exit(1)

    async def serve(self):
        args, loop = self.args, asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(64))
        together = args.batch_size // args.num_generations if args.engine == "hf" else 1
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.show_life())
            await asyncio.to_thread(self.prepare)
            inbox = asyncio.Queue()
            threading.Thread(target=self.receive, args=(loop, inbox), daemon=True).start()
            self.send("ready")
            while True:
                match await inbox.get():
                    case "grant", slots, version:
                        self.version = version
                        for begin in range(0, len(slots), together):
                            tasks.create_task(self.fill(slots[begin : begin + together]))
                    case "evaluate", version:
                        self.version = version
                        tasks.create_task(self.evaluate(version))
                    case ("stop",):
                        os._exit(0)  # what was started from here ends when its pipes close

    def prepare(self):
        """The engine, and processes for environments and rewards."""
        args, work = self.args, self.work
        self.tokenizer = load_tokenizer(args.model, args.chat_template, args.trust_remote_code)
        if args.engine == "hf":
            policy = load_policy(replace(args, gradient_checkpointing=False), load_config(args), work.device)
            self.engine = HFEngine(plain_copy(args, policy, work.dtype, work.device))
            self.engine.version = None
        else:
            servers = [VLLMServer(None, url, timeout=args.vllm_timeout) for url in work.urls]
            self.engine = VLLMEngine(servers, in_flight=True, keep_kv=args.keep_kv)
            self.retries = self.engine.retries
        num_players, num_judges = (1, 1) if args.engine == "hf" else (self.PLAYERS, self.JUDGES)
        self.players, self.judges = asyncio.Queue(), asyncio.Queue()
        for _ in range(num_players):
            player = args.environment and EnvironmentWorker(args.environment, args.environment_timeout)
            self.players.put_nowait(player)
        for _ in range(num_judges):
            worker = RewardWorker(args.rewards, args.reward_timeout, args.max_completion_length)
            self.judges.put_nowait(worker)

    def receive(self, loop, inbox):
        """A thread: what the trainer says, for as long as it lives."""
        while True:
            try:
                message = self.pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            loop.call_soon_threadsafe(inbox.put_nowait, message)

    def send(self, *message):
        with self.sending:
            self.pipe.send(message)

    async def show_life(self):
        while True:
            self.beat.value = time.monotonic()
            self.send("news", self.news())
            await asyncio.sleep(0.5)

    def news(self):
        """What the trainer logs of this process."""
        now = time.monotonic()
        busy = self.busy_seconds + (now - self.busy_since if self.in_flight else 0.0)
        said = {"time": now, "busy": busy, "tokens": self.num_tokens, "in_flight": self.in_flight}
        return {**said, "retries": dict(self.retries), "problem": self.problem}

    async def fill(self, slots):
        """Sample and judge a group for each slot, together, and again with other prompts where it must."""
        args, data, attempts = self.args, self.work.data, 0
        while slots:
            cursors = [next(self.cursors) for _ in slots]
            n = len(data)
            rows = [data[int(epoch_order(n, args.seed, c // n)[c % n])] for c in cursors]
            try:
                groups = await self.sample(rows, cursors, args.num_generations, args.temperature)
            except RefusedError as error:
                why = f"row {rows[0]['row']} of {rows[0]['source']}: {error}"
                groups, failures, signals = [[] for _ in slots], Counter(), [False] * len(slots)
            else:
                groups, failures = await self.judge(rows, cursors, groups)
                attempts, why = attempts + 1, "zero variance"
                is_final = args.zero_variance != "replace" or attempts > args.max_replacements
                signals = [True] * len(slots) if is_final else have_signal(groups, args)
            again, messages = [], []  # sent together: the first has the failures of all
            for slot, cursor, group, counts in zip(slots, cursors, groups, signals, strict=True):
                if counts:
                    messages.append(("group", slot, group, failures))
                else:
                    messages.append(("again", slot, self.version, cursor, group, failures, why))
                    again.append(slot)
                failures = Counter()
            self.send("news", self.news())
            self.send("judged", messages)
            slots = again

    async def evaluate(self, version):
        """Sample and judge the held-out prompts with the weights of `version`."""
        rows, k = self.work.eval_data, self.args.eval_generations
        cursors, temperature = range(len(rows)), 0 if k == 1 else self.args.temperature
        groups = await self.sample(rows, cursors, k, temperature, 1)
        self.send("evaluated", version, await self.judge(rows, cursors, groups))

    async def sample(self, rows, cursors, num_samples, temperature, task=0):
        """As sample_groups. The embedded engine makes one call at a time; vLLM has one for each task, or with
        an environment for each player."""
        args, is_free = self.args, self.args.engine == "vllm" and not self.args.environment
        player = None if is_free else await self.players.get()
        if not self.in_flight:
            self.busy_since = time.monotonic()
        self.in_flight += len(rows)
        try:
            if is_free:
                self.engine.version = self.version
                keys = [(args.seed, self.version, cursor) for cursor in cursors]
                prompts, limits = [row["input_ids"] for row in rows], [args.max_completion_length] * len(rows)
                asked = prompts, keys, num_samples, limits, temperature, self.work.stop_ids
                groups = await self.engine.generate_all(*asked)
            else:
                asked = player, rows, cursors, num_samples, temperature, task
                groups = await asyncio.to_thread(self.sample_here, *asked)
        finally:
            self.in_flight -= len(rows)
            if not self.in_flight:
                self.busy_seconds += time.monotonic() - self.busy_since
            if not is_free:
                self.players.put_nowait(player)
        rollouts = [each.rollout if args.environment else each for group in groups for each in group]
        self.num_tokens += sum(sum(rollout.mask or [True] * len(rollout.ids)) for rollout in rollouts)
        return groups

    def sample_here(self, player, rows, cursors, num_samples, temperature, task):
        """A thread: with the newest weights that there are."""
        play = player and functools.partial(
            play_episodes,
            engine=self.engine,
            environment=player,
            tokenizer=self.tokenizer,
            limits=self.work.limits,
        )
        if self.work.weights:
            self.work.weights.give(self.engine)
        else:
            self.engine.version = self.version
        asked = rows, cursors, num_samples, temperature, self.work.stop_ids, task
        groups = sample_groups(self.args, self.engine, play, *asked)
        self.problem = player.problem if player and player.problem else self.problem
        return groups

    async def judge(self, rows, cursors, groups):
        worker = await self.judges.get()
        try:
            return await asyncio.to_thread(judge, self.args, worker, self.tokenizer, rows, cursors, groups)
        finally:
            self.problem = worker.problem or self.problem
            self.judges.put_nowait(worker)


class Finished(NamedTuple):
    """A group that waits to be trained."""

    group: list
    """Samples of one prompt."""
    time: float
    """When it came, time.monotonic()."""


class Batch(NamedTuple):
    """What a step gets, the same on all ranks."""

    groups: list
    passed_over: list
    """Groups that others have replaced since the last step."""
    failures: Counter
    """Failed rewards of the samples that were judged since then, by kind."""
    judged: int
    """How many these were."""
    metrics: dict
    problem: str
    """What a reward or an environment said when it last raised."""


class RolloutProcess:
    """The rollout process as the trainer's first rank sees it."""

    LONGEST_SILENCE = 120  # seconds without a sign of life after which it counts as dead

    def __init__(self, work, pacer, cursor, consumed):
        """cursor, consumed: which prompts a resumed run is done with: all before cursor, and these."""
        self.work, self.pacer, self.cursor, self.consumed = work, pacer, cursor, set(consumed)
        self.passed_over = []  # groups in whose place others are sampled, since they were last logged
        self.failures, self.judged = Counter(), 0  # of samples, since they were last logged
        self.dropped, self.evaluated, self.rates = Counter(), {}, {}
        self.version, self.evaluating, self.may_restart, self.refused = 0, None, True, 0
        atexit.register(self.stop)
        self.start()

    def start(self):
        context = multiprocessing.get_context("forkserver")
        if self.work.weights:
            self.work.weights.lock = context.Lock()  # one that was killed may hold the old one
        self.pipe, theirs = context.Pipe()
        self.beat = context.Value("d", time.monotonic(), lock=False)
        waiting = {each.group[0].cursor for each in self.pacer.finished.values()}
        skip = self.consumed | waiting | {group[0].cursor for group in self.passed_over if group}
        arguments = theirs, self.beat, self.work, self.cursor, skip
        self.process = context.Process(target=serve_rollouts, args=arguments)
        self.process.start()
        print(f"rollouts  process {self.process.pid}", flush=True)
        theirs.close()
        self.inbox, self.last_group = queue.SimpleQueue(), time.monotonic()
        self.news = {"time": self.last_group, "busy": 0.0, "tokens": 0, "in_flight": 0, "retries": {}}
        self.news["problem"], self.logged = "", self.news
        threading.Thread(target=receive_all, args=(self.pipe, self.inbox), daemon=True).start()

    def stop(self):
        atexit.unregister(self.stop)
        self.send("stop")
        self.process.join(5)
        self.process.kill()
        self.process.join()
        if self.work.weights:
            self.work.weights.lock = None  # its semaphore goes with it

    def send(self, *message):
        """Messages are short, and so wait for nobody who reads them."""
        send_all(self.pipe, [message])

    def grant(self, version):
        """Let it begin groups, now that the engine has the weights of `version`."""
        self.version = version
        self.send("grant", self.pacer.open(version), version)

    def evaluate(self, version):
        """Let it evaluate; `evaluated` has the groups later."""
        self.evaluating = version
        self.send("evaluate", version)

    def restart(self, problem):
        """Once: it begins again what it had not finished."""
        self.process.kill()
        self.process.join()
        if not self.may_restart:
            raise EngineError(f"the rollout process failed again: {problem}")
        print(f"the rollout process failed and is started again: {problem}", flush=True)
        self.may_restart = False
        self.start()
        unfinished = [slot for slot in self.pacer.began if slot not in self.pacer.finished]
        self.pacer.began |= dict.fromkeys(unfinished, self.version)  # they begin anew, and so are due later
        if self.evaluating is not None:
            self.evaluate(self.evaluating)
        self.send("grant", unfinished, self.version)

    def wait(self, ready, seconds, since):
        """What ready() says, as soon as that is not None, or None after so many seconds. since: when the
        trainer began to wait. EngineError where the process cannot go on."""
        until = time.monotonic() + seconds
        while True:
            while not self.inbox.empty():
                self.take_in(self.inbox.get())
            if (found := ready()) is not None:
                return found
            now = time.monotonic()
            if now - self.beat.value > self.LONGEST_SILENCE:
                self.restart(f"it gave no sign of life for {self.LONGEST_SILENCE} s")
            if (waited := now - max(since, self.last_group)) > self.work.args.rollout_timeout:
                raise EngineError(
                    f"no group was finished in {waited:.0f} s (--rollout-timeout); {self.news['in_flight']} "
                    f"prompts are in flight, {len(self.pacer.finished)} groups wait for others; to judge "
                    "one may take several times --reward-timeout"
                )
            try:
                self.take_in(self.inbox.get(timeout=max(0.0, min(1.0, until - now))))
            except queue.Empty:
                if now >= until:
                    return None

    def take_in(self, message):
        match message:
            case "judged", messages:
                for each in messages:
                    self.take_in(each)
                return
            case "group", slot, group, failures:
                self.pacer.finished[slot] = Finished(group, time.monotonic())
                self.failures += failures
                self.judged += len(group)
                self.refused = 0
            case "again", slot, version, cursor, group, failures, why:
                self.pacer.began[slot] = version
                self.passed_over.append(group)
                self.failures += failures
                self.judged += len(group)
                self.dropped[why if group else "refused"] += 1
                self.refused += not group
                if not group:
                    self.consumed.add(cursor)
                    print(f"prompt {cursor} is left out: {why}", flush=True)
                if self.refused > self.pacer.per_step:
                    raise EngineError(f"{self.refused} prompts in a row were refused. The last: {why}")
            case "evaluated", version, found:
                self.evaluated[version], self.evaluating = found, None
                return
            case "news", news:
                self.news = news
                return
            case "refused", text:  # it would be again
                raise EngineError(text)
            case ("error", text) | ("crash", text):
                self.process.join(5)
                self.restart(text or f"it ended with exit code {self.process.exitcode}")
                return
            case ("ready",):
                return
        self.last_group = time.monotonic()

    def batch(self, version):
        """-> the Batch of the step from `version`; None where it must wait."""
        if (finished := self.pacer.take(version)) is None:
            return None
        now, news, logged = time.monotonic(), self.news, self.logged
        if seconds := news["time"] - logged["time"]:  # else what was logged holds
            tokens, busy = news["tokens"] - logged["tokens"], news["busy"] - logged["busy"]
            self.rates = {"rollout/generated_tok_s": tokens / seconds}
            self.rates["utilisation/generation"] = busy / seconds
        metrics = {
            "sample/rollout_queue_size": len(self.pacer.finished),
            "sample/time_in_queue_s": float(np.mean([now - each.time for each in finished])),
            "rollout/inflight": news["in_flight"],
            **self.rates,
        }
        metrics |= {f"rollout/dropped/{why}": count for why, count in self.dropped.items()}
        metrics |= {f"rollout/retried/{why}": count for why, count in news["retries"].items()}
        passed_over = [group for group in self.passed_over if group]  # one that was refused is empty
        own = self.failures, self.judged, metrics, news["problem"]
        batch = Batch([each.group for each in finished], passed_over, *own)
        self.logged, self.passed_over, self.failures, self.judged = news, [], Counter(), 0
        return batch

    def close(self, groups):
        """Count groups as done with -> {"cursor", "consumed"}, for a checkpoint."""
        self.consumed |= {group[0].cursor for group in groups}
        while self.cursor in self.consumed:
            self.consumed.remove(self.cursor)
            self.cursor += 1
        return {"cursor": self.cursor, "consumed": sorted(self.consumed)}


# ---- Main --------------------------------------------------------------------------------------------------


def prompt_number(group):
    """Which prompt a group of samples answers, for sorting."""
    return group[0].cursor


def check_args(args):
    """This script's own checks of its flags."""
    defaults = type(args)()
    above_0 = "num_generations max_completion_length eval_generations rollout_timeout"
    above_0 += " temperature reward_timeout epsilon delta importance_sampling_clip_max sapo_temperature_pos"
    above_0 += " sapo_temperature_neg top_entropy_quantile epsilon_high max_turns environment_timeout"
    above_0 += " ref_model_sync_steps vllm_timeout vllm_tensor_parallel_size vllm_gpu_memory_utilization"
    for name in above_0.split():
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(name)} is {value}; it must be above 0")
    or_0 = "beta entropy_coef max_replacements max_failed_rewards router_aux_loss_coef vespo_k_pos"
    or_0 += " vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
    for name in or_0.split():
        if not 0 <= (getattr(args, name) or 0) < math.inf:
            raise UserError(f"{flag(name)} is {getattr(args, name)}; it must be 0 or more")
    if args.off_policy_mask_threshold is not None and not math.isfinite(args.off_policy_mask_threshold):
        raise UserError(f"--off-policy-mask-threshold is {args.off_policy_mask_threshold}; it must be finite")
    if args.loss_type == "cispo" and clip_high(args) < 1:
        raise UserError(
            f"--epsilon-high {args.epsilon_high} is cispo's largest weight, not a distance from 1: it would "
            "scale all tokens down. Take 5, or leave it out"
        )
    if args.max_staleness < 0:
        raise UserError(f"--max-staleness is {args.max_staleness}; it must be 0 or more")
    if args.num_generations < 2:
        raise UserError(
            "--num-generations must be 2 or more: samples of a prompt are compared with each other"
        )
    if args.batch_size % args.num_generations:
        raise UserError(
            f"--batch-size {args.batch_size} counts samples; it must be a multiple of --num-generations "
            f"{args.num_generations}"
        )
    if args.top_entropy_quantile > 1:
        raise UserError(f"--top-entropy-quantile is {args.top_entropy_quantile}; it must be at most 1")
    if len(set(args.rewards)) < len(args.rewards):
        raise UserError("--rewards: name each reward once")
    if args.reward_weights and len(args.reward_weights) != len(args.rewards):
        raise UserError(
            f"--reward-weights has {len(args.reward_weights)} weights for {len(args.rewards)} rewards"
        )
    if not all(map(math.isfinite, args.reward_weights)):
        raise UserError("--reward-weights must be finite")
    if args.delta is not None and args.delta <= clip_high(args):
        raise UserError(f"--delta {args.delta} must be above 1 + epsilon, {clip_high(args):g}")
    least = args.importance_sampling_clip_min
    if least is not None and not 0 <= least < args.importance_sampling_clip_max:
        raise UserError(
            "--importance-sampling-clip-min must be 0 or more and below --importance-sampling-clip-max"
        )
    corrects = args.proximal == "trainer" and args.importance_sampling_mode != "none"
    if args.loss_type == "vespo" and corrects and args.importance_sampling_mode.startswith("sequence"):
        raise UserError("--loss-type vespo corrects by token; add --importance-sampling-mode token_truncate")
    if args.loss_type == "vespo" and args.importance_sampling_level == "sequence":
        raise UserError(
            "--loss-type vespo has weights of sequences itself; leave out --importance-sampling-level"
        )
    if not 0 < args.ref_model_mixup_alpha <= 1:
        raise UserError(
            f"--ref-model-mixup-alpha is {args.ref_model_mixup_alpha}; it must be above 0 and at most 1"
        )
    if args.kl_estimator == "k1" and not (args.use_bias_correction_kl or args.kl_in_reward):
        raise UserError(
            "--kl-estimator k1 in the loss has no expected gradient; use k2 or k3, or correct its bias"
        )
    if args.vllm_url and not all(url.startswith(("http://", "https://")) for url in args.vllm_url):
        raise UserError(f"--vllm-url {' '.join(args.vllm_url)}: give each as http://HOST:PORT")
    if (ranks := int(os.environ.get("WORLD_SIZE", 1))) % args.vllm_tensor_parallel_size:
        raise UserError(
            f"--vllm-tensor-parallel-size {args.vllm_tensor_parallel_size} does not divide the {ranks} ranks"
        )
    if len({url.rstrip("/") for url in args.vllm_url}) < len(args.vllm_url):
        raise UserError("--vllm-url: name each server once; ranks share them in turn")
    several_nodes = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    if args.engine == "vllm" and not args.vllm_url and several_nodes:
        raise UserError(
            "--engine vllm starts servers that only their own machine reaches, and the rollout process asks "
            "all of them from the first; on several machines give --vllm-url"
        )
    starts_server = (args.engine == "vllm" and not args.vllm_url, "--engine vllm without --vllm-url")
    clipped = args.loss_type in CLIPPED
    in_loss = "--beta above 0, and no --kl-in-reward"
    applies = {  # flag -> whether the others let it count, and what it needs
        "delta": (clipped, f"--loss-type {', '.join(sorted(CLIPPED))}"),
        "epsilon": (clipped, f"--loss-type {', '.join(sorted(CLIPPED))}"),
        "epsilon_high": (clipped or args.loss_type == "cispo", "a loss that clips"),
        "sapo_temperature_pos": (args.loss_type == "sapo", "--loss-type sapo"),
        "sapo_temperature_neg": (args.loss_type == "sapo", "--loss-type sapo"),
        "kl_estimator": (args.beta and not args.kl_in_reward, in_loss),
        "use_bias_correction_kl": (args.beta and not args.kl_in_reward, in_loss),
        "kl_in_reward": (args.beta, "--beta above 0"),
        "vllm_url": (args.engine == "vllm", "--engine vllm"),
        "vllm_timeout": (args.engine == "vllm", "--engine vllm"),
        "vllm_gpu_memory_utilization": starts_server,
        "vllm_tensor_parallel_size": starts_server,
        "sync_ref_model": (args.beta and not args.lora_rank, "--beta above 0, and no LoRA"),
        "ref_model_mixup_alpha": (args.sync_ref_model, "--sync-ref-model"),
        "ref_model_sync_steps": (args.sync_ref_model, "--sync-ref-model"),
        "max_replacements": (args.zero_variance == "replace", "--zero-variance replace"),
        "baseline": (args.multi_objective_aggregation == "sum_then_normalize", "sum_then_normalize"),
        "scale_rewards": (args.multi_objective_aggregation == "sum_then_normalize", "sum_then_normalize"),
        "eval_generations": (args.eval_dataset, "--eval-dataset"),
        "in_order": (args.max_staleness, "--max-staleness above 0"),
        "keep_kv": (args.engine == "vllm" and args.max_staleness, "--engine vllm, --max-staleness above 0"),
        "max_turns": (args.environment, "--environment"),
        "environment_timeout": (args.environment, "--environment"),
        "importance_sampling_mode": (args.proximal == "trainer", "--proximal trainer"),
        "importance_sampling_clip_min": (corrects, "a correction, by --proximal trainer"),
        "importance_sampling_clip_max": (corrects, "a correction, by --proximal trainer"),
        **{
            f"vespo_{name}": (args.loss_type == "vespo", "--loss-type vespo")
            for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
        },
    }  # fmt: skip
    for name, (possible, needed) in applies.items():
        if getattr(args, name) != getattr(defaults, name) and not possible:
            raise UserError(f"{flag(name)} does not apply to the other flags as given: it needs {needed}")


def with_default_rewards(args, has_reward):
    """--rewards as they count. has_reward: whether there is an environment with a get_reward."""
    if "environment" in args.rewards and not has_reward:
        raise UserError("--rewards environment needs an --environment that has a method `get_reward`")
    return replace(args, rewards=args.rewards or (("environment",) if has_reward else ("accuracy",)))


def router_aux_coef(args, config):
    """Weight of the load-balancing loss: the flag's, else the config's; 0 for a model without experts."""
    text = config.get_text_config()
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        given = args.router_aux_loss_coef
        return getattr(text, "router_aux_loss_coef", 0.0) if given is None else given
    if args.router_aux_loss_coef is not None:
        raise UserError("--router-aux-loss-coef needs a mixture of experts, which this model is not")
    return 0.0


def main(args):
    # ---- Checks and data, before any process waits for another ----
    args = without_foreign_eval(args)
    check_shared_args(args)
    prepare_workers()
    environment = EnvironmentWorker(args.environment, args.environment_timeout) if args.environment else None
    args = with_default_rewards(args, environment is not None and environment.has_reward)
    check_args(args)
    RewardWorker(args.rewards, args.reward_timeout, args.max_completion_length).stop()  # can it be made?
    config = load_config(args)
    aux_coef = router_aux_coef(args, config)
    tokenizer = load_tokenizer(args.model, args.chat_template, args.trust_remote_code)
    max_length = check_lengths(args, config)
    room = max_length - args.max_completion_length
    if room < 1:
        raise UserError(
            f"--max-completion-length {args.max_completion_length} leaves no room for a prompt; raise "
            "--max-length"
        )
    encode = functools.partial(
        encode_prompt,
        tokenizer=tokenizer,
        max_length=room,
        vocab_size=config.get_text_config().vocab_size,
        tools=environment and environment.tools,
    )
    prepare = functools.partial(
        prepare_data, encode=encode, features=PROMPT_FEATURES, config=args.dataset_config
    )
    data, report = prepare(args.dataset, split=args.dataset_split, seed=args.seed)
    eval_data = None
    if args.eval_dataset:
        eval_data, eval_report = prepare(args.eval_dataset, split=args.eval_split)
    both = [data, eval_data] if args.eval_dataset else [data]
    for rows in both:
        check_reward_columns(args.rewards, rows["columns"])
    longest = longest_sample(args, max_length, both)
    prompts_per_step = args.batch_size // args.num_generations
    steps_per_epoch = math.ceil(len(data) / prompts_per_step)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    if args.warmup_steps >= total_steps:
        raise UserError(f"--warmup-steps {args.warmup_steps:g} leaves nothing of the {total_steps} steps")
    warmup_steps = int(args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * total_steps)

    # ---- Model, reference, engine and optimizer ----
    # --- shared: init ---
    rank, world_size, device = init_distributed()
    caught_signals = catch_signals()
    dtype = compute_dtype(args, device)
    torch.manual_seed(args.seed)
    # --- end shared ---
    num_threads = torch.get_num_threads()
    if device.type == "cpu" and args.max_staleness and not args.vllm_url:  # both compute at the same time
        num_threads = max(1, num_threads // 2)
        torch.set_num_threads(num_threads)
    data_digest = rows_digest(data)
    check_same_data(data_digest, rows_digest(eval_data) if args.eval_dataset else None)
    output_dir = choose_output_dir(args)
    servers = find_servers(args, device, dtype, longest, output_dir)
    policy = load_policy(args, config, device)
    reference = copy_reference(args, policy, dtype)
    for each in [policy, reference] if isinstance(reference, torch.nn.Module) else [policy]:
        unwrap(each).token_stats = MethodType(token_stats, unwrap(each))
        shard(each, args, device, ["token_stats"])
    parameters = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = make_optimizer(args, parameters)
    packing = self_check(policy, device, dtype)  # not before: a forward leaves FSDP's root unsharded
    moving = {"reference": reference} if args.sync_ref_model else {}  # in checkpoints, beside the policy
    eos = unwrap(policy).generation_config.eos_token_id
    stop_ids = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
    if environment:
        check_tools(tokenizer, environment.tools, stop_ids)
        environment.stop()  # the rollout process has its own
    engine = VLLMEngine(servers, unwrap(policy), dtype, keep_kv=args.keep_kv) if servers else None
    row = data[rank % len(data)]
    engine_check = functools.partial(check_engine, args, engine, unwrap(policy), row, stop_ids, device)
    for server in servers:
        server.wait(caught_signals)
        server.check()
    # Before the servers get any weights, where no other run has changed them.
    if servers and not any_rank(any(server.version != "default" for server in servers)):
        with adapter(policy, ""):  # they have the base
            engine_check()
    shared_weights = None if servers else SharedWeights(whole_weights(policy), dtype)

    # ---- Resume, report ----
    progress = {"step": 0, "tokens": 0, "cursor": 0, "consumed": []}
    if args.resume:
        check_resumable(output_dir, args, data_digest)
        if checkpoints := complete_checkpoints(output_dir):
            progress = load_checkpoint(checkpoints[-1], policy, optimizer, **moving)
        if rank == 0:
            print(f"resuming after step {progress['step']}, from {checkpoints[-1]}" if checkpoints else
                  f"{output_dir} has no complete checkpoint: starting from the beginning")  # fmt: skip
    log = RunLog(args, output_dir, data_digest, keep_until=progress["step"] or -1)
    gathered = [None] * world_size
    dist.all_gather_object(gathered, [server.url for server in servers if server.is_owner])
    rollouts, urls = None, [url for some in gathered for url in some]
    if rank == 0:
        limits = args.max_turns, longest, args.max_completion_length
        own = shared_weights, device, dtype, num_threads
        work = RolloutWork(args, data, eval_data, stop_ids, limits, urls, *own)
        pacer = Pacer(prompts_per_step, args.max_staleness, total_steps, progress["step"], args.in_order)
        rollouts = RolloutProcess(work, pacer, progress["cursor"], progress["consumed"])
        cut_completions(output_dir / "completions.jsonl", progress["step"])
        total, trained = (
            sum(weight.numel() for weight in some) for some in (policy.parameters(), parameters)
        )
        print(f"model     {args.model}: {total:,} parameters, {trained:,} trained")
        print(f"device    {world_size} x {device.type}, computing in {dtype}")
        describe_prompts("train", data, report)
        if args.eval_dataset:
            describe_prompts("held out", eval_data, eval_report)
        print(f"steps     {total_steps} of {args.batch_size} samples, {args.num_generations} a prompt")
        first = data[0]
        print(f"example   row {first['row']} of {first['source']}:\n{tokenizer.decode(first['input_ids'])}")
        print(f"output    {output_dir}", flush=True)
    bar = tqdm(total=total_steps, initial=progress["step"], disable=rank != 0, unit="step")

    unchecked = 2  # times that log-probs are compared after the engine got weights

    def stop_here(problem):
        """End the run with a checkpoint, on all ranks."""
        if progress["step"]:
            save_checkpoint(output_dir, progress, policy, optimizer, args.keep_checkpoints, **moving)
        kept = "which is saved" if progress["step"] else "nothing to save yet"
        raise UserError(f"{problem}\nStopped after step {progress['step']}, {kept}; mend it, then --resume")

    def publish(step, is_lost=False):
        """Give the engine the weights of `step`, on all ranks -> why that cannot be done, or None. A server
        that fails, or has lost them, is started again once, and gets them."""
        nonlocal unchecked
        for attempts_left in (1, 0):
            problem, unchecked = None, max(unchecked, int(is_lost))
            if is_lost:
                _, problem = try_engine(engine.recover, caught_signals)
            if not any_rank(problem):
                load = engine.load_weights if servers else shared_weights.write
                _, problem = try_engine(load, whole_weights(policy), step)
            if servers and unchecked and not any_rank(problem):
                try:
                    engine_check()
                    unchecked -= 1
                except UserError as error:  # all ranks have one
                    problem = error
            if not any_rank(problem) or any_rank(caught_signals):  # of which wait_for hears next
                return None
            problem = problem or EngineError("the engine of another rank failed")
            if attempts_left and rank == 0:
                bar.write(f"step {step}: {problem}; it is tried once more")
            is_lost = bool(servers)
            if rank == 0 and not servers:  # its process has ended, perhaps with the lock
                try_engine(rollouts.restart, problem)
        return problem

    def wait_for(step, ready):
        """What ready() finds on the first rank, for all ranks; None where a signal stops the run. Servers
        that have lost the weights of `step` get them again meanwhile."""
        since = time.monotonic()
        while True:
            said = [None, ""]
            if rank == 0:
                found, problem = try_engine(rollouts.wait, ready, 2.0, since)
                said = [found, str(problem or "")]
            dist.broadcast_object_list(said)
            if any_rank(caught_signals):
                return None
            if said[1]:
                stop_here(said[1])
            if said[0] is not None:
                return said[0]
            if any_rank(any(server.is_owner and server.has_lost(step) for server in servers)):
                if problem := publish(step, is_lost=True):
                    stop_here(problem)
                since = time.monotonic()

    def evaluate_when_due(step):
        due = step in (0, total_steps) or (args.eval_every and step % args.eval_every == 0)
        if not args.eval_dataset or not due or any_rank(step in log.evals):
            return
        if rank == 0:
            rollouts.evaluate(step)
        found = wait_for(step, lambda: rollouts.evaluated.pop(step, None))
        if found is None:  # stopped by a signal: it is done again on resume
            return
        log.evals[step] = eval_metrics(*found, args)
        log.write({"step": step} | {name: finite(value) for name, value in log.evals[step].items()})
        if rank == 0:  # tqdm writes though it is disabled
            shown = ", ".join(f"{name} {value:.4f}" for name, value in log.evals[step].items())
            bar.write(f"step {step}: {shown}")

    if problem := publish(progress["step"]):
        stop_here(problem)
    evaluate_when_due(progress["step"])  # on resume, where the run ended between a step and its evaluation
    if rank == 0:
        rollouts.grant(progress["step"])

    # ---- Training ----
    for step in range(progress["step"], total_steps):
        began = time.perf_counter()
        torch.manual_seed(hash((args.seed, step, rank)) % 2**63)  # a step draws the same, resumed or not

        # ---- Rollout: wait for groups, compare their samples ----
        found = wait_for(step, rollouts and functools.partial(rollouts.batch, step))
        wait_seconds = time.perf_counter() - began
        if found is None:
            break
        groups, metrics = found.groups, found.metrics
        drawn = sorted(groups + found.passed_over, key=prompt_number)
        samples = [s for group in drawn for s in group]
        try:
            check_failures(step + 1, found.failures, max(1, found.judged), args, found.problem)
        except UserError as error:
            stop_here(error)
        metrics |= rollout_metrics(samples, advantages(rewards_of(drawn), args)[1], args)
        metrics |= {"failed_rewards": found.failures.total(), "drawn_prompts": len(drawn)}
        if args.zero_variance != "keep":
            groups = list(itertools.compress(groups, have_signal(groups, args)))
        groups.sort(key=prompt_number)
        kept = [s for group in groups for s in group]
        ages = Counter(step - version for s in kept for version in s.versions)
        if not all(0 <= age <= args.max_staleness for age in ages):
            problem = (
                f"step {step + 1} has tokens of weights {sorted(ages)} steps old, not 0 to --max-staleness"
            )
            stop_here(f"{problem}. Does another run give weights to the same server?")
        some = [s for s in samples if s.logps][:8]
        if step == 0 and some:
            remedy = "try --engine hf" if servers else "try --engine vllm"
            check_log_probs(args, some, unwrap(policy), device, remedy)
        plan = plan_samples(kept, world_size, args.micro_batch_tokens, packing)
        if reference is not None:
            with adapter(policy, reference):
                model = unwrap(policy) if args.lora_rank else reference
                ref_logps, _ = recompute(model, kept, plan, device, packing, args.temperature)
            for s, logps in zip(kept, ref_logps, strict=True):
                s.ref_logps = logps
        if args.kl_in_reward and args.max_staleness:  # the policy's divergence, not that of what sampled
            logps, _ = recompute(unwrap(policy), kept, plan, device, packing, args.temperature)
            for s, own in zip(kept, logps, strict=True):
                s.old_logps = own
        set_advantages(groups, args)
        for s in kept:
            s.old_logps = s.logps if args.proximal == "sampler" else None
        samples_of_step = [
            s for s in kept
            if not math.isnan(s.advantage) and (s.is_finished or not args.mask_truncated_completions)
        ]  # fmt: skip
        if rank == 0 and (step == 0 or (args.eval_every and step % args.eval_every == 0)):
            bar.write(show_samples(samples, tokenizer))
        if rank == 0:
            log_samples(output_dir / "completions.jsonl", step + 1, samples, args.rewards, tokenizer)

        # ---- This step's samples ----
        train_began, samples = time.perf_counter(), samples_of_step
        lengths_B = np.array([len(s.logps) for s in samples], dtype=float)
        step_tokens = int(lengths_B.sum())
        weights_B = token_weights(lengths_B, step_tokens, args) if samples else lengths_B
        plan = plan_samples(samples, world_size, args.micro_batch_tokens, packing)
        entropy_floor, entropy_tokens = -math.inf, step_tokens
        if args.top_entropy_quantile < 1 and samples:
            _, entropies = recompute(unwrap(policy), samples, plan, device, packing, args.temperature)
            entropies = np.array([value for values in entropies for value in values], np.float32)
            entropy_floor = float(np.quantile(entropies, 1 - args.top_entropy_quantile))
            entropy_tokens = int((entropies >= entropy_floor).sum())
        learning_rate = args.learning_rate * lr_factor(step, total_steps, warmup_steps, args.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # ---- Forward and backward, micro-batch by micro-batch ----
        totals, extremes, micro_losses = Counter(), [], []
        step_length = max(1, sum(len(s.prompt_ids) + len(s.ids) for s in samples))
        aux_total = torch.zeros((), device=device)
        for chosen in plan[rank]:
            if any_rank(caught_signals):
                break
            some = [samples[i] for i in chosen]
            sampled = stack_tokens(some, weights_B[chosen], device)
            micro_batch = collate_samples(some, device, packing)
            stats = unwrap(policy).token_stats(micro_batch, args.temperature, want_aux_loss=aux_coef > 0)
            loss, is_trained_N, sums, most = grpo_loss(stats, sampled, args, entropy_floor)
            if args.proximal == "sampler":  # to itself it is 0: log its age
                gap_N = (stats.logps_N.detach() - sampled.sampler_logps_N).abs()
                sums["sampling/sampling_logp_difference/mean"] = gap_N.sum()
                most["sampling/sampling_logp_difference/max"] = gap_N.max() if len(gap_N) else gap_N.sum()
            if args.entropy_coef:
                entropy = (stats.entropy_N * is_trained_N).sum() / max(1, entropy_tokens)
                loss = loss - args.entropy_coef * entropy
            if aux_coef > 0:  # exempt from independence of hardware, as in other scripts
                share = sum(len(s.prompt_ids) + len(s.ids) for s in some) / step_length
                loss = loss + aux_coef * stats.aux_loss * share
                aux_total += stats.aux_loss.detach() * share
            (loss * world_size).backward()  # FSDP averages over ranks; this is a share of a global mean
            totals.update({"loss": loss.detach(), **sums})
            extremes.append(torch.stack([*most.values()]))
            micro_losses.append(loss.detach())
        if len(micro_losses) < len(plan[rank]):  # stopped by a signal: this step does not count
            break

        # ---- Step ----
        grad_norm = full(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)).item()
        sums = torch.stack([torch.as_tensor(value, device=device) for value in totals.values()])
        dist.all_reduce(sums)
        extremes = torch.stack(extremes).amax(0)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        extremes = extremes.nan_to_num(neginf=0.0)  # a step without tokens
        metrics["loss"], *means = sums.tolist()
        for name, value in zip([*totals][1:], means, strict=True):
            metrics[name] = value / max(1, len(samples) if name in sample_metrics(args) else step_tokens)
        metrics |= {
            name: -value if name.endswith("min") else value
            for name, value in zip(most, extremes.tolist(), strict=True)
        }
        if not math.isfinite(metrics["loss"] + grad_norm):
            n = len(data)
            rows = [epoch_order(n, args.seed, s.cursor // n)[s.cursor % n] for s in samples]
            rows, place_S = np.unique(rows, return_inverse=True)
            asked = [np.unique(place_S[chosen]) for chosen in plan[rank]]
            stop_non_finite(step + 1, metrics["loss"], grad_norm, data, rows, asked, micro_losses)
        if samples:  # else Adam would go on with the moments of earlier steps
            optimizer.step()
        optimizer.zero_grad()
        if args.sync_ref_model and (step + 1) % args.ref_model_sync_steps == 0:
            move_reference(reference, policy, args.ref_model_mixup_alpha)
        progress = {"step": step + 1, "tokens": progress["tokens"] + step_tokens}
        done = [rollouts.close(drawn) if rank == 0 else None]
        dist.broadcast_object_list(done)
        progress |= done[0]

        # ---- Weight sync ----
        sync_began, paused = time.perf_counter(), sum(server.pause_seconds for server in servers)
        is_last = progress["step"] == total_steps
        problem = None if is_last and not args.eval_dataset else publish(progress["step"])
        sync_seconds = time.perf_counter() - sync_began
        paused = torch.tensor(sum(server.pause_seconds for server in servers) - paused, device=device)
        dist.all_reduce(paused, dist.ReduceOp.MAX)

        # ---- Log, evaluate, save ----
        seconds = time.perf_counter() - began
        bar.update()
        shown = f"reward {metrics['reward']:.3f}, loss {metrics['loss']:.4f}"
        bar.set_postfix_str(f"{shown}, {step_tokens / seconds:,.0f} tokens/s", refresh=False)
        if progress["step"] % args.log_every == 0 or progress["step"] == total_steps:
            if aux_coef > 0:
                dist.all_reduce(aux_total)
                metrics["aux_loss"] = aux_total.item()
            cursor, train_seconds = progress["cursor"], sync_began - train_began
            metrics |= {"epoch": cursor / len(data), "grad_norm": grad_norm, "learning_rate": learning_rate}
            metrics |= {"perf/rollout_wait_s": wait_seconds, "perf/weight_sync_s": sync_seconds}
            metrics |= {
                "perf/weight_sync_pause_s": paused.item(),
                "utilisation/trainer": 1 - (wait_seconds + sync_seconds) / seconds,
            }
            metrics |= {"sample/staleness_max": max(ages, default=0)}
            metrics |= {"sample/staleness_mean": float(np.mean([*ages.elements()] or [0]))}
            metrics |= {f"staleness/{age}": n / ages.total() for age, n in sorted(ages.items())}
            metrics |= {"train_seconds": train_seconds}
            metrics |= {"train_tokens_per_second": step_tokens / train_seconds}
            metrics |= {"tokens_per_second": step_tokens / seconds, "step_seconds": seconds}
            counts = {name: progress[name] for name in ("step", "tokens", "cursor")}
            log.write({**counts, **{name: finite(value) for name, value in metrics.items()}})
        if problem:
            stop_here(problem)
        evaluate_when_due(progress["step"])
        if rank == 0:
            rollouts.grant(progress["step"])
        if args.save_every and (progress["step"] % args.save_every == 0 or progress["step"] == total_steps):
            save_checkpoint(output_dir, progress, policy, optimizer, args.keep_checkpoints, **moving)
    bar.close()

    # ---- End: stopped by a signal, or done ----
    if any_rank(caught_signals):
        optimizer.zero_grad()
        if progress["step"]:
            save_checkpoint(output_dir, progress, policy, optimizer, args.keep_checkpoints, **moving)
        if rank == 0:
            kept = "which is saved" if progress["step"] else "nothing to save yet"
            print(f"stopped by a signal after step {progress['step']} of {total_steps}, {kept}")
            print(f"to go on, give the same flags with --output-dir {output_dir} --resume")
    else:
        final, problem = export(args, output_dir, policy, tokenizer, stop_ids, dtype)
        if problem:
            save_checkpoint(output_dir, progress, policy, optimizer, args.keep_checkpoints, **moving)
            raise UserError(
                f"{final} cannot be written: {problem}. Training is saved; mend it, then --resume"
            )
        if rank == 0:
            if {0, total_steps} <= log.evals.keys():
                before, after = log.evals[0]["eval/reward"], log.evals[total_steps]["eval/reward"]
                print(f"eval/reward: {before:.4f} before training, {after:.4f} after {total_steps} steps")
            print(f"the model is in {final}; its answers end with {tokenizer.decode(stop_ids) or 'nothing'}")
    if rank == 0:
        rollouts.stop()
    if servers:
        engine.stop()
    log.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.stdout.flush()
    os._exit(0)  # in Python's own teardown a thread of gloo may abort the process: pytorch/pytorch#179291
