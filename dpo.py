"""Direct preference optimization (DPO): raise chosen answers above rejected ones, held by a reference.

Choices that papers and implementations differ in:
1. --loss-type names one or several losses (weighted by --loss-weights) of the sums of log-probs; dpo_loss has
   each with its paper. beta is the strength of the reference; rewards are beta (log policy - log reference).
2. The reference is the model as given: a frozen copy; with a new LoRA, the base; with a LoRA adapter trained
   further, a frozen copy of that adapter; or its log-probs computed once (--precompute-ref-log-probs). TR-DPO
   (arXiv:2404.09656) moves the copy after the policy: --sync-ref-model. simpo, orpo, cpo and sft have none.
3. Losses are divided by the pairs of the whole step, sft's by its chosen tokens, over all ranks. aot sorts
   the whole step's pairs. Neither hardware nor --micro-batch-tokens changes the loss.
4. Chosen and rejected share the prompt's tokens, and are never cut on one side only.
5. --f-divergence-type (arXiv:2309.16240), --ld-alpha (LD-DPO: arXiv:2409.06411), --use-weighting (WPO:
   arXiv:2406.11827) and --label-smoothing (cDPO) change the losses that they make sense for.

Shapes: P pairs, N trained positions of a micro-batch, K columns of PairStats; documents 2i and 2i + 1 of a
micro-batch are the chosen and the rejected side of its pair i. Alignment as in common.MicroBatch.

Metrics, over the step's pairs: loss; rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies
(share of pairs whose chosen side has the higher reward); logps/chosen, logps/rejected, sums over a side;
entropy over both sides' tokens; mean_token_accuracy of chosen tokens. Held-out: eval/..., with
eval/exact_match, the share of chosen answers that greedy decoding would reproduce.

CPU:    python dpo.py                                (the embedded model and data, in a minute)
1 GPU:  python dpo.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --learning-rate 1e-6
1 node: torchrun --nproc-per-node 8 dpo.py --model ... --dataset ...
nodes:  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 dpo.py ...
"""

import copy
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Literal, NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
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
    PREFERENCE_FEATURES,
    UserError,
    check_pairs,
    collate,
    encode_preference,
    load_tokenizer,
    mark_trained,
    parse_source,
    prepare_data,
    split_batch,
)

ASSETS = Path(__file__).resolve().parent / "tests" / "assets"
TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen weights are not in checkpoints
EVAL_METRICS = ("eval/loss", "eval/rewards/accuracies", "eval/exact_match")
# A resumed run may change these: they do not change what is learnt, but to rounding.
RUN_FLAGS = ["output_dir", "resume", "save_every", "keep_checkpoints", "eval_every", "log_every", "wandb"]
RUN_FLAGS += ["run_name", "micro_batch_tokens", "gradient_checkpointing", "compile"]
# What each loss takes part in. Reference-free losses have none; the others compare with the reference.
REFERENCE_FREE = {"simpo", "orpo", "cpo", "sft"}
SORTING = {"aot", "aot_unpaired"}
SMOOTHED = {"sigmoid", "exo_pair", "robust", *SORTING}
F_DIVERGENT = {"sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "rdpo", "sft"}

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "orpo", "cpo", "rdpo",
]  # fmt: skip


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
    load_in_4bit: bool = False
    """QLoRA: hold the frozen base in 4 bits (nf4) on each rank. Needs bitsandbytes."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""

    # --- data
    dataset: tuple[str, ...] = (str(ASSETS / "preferences.jsonl"),)
    """Files, directories or hub ids; PATH:2 takes the rows twice an epoch, PATH:0.5 half of them."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    dataset_split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    eval_dataset: tuple[str, ...] = (str(ASSETS / "preferences_eval.jsonl"),)
    """Held-out data, as --dataset; none with --eval-dataset alone, or if only --dataset is given."""
    eval_split: str = "test"
    """Split of the held-out data, as --dataset-split."""
    max_length: int | None = None
    """Most tokens of an example; the model's context if not given."""
    chat_template: str | None = None
    """A file with a Jinja chat template to use in place of the tokenizer's own."""
    overflow: Literal["drop", "truncate", "error"] = "drop"
    """What happens to an example longer than --max-length. Drops are counted and printed."""
    contradictions: Literal["warn", "drop", "error"] = "warn"
    """What happens to pairs of which another row holds the reverse."""

    # --- optimization
    batch_size: int = 128
    """Examples an optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: int = 8192
    """Most packed tokens in one forward on one rank. Out of memory? Lower it: the maths does not change."""
    epochs: int = 2
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; takes precedence over --epochs."""
    learning_rate: float = 1e-4
    """Peak learning rate. The default suits the embedded 1M model: see the README for larger ones."""
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """Decay after warm-up, to 0 after the last step; wsd is constant, then linear over the last fifth."""
    warmup_steps: float = 0.05
    """Steps over which the learning rate rises linearly from 0; below 1, a share of all steps."""
    weight_decay: float = 0.0
    """AdamW's decay, on matrices only."""
    adam_beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: float = 0.999
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

    # --- algorithm
    beta: float = 0.1
    """Strength of the reference; simpo's and cpo's scale of the margin; orpo's weight of the odds ratio."""
    loss_type: tuple[LossType, ...] = ("sigmoid",)
    """One loss or several, which are summed."""
    loss_weights: tuple[float, ...] = ()
    """A weight for each of --loss-type; 1 if not given."""
    label_smoothing: float = 0.0
    """Probability that a preference is flipped (sigmoid, exo_pair, robust, aot, aot_unpaired)."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What holds the policy by the reference."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of alpha_divergence; 1 is reverse_kl."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the log-probs of what one side is longer by; 1 is DPO."""
    use_weighting: bool = False
    """WPO: weigh pairs by how likely the policy is to write them."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks for."""
    rdpo_alpha: float = 0.005
    """rdpo's penalty for each token by which the chosen side is longer."""
    reference_free: bool = False
    """Leave the reference out: its log-probs count as 0."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs once, before training, and keep them on disk; then it is freed."""
    sync_ref_model: bool = False
    """TR-DPO: move the reference towards the policy every --ref-model-sync-steps."""
    ref_model_mixup_alpha: float = 0.6
    """The policy's share when the reference moves; 1 copies it."""
    ref_model_sync_steps: int = 512
    """Steps between two moves of the reference."""
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


