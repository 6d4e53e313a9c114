"""Reward model: learn a score for answers from comparisons of them.

What is learnt, and where implementations differ:
1. Pairs: Bradley-Terry (arXiv:2203.02155 eq. 1), -log sigmoid(score_w - score_l - margin), divided by the
   rows of the whole step over all ranks. Where a row has a `probability` that the chosen side wins, and with
   --label-smoothing, it is the expected loss over both outcomes; the likelier side counts as the better one.
2. Rankings of K completions: Plackett-Luce, the likelihood of picking the best, then the best of the rest,
   and so on. Completions that tie are not compared.
3. A completion's score is read at its last token, known from its length: there is no padding here. final/ has
   a pad token that occurs in no row, so that transformers finds the same token in any batch. With LoRA it is
   a whole model, too, as no adapter can name its pad token or its one label: see --lora-merge.
4. --center-rewards-coefficient holds a row's scores around 0 (arXiv:2312.09244).
5. The score head computes in float32, and is trained with LoRA, too.

Shapes: R rows (pairs or rankings), K completions of a row, the best first; M compared pairs of completions; B
documents of a micro-batch, T its packed tokens, D hidden size.

Metrics, over the step's rows: loss; accuracy (share of compared pairs whose better side scores higher);
margin (mean difference of scores); min_reward, mean_reward, max_reward. Held-out, also eval/accuracy_low and
eval/accuracy_high (95 % Wilson interval), eval/calibration_error (of the probability that the better side
wins), eval/accuracy_shorter, _same_length and _longer (of the better side than the worse), eval/std_reward.

CPU:    python reward_model.py                       (the embedded model and data, in two minutes)
1 GPU:  python reward_model.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --learning-rate 1e-5
1 node: torchrun --nproc-per-node 8 reward_model.py --model ... --dataset ...
nodes:  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 reward_model.py
score:  python reward_model.py --model runs/NAME/final --score chats.jsonl
"""

import contextlib
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
import torch.nn.functional as F
import tyro
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
)

from common import (
    RANKING_FEATURES,
    UserError,
    check_pairs,
    collate,
    encode_ranking,
    encode_sft,
    load_tokenizer,
    mark_trained,
    parse_row,
    parse_source,
    prepare_data,
    special_tokens,
    split_batch,
)

ASSETS = Path(__file__).resolve().parent / "tests" / "assets"
TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen weights are not in checkpoints
EVAL_METRICS = ("eval/loss", "eval/accuracy", "eval/calibration_error")
# A resumed run may change these: they do not change what is learnt, but to rounding.
RUN_FLAGS = ["output_dir", "resume", "save_every", "keep_checkpoints", "eval_every", "log_every", "wandb"]
RUN_FLAGS += ["run_name", "micro_batch_tokens", "gradient_checkpointing", "compile"]
# With --score nothing is trained: only these apply.
SCORE_FLAGS = ["score", "model", "dtype", "attention", "trust_remote_code", "lora_rank", "load_in_4bit"]
SCORE_FLAGS += ["max_length", "chat_template", "micro_batch_tokens", "output_dir"]


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
    lora_merge: bool = True
    """Export final/ as one model with the adapters merged, rather than as an adapter."""
    load_in_4bit: bool = False
    """QLoRA: hold the frozen base in 4 bits (nf4) on each rank. Needs bitsandbytes."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""

    # --- data
    dataset: tuple[str, ...] = (str(ASSETS / "comparisons.jsonl"),)
    """Files, directories or hub ids; PATH:2 takes the rows twice an epoch, PATH:0.5 half of them."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    dataset_split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    eval_dataset: tuple[str, ...] = (str(ASSETS / "comparisons_eval.jsonl"),)
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
    batch_size: int = 32
    """Examples an optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: int = 8192
    """Most packed tokens in one forward on one rank. Out of memory? Lower it: the maths does not change."""
    epochs: int = 2
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; takes precedence over --epochs."""
    learning_rate: float = 3e-4
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
    eval_every: int = 100
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
    label_smoothing: float = 0.0
    """Probability that a preference between two is flipped."""
    center_rewards_coefficient: float = 0.0
    """Weight of the squared sum of a row's scores."""
    score: str | None = None
    """Train nothing: score the conversations of this .jsonl file with --model, to OUTPUT_DIR/scores.jsonl."""


