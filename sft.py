"""Supervised fine-tuning (SFT): raise the likelihood of the answers in a dataset, token by token.

What is trained, and where implementations differ:
1. Only the tokens that the model must produce: the completion, or the assistant's turns with the token that ends each
   (--loss-on). The mask comes from the chat template itself (common.encode_messages).
2. Every trained token weighs the same: losses are summed and divided by the number of trained tokens of the whole step
   over all micro-batches and ranks, so that neither hardware nor --micro-batch-tokens changes the loss.
3. Documents are packed into rows without padding, and attention keeps them apart: packed equals alone.
4. Logits are never held: log-probs come from the hidden states in chunks, recomputed in the backward.
5. --loss-type dft weighs each token by its own detached probability (Dynamic Fine-Tuning, arXiv:2508.05629, eq. 9);
   --label-smoothing mixes in the uniform distribution (Szegedy et al. 2016); --neftune-alpha adds noise to the
   embeddings (arXiv:2310.05914).

Shapes: T packed tokens of a micro-batch, N its trained positions, D hidden size, V vocabulary, B documents.
Alignment: labels_N[i] is the token that position positions_N[i] predicts; logps_N[i] is its log-probability.

Metrics: loss, entropy and mean_token_accuracy over the step's trained tokens; grad_norm before clipping; learning_rate;
tokens, all tokens so far; tokens_per_second. Held-out: eval/loss, eval/mean_token_accuracy, and eval/exact_match, the
share of examples whose every trained token is the arg-max: what greedy decoding would reproduce.

    python sft.py                                                    the embedded model and data, on a CPU, two minutes
    python sft.py --model Qwen/Qwen3-0.6B --dataset chats.jsonl --learning-rate 1e-5          one GPU
    torchrun --nproc-per-node 8 sft.py --model ... --dataset ...                              one node
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 sft.py ...   several nodes
"""

import functools
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from common import SFT_COLUMNS, UserError, collate, encode_sft, load_tokenizer, mark_trained, prepare_data, split_batch

ASSETS = Path(__file__).resolve().parent / "tests" / "assets"


@dataclass(frozen=True)
class Args:
    # --- model
    model: str = str(ASSETS / "model")
    """A directory with a causal language model, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in: auto is bfloat16 on CUDA, float32 on CPU. Trained weights are float32 always."""
    attention: str = "varlen"
    """Attention implementation of transformers; varlen keeps packed documents apart. One that cannot gets a row each."""
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
    dataset: tuple[str, ...] = (str(ASSETS / "messages.jsonl"),)
    """Files (.jsonl, .json, .parquet, .csv), directories or hub ids; PATH:2 takes its rows twice an epoch, PATH:0.5 half."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    dataset_split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    eval_dataset: tuple[str, ...] = (str(ASSETS / "messages_eval.jsonl"),)
    """Held-out data, as --dataset; none with --eval-dataset alone."""
    eval_split: str = "test"
    """Split of the held-out data, as --dataset-split."""
    max_length: int | None = None
    """Most tokens of an example; the model's context if not given."""
    chat_template: str | None = None
    """A file with a Jinja chat template to use in place of the tokenizer's own."""
    overflow: Literal["drop", "truncate", "error"] = "drop"
    """What happens to an example longer than --max-length. Drops are counted and printed."""
    loss_on: Literal["auto", "completion", "assistant", "last-assistant", "all"] = "auto"
    """Which tokens are trained; auto: the completion, else the assistant's turns, else (plain text) all."""

    # --- optimization
    batch_size: int = 128
    """Examples an optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: int = 8192
    """Most packed tokens in one forward on one rank. Out of memory? Lower it: the maths does not change."""
    epochs: int = 3
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; takes precedence over --epochs."""
    learning_rate: float = 1e-3
    """Peak learning rate. The default suits the embedded 1M model: use about 1e-5 for 1B and more, 1e-4 with LoRA."""
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """Decay after warm-up, to 0 at the last step; wsd is constant, then linear over the last fifth."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
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
    """Steps between evaluations; there is always one before the first step and one after the last. 0: only those."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl; a row holds that step's values."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases logging; offline needs no account: see the curves with `wandb leet OUTPUT_DIR/wandb/latest-run`."""
    run_name: str | None = None
    """Name of the run in wandb; the output directory's if not given."""

    # --- algorithm
    loss_type: Literal["nll", "dft"] = "nll"
    """nll: cross-entropy. dft: each token's cross-entropy times its own probability."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary (nll only)."""
    neftune_alpha: float = 0.0
    """Size of the uniform noise on embeddings; 0 is none. Changes with packing, unlike everything else."""
    router_aux_loss_coef: float | None = None
    """Weight of a mixture-of-experts model's load-balancing loss; its config's if not given, 0 is none."""


# ---- Maths -----------------------------------------------------------------------------------------------------------