class PairStats(NamedTuple):
    """What is known of each pair, (P,) each: of its chosen (w, winning) and rejected (l, losing) side."""

    logps_w_P: torch.Tensor
    """Sum of the policy's log-probs; --ld-alpha weighs those of the longer side's tail."""
    logps_l_P: torch.Tensor
    ref_logps_w_P: torch.Tensor
    ref_logps_l_P: torch.Tensor
    length_w_P: torch.Tensor
    """Trained tokens."""
    length_l_P: torch.Tensor
    sft_logps_w_P: torch.Tensor
    """Sum of the policy's log-probs, never weighted."""
    weight_P: torch.Tensor
    """WPO's; 1 without it."""
    entropy_P: torch.Tensor
    """Sum over both sides."""
    hits_w_P: torch.Tensor
    """Tokens that are the arg-max."""


def dpo_loss(pairs, args, mean_length_w):
    """Loss of each pair, (P,); the caller divides the sum by the step's global number of pairs.

    mean_length_w: trained tokens of a chosen side, mean over the step's pairs. Symbols: theta the policy, ref
    the reference, y_w and y_l chosen and rejected, beta, eps = --label-smoothing. aot and aot_unpaired sort
    the pairs and so must be given all of a step.
    """
    beta, eps = args.beta, args.label_smoothing
    ratio_w_P = pairs.logps_w_P - pairs.ref_logps_w_P  # log pi_theta(y_w|x) - log pi_ref(y_w|x)
    ratio_l_P = pairs.logps_l_P - pairs.ref_logps_l_P
    score_w_P, score_l_P = (f_score(ratio_P, args) for ratio_P in (ratio_w_P, ratio_l_P))
    margin_P = beta * (score_w_P - score_l_P)
    mean_w_P, mean_l_P = pairs.logps_w_P / pairs.length_w_P, pairs.logps_l_P / pairs.length_l_P
    logsigmoid, sigmoid = F.logsigmoid, torch.sigmoid
    total_P = torch.zeros_like(margin_P)
    weights = args.loss_weights or (1.0,) * len(args.loss_type)
    for loss_type, weight in zip(args.loss_type, weights, strict=True):
        match loss_type:
            case "sigmoid":  # DPO, arXiv:2305.18290 eq. 7; with eps > 0 cDPO
                losses_P = logistic_loss(margin_P, eps)
            case "hinge":  # SLiC on normalised likelihoods, arXiv:2305.10425; RSO, arXiv:2309.06657
                losses_P = torch.relu(1 - margin_P)
            case "ipo":  # arXiv:2310.12036 eq. 17, by token, as its authors do
                delta_P = score_w_P / pairs.length_w_P - score_l_P / pairs.length_l_P
                losses_P = (delta_P - 1 / (2 * beta)) ** 2
            case "exo_pair":  # EXO, arXiv:2402.00856 eq. 16: KL(softmax(margin) || (1 - eps, eps))
                losses_P = sigmoid(margin_P) * (logsigmoid(margin_P) - math.log1p(-eps))
                losses_P = losses_P + sigmoid(-margin_P) * (logsigmoid(-margin_P) - math.log(eps))
            case "nca_pair":  # NCA, arXiv:2402.05369
                losses_P = -logsigmoid(beta * ratio_w_P)
                losses_P = losses_P - 0.5 * (logsigmoid(-beta * ratio_w_P) + logsigmoid(-beta * ratio_l_P))
            case "robust":  # Robust DPO, arXiv:2403.00409
                flipped_P = eps * logsigmoid(-margin_P)
                losses_P = (flipped_P - (1 - eps) * logsigmoid(margin_P)) / (1 - 2 * eps)
            case "bco_pair":  # BCO, arXiv:2404.04656, without its running mean of rewards
                losses_P = -logsigmoid(beta * ratio_w_P) - logsigmoid(-beta * ratio_l_P)
            case "sppo_hard":  # SPPO, arXiv:2405.00675 eq. 4.7 with hard probabilities
                losses_P = (ratio_w_P - 0.5 / beta) ** 2 + (ratio_l_P + 0.5 / beta) ** 2
            case "aot":  # AOT, arXiv:2406.05882: the i-th smallest of one side against the other's
                of_policy_P = pairs.logps_w_P - pairs.logps_l_P
                of_ref_P = pairs.ref_logps_w_P - pairs.ref_logps_l_P
                losses_P = logistic_loss(beta * (of_policy_P.sort().values - of_ref_P.sort().values), eps)
            case "aot_unpaired":
                losses_P = logistic_loss(beta * (ratio_w_P.sort().values - ratio_l_P.sort().values), eps)
            case "apo_zero":  # APO, arXiv:2408.06266 eq. 7: chosen up, rejected down
                losses_P = 1 - sigmoid(beta * ratio_w_P) + sigmoid(beta * ratio_l_P)
            case "apo_down":  # eq. 8: both down, rejected more
                losses_P = sigmoid(beta * ratio_w_P) + 1 - sigmoid(beta * (ratio_w_P - ratio_l_P))
            case "discopop":  # DiscoPOP, arXiv:2406.08414 eq. 5; e^-margin only where its share is not 0
                share_P = sigmoid(margin_P / args.discopop_tau)
                exponential_P = torch.exp(logsigmoid(margin_P / args.discopop_tau) - margin_P)
                losses_P = exponential_P - (1 - share_P) * logsigmoid(margin_P)
            case "sft":  # the mean over all chosen tokens of the step, times the pairs
                losses_P = -pairs.sft_logps_w_P / mean_length_w
            case "sigmoid_norm":  # DPO by token, as in Tulu 3, arXiv:2411.15124
                delta_P = score_w_P / pairs.length_w_P - score_l_P / pairs.length_l_P
                losses_P = -logsigmoid(beta * delta_P)
            case "simpo":  # SimPO, arXiv:2405.14734 eq. 6
                losses_P = -logsigmoid(beta * (mean_w_P - mean_l_P) - args.simpo_gamma)
            case "orpo":  # ORPO, arXiv:2403.07691 eq. 6 and 7; likelihoods are means by token
                log_odds_P = mean_w_P - log1mexp(mean_w_P) - mean_l_P + log1mexp(mean_l_P)
                losses_P = -mean_w_P - beta * logsigmoid(log_odds_P)
            case "cpo":  # CPO, arXiv:2401.08417; its NLL is a sum over tokens
                losses_P = -logsigmoid(beta * (pairs.logps_w_P - pairs.logps_l_P)) - pairs.sft_logps_w_P
            case "rdpo":  # R-DPO, arXiv:2403.19159
                penalty_P = args.rdpo_alpha * (pairs.length_w_P - pairs.length_l_P)
                losses_P = -logsigmoid(margin_P - penalty_P)
        total_P = total_P + weight * losses_P
    return total_P * pairs.weight_P