# ---- Maths -------------------------------------------------------------------------------------------------


class Rankings(NamedTuple):
    """What rows say of their completions, the best first."""

    ranks_RK: torch.Tensor
    """Smaller is better; inf where a row has fewer completions."""
    margin_R: torch.Tensor
    """By how much the first of two should be above the second."""
    probability_R: torch.Tensor
    """That the first of two wins; -1 where the row has none."""


def reward_loss(scores_RK, rankings, label_smoothing, centering):
    """Loss of each row, (R,); the caller divides the sum by the step's global number of rows.

    Scores of completions that a row does not have are 0.
    """
    ranks_RK = rankings.ranks_RK
    gap_R = scores_RK[:, 0] - scores_RK[:, 1] - rankings.margin_R
    wins_R = torch.where(rankings.probability_R < 0, 1 - label_smoothing, rankings.probability_R)
    bradley_terry_R = -wins_R * F.logsigmoid(gap_R) - (1 - wins_R) * F.logsigmoid(-gap_R)
    # Each is picked from itself and those ranked below it. One that is missing is alone: log 1.
    below_RKK = (ranks_RK[:, None, :] > ranks_RK[:, :, None]) & ranks_RK.isfinite()[:, None, :]
    choices_RKK = below_RKK | torch.eye(ranks_RK.shape[1], dtype=torch.bool, device=ranks_RK.device)
    scores_RKK = scores_RK[:, None, :].masked_fill(~choices_RKK, -torch.inf)
    plackett_luce_R = (scores_RKK.logsumexp(2) - scores_RK).sum(1)
    completions_R = ranks_RK.isfinite().sum(1)
    centered_R = (2 / completions_R * scores_RK.sum(1)) ** 2
    return torch.where(completions_R == 2, bradley_terry_R, plackett_luce_R) + centering * centered_R


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


def compared_pairs(scores_RK, rankings):
    """All pairs of completions of one row that do not tie: the better one's score less the worse one's, (M,),
    and where they are: row, better, worse, (M,) each."""
    ranks_RK = rankings.ranks_RK
    better_RKK = (ranks_RK[:, :, None] < ranks_RK[:, None, :]) & ranks_RK.isfinite()[:, None, :]
    row_M, better_M, worse_M = better_RKK.nonzero(as_tuple=True)
    return scores_RK[row_M, better_M] - scores_RK[row_M, worse_M], (row_M, better_M, worse_M)


def reward_metrics(scores_RK, rankings, args):
    """Metrics over all rows of a step or of the held-out data, by TRL's names."""
    gap_M, _ = compared_pairs(scores_RK, rankings)
    scores_B = scores_RK[rankings.ranks_RK.isfinite()]
    losses_R = reward_loss(scores_RK, rankings, args.label_smoothing, args.center_rewards_coefficient)
    metrics = {
        "loss": losses_R.mean(),
        "accuracy": (gap_M > 0).float().mean(),
        "margin": gap_M.mean(),
        "min_reward": scores_B.min(),
        "mean_reward": scores_B.mean(),
        "max_reward": scores_B.max(),
    }
    return {name: value.item() for name, value in metrics.items()}


def heldout_metrics(scores_RK, rankings, targets_RK, args):
    """The same and more, as eval/...; targets_RK: tokens of each completion. Empty buckets are left out."""
    metrics = reward_metrics(scores_RK, rankings, args)
    metrics["std_reward"] = scores_RK[rankings.ranks_RK.isfinite()].std(correction=0).item()
    gap_M, (row_M, better_M, worse_M) = compared_pairs(scores_RK, rankings)
    metrics["accuracy_low"], metrics["accuracy_high"] = wilson_interval(metrics["accuracy"], len(gap_M))
    wins_M = torch.where(rankings.probability_R < 0, 1.0, rankings.probability_R)[row_M]
    metrics["calibration_error"] = calibration_error(gap_M, wins_M)
    longer_M = targets_RK[row_M, better_M] - targets_RK[row_M, worse_M]
    buckets = {"shorter": longer_M < 0, "same_length": longer_M == 0, "longer": longer_M > 0}
    for name, bucket_M in buckets.items():
        if bucket_M.any():
            metrics[f"accuracy_{name}"] = (gap_M > 0)[bucket_M].float().mean().item()
    return {f"eval/{name}": value for name, value in metrics.items()}