def sft_loss(logps_N, mean_logps_N, loss_type, label_smoothing):
    """Loss of each trained token, (N,); the caller sums it and divides by the step's global number of trained tokens.

    logps_N: log-prob of each label; mean_logps_N: mean log-prob over the vocabulary (None without label smoothing).
    """
    match loss_type:
        case "nll" if label_smoothing:
            return -(1 - label_smoothing) * logps_N - label_smoothing * mean_logps_N
        case "nll":
            return -logps_N
        case "dft":  # arXiv:2508.05629: the policy-gradient view of SFT has an implicit weight 1/p, which p removes
            return -logps_N.exp().detach() * logps_N


def lr_factor(step, total_steps, warmup_steps, schedule):
    """Share of the peak learning rate in step `step` (counted from 0)."""
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


class TokenStats(NamedTuple):
    """What a forward says of each trained position; all (N,), float32 but for is_top1_N. None where not asked for."""

    logps_N: torch.Tensor
    entropy_N: torch.Tensor
    is_top1_N: torch.Tensor
    mean_logps_N: torch.Tensor | None
    aux_loss: torch.Tensor | None


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probs of labels, entropy, arg-max hits and (if asked) mean log-probs, without holding logits (N, V).

    logits = softcap * tanh(scale * (hidden_ND @ weight_VD.T + bias_V) / softcap) / temperature, a chunk of positions at
    a time, recomputed in the backward. The log-sum-exp is fp32 and weight gradients accumulate in fp32. All four
    outputs but is_top1_N can be differentiated: with p the softmax of a position and H its entropy,
        d logp / d logits = onehot - p,   d mean_logp / d logits = 1/V - p,   d H / d logits = -p (log p + H).
    """

    CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}  # logits held at a time: 16 MiB on CPU (near its cache), 1 GiB on CUDA

    @staticmethod
    def logits(hidden_CD, weight_VD, bias_V, head, out=None):
        """One chunk's logits before the temperature's division is undone: (C, V), float32."""
        if hidden_CD.is_cuda and hidden_CD.dtype != torch.float32:
            logits_CV = torch.mm(hidden_CD, weight_VD.T, out_dtype=torch.float32)
        else:
            logits_CV = torch.mm(hidden_CD, weight_VD.T, out=out).float()
        if bias_V is not None:
            logits_CV += bias_V.float()
        if head.scale != 1:
            logits_CV *= head.scale
        if head.softcap:
            logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
        return logits_CV.div_(head.temperature) if head.temperature != 1 else logits_CV

    @staticmethod
    def chunks(hidden_ND, weight_VD):
        size = max(1, ChunkedLogProbs.CHUNK_ELEMENTS[hidden_ND.device.type] // len(weight_VD))
        buffer = None
        if hidden_ND.device.type == "cpu":  # one buffer for all chunks: fresh memory costs page faults
            buffer = hidden_ND.new_empty(min(size, len(hidden_ND)), len(weight_VD))
        for start in range(0, len(hidden_ND), size):
            rows = slice(start, min(start + size, len(hidden_ND)))
            yield rows, None if buffer is None else buffer[: rows.stop - start]

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, head, want_mean):
        logps_N, entropy_N, mean_N, lse_N = (hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(4))
        is_top1_N = torch.empty_like(labels_N, dtype=torch.bool)
        for rows, out in ChunkedLogProbs.chunks(hidden_ND, weight_VD):
            logits_CV = ChunkedLogProbs.logits(hidden_ND[rows], weight_VD, bias_V, head, out)
            top_C1 = logits_CV.amax(-1, keepdim=True)
            label_C1 = logits_CV.gather(1, labels_N[rows, None])
            if want_mean:
                mean_N[rows] = logits_CV.mean(-1)
            is_top1_N[rows] = (label_C1 == top_C1).squeeze(1)
            probs_CV = torch.softmax(logits_CV, -1)
            lse_C1 = top_C1 - probs_CV.amax(-1, keepdim=True).log()  # the arg-max has probability 1 / sum exp(z - top)
            logps_N[rows] = (label_C1 - lse_C1).squeeze(1)
            lse_N[rows] = lse_C1.squeeze(1)
            entropy_N[rows] = lse_N[rows] - torch.linalg.vecdot(probs_CV, logits_CV)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, lse_N, entropy_N)
        ctx.head = head
        ctx.mark_non_differentiable(is_top1_N)
        ctx.set_materialize_grads(False)
        return logps_N, entropy_N, is_top1_N, (mean_N - lse_N) if want_mean else None

    @staticmethod
    def backward(ctx, grad_logps_N, grad_entropy_N, _, grad_mean_N):
        hidden_ND, weight_VD, bias_V, labels_N, lse_N, entropy_N = ctx.saved_tensors
        head, zeros_N = ctx.head, torch.zeros_like(lse_N)
        grad_logps_N = zeros_N if grad_logps_N is None else grad_logps_N
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for rows, out in ChunkedLogProbs.chunks(hidden_ND, weight_VD):
            logits_CV = ChunkedLogProbs.logits(hidden_ND[rows], weight_VD, bias_V, head, out)
            slope_CV = 1 - (logits_CV * (head.temperature / head.softcap)) ** 2 if head.softcap else None
            grad_CV = logits_CV.sub_(lse_N[rows, None])
            pull_N = grad_logps_N[rows] if grad_mean_N is None else grad_logps_N[rows] + grad_mean_N[rows]
            if grad_entropy_N is None:
                grad_CV.exp_().mul_(-pull_N[:, None])
            else:
                surprise_CV = (grad_CV + entropy_N[rows, None]).mul_(grad_entropy_N[rows, None]).add_(pull_N[:, None])
                grad_CV.exp_().mul_(surprise_CV.neg_())
            if grad_mean_N is not None:
                grad_CV += grad_mean_N[rows, None] / len(weight_VD)
            grad_CV.scatter_add_(1, labels_N[rows, None], grad_logps_N[rows, None])
            grad_CV = grad_CV.mul_(slope_CV) if head.softcap else grad_CV
            if head.scale != head.temperature:
                grad_CV *= head.scale / head.temperature
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[rows])
            if grad_weight_VD is None:
                continue
            if grad_CV.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_CV.T, hidden_ND[rows])
            else:
                grad_weight_VD += grad_CV.T @ hidden_ND[rows]
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, None, None, None


class Head(NamedTuple):
    """What a model does to its logits after the matrix product, and the sampling temperature."""

    scale: float
    softcap: float
    temperature: float


def token_stats(self, batch, temperature=1.0, want_mean=False, aux_loss=False):
    """A method for causal language models: MicroBatch -> TokenStats at its trained positions.

    Honours what architectures do to logits: bias, multipliers (Cohere, Granite, Falcon-H1), soft-cap (Gemma).
    `self_check` compares it with the model's own forward at every start.
    """
    config = self.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    head = Head(scale, getattr(config, "final_logit_softcapping", None) or 0.0, temperature)
    outputs = self.base_model(**batch.inputs, **({"output_router_logits": True} if aux_loss else {}))
    hidden_ND = outputs.last_hidden_state[0].index_select(0, batch.positions_N)
    lm_head = self.get_output_embeddings()
    stats = ChunkedLogProbs.apply(hidden_ND, lm_head.weight, lm_head.bias, batch.labels_N, head, want_mean)
    if aux_loss:
        balance = sys.modules[type(self.base_model).__module__].load_balancing_loss_func
        experts = getattr(config, "num_experts", None) or config.num_local_experts
        aux_loss = balance(outputs.router_logits, experts, config.num_experts_per_tok)
    return TokenStats(*stats, aux_loss if aux_loss is not False else None)


# ---- Shared with the other scripts: checks, model --------------------------------------------------------------------


def check_shared_args(args, world_size):
    """Refuse, before anything is loaded, values out of range and flags that the chosen mode would ignore."""
    defaults = type(args)()
    positive = ("batch_size", "micro_batch_tokens", "epochs", "learning_rate", "lora_alpha", "keep_checkpoints", "log_every")
    for name in (*positive, "max_steps", "max_length"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    for name in ("lora_rank", "warmup_steps", "weight_decay", "max_grad_norm", "save_every", "eval_every", "seed"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 0 or more")
    for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 0 and below 1")
    if args.lora_rank == 0:
        for name in (field for field in asdict(args) if field.startswith("lora_") or field == "load_in_4bit"):
            if getattr(args, name) != getattr(defaults, name):
                raise UserError(f"--{name.replace('_', '-')} needs adapters: add --lora-rank 16, or leave it out")
    if any("lm_head" in target for target in args.lora_targets):
        raise UserError("--lora-targets lm_head is refused: the head's log-probs are computed in chunks from its weight")
    if args.resume and not args.output_dir:
        raise UserError("--resume needs --output-dir, the directory of the run to continue")
    if not args.dataset:
        raise UserError("--dataset is empty; name at least one file, directory or hub id")
    if args.batch_size < world_size:
        raise UserError(f"--batch-size {args.batch_size} is below the number of ranks, {world_size}; raise it or use fewer")
    if args.output_dir and not args.resume and (Path(args.output_dir) / "args.json").exists():
        raise UserError(f"--output-dir {args.output_dir} holds a run already; add --resume to continue it, or name another")


def load_config(args):
    """The model's config, with every dropout set to 0; UserError where there is no model."""
    if (Path(args.model) / "adapter_config.json").exists():
        raise UserError(f"--model {args.model} is a LoRA adapter; merge it first (--lora-merge exports a merged model)")
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # hub, file and format errors alike
        raise UserError(f"--model {args.model}: its config cannot be loaded: {error}") from error
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def check_lengths(args, config, tokenizer):
    """The most tokens of an example; UserError where flags, tokenizer and model do not fit together."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.get_text_config().vocab_size:
        raise UserError(
            f"--model {args.model}: the tokenizer has ids up to {largest}, but the model's vocabulary is "
            f"{config.get_text_config().vocab_size}; resize the model's embeddings or use its own tokenizer"
        )
    if args.max_length and context and args.max_length > context:
        raise UserError(f"--max-length {args.max_length} is above the model's context of {context} tokens; lower it")
    return args.max_length or context or args.micro_batch_tokens


def load_policy(args, config, device):
    """The model to train: float32 weights, or frozen ones in the compute type (or 4 bits) with float32 adapters."""
    dtype = torch.float32 if args.lora_rank == 0 else compute_dtype(args, device)
    quantization = None
    if args.load_in_4bit:
        try:
            version("bitsandbytes")
        except ModuleNotFoundError as error:
            raise UserError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes==0.50.2") from error
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    try:
        policy = AutoModelForCausalLM.from_pretrained(
            args.model,
            config=config,
            dtype=dtype,
            attn_implementation=args.attention,
            quantization_config=quantization,
            trust_remote_code=args.trust_remote_code,
            device_map={"": device} if quantization else None,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {args.model} cannot be loaded with --attention {args.attention}: {error}") from error
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    if not args.lora_rank:
        return policy
    lora = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets[0] if args.lora_targets == ("all-linear",) else list(args.lora_targets),
        use_rslora=args.lora_rslora,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(policy, lora)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, m in policy.named_modules() if isinstance(m, torch.nn.Linear)})
        raise UserError(f"--lora-targets {' '.join(args.lora_targets)}: {error}. The model has {', '.join(names)}") from error


def compute_dtype(args, device):
    automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
    return automatic if args.dtype == "auto" else getattr(torch, args.dtype)


def causal_lm(policy):
    """The causal language model itself, which LoRA wraps."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def shard(policy, args, mesh, device, forward_methods):
    """FSDP2 over the decoder layers and the root, in place: float32 shards, computed in `dtype`, reduced in float32."""
    model = causal_lm(policy)
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if args.compile:
        for layer in layers:
            layer.compile(dynamic=True)
    if dist.get_world_size() == 1 and compute_dtype(args, device) == torch.float32:
        return  # nothing to shard or to cast
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype(args, device), reduce_dtype=torch.float32),
        "ignored_params": frozen if args.load_in_4bit else None,  # 4-bit weights cannot be sharded
    }
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for method in forward_methods:
        register_fsdp_forward_method(model, method)