def logistic_loss(margin_P, eps):
    """-log sigmoid, of a margin whose sign is wrong with probability eps."""
    return -(1 - eps) * F.logsigmoid(margin_P) - eps * F.logsigmoid(-margin_P)


def f_score(ratio_P, args):
    """f'(pi_theta / pi_ref), of the logarithm of that ratio, but for a constant: arXiv:2309.16240."""
    match args.f_divergence_type:
        case "reverse_kl":
            return ratio_P
        case "forward_kl":
            return 1 - torch.exp(-ratio_P)
        case "js_divergence":
            return math.log(2) + F.logsigmoid(ratio_P)
        case "alpha_divergence" if abs(args.f_alpha_divergence_coef - 1) < 1e-6:
            return ratio_P
        case "alpha_divergence":
            power = args.f_alpha_divergence_coef - 1
            return torch.expm1((power * ratio_P).clamp(max=80)) / power


def log1mexp(logps_P):
    """log(1 - p) of log p, exact for p near 0 and near 1; p = 1 counts as the float before it."""
    logps_P = logps_P.clamp(max=-1e-7)
    return torch.where(logps_P > -0.69, torch.log(-torch.expm1(logps_P)), torch.log1p(-torch.exp(logps_P)))


def sum_sides(values_N, documents_N, num_pairs):
    """Sum of what each trained position has over each side of its pair -> (P, 2)."""
    sums_B = values_N.new_zeros(2 * num_pairs).index_add_(0, documents_N, values_N)
    return sums_B.view(num_pairs, 2)