def wilson_interval(share, n):
    """The 95 % interval of a share of n trials: Wilson 1927."""
    z = 1.959964
    center, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (center - spread) / (1 + z * z / n), (center + spread) / (1 + z * z / n)


def calibration_error(gap_M, wins_M, bins=10):
    """Expected calibration error (arXiv:1706.04599 eq. 3) of the favourite's probability to win. wins_M: the
    data's probability that the better side wins."""
    confidence_M = torch.sigmoid(gap_M.abs())  # from 1/2 to 1
    bin_M = ((confidence_M - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    error_M = torch.where(gap_M > 0, wins_M, 1 - wins_M).double() - confidence_M
    error_of_bins = error_M.new_zeros(bins).index_add_(0, bin_M, error_M)
    return error_of_bins.abs().sum().item() / len(gap_M)


def scores(self, batch):
    """A method for sequence classification models: MicroBatch -> each document's score, (B,), float32."""
    hidden_TD = self.base_model(**batch.inputs).last_hidden_state[0]
    return self.score(hidden_TD.index_select(0, batch.last_B).float()).float().squeeze(1)


# ---- Data --------------------------------------------------------------------------------------------------


def ranked_documents(data, rows):
    """[(ids, loss mask), ...] of some rows, each row's best first."""
    columns, documents = data[rows], []
    for ids, mask, lengths in zip(
        columns["input_ids"], columns["loss_mask"], columns["lengths"], strict=True
    ):
        ends = np.cumsum(lengths)[:-1]
        documents += zip(np.split(ids, ends), np.split(mask, ends), strict=True)
    return documents


def padded(lists, value):
    """Lists of numbers -> (R, K), filled up with a value."""
    lists = list(lists)
    width = max(map(len, lists))
    return torch.tensor([row + [value] * (width - len(row)) for row in lists])


def load_rankings(data):
    """Rankings of all rows, on the CPU."""
    columns = padded(data["ranks"], math.inf), torch.tensor(data["margin"]), torch.tensor(data["probability"])
    return Rankings(*(column.float() for column in columns))


def select_rankings(rankings, rows, device):
    return Rankings(*(column[rows].to(device) for column in rankings))


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


# ---- Scores ------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_check(policy, device, dtype):
    """Compare scores with the model's own, of short documents -> what they bear: standing in one row
    ("packed"), and with a prompt that they share ("shared"), or neither ("alone").

    Raises UserError if those of a document alone differ: then `scores` does not know the architecture's head;
    or if tokens see later ones: then the architecture does not honour --attention.
    """
    model, tolerance = unwrap(policy), 1e-3 if dtype == torch.float32 else 0.2
    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randint(text.vocab_size, (n,), generator=generator).numpy() for n in (7, 12)]
    first, second = (np.where(ids == text.pad_token_id, (ids + 1) % text.vocab_size, ids) for ids in pair)
    other, branch = (first + 1) % text.vocab_size, np.append(first[:4], second)
    sibling, longer = np.append(first[:4], other[4:]), np.append(second, first[0])

    def score(*documents, share_prompts=False, earlier=0):
        batch = collate([(ids, np.arange(len(ids)) >= 4) for ids in documents], device, share_prompts)
        batch.last_B -= earlier
        return model.scores(batch)

    def own(*documents):
        rows = [torch.from_numpy(ids).to(device)[None] for ids in documents]
        return torch.cat([model(input_ids=ids_BT, use_cache=False).logits[0].float() for ids_BT in rows])

    def largest(error_B):
        return error_B.abs().max().item()

    policy.eval()
    try:
        alone_B = torch.cat([score(first), score(second)])
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"{text.model_type} is built in a way that `scores` does not know: {error!r}"
        ) from error
    if (error := largest(alone_B - own(first, second))) > tolerance:
        raise UserError(
            f"{text.model_type}: scores from hidden states differ from its own by {error:.3g}; its "
            "score head is not a linear layer on the last token: adapt `scores`"
        )
    packed_B, shared_B = score(first, second), score(first, branch, share_prompts=True)
    errors = largest(packed_B - own(first, second)), largest(shared_B - own(first, branch))
    # What a token cannot see changes its score by nothing at all, however small a new head's scores.
    leak_back = largest(score(longer, earlier=1) - score(np.append(second, first[1]), earlier=1))
    leak_across = largest((packed_B - score(other, second))[1])
    leak_beside = largest((shared_B - score(sibling, branch, share_prompts=True))[1])
    policy.train()
    if leak_back > 1e-5:
        raise UserError(
            f"{text.model_type} lets tokens see later ones with this --attention; use --attention eager"
        )
    rope = json.dumps(getattr(text, "rope_parameters", None) or {}, default=str)
    length_dependent = "longrope" in rope or "dynamic" in rope  # which short documents do not show
    if errors[0] > tolerance or leak_across > 1e-5 or length_dependent:
        return "alone"
    return "packed" if errors[1] > tolerance or leak_beside > 1e-5 else "shared"