@torch.no_grad()
def self_check(policy, device, dtype):
    """Compare packed log-probs with the model's own forward, on two short documents. Returns whether packing is exact.

    Raises UserError if the log-probs of a document alone differ: then this script does not know what the architecture
    does between hidden states and logits. Where only packing differs, documents must have a row each.
    """
    model, tolerance = causal_lm(policy), 1e-3 if dtype == torch.float32 else 0.2
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    documents = [(torch.randint(vocabulary, (n,), generator=generator).numpy(), np.ones(n, bool)) for n in (7, 12)]
    policy.eval()
    packed_N = model.token_stats(collate(documents, device)).logps_N
    alone_N = torch.cat([model.token_stats(collate([document], device)).logps_N for document in documents])
    expected_N = []
    for ids, _ in documents:
        ids_BT = torch.from_numpy(ids).to(device)[None]
        logps_TV = model(input_ids=ids_BT, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        expected_N.append(logps_TV.gather(1, ids_BT[0, 1:, None]).squeeze(1))
    policy.train()
    expected_N = torch.cat(expected_N)
    if (error := (alone_N - expected_N).abs().max().item()) > tolerance:
        raise UserError(
            f"{model.config.model_type}: log-probs from hidden states differ from the model's own by {error:.3g}; this "
            "architecture transforms logits in a way that token_stats does not know. Add it there."
        )
    rope = json.dumps(getattr(model.config.get_text_config(), "rope_parameters", None) or {}, default=str)
    return (packed_N - expected_N).abs().max().item() <= tolerance and not any(k in rope for k in ("longrope", "dynamic"))


# ---- Shared with the other scripts: distribution, checkpoints, logs --------------------------------------------------


def init_distributed():
    """Join the process group (of one process without torchrun) -> rank, world size, device. gloo also carries flags."""
    cuda = torch.cuda.is_available()
    backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(minutes=30)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def catch_signals():
    """SIGTERM and SIGINT, from now on, add to the list that this returns: the run stops at its next micro-batch."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught


def any_rank(flag):
    """Whether `flag` is true on any rank. On gloo, so that a GPU's queue is not drained for it."""
    if dist.get_world_size() == 1:
        return bool(flag)
    flag = torch.tensor(int(bool(flag)))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def full(tensor):
    """The whole of a tensor that FSDP may have sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True)


def save_checkpoint(output_dir, step, policy, optimizer, progress, keep):
    """Write checkpoint-<step> aside and rename it, so that it is complete or absent; then delete all but `keep`."""
    final, aside = output_dir / f"checkpoint-{step:08d}", output_dir / f".checkpoint-{step:08d}.partial"
    if final.exists():
        return
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    dist.barrier()
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=TRAINABLE_ONLY)
    try:
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=aside)
        if rank == 0:
            (aside / "progress.json").write_text(json.dumps({"step": step, **progress}))
            os.rename(aside, final)
    except (OSError, dcp.api.CheckpointException) as error:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        kept = ", ".join(path.name for path in complete_checkpoints(output_dir)) or "none"
        raise UserError(f"the checkpoint of step {step} cannot be written to {output_dir}: {error}. Is the disk full? "
                        f"Complete checkpoints: {kept}; free space, then --resume") from error  # fmt: skip
    if rank == 0:
        for old in complete_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def complete_checkpoints(output_dir):
    return sorted(path for path in output_dir.glob("checkpoint-*") if (path / "progress.json").exists())


def load_checkpoint(path, policy, optimizer):
    """Restore weights and optimizer in place, on any number of ranks -> the saved progress."""
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=TRAINABLE_ONLY)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    return json.loads((path / "progress.json").read_text())


RUN_FLAGS = ("output_dir", "resume", "save_every", "keep_checkpoints", "eval_every", "log_every", "wandb", "run_name",
             "micro_batch_tokens", "gradient_checkpointing", "compile")  # fmt: skip


def check_resumable(output_dir, args, data_digest):
    """Refuse to resume a run whose flags or data would make this another training."""
    if not (output_dir / "args.json").exists():
        return
    before = json.loads((output_dir / "args.json").read_text())
    now = json.loads(json.dumps(asdict(args)))
    changed = [name for name in now if name not in RUN_FLAGS and before["args"].get(name) != now[name]]
    if changed:
        lines = "\n".join(f"  --{name.replace('_', '-')} was {before['args'].get(name)}, is {now[name]}" for name in changed)
        raise UserError(f"--resume: {output_dir} was begun with other flags; use the same, or another directory:\n{lines}")
    if before["data"] != data_digest:
        raise UserError(f"--resume: the data that {output_dir} was begun with has changed; restore it or begin a new run")


def digest(data, lengths):
    """A fingerprint of tokenized rows: all their lengths, and the ids of 64 of them."""
    sample = data[np.linspace(0, len(data) - 1, 64).astype(int)]["input_ids"]
    return hashlib.sha256(np.concatenate([lengths, *sample]).astype(np.int64).tobytes()).hexdigest()[:16]


class RunLog:
    """args.json, copies of the code, metrics.jsonl and wandb; does nothing on ranks other than 0."""

    def __init__(self, args, output_dir, data_digest, keep_until):
        self.enabled = dist.get_rank() == 0
        self.evals = {}  # step -> held-out metrics
        if not self.enabled:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / "metrics.jsonl"
        run_id = self.start(args, output_dir, data_digest, Path(__file__))
        rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        rows = [row for row in rows if keep_until is not None and row["step"] <= keep_until]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(partial, self.path)
        for row in rows:
            metrics = {name: value for name, value in row.items() if name.startswith("eval/")}
            if metrics:
                self.evals[row["step"]] = metrics
        self.wandb = None
        if args.wandb != "disabled":
            import wandb  # slow to import, and not needed where it is disabled

            self.wandb = wandb.init(
                mode=args.wandb,
                dir=output_dir,
                id=run_id,
                resume="allow",
                name=args.run_name or output_dir.name,
                project="post-training",
                config=asdict(args),
                settings=wandb.Settings(silent=True),
            )

    @staticmethod
    def start(args, output_dir, data_digest, script):
        """Write args.json and the code, or on --resume keep them -> the wandb id."""
        if (output_dir / "args.json").exists():
            return json.loads((output_dir / "args.json").read_text())["wandb_id"]
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=script.parent, capture_output=True, text=True, check=False)
        run_id = f"{script.stem}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
        packages = ("torch", "transformers", "datasets", "peft", "tyro", "wandb")
        record = {
            "args": asdict(args),
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
            "git_commit": git.stdout.strip() or None,
            "world_size": dist.get_world_size(),
            "data": data_digest,
            "wandb_id": run_id,
        }
        shutil.copy(script, output_dir / "script.py")
        shutil.copy(script.parent / "common.py", output_dir / "common.py")
        (output_dir / "args.json").write_text(json.dumps(record, indent=2))
        return run_id

    def write(self, row):
        """Append one row of metrics."""
        if self.enabled:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.wandb:
                self.wandb.log(row, step=row["step"])

    def finish(self):
        if self.enabled and self.wandb:
            self.wandb.finish()


def export(args, output_dir, policy, tokenizer, stop_ids, dtype):
    """Write final/: the model in the type it computed in (or its adapter, or both merged), tokenizer and template.

    `stop_ids`, the tokens trained to end a turn, join the generation config's EOS ids, so that generation stops there.
    """
    final, model = output_dir / "final", causal_lm(policy)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=args.lora_rank > 0)
    state = get_model_state_dict(policy, options=options)  # every rank takes part
    if dist.get_rank() == 0:
        generation = model.generation_config or GenerationConfig()
        eos = generation.eos_token_id
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        generation.eos_token_id = eos + [token for token in stop_ids if token not in eos]
        if args.lora_rank:
            policy.save_pretrained(final, state_dict=state)
        else:
            model.config.dtype = dtype
            model.save_pretrained(final, state_dict={name: weight.to(dtype) for name, weight in state.items()})
        if args.lora_merge:
            base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, trust_remote_code=args.trust_remote_code)
            merged = PeftModel.from_pretrained(base, final).merge_and_unload()
            shutil.rmtree(final)
            merged.save_pretrained(final)
        generation.save_pretrained(final)
        tokenizer.save_pretrained(final)
    dist.barrier()
    return final


# ---- Main ------------------------------------------------------------------------------------------------------------


def check_args(args):
    """This script's own checks of its flags."""
    if args.label_smoothing and args.loss_type != "nll":
        raise UserError("--label-smoothing applies to --loss-type nll only; leave one of them out")
    if not 0 <= args.label_smoothing < 1:
        raise UserError(f"--label-smoothing is {args.label_smoothing}; it must be at least 0 and below 1")
    if args.neftune_alpha < 0 or (args.router_aux_loss_coef or 0) < 0:
        raise UserError("--neftune-alpha and --router-aux-loss-coef must be 0 or more")


def router_aux_coef(args, config):
    """Weight of the load-balancing loss: the flag's, else the config's; 0 for a model without experts."""
    text = config.get_text_config()
    if not (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)):
        if args.router_aux_loss_coef is not None:
            raise UserError(f"--router-aux-loss-coef needs a mixture of experts, which {args.model} is not; leave it out")
        return 0.0
    given = args.router_aux_loss_coef
    return getattr(text, "router_aux_loss_coef", 0.0) if given is None else given