def sum_logps(logps_N, documents_N, num_pairs, ld_alpha):
    """Sums of log-probs, (P, 2). LD-DPO: beyond the shorter side's length, they count ld_alpha times."""
    if ld_alpha is not None:
        length_P2 = sum_sides(torch.ones_like(logps_N), documents_N, num_pairs)
        begin_B = length_P2.flatten().cumsum(0) - length_P2.flatten()
        place_N = torch.arange(len(documents_N), device=documents_N.device) - begin_B[documents_N]
        logps_N = torch.where(place_N < length_P2.amin(1)[documents_N // 2], 1.0, ld_alpha) * logps_N
    return sum_sides(logps_N, documents_N, num_pairs)


def pair_stats(stats, documents_N, ref_logps_P2, args):
    """TokenStats of positions of whole pairs, and the document of each -> PairStats."""
    sides = functools.partial(sum_sides, documents_N=documents_N, num_pairs=len(ref_logps_P2))
    length_P2 = sides(torch.ones_like(stats.logps_N))
    weight_P = torch.ones_like(length_P2[:, 0])
    if args.use_weighting:  # WPO eq. 2: the geometric mean of p(token) / sum of p^2 over each side
        weight_P = (sides(stats.logps_N.detach() - stats.log_sum_sq_N) / length_P2).sum(1).exp()
    return PairStats(
        *sum_logps(stats.logps_N, documents_N, len(ref_logps_P2), args.ld_alpha).unbind(1),
        *ref_logps_P2.unbind(1),
        *length_P2.unbind(1),
        sft_logps_w_P=sides(stats.logps_N)[:, 0],
        weight_P=weight_P,
        entropy_P=sides(stats.entropy_N.detach()).sum(1),
        hits_w_P=sides(stats.is_top1_N.float())[:, 0],
    )


def pair_metrics(pairs, args):
    """Metrics over all pairs of a step or of the held-out data, by TRL's names."""
    lengths_P = pairs.length_w_P, pairs.length_l_P
    reward_w_P = args.beta * (pairs.logps_w_P - pairs.ref_logps_w_P)
    reward_l_P = args.beta * (pairs.logps_l_P - pairs.ref_logps_l_P)
    if {*args.loss_type} - {"sft"} in ({"simpo"}, {"orpo"}, {"simpo", "orpo"}):  # what these compare
        reward_w_P, reward_l_P = reward_w_P / lengths_P[0], reward_l_P / lengths_P[1]
    metrics = {
        "loss": dpo_loss(pairs, args, pairs.length_w_P.mean()).mean(),
        "rewards/chosen": reward_w_P.mean(),
        "rewards/rejected": reward_l_P.mean(),
        "rewards/margins": (reward_w_P - reward_l_P).mean(),
        "rewards/accuracies": (reward_w_P > reward_l_P).float().mean(),
        "logps/chosen": pairs.logps_w_P.mean(),
        "logps/rejected": pairs.logps_l_P.mean(),
        "entropy": pairs.entropy_P.sum() / sum(lengths_P).sum(),
        "mean_token_accuracy": pairs.hits_w_P.sum() / pairs.length_w_P.sum(),
    }
    return {name: value.item() for name, value in metrics.items()}


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


def pair_documents(data, rows):
    """[(ids, loss mask), ...] of some pairs: chosen, rejected, chosen, ..."""
    columns, documents = data[rows], []
    for ids, mask, (length_w, _) in zip(
        columns["input_ids"], columns["loss_mask"], columns["lengths"], strict=True
    ):
        documents += [(ids[:length_w], mask[:length_w]), (ids[length_w:], mask[length_w:])]
    return documents


@functools.lru_cache(maxsize=1)
def epoch_order(num_rows, seed, epoch):
    """The order of an epoch's rows: the same on every rank and for any number of ranks."""
    generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
    return torch.randperm(num_rows, generator=generator).numpy()


def packed_lengths(data, args, packing):
    """Tokens of each row, its prompt once if it is "shared"; UserError if the longest does not fit into
    a micro-batch."""
    lengths = np.array(data["length"])
    if packing == "shared":
        lengths -= np.array(data["prompt_length"]) * (np.array([len(some) for some in data["lengths"]]) - 1)
    if lengths.max() > args.micro_batch_tokens:
        row = data[int(lengths.argmax())]
        raise UserError(
            f"row {row['row']} of {row['source']} has {lengths.max()} tokens, more than --micro-batch-tokens "
            f"{args.micro_batch_tokens}; the smallest value that works is {lengths.max()}"
        )
    return lengths


def rows_digest(data):
    """A hash of all encoded rows, in their order."""
    return hashlib.sha256("".join(data["digest"]).encode()).hexdigest()[:16]


def describe(name, data, report, lengths):
    """Print what is used of a dataset, and why the rest is not."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "none"
    unused = ", ".join(sorted(report["unused"])) or "none"
    sources = ", ".join(data.unique("source"))
    print(f"{name:<9} {sources}: {report['rows']} rows, {len(data)} used")
    print(f"{'':<9} dropped: {dropped}; columns not used: {unused}")
    share, longest = sum(data["num_targets"]) / lengths.sum(), lengths.max()
    print(f"{'':<9} {lengths.sum()} tokens, {share:.1%} of them trained; the longest row has {longest}")


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


# ---- The reference -----------------------------------------------------------------------------------------


def make_reference(args, policy, dtype):
    """What the policy, not sharded yet, is compared with: a frozen copy of its weights; with LoRA the name of
    an adapter, "" for none; None where no loss needs one or where log-probs are precomputed."""
    if {*args.loss_type} <= REFERENCE_FREE or args.reference_free or args.precompute_ref_log_probs:
        return None
    if not args.lora_rank:
        reference = copy.deepcopy(policy).eval().requires_grad_(False)
        if not args.sync_ref_model:  # its float32 weights would never be seen
            for weight in reference.parameters():
                weight.data = weight.data.to(dtype)
        return reference
    if given := adapter_config(args):
        if given.bias != "none":
            raise UserError(
                f"--model {args.model} is an adapter that trains the base's biases ({given.bias}), which its "
                "reference would share; add --precompute-ref-log-probs"
            )
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


def forward_pairs(model, documents, device, packing, **wanted):
    """The documents of whole pairs, in one row or (if they must be alone) each in its own -> TokenStats of
    all trained positions, and the document of each."""
    rows = [[document] for document in documents] or [[], []] if packing == "alone" else [documents]
    batches = [collate(row, device, packing == "shared") for row in rows]
    *parts, aux_losses = zip(*(model.token_stats(batch, **wanted) for batch in batches), strict=True)
    stats = [None if part[0] is None else torch.cat(part) for part in parts]
    aux_loss = None if aux_losses[0] is None else sum(aux_losses) / len(aux_losses)
    documents_N = torch.cat([batch.documents_N + number for number, batch in enumerate(batches)])
    return TokenStats(*stats, aux_loss), documents_N


@torch.no_grad()
def reference_logps(args, policy, reference, documents, indices, device, packing):
    """The reference's sums of log-probs over each side, (P, 2). reference: as made, or a table (rows, 2)."""
    if reference is None:
        return torch.zeros(len(indices), 2, device=device)
    if isinstance(reference, torch.Tensor):
        return reference[indices]
    with adapter(policy, reference):
        model = unwrap(policy) if args.lora_rank else reference
        stats, documents_N = forward_pairs(model, documents, device, packing)
    return sum_logps(stats.logps_N, documents_N, len(indices), args.ld_alpha)


@torch.no_grad()
def collect_pairs(args, policy, device, packing, caught_signals, reference, data, rows, plan):
    """PairStats of `rows` of the data, over all ranks, as a table (P, K). None if stopped by a signal."""
    policy.eval()
    table_PK = torch.zeros(len(rows), len(PairStats._fields), device=device)
    for chosen in plan[dist.get_rank()]:
        if any_rank(caught_signals):
            return None
        documents = pair_documents(data, rows[chosen])
        ref_logps_P2 = reference_logps(args, policy, reference, documents, rows[chosen], device, packing)
        stats, documents_N = forward_pairs(
            unwrap(policy), documents, device, packing, want_sum_sq=args.use_weighting
        )
        table_PK[chosen] = torch.stack(pair_stats(stats, documents_N, ref_logps_P2, args), 1)
    policy.train()
    dist.all_reduce(table_PK)  # each row is one rank's
    return table_PK


def precompute_logps(collect, data, plan, device, key):
    """The untrained policy's sums of log-probs of all pairs, (rows, 2), kept in a file named after `key`.
    None if stopped by a signal."""
    name, rows = hashlib.sha256(repr(key).encode()).hexdigest()[:32], np.arange(len(data))
    path = Path(datasets.config.HF_DATASETS_CACHE) / "post-training" / f"reference-{name}.npy"
    if any_rank(dist.get_rank() == 0 and path.exists()):
        table_R2 = torch.zeros(len(data), 2, device=device)
        if dist.get_rank() == 0:
            print(f"reference log-probs of {len(data)} pairs are read from {path}")
            table_R2 += torch.from_numpy(np.load(path, allow_pickle=False)).to(device)
        dist.broadcast(table_R2, 0)
        return table_R2
    if (table_RK := collect(None, data, rows, plan)) is None:
        return None
    table_R2 = table_RK[:, :2].contiguous()
    if dist.get_rank() == 0:
        print(f"reference log-probs of {len(data)} pairs are computed, and kept in {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside := path.with_suffix(f".{os.getpid()}"), "wb") as file:
            np.save(file, table_R2.cpu().numpy())
        aside.replace(path)
    return table_R2


def model_digest(policy):
    """A hash of what an unsharded model computes with: its config, weights, and the scales of its adapter."""
    config = {**unwrap(policy).config.to_dict(), "_name_or_path": ""}
    scales = [layer.scaling for layer in policy.modules() if isinstance(layer, BaseTunerLayer)]
    digest = hashlib.sha256(f"{config} {scales}".encode())
    for name, weight in policy.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def move_reference(reference, policy, share):
    """reference <- share * policy + (1 - share) * reference, on this rank's shards."""
    for model in (reference, policy):
        if isinstance(model, FSDPModule):
            model.reshard()  # a forward without backward leaves FSDP's root unsharded
    for ours, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
        ours.lerp_(theirs.to(ours.dtype), share)


# ---- Main --------------------------------------------------------------------------------------------------


def check_args(args):
    """This script's own checks of its flags."""
    types, defaults = {*args.loss_type}, type(args)()
    named = " ".join(args.loss_type)
    if not types or len(types) < len(args.loss_type):
        raise UserError(f"--loss-type {named}: name one loss or several, each once")
    if args.loss_weights and len(args.loss_weights) != len(args.loss_type):
        raise UserError(
            f"--loss-weights has {len(args.loss_weights)} weights for --loss-type {named}; give one for each"
        )
    if not all(0 < weight < math.inf for weight in args.loss_weights):
        raise UserError("--loss-weights must be above 0; leave out a loss that is not to count")
    for name in ("beta", "discopop_tau", "ref_model_sync_steps"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"{flag(name)} is {getattr(args, name)}; it must be above 0")
    for name in ("simpo_gamma", "rdpo_alpha", "router_aux_loss_coef"):
        if not 0 <= (getattr(args, name) or 0) < math.inf:
            raise UserError(f"{flag(name)} is {getattr(args, name)}; it must be 0 or more")
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label-smoothing is {args.label_smoothing}; it must be at least 0 and below 0.5")
    if "exo_pair" in types and not args.label_smoothing:
        raise UserError("--loss-type exo_pair needs --label-smoothing above 0, such as 0.001")
    if args.ld_alpha is not None and not 0 <= args.ld_alpha <= 1:
        raise UserError(f"--ld-alpha is {args.ld_alpha}; it must be from 0 to 1")
    if not 0 < args.ref_model_mixup_alpha <= 1:
        raise UserError(
            f"--ref-model-mixup-alpha is {args.ref_model_mixup_alpha}; it must be above 0 and at most 1"
        )
    if not math.isfinite(args.f_alpha_divergence_coef):
        raise UserError("--f-alpha-divergence-coef must be a finite number")
    applies = {  # flag -> whether the others let it count, and what it needs
        "label_smoothing": (types & SMOOTHED, f"--loss-type {' or '.join(sorted(SMOOTHED))}"),
        "f_divergence_type": (types <= F_DIVERGENT and types != {"sft"},
                              f"losses among {', '.join(sorted(F_DIVERGENT))}"),
        "f_alpha_divergence_coef": (args.f_divergence_type == "alpha_divergence",
                                    "--f-divergence-type alpha_divergence"),
        "ld_alpha": (types - {"sft"} and not types & {"simpo", "orpo", "cpo"},
                     "losses other than simpo, orpo and cpo, and not sft alone"),
        "use_weighting": (not types & {*SORTING, "sft", "orpo", "cpo"},
                          "losses of single pairs, without sft, orpo, cpo, aot and aot_unpaired"),
        "discopop_tau": ("discopop" in types, "--loss-type discopop"),
        "simpo_gamma": ("simpo" in types, "--loss-type simpo"),
        "rdpo_alpha": ("rdpo" in types, "--loss-type rdpo"),
        "reference_free": (types - REFERENCE_FREE, "a loss that has a reference"),
        "precompute_ref_log_probs": (types - REFERENCE_FREE and not args.reference_free,
                                     "a loss that has a reference"),
        "sync_ref_model": (types - REFERENCE_FREE and not args.reference_free and not args.lora_rank
                           and not args.precompute_ref_log_probs,
                           "a reference that is a copy of the weights: no LoRA, nothing precomputed"),
        "ref_model_mixup_alpha": (args.sync_ref_model, "--sync-ref-model"),
        "ref_model_sync_steps": (args.sync_ref_model, "--sync-ref-model"),
    }  # fmt: skip
    for name, (possible, needed) in applies.items():
        if getattr(args, name) != getattr(defaults, name) and not possible:
            raise UserError(f"{flag(name)} does not apply to --loss-type {named} as given: it needs {needed}")
    if types & SORTING and args.lora_dropout:
        raise UserError(f"--loss-type {named} computes a step's log-probs twice; set --lora-dropout 0")


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
    check_args(args)
    config = load_config(args)
    aux_coef = router_aux_coef(args, config)
    tokenizer = load_tokenizer(args.model, args.chat_template, args.trust_remote_code)
    encode = functools.partial(
        encode_preference,
        tokenizer=tokenizer,
        max_length=check_lengths(args, config),
        overflow=args.overflow,
        vocab_size=config.get_text_config().vocab_size,
    )
    prepare = functools.partial(
        prepare_data, encode=encode, features=PREFERENCE_FEATURES, config=args.dataset_config
    )
    data, report = prepare(args.dataset, split=args.dataset_split, seed=args.seed)
    data, pairs_report = check_pairs(data, args.contradictions)
    row_tokens, targets_w = packed_lengths(data, args, "shared"), np.array(data["targets"])[:, 0]
    if args.eval_dataset:
        eval_data, eval_report = prepare(args.eval_dataset, split=args.eval_split)
        eval_tokens = packed_lengths(eval_data, args, "shared")
    steps_per_epoch = math.ceil(len(data) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    if args.warmup_steps >= total_steps:
        raise UserError(f"--warmup-steps {args.warmup_steps:g} leaves nothing of the {total_steps} steps")
    warmup_steps = int(args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * total_steps)

    # ---- Model, reference and optimizer ----
    # --- shared: init ---
    rank, world_size, device = init_distributed()
    caught_signals = catch_signals()
    dtype = compute_dtype(args, device)
    torch.manual_seed(args.seed)
    # --- end shared ---
    data_digest = rows_digest(data)
    check_same_data(data_digest, rows_digest(eval_data) if args.eval_dataset else None)
    policy = load_policy(args, config, device)
    given_model = model_digest(policy) if args.precompute_ref_log_probs else None
    reference = make_reference(args, policy, dtype)
    models = [policy, reference] if isinstance(reference, torch.nn.Module) else [policy]
    for each in models:
        unwrap(each).token_stats = MethodType(token_stats, unwrap(each))
        shard(each, args, device, ["token_stats"])
    parameters = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = make_optimizer(args, parameters)
    packing = self_check(policy, device, dtype)  # not before: a forward leaves FSDP's root unsharded
    moving = {"reference": reference} if args.sync_ref_model else {}  # in checkpoints, beside the policy

    # ---- Output directory, precomputed reference, resume, report ----
    output_dir = choose_output_dir(args)
    if args.resume:
        check_resumable(output_dir, args, data_digest)
    collect = functools.partial(collect_pairs, args, policy, device, packing, caught_signals)
    lengths = packed_lengths(data, args, packing)
    arrays = data.with_format("numpy", ["input_ids", "loss_mask", "lengths"])
    eval_reference = reference
    if args.eval_dataset:
        eval_arrays = eval_data.with_format("numpy", ["input_ids", "loss_mask", "lengths"])
        eval_lengths = packed_lengths(eval_data, args, packing)
        eval_plan = split_batch(
            eval_lengths.tolist(), world_size, args.micro_batch_tokens, packing == "alone"
        )
    if args.precompute_ref_log_probs:
        plan = split_batch(lengths.tolist(), world_size, args.micro_batch_tokens, packing == "alone")
        key = given_model, str(dtype), args.attention, args.ld_alpha
        reference = precompute_logps(collect, arrays, plan, device, (*key, data_digest))
        if args.eval_dataset:
            key = (*key, rows_digest(eval_data))
            eval_reference = precompute_logps(collect, eval_arrays, eval_plan, device, key)
        if any_rank(caught_signals):
            if rank == 0:
                print("stopped by a signal before training: nothing to save")
            return dist.destroy_process_group()
    progress = {"step": 0, "tokens": 0}
    if args.resume:
        if checkpoints := complete_checkpoints(output_dir):
            progress = load_checkpoint(checkpoints[-1], policy, optimizer, **moving)
        if rank == 0:
            print(f"resuming after step {progress['step']}, from {checkpoints[-1]}" if checkpoints else
                  f"{output_dir} has no complete checkpoint: starting from the beginning")  # fmt: skip
    log = RunLog(args, output_dir, data_digest, keep_until=progress["step"] or -1)
    if rank == 0:
        total, trained = (
            sum(weight.numel() for weight in some) for some in (policy.parameters(), parameters)
        )
        print(f"model     {args.model}: {total:,} parameters, {trained:,} trained")
        print(f"device    {world_size} x {device.type}, computing in {dtype}")
        describe("train", data, report, row_tokens)
        print(f"pairs     {pairs_report}")
        if args.eval_dataset:
            describe("held out", eval_data, eval_report, eval_tokens)
        rows = f"rows of up to {args.micro_batch_tokens} tokens"
        rows = "one completion a row" if packing == "alone" else rows
        print(f"steps     {total_steps} of {args.batch_size} pairs ({steps_per_epoch} an epoch), in {rows}")
        print(f"example   row {data[0]['row']} of {data[0]['source']}; completions stand in [[ ]]:")
        for side, (ids, mask) in zip(("chosen", "rejected"), pair_documents(arrays, [0]), strict=True):
            print(f"{side}:\n{mark_trained(tokenizer, ids, mask)}")
        print(f"output    {output_dir}", flush=True)
    bar = tqdm(total=total_steps, initial=progress["step"], disable=rank != 0, unit="step")

    def evaluate_when_due(step):
        due = step in (0, total_steps) or (args.eval_every and step % args.eval_every == 0)
        if not args.eval_dataset or not due or any_rank(step in log.evals):
            return
        table_PK = collect(eval_reference, eval_arrays, np.arange(len(eval_data)), eval_plan)
        if table_PK is not None:
            pairs = PairStats(*table_PK.unbind(1))
            metrics = pair_metrics(pairs, args)
            metrics["exact_match"] = (pairs.hits_w_P == pairs.length_w_P).float().mean().item()
            log.evals[step] = {f"eval/{name}": value for name, value in metrics.items()}
            log.write({"step": step, **log.evals[step]})
            if rank == 0:  # tqdm writes though it is disabled
                shown = ", ".join(f"{name} {log.evals[step][name]:.4f}" for name in EVAL_METRICS)
                bar.write(f"step {step}: {shown}")

    evaluate_when_due(progress["step"])  # on resume, where the run ended between a step and its evaluation

    # ---- Training ----
    for step in range(progress["step"], total_steps):
        began = time.perf_counter()
        torch.manual_seed(hash((args.seed, step, rank)) % 2**63)  # a step draws the same, resumed or not
        epoch, first = step // steps_per_epoch, step % steps_per_epoch * args.batch_size
        rows = epoch_order(len(data), args.seed, epoch)[first : first + args.batch_size]
        plan = split_batch(lengths[rows].tolist(), world_size, args.micro_batch_tokens, packing == "alone")
        mean_length_w, step_tokens = targets_w[rows].mean(), int(row_tokens[rows].sum())  # over all ranks
        learning_rate = args.learning_rate * lr_factor(step, total_steps, warmup_steps, args.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # ---- Losses that sort pairs need all of the step's: their gradient weighs each pair's log-probs ----
        slope_PK, step_reference = None, (reference, rows)
        if SORTING & {*args.loss_type}:
            if (table_PK := collect(reference, arrays, rows, plan)) is None:
                break
            loss_P = dpo_loss(PairStats(*table_PK.requires_grad_().unbind(1)), args, mean_length_w)
            slope_PK = torch.autograd.grad(loss_P.mean(), table_PK)[0]
            step_reference = table_PK.detach()[:, 2:4], np.arange(len(rows))

        # ---- Forward and backward, micro-batch by micro-batch ----
        table_PK = torch.zeros(len(rows), len(PairStats._fields), device=device)
        micro_losses, aux_total = [], torch.zeros((), device=device)
        for chosen in plan[rank]:
            if any_rank(caught_signals):
                break
            documents = pair_documents(arrays, rows[chosen])
            table, indices = step_reference
            ref_logps_P2 = reference_logps(args, policy, table, documents, indices[chosen], device, packing)
            wanted = {"want_sum_sq": args.use_weighting, "want_aux_loss": aux_coef > 0}
            stats, documents_N = forward_pairs(unwrap(policy), documents, device, packing, **wanted)
            pairs = pair_stats(stats, documents_N, ref_logps_P2, args)
            if slope_PK is None:
                loss = dpo_loss(pairs, args, mean_length_w).sum() / len(rows)
            else:
                loss = (torch.stack(pairs, 1) * slope_PK[chosen]).sum()
            if aux_coef > 0:
                aux_loss = stats.aux_loss * (row_tokens[rows[chosen]].sum() / step_tokens)
                loss = loss + aux_coef * aux_loss
                aux_total += aux_loss.detach()
            (loss * world_size).backward()  # FSDP averages over ranks; this is a share of a global mean
            table_PK[chosen] = torch.stack(pairs, 1).detach()
            micro_losses.append(loss.detach())
        if len(micro_losses) < len(plan[rank]):  # stopped by a signal: this step does not count
            break

        # ---- Step ----
        grad_norm = full(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)).item()
        dist.all_reduce(table_PK)  # each row is one rank's
        metrics = pair_metrics(PairStats(*table_PK.unbind(1)), args)
        if not math.isfinite(metrics["loss"] + grad_norm):
            stop_non_finite(step + 1, metrics["loss"], grad_norm, data, rows, plan[rank], micro_losses)
        optimizer.step()
        optimizer.zero_grad()
        progress = {"step": step + 1, "tokens": progress["tokens"] + step_tokens}
        if args.sync_ref_model and progress["step"] % args.ref_model_sync_steps == 0:
            move_reference(reference, policy, args.ref_model_mixup_alpha)

        # ---- Log, evaluate, save ----
        seconds = time.perf_counter() - began
        bar.update()
        bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, {step_tokens / seconds:,.0f} tokens/s", refresh=False
        )
        if progress["step"] % args.log_every == 0 or progress["step"] == total_steps:
            if aux_coef > 0:
                dist.all_reduce(aux_total)
                metrics["aux_loss"] = aux_total.item()
            metrics |= {"epoch": progress["step"] / steps_per_epoch, "grad_norm": grad_norm}
            metrics |= {"learning_rate": optimizer.param_groups[0]["lr"]}
            metrics |= {"tokens_per_second": step_tokens / seconds, "step_seconds": seconds}
            log.write({**progress, **metrics})
        evaluate_when_due(progress["step"])
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
        stop_ids = sorted(set(data.unique("stop_id")) - {-1})  # with what the model learns to stop
        final, problem = export(args, output_dir, policy, tokenizer, stop_ids, dtype)
        if problem:
            save_checkpoint(output_dir, progress, policy, optimizer, args.keep_checkpoints, **moving)
            raise UserError(
                f"{final} cannot be written: {problem}. Training is saved; mend it, then --resume"
            )
        if rank == 0:
            for name in EVAL_METRICS if {0, total_steps} <= log.evals.keys() else ():
                before, after = log.evals[0][name], log.evals[total_steps][name]
                print(f"{name}: {before:.4f} before training, {after:.4f} after {total_steps} steps")
            print(f"the model is in {final}; its answers end with {tokenizer.decode(stop_ids) or 'nothing'}")
    log.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.stdout.flush()
    os._exit(0)  # in Python's own teardown a thread of gloo may abort the process: pytorch/pytorch#179291