def score_documents(model, documents, device, packing, most):
    """Scores of documents, (B,), in one row or (if they must be alone) each in its own, of `most` rows on
    every rank."""
    rows = [documents]
    if packing == "alone":
        rows = [[document] for document in documents] + [[]] * (most - len(documents))
    return torch.cat([model.scores(collate(row, device, packing == "shared"))[: len(row)] for row in rows])


@torch.no_grad()
def collect_scores(policy, data, rankings, plan, device, packing, caught_signals):
    """Scores of all rows, (R, K), over all ranks. None if stopped by a signal."""
    policy.eval()
    ranks_RK = rankings.ranks_RK
    table_RK = torch.zeros(ranks_RK.shape, device=device)
    for rows in plan[dist.get_rank()]:
        if any_rank(caught_signals):
            return None
        scores_B = score_documents(
            unwrap(policy), ranked_documents(data, rows), device, packing, ranks_RK.shape[1]
        )
        has_RK = ranks_RK[rows].isfinite().to(device)
        table_RK[rows] = torch.zeros(has_RK.shape, device=device).masked_scatter(has_RK, scores_B)
    policy.train()
    dist.all_reduce(table_RK)  # each row is one rank's
    return table_RK


def load_reward_config(args):
    """The config of the model with one label; UserError where it is a classifier of more."""
    config = load_config(args)
    is_classifier = any("SequenceClassification" in name for name in config.architectures or ())
    if is_classifier and config.num_labels != 1:
        raise UserError(f"--model {args.model} has {config.num_labels} labels; a reward model has one")
    if args.score and not (is_classifier or adapter_config(args)):
        raise UserError(
            f"--score needs a trained reward model; --model {args.model} is {config.architectures}"
        )
    config.num_labels = 1
    return config


def load_reward_model(args, config, device, pad_id):
    """The sharded policy, with `scores` and pad_id, a row of embeddings for which is added if need be."""
    policy = load_policy(args, config, device, AutoModelForSequenceClassification)
    model = unwrap(policy)
    if pad_id is not None:
        if pad_id >= config.get_text_config().vocab_size:
            if args.lora_rank and not args.lora_merge:
                raise UserError(
                    "the tokenizer has no pad token that is free, and an adapter brings none; leave out "
                    "--no-lora-merge, or add one to the tokenizer"
                )
            model.resize_token_embeddings(pad_id + 1, mean_resizing=False)
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_id
    model.scores = MethodType(scores, model)
    shard(policy, args, device, ["scores"])
    return policy