def add_neftune(model, alpha):
    """Noise on the embeddings in training, uniform in +-alpha / sqrt(length x D), length being the document's own."""

    def add_noise(embedding, inputs, output):
        if not embedding.training:
            return output
        size_T = alpha / (embedding.lengths_T * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * size_T[:, None].to(output)

    model.get_input_embeddings().register_forward_hook(add_noise)


@torch.no_grad()
def evaluate(policy, data, plan, device):
    """Held-out metrics over all of `data`, each token and each example counted once over all ranks."""
    model = causal_lm(policy).eval()
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for rows in plan[dist.get_rank()]:
        batch = collate(documents(data, rows), device)
        stats = model.token_stats(batch)
        wrong_B = torch.zeros(len(rows), device=device).index_add_(0, batch.documents_N, (~stats.is_top1_N).float())
        exact = (wrong_B == 0).sum()
        sums += torch.stack([-stats.logps_N.sum(), stats.is_top1_N.sum(), exact, sums.new_tensor(len(batch.labels_N)), sums.new_tensor(len(rows))])
    dist.all_reduce(sums)
    model.train()
    loss, correct, exact, tokens, examples = sums.tolist()
    return {"eval/loss": loss / tokens, "eval/mean_token_accuracy": correct / tokens, "eval/exact_match": exact / examples}


def documents(data, rows):
    """[(ids, loss mask), ...] of some rows."""
    columns = data[rows]
    return list(zip(columns["input_ids"], columns["loss_mask"], strict=True))


@functools.lru_cache(maxsize=1)
def epoch_order(num_rows, seed, epoch):
    """The order of an epoch's rows: the same on every rank and number of ranks."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)).numpy()


def row_lengths(data, args):
    """Tokens of each row; UserError if the longest does not fit into a micro-batch."""
    lengths = pc.list_value_length(data.with_format("arrow")["input_ids"][:].combine_chunks()).to_numpy().astype(np.int64)
    if lengths.max() > args.micro_batch_tokens:
        row = data[int(lengths.argmax())]
        raise UserError(
            f"row {row['row']} of {row['source']} has {lengths.max()} tokens, more than --micro-batch-tokens "
            f"{args.micro_batch_tokens}; the smallest value that works is {lengths.max()} (or lower --max-length)"
        )
    return lengths


def ending_ids(data, tokenizer):
    """The special tokens that end the examples: what the model learns to stop with."""
    endings = {row["input_ids"][-1] for row in data.select(range(min(len(data), 1000))) if row["loss_mask"][-1]}
    return sorted(endings & set(tokenizer.all_special_ids))


def choose_output_dir(args):
    """--output-dir, or a new name that rank 0 chooses for all."""
    name = [args.output_dir or f"runs/{Path(__file__).stem}-{datetime.now():%Y%m%d-%H%M%S}"]
    dist.broadcast_object_list(name)
    return Path(name[0])


def make_optimizer(args, parameters):
    """AdamW with weight decay on matrices only; the learning rate is set at every step."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=args.learning_rate, betas=betas, fused=True)


def stop_non_finite(step, loss, grad_norm, data, rows, plan, micro_losses):
    """End the run before the optimizer sees a NaN, naming the rows of the micro-batches whose loss is not finite."""
    mine = [int(row) for chosen, value in zip(plan, micro_losses, strict=True) if not value.isfinite() for row in rows[chosen]]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    bad = sum(gathered, []) or rows.tolist()
    data.reset_format()
    names = ", ".join(f"{data[row]['row']} of {data[row]['source']}" for row in bad[:8])
    raise UserError(
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; nothing was updated or saved. The micro-batches "
        f"concerned hold {len(bad)} rows: {names}{', ...' if len(bad) > 8 else ''}. Look at them, or lower --learning-rate"
    )


def describe(name, data, report, lengths):
    """A line on what is used of a dataset, and why the rest is not."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "none"
    targets = sum(data["num_targets"])
    ignored = f"; ignored columns: {', '.join(sorted(report['ignored_columns']))}" if report["ignored_columns"] else ""
    print(
        f"{name:<9} {report['rows']} rows, {len(data)} used (dropped: {dropped}); {lengths.sum()} tokens, "
        f"{targets / lengths.sum():.1%} trained; longest {lengths.max()}{ignored}"
    )


def main(args):
    # ---- Checks and data, before any process waits for another ----
    check_shared_args(args, int(os.environ.get("WORLD_SIZE", 1)))
    check_args(args)
    config = load_config(args)
    aux_coef = router_aux_coef(args, config)
    tokenizer = load_tokenizer(args.model, args.chat_template, args.trust_remote_code)
    encode = functools.partial(
        encode_sft,
        tokenizer=tokenizer,
        loss_on=args.loss_on,
        max_length=check_lengths(args, config, tokenizer),
        overflow=args.overflow,
        vocab_size=config.get_text_config().vocab_size,
    )
    prepare = functools.partial(prepare_data, encode=encode, columns=SFT_COLUMNS, tokenizer=tokenizer, seed=args.seed)
    data, report = prepare(args.dataset, config=args.dataset_config, split=args.dataset_split)
    lengths, num_targets = row_lengths(data, args), np.array(data["num_targets"])
    if args.eval_dataset:
        eval_data, eval_report = prepare(args.eval_dataset, split=args.eval_split)
        eval_lengths = row_lengths(eval_data, args)
    steps_per_epoch = math.ceil(len(data) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    if args.warmup_steps >= total_steps:
        raise UserError(f"--warmup-steps {args.warmup_steps} leaves nothing of the {total_steps} steps; lower it")

    # ---- Model, optimizer ----
    rank, world_size, device = init_distributed()
    caught_signals = catch_signals()
    dtype = compute_dtype(args, device)
    torch.manual_seed(args.seed)
    policy = load_policy(args, config, device)
    model = causal_lm(policy)
    model.token_stats = MethodType(token_stats, model)
    shard(policy, args, init_device_mesh(device.type, (world_size,)), device, ["token_stats"])
    policy.to(device).train()
    packable = self_check(policy, device, dtype)
    if args.neftune_alpha:
        add_neftune(model, args.neftune_alpha)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(args, parameters)

    # ---- Output directory, resume ----
    output_dir = choose_output_dir(args)
    data_digest = digest(data, lengths)
    start, tokens_seen = 0, 0
    if args.resume:
        check_resumable(output_dir, args, data_digest)
        if checkpoints := complete_checkpoints(output_dir):
            progress = load_checkpoint(checkpoints[-1], policy, optimizer)
            start, tokens_seen = progress["step"], progress["tokens"]
        if rank == 0:
            print(f"resuming after step {start} from {checkpoints[-1]}" if checkpoints else
                  f"no complete checkpoint in {output_dir}: starting from the beginning")  # fmt: skip
    log = RunLog(args, output_dir, data_digest, keep_until=start if start else None)

    if rank == 0:
        total, trained = (sum(p.numel() for p in some) for some in (policy.parameters(), parameters))
        print(f"{'model':<9} {args.model}: {total:,} parameters, {trained:,} trained; {dtype} on {world_size} x {device.type}")
        describe("train", data, report, lengths)
        if args.eval_dataset:
            describe("held out", eval_data, eval_report, eval_lengths)
        print(f"{'steps':<9} {total_steps} of {args.batch_size} examples ({steps_per_epoch} an epoch), rows of at most "
              f"{args.micro_batch_tokens} tokens{'' if packable else ', one example each (this attention cannot pack)'}")  # fmt: skip
        example = data[0]
        print(f"{'example':<9} row {example['row']} of {example['source']}; what is trained stands in [[ ]]:\n"
              f"{mark_trained(tokenizer, example['input_ids'], example['loss_mask'])}")  # fmt: skip
        print(f"{'output':<9} {output_dir}", flush=True)

    data, stop_ids = data.with_format("numpy", ["input_ids", "loss_mask"]), ending_ids(data, tokenizer)
    if args.eval_dataset:
        eval_data = eval_data.with_format("numpy", ["input_ids", "loss_mask"])
        eval_plan = split_batch(eval_lengths.tolist(), world_size, args.micro_batch_tokens, alone=not packable)

    def evaluate_after(step):
        if args.eval_dataset and any_rank(rank == 0 and step not in log.evals):
            log.evals[step] = evaluate(policy, eval_data, eval_plan, device)
            log.write({"step": step, **log.evals[step]})
            bar.write(f"after step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in log.evals[step].items()))

    bar = tqdm(total=total_steps, initial=start, disable=rank != 0, unit="step", dynamic_ncols=True)
    done, stopping = start, False
    if done in (0, total_steps) or (args.eval_every and done % args.eval_every == 0):
        evaluate_after(done)  # on resume, where the run ended between a step and its evaluation

    # ---- Training ----
    for step in range(start, total_steps):
        began = time.perf_counter()
        torch.manual_seed(hash((args.seed, step, rank)) % 2**63)  # every step draws alike, whether resumed or not
        epoch, first = step // steps_per_epoch, step % steps_per_epoch * args.batch_size
        rows = epoch_order(len(data), args.seed, epoch)[first : first + args.batch_size]
        plan = split_batch(lengths[rows].tolist(), world_size, args.micro_batch_tokens, alone=not packable)
        step_targets, step_tokens = int(num_targets[rows].sum()), int(lengths[rows].sum())  # global: no collective needed
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)

        sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, entropy, arg-max hits, aux loss
        micro_losses = []
        for chosen in plan[rank]:
            if stopping := any_rank(caught_signals):
                break
            batch = collate(documents(data, rows[chosen]), device)
            if args.neftune_alpha:
                lengths_B = batch.inputs["cu_seq_lens_q"].diff()
                model.get_input_embeddings().lengths_T = lengths_B.repeat_interleave(lengths_B)
            stats = model.token_stats(batch, want_mean=args.label_smoothing > 0, aux_loss=aux_coef > 0)
            losses_N = sft_loss(stats.logps_N, stats.mean_logps_N, args.loss_type, args.label_smoothing)
            loss = losses_N.sum() / step_targets
            if aux_coef:
                aux_loss = stats.aux_loss * (batch.num_tokens / step_tokens)
                loss = loss + aux_coef * aux_loss
                sums[3] += aux_loss.detach()
            (loss * world_size).backward()  # FSDP averages over ranks what is a share of a global mean already
            sums[:3] += torch.stack([x_N.detach().sum() for x_N in (losses_N, stats.entropy_N, stats.is_top1_N)])
            micro_losses.append(loss.detach())
        if stopping:
            break

        grad_norm = full(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)).item()
        dist.all_reduce(sums)
        loss, entropy, accuracy = (sums[:3] / step_targets).tolist()
        if not math.isfinite(loss + grad_norm):
            stop_non_finite(step + 1, loss, grad_norm, data, rows, plan[rank], micro_losses)
        optimizer.step()
        optimizer.zero_grad()
        done, tokens_seen = step + 1, tokens_seen + step_tokens

        seconds = time.perf_counter() - began
        bar.update()
        bar.set_postfix_str(f"loss {loss:.4f}, {step_tokens / seconds:,.0f} tokens/s", refresh=False)
        if done % args.log_every == 0 or done == total_steps:
            row = {"step": done, "epoch": done / steps_per_epoch, "loss": loss, "grad_norm": grad_norm}
            row |= {"learning_rate": optimizer.param_groups[0]["lr"], "entropy": entropy, "mean_token_accuracy": accuracy}
            row |= {"aux_loss": sums[3].item()} if aux_coef else {}
            log.write({**row, "tokens": tokens_seen, "tokens_per_second": step_tokens / seconds, "step_seconds": seconds})
        if done == total_steps or (args.eval_every and done % args.eval_every == 0):
            evaluate_after(done)
        if args.save_every and (done % args.save_every == 0 or done == total_steps):
            save_checkpoint(output_dir, done, policy, optimizer, {"tokens": tokens_seen}, args.keep_checkpoints)
    bar.close()

    # ---- End: stopped by a signal, or done ----
    if stopping:
        if done:
            save_checkpoint(output_dir, done, policy, optimizer, {"tokens": tokens_seen}, args.keep_checkpoints)
        if rank == 0:
            print(f"stopped by a signal after step {done} of {total_steps}, saved. To continue, give the same flags with "
                  f"--output-dir {output_dir} --resume")  # fmt: skip
    else:
        final = export(args, output_dir, policy, tokenizer, stop_ids, dtype)
        if rank == 0:
            for name, value in log.evals.get(total_steps, {}).items():
                print(f"{name}: {log.evals[0][name]:.4f} before training, {value:.4f} after step {total_steps}")
            print(f"model in {final}")
    log.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