def score_file(args):
    """Write OUTPUT_DIR/scores.jsonl: each row of --score with its `score`, or null and the `problem`."""
    if (adapter := Path(args.model) / "adapter_config.json").exists() and not args.lora_rank:
        with contextlib.suppress(ValueError, AttributeError):  # a broken one is refused below
            args = replace(args, lora_rank=json.loads(adapter.read_text()).get("r", 0))
    config = load_reward_config(args)
    tokenizer = load_tokenizer(args.model, args.chat_template, args.trust_remote_code)
    encode = functools.partial(
        encode_sft,
        tokenizer=tokenizer,
        max_length=min(check_lengths(args, config), args.micro_batch_tokens),
        vocab_size=config.get_text_config().vocab_size,
    )
    rank, world_size, device = init_distributed()
    policy = load_reward_model(args, config, device, None)
    packing = score_check(policy, device, compute_dtype(args, device))
    output_dir = choose_output_dir(args)
    if any_rank(rank == 0 and (output_dir / "scores.jsonl").exists()):
        raise UserError(f"{output_dir / 'scores.jsonl'} exists; name another --output-dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    policy.eval()
    count = failed = 0
    with (
        open(args.score, "rb") as file,
        open(output_dir / "scores.jsonl" if rank == 0 else os.devnull, "w", encoding="utf-8") as out,
        torch.no_grad(),
    ):
        lines = tqdm(filter(bytes.strip, file), unit="row", disable=rank != 0)
        while chunk := list(itertools.islice(lines, 1024)):
            rows, encoded = zip(*(read_scored(line, encode) for line in chunk), strict=True)
            good = [place for place, result in enumerate(encoded) if not isinstance(result, str)]
            lengths = [len(encoded[place]) for place in good]
            scores_P = torch.zeros(len(chunk), device=device)
            plan = (
                split_batch(lengths, world_size, args.micro_batch_tokens, packing == "alone")
                if good
                else {rank: []}
            )
            for some in plan[rank]:
                places = [good[index] for index in some]
                documents = [(np.array(encoded[place]), np.zeros(len(encoded[place]))) for place in places]
                scores_P[places] = score_documents(unwrap(policy), documents, device, packing, 1)
            dist.all_reduce(scores_P)  # each is one rank's
            for row, result, score in zip(rows, encoded, scores_P.tolist(), strict=True):
                said = {"score": None, "problem": result} if isinstance(result, str) else {"score": score}
                out.write(json.dumps({**row, **said}, ensure_ascii=False) + "\n")
            out.flush()
            count, failed = count + len(chunk), failed + len(chunk) - len(good)
    if rank == 0:
        print(
            f"{count - failed} of {count} rows have a score in {output_dir}/scores.jsonl, the rest a problem"
        )
    dist.destroy_process_group()


def read_scored(line, encode):
    """A line of --score -> the row, and its ids or what is wrong with it. As in training, a prompt may be
    text and the completion messages, and the other way round."""
    row = {}
    try:
        row = parse_row(line)
        match row:
            case {"prompt": str(prompt), "completion": list()}:
                encoded = encode({**row, "prompt": [{"role": "user", "content": prompt}]})
            case {"prompt": list(), "completion": str(completion)}:
                encoded = encode({**row, "completion": [{"role": "assistant", "content": completion}]})
            case _:
                encoded = encode(row)
    except UserError as error:
        return row, str(error)
    return row, encoded["dropped"] or encoded["input_ids"]


def choose_pad(tokenizer, data):
    """Give the tokenizer a pad token that no row has, of its own special ones or a new one -> its id."""
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for batch in data.with_format("numpy", ["input_ids"]).iter(1000):
        used.update(np.unique(np.concatenate(list(batch["input_ids"]))).tolist())
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in used:
        free = {token: index for token, index in special_tokens(tokenizer).items() if index not in used}
        reserved = [token for token in free if any(word in token for word in ("pad", "reserved", "unused"))]
        tokenizer.add_special_tokens({"pad_token": min(reserved, key=free.get, default="<|pad|>")})
    return tokenizer.pad_token_id


# ---- Main --------------------------------------------------------------------------------------------------


def check_args(args):
    """This script's own checks of its flags."""
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label-smoothing is {args.label_smoothing}; it must be at least 0 and below 0.5")
    if not 0 <= args.center_rewards_coefficient < math.inf:
        raise UserError(
            f"--center-rewards-coefficient is {args.center_rewards_coefficient}; it must be 0 or more"
        )
    if args.score is None:
        return
    if not Path(args.score).is_file():
        raise UserError(f"--score {args.score}: no such file (looked from {Path.cwd()})")
    if Path(args.score).suffix != ".jsonl":
        raise UserError(f"--score {args.score} must be a .jsonl file, with one conversation a line")
    defaults = asdict(type(args)())
    for name, default in defaults.items():
        if name not in SCORE_FLAGS and getattr(args, name) != default:
            raise UserError(f"{flag(name)} does not apply to --score, which trains nothing; leave it out")


def main(args):
    # ---- Checks and data, before any process waits for another ----
    args = without_foreign_eval(args)
    check_shared_args(args)
    check_args(args)
    if args.score:
        return score_file(args)
    config = load_reward_config(args)
    tokenizer = load_tokenizer(args.model, args.chat_template, args.trust_remote_code)
    encode = functools.partial(
        encode_ranking,
        tokenizer=tokenizer,
        max_length=check_lengths(args, config),
        overflow=args.overflow,
        vocab_size=config.get_text_config().vocab_size,
    )
    prepare = functools.partial(
        prepare_data, encode=encode, features=RANKING_FEATURES, config=args.dataset_config
    )
    data, report = prepare(args.dataset, split=args.dataset_split, seed=args.seed)
    data, pairs_report = check_pairs(data, args.contradictions)
    row_tokens, rankings = packed_lengths(data, args, "shared"), load_rankings(data)
    if args.label_smoothing and rankings.ranks_RK.shape[1] > 2:
        raise UserError("--label-smoothing applies to pairs, but the data has rankings; leave it out")
    if args.eval_dataset:
        eval_data, eval_report = prepare(args.eval_dataset, split=args.eval_split)
        eval_rankings = load_rankings(eval_data)
        eval_tokens = packed_lengths(eval_data, args, "shared")
    pad_id = choose_pad(tokenizer, data)
    steps_per_epoch = math.ceil(len(data) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    if args.warmup_steps >= total_steps:
        raise UserError(f"--warmup-steps {args.warmup_steps:g} leaves nothing of the {total_steps} steps")
    warmup_steps = int(args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * total_steps)

    # ---- Model and optimizer ----
    # --- shared: init ---
    rank, world_size, device = init_distributed()
    caught_signals = catch_signals()
    dtype = compute_dtype(args, device)
    torch.manual_seed(args.seed)
    # --- end shared ---
    data_digest = rows_digest(data)
    check_same_data(data_digest, rows_digest(eval_data) if args.eval_dataset else None)
    policy = load_reward_model(args, config, device, pad_id)
    parameters = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = make_optimizer(args, parameters)
    packing = score_check(policy, device, dtype)  # not before: a forward leaves FSDP's root unsharded

    # ---- Output directory, resume, report ----
    output_dir = choose_output_dir(args)
    progress = {"step": 0, "tokens": 0}
    if args.resume:
        check_resumable(output_dir, args, data_digest)
        if checkpoints := complete_checkpoints(output_dir):
            progress = load_checkpoint(checkpoints[-1], policy, optimizer)
        if rank == 0:
            print(f"resuming after step {progress['step']}, from {checkpoints[-1]}" if checkpoints else
                  f"{output_dir} has no complete checkpoint: starting from the beginning")  # fmt: skip
    log = RunLog(args, output_dir, data_digest, keep_until=progress["step"] or -1)
    lengths = packed_lengths(data, args, packing)
    arrays = data.with_format("numpy", ["input_ids", "loss_mask", "lengths"])
    if args.eval_dataset:
        eval_lengths = packed_lengths(eval_data, args, packing)
        eval_arrays = eval_data.with_format("numpy", ["input_ids", "loss_mask", "lengths"])
        eval_plan = split_batch(
            eval_lengths.tolist(), world_size, args.micro_batch_tokens, packing == "alone"
        )
    if rank == 0:
        total, trained = (
            sum(weight.numel() for weight in some) for some in (policy.parameters(), parameters)
        )
        print(f"model     {args.model}: {total:,} parameters, {trained:,} trained")
        print(f"device    {world_size} x {device.type}, computing in {dtype}")
        describe("train", data, report, row_tokens)
        print(f"rows      {pairs_report}")
        if args.eval_dataset:
            describe("held out", eval_data, eval_report, eval_tokens)
        rows = f"rows of up to {args.micro_batch_tokens} tokens"
        rows = "one completion a row" if packing == "alone" else rows
        print(f"steps     {total_steps} of {args.batch_size} rows ({steps_per_epoch} an epoch), in {rows}")
        print(
            f"example   row {data[0]['row']} of {data[0]['source']}, best first; completions stand in [[ ]]:"
        )
        for ids, mask in ranked_documents(arrays, [0]):
            print(mark_trained(tokenizer, ids, mask))
        print(f"output    {output_dir}; the pad token is {tokenizer.pad_token}", flush=True)
    bar = tqdm(total=total_steps, initial=progress["step"], disable=rank != 0, unit="step")

    def evaluate_when_due(step):
        due = step in (0, total_steps) or (args.eval_every and step % args.eval_every == 0)
        if not args.eval_dataset or not due or any_rank(step in log.evals):
            return
        scores_RK = collect_scores(
            policy, eval_arrays, eval_rankings, eval_plan, device, packing, caught_signals
        )
        if scores_RK is not None:
            targets_RK = padded(eval_data["targets"], 0)
            log.evals[step] = heldout_metrics(scores_RK.cpu(), eval_rankings, targets_RK, args)
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
        step_tokens = int(row_tokens[rows].sum())  # over all ranks
        learning_rate = args.learning_rate * lr_factor(step, total_steps, warmup_steps, args.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # ---- Forward and backward, micro-batch by micro-batch ----
        step_rankings = select_rankings(rankings, rows, device)
        table_RK = torch.zeros_like(step_rankings.ranks_RK)  # scores
        micro_losses = []
        for chosen in plan[rank]:
            if any_rank(caught_signals):
                break
            documents = ranked_documents(arrays, rows[chosen])
            scores_B = score_documents(unwrap(policy), documents, device, packing, table_RK.shape[1])
            some = select_rankings(step_rankings, chosen, device)
            scores_RK = torch.zeros_like(some.ranks_RK).masked_scatter(some.ranks_RK.isfinite(), scores_B)
            losses_R = reward_loss(scores_RK, some, args.label_smoothing, args.center_rewards_coefficient)
            loss = losses_R.sum() / len(rows)
            (loss * world_size).backward()  # FSDP averages over ranks; this is a share of a global mean
            table_RK[chosen] = scores_RK.detach()
            micro_losses.append(loss.detach())
        if len(micro_losses) < len(plan[rank]):  # stopped by a signal: this step does not count
            break

        # ---- Step ----
        grad_norm = full(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)).item()
        dist.all_reduce(table_RK)  # each row is one rank's
        metrics = reward_metrics(table_RK, step_rankings, args)
        if not math.isfinite(metrics["loss"] + grad_norm):
            stop_non_finite(step + 1, metrics["loss"], grad_norm, data, rows, plan[rank], micro_losses)
        optimizer.step()
        optimizer.zero_grad()
        progress = {"step": step + 1, "tokens": progress["tokens"] + step_tokens}

        # ---- Log, evaluate, save ----
        seconds = time.perf_counter() - began
        bar.update()
        bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, {step_tokens / seconds:,.0f} tokens/s", refresh=False
        )
        if progress["step"] % args.log_every == 0 or progress["step"] == total_steps:
            metrics |= {"epoch": progress["step"] / steps_per_epoch, "grad_norm": grad_norm}
            metrics |= {"learning_rate": optimizer.param_groups[0]["lr"]}
            metrics |= {"tokens_per_second": step_tokens / seconds, "step_seconds": seconds}
            log.write({**progress, **metrics})
        evaluate_when_due(progress["step"])
        if args.save_every and (progress["step"] % args.save_every == 0 or progress["step"] == total_steps):
            save_checkpoint(output_dir, progress, policy, optimizer, args.keep_checkpoints)
    bar.close()

    # ---- End: stopped by a signal, or done ----
    if any_rank(caught_signals):
        optimizer.zero_grad()
        if progress["step"]:
            save_checkpoint(output_dir, progress, policy, optimizer, args.keep_checkpoints)
        if rank == 0:
            kept = "which is saved" if progress["step"] else "nothing to save yet"
            print(f"stopped by a signal after step {progress['step']} of {total_steps}, {kept}")
            print(f"to go on, give the same flags with --output-dir {output_dir} --resume")
    else:
        final, problem = export(args, output_dir, policy, tokenizer, [], dtype)
        if problem:
            save_checkpoint(output_dir, progress, policy, optimizer, args.keep_checkpoints)
            raise UserError(
                f"{final} cannot be written: {problem}. Training is saved; mend it, then --resume"
            )
        if rank == 0:
            for name in EVAL_METRICS if {0, total_steps} <= log.evals.keys() else ():
                before, after = log.evals[0][name], log.evals[total_steps][name]
                print(f"{name}: {before:.4f} before training, {after:.4f} after {total_steps} steps")
            print(f"the model is in {final}; to score: python reward_model.py --model {final} --score FILE")
    log.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.stdout.flush()
    os._exit(0)  # in Python's own teardown a thread of gloo may abort the process: pytorch/pytorch#179291
