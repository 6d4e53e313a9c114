"""Log-probs, losses, packing and attention against independent references."""

import random
import subprocess
import sys
import time
from itertools import pairwise
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ASSETS, ROOT
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

import sft
from common import UserError, collate, split_batch
from sft import ChunkedLogProbs, Head, lr_factor, sft_loss

# ---- Chunked log-probs -----------------------------------------------------------------------------------------------

HEADS = {
    "plain": (Head(1.0, 0.0, 1.0), False),
    "bias": (Head(1.0, 0.0, 1.0), True),
    "scale": (Head(0.25, 0.0, 1.0), False),
    "softcap": (Head(1.0, 3.0, 1.0), False),
    "all": (Head(0.5, 2.0, 0.7), True),
}


def naive(hidden_ND, weight_VD, bias_V, labels_N, head):
    """logps, entropy, is_top1, mean log-prob and log of the sum of p squared from whole logits in float64."""
    logits_NV = (hidden_ND @ weight_VD.T + (0 if bias_V is None else bias_V)) * head.scale
    if head.softcap:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    logps_NV = (logits_NV / head.temperature).log_softmax(-1)
    entropy_N = -(logps_NV.exp() * logps_NV).sum(-1)
    return (
        logps_NV.gather(1, labels_N[:, None])[:, 0],
        entropy_N,
        logps_NV.argmax(-1) == labels_N,
        logps_NV.mean(-1),
        (2 * logps_NV).logsumexp(-1),
    )


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("chunk", [7 * 50, 10**9])
def test_chunked_log_probs_equal_whole_logits(name, chunk, monkeypatch):
    monkeypatch.setattr(ChunkedLogProbs, "CHUNK_ELEMENTS", (chunk, chunk))
    head, with_bias = HEADS[name]
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((23, 16), (50, 16), (50,)))
    labels, weights = torch.randint(50, (23,)), torch.randn(3, 23, dtype=torch.float64)
    labels[3] = (hidden @ weight.T)[3].argmax()
    results = []
    for function, dtype in ((naive, torch.float64), (ChunkedLogProbs.apply, torch.float32)):
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight, bias)]
        given = (*inputs[:2], inputs[2] if with_bias else None, labels, head)
        logps, entropy, top1, mean, sum_sq = function(*given, *(() if function is naive else (True, True)))
        (torch.stack([logps, entropy, mean]).double() * weights).sum().backward()
        results.append(
            [logps, entropy, top1, mean, sum_sq, *(tensor.grad for tensor in inputs[: 2 + with_bias])]
        )
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-4)
    assert results[0][2].any()


def test_gradient_of_log_probs_alone_and_with_nothing_trained():
    """The paths that training takes: no gradient for entropy and mean; an empty micro-batch."""
    hidden, weight, labels = (
        torch.randn(5, 8, requires_grad=True),
        torch.randn(9, 8, requires_grad=True),
        torch.arange(5),
    )
    ChunkedLogProbs.apply(hidden, weight, None, labels, Head(1, 0, 1), False, False)[0].sum().backward()
    expected = torch.autograd.grad(
        F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), (hidden, weight)
    )
    torch.testing.assert_close((-hidden.grad, -weight.grad), expected)
    weight.grad = None
    ChunkedLogProbs.apply(hidden[:0], weight, None, labels[:0], Head(1, 0, 1), False, False)[
        0
    ].sum().backward()
    assert weight.grad.abs().max() == 0


def test_only_the_newest_forward_keeps_logits_for_its_backward():
    """Two forwards before their backwards, as where each document has its own row: the older one computes them again."""
    weight = torch.randn(9, 8, requires_grad=True)
    hidden, labels = torch.randn(2, 5, 8), torch.arange(5)
    sums = [
        ChunkedLogProbs.apply(hidden_ND, weight, None, labels, Head(1, 0, 1), False, False)[0].sum()
        for hidden_ND in hidden
    ]
    (2 * sums[0] + sums[1]).backward()
    losses = [F.cross_entropy(hidden_ND @ weight.T, labels, reduction="sum") for hidden_ND in hidden]
    (expected,) = torch.autograd.grad(2 * losses[0] + losses[1], weight)
    torch.testing.assert_close(-weight.grad, expected)
    assert ChunkedLogProbs.newest == (None, None)


PEAK = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from sft import ChunkedLogProbs, Head
torch.set_num_threads(2)
hidden, weight = torch.randn(4096, 32, requires_grad=True), torch.randn({vocabulary}, 32, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ChunkedLogProbs.apply(hidden, weight, None, torch.zeros(4096, dtype=torch.long), Head(1, 0, 1), False, False)[0].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_of_log_probs_is_bounded_while_logits_grow():
    peaks = {}
    for vocabulary in (8_000, 64_000):  # logits of 125 MiB and 1,000 MiB in float32
        code = PEAK.format(root=str(ROOT), vocabulary=vocabulary)
        peaks[vocabulary] = float(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        )
    assert peaks[64_000] < 400, peaks


# ---- Losses and schedules --------------------------------------------------------------------------------------------


def test_losses():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 6, 11), torch.randint(11, (1, 6))
    labels[0, 2] = -100
    logps_NV = logits[0].log_softmax(-1)[labels[0] != -100]
    logps, mean = logps_NV.gather(1, labels[0][labels[0] != -100, None])[:, 0], logps_NV.mean(-1)
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, labels)
    torch.testing.assert_close(sft_loss(logps, mean, "nll", 0.1).mean(), expected)
    torch.testing.assert_close(
        sft_loss(logps, None, "nll", 0.0).mean(), F.cross_entropy(logits[0], labels[0])
    )
    logps = logps.clone().requires_grad_()
    sft_loss(logps, None, "dft", 0.0).sum().backward()
    torch.testing.assert_close(logps.grad, -logps.detach().exp())  # the weight is not differentiated


def test_schedules():
    for name in ("constant", "linear", "cosine", "wsd"):
        factors = [lr_factor(step, 110, 10, name) for step in range(110)]
        assert factors[:10] == [(step + 1) / 10 for step in range(10)]
        assert factors[10] == 1
        assert all(a >= b for a, b in pairwise(factors[10:]))
    assert lr_factor(60, 110, 10, "linear") == 0.5
    assert lr_factor(60, 110, 10, "cosine") == pytest.approx(0.5)
    assert lr_factor(89, 110, 10, "wsd") == 1
    assert lr_factor(100, 110, 10, "wsd") == pytest.approx(0.5)
    assert lr_factor(109, 110, 10, "constant") == 1
    assert 0 < lr_factor(109, 110, 10, "linear") < 0.02  # the last step still learns


# ---- Packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("alone", [False, True])
def test_split_batch_places_every_document_once(world_size, alone):
    rng = random.Random(0)
    for n in (1, 3, 40):
        lengths = [rng.randint(1, 100) for _ in range(n)]
        plan = split_batch(lengths, world_size, 120, alone)
        assert sorted(index for rank in plan for batch in rank for index in batch) == list(range(n))
        assert len({len(rank) for rank in plan}) == 1
        assert max(sum(lengths[i] for i in batch) for rank in plan for batch in rank) <= 120
        if alone:
            assert max(len(batch) for rank in plan for batch in rank) == 1
    loads = [
        sum(lengths[i] for batch in rank for i in batch) for rank in split_batch(lengths, world_size, 120)
    ]
    assert max(loads) - min(loads) <= 0.1 * sum(lengths)


def test_split_batch_of_a_whole_evaluation_set_is_quick():
    began = time.perf_counter()
    (plan,) = split_batch([5000] * 4000, 1, 8192)
    assert time.perf_counter() - began < 5  # 0.3 s; a minute when the count grew by one
    assert len(plan) <= 4100


def test_collate_aligns_labels_with_the_position_that_predicts_them():
    first, second = (
        (np.array([5, 6, 7]), np.array([False, False, True])),
        (np.array([8, 9]), np.array([True, True])),
    )
    batch = collate([first, second])
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch.positions_N.tolist() == [
        1,
        3,
    ]  # 6 predicts 7, 8 predicts 9; nothing predicts 8, though its mask is set
    assert batch.labels_N.tolist() == [7, 9]
    assert batch.documents_N.tolist() == [0, 1]
    assert batch.num_tokens == 5
    empty = collate([])
    assert (len(empty.positions_N), empty.num_tokens) == (0, 0)


def documents(lengths, vocabulary=512, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, vocabulary, n), np.ones(n, bool)) for n in lengths]


def embedded_model(**kwargs):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", attn_implementation="varlen", **kwargs)
    model.token_stats = MethodType(sft.token_stats, model)
    return model


@pytest.mark.parametrize("window", [None, 7])
def test_packed_equals_alone(window):
    """Log-probs and gradients of a packed row equal those of transformers' own forward on each document alone."""
    model = embedded_model()
    if window:
        for layer in model.model.layers:
            layer.self_attn.sliding_window = window
    packed = documents([3, 40, 41, 2, 300, 33, 280, 5])
    stats = model.token_stats(collate(packed))
    stats.logps_N.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = []
    for ids, _ in packed:
        ids_BT = torch.from_numpy(ids)[None]
        if window:
            band = torch.ones(len(ids), len(ids), dtype=torch.bool).tril().triu(1 - window)
            logits = model(
                input_ids=ids_BT, attention_mask={"full_attention": band[None, None]}, use_cache=False
            ).logits[0, :-1]
        else:
            logits = model(input_ids=ids_BT, use_cache=False).logits[0, :-1]
        expected.append(logits.log_softmax(-1).gather(1, ids_BT[0, 1:, None])[:, 0])
    expected = torch.cat(expected)
    expected.sum().backward()
    torch.testing.assert_close(stats.logps_N, expected, rtol=1e-4, atol=1e-4)
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("window", [None, 7])
def test_prompts_that_stand_in_the_row_once_change_nothing(window):
    """Log-probs and gradients, with families of several completions, long and short, and documents that share nothing."""
    model, rng = embedded_model(), np.random.default_rng(0)
    if window:
        for layer in model.model.layers:
            layer.self_attn.sliding_window = window
    packed, saved = [], 0
    for prompt_length, completions in (
        (30, (5, 40, 6)),
        (280, (3, 90)),
        (1, (4, 4)),
        (12, (7,)),
        (0, (9, 9)),
    ):
        prompt = rng.integers(0, 512, prompt_length)
        for n in completions:
            mask = np.arange(prompt_length + n) >= prompt_length
            packed.append((np.append(prompt, rng.integers(0, 512, n)), mask))
        saved += prompt_length * (len(completions) - 1)
    results = []
    for share_prompts in (False, True):
        batch = collate(packed, share_prompts=share_prompts)
        stats = model.token_stats(batch)
        (stats.logps_N * torch.linspace(-1, 1, len(stats.logps_N))).sum().backward()
        results.append(
            [stats.logps_N, batch.labels_N, batch.documents_N, *(p.grad for p in model.parameters())]
        )
        assert batch.inputs["input_ids"][0, batch.last_B].tolist() == [ids[-1] for ids, _ in packed]
        model.zero_grad()
    assert batch.num_tokens == sum(len(ids) for ids, _ in packed) - saved == batch.inputs["input_ids"].numel()
    for repeated, shared in zip(*results, strict=True):
        torch.testing.assert_close(shared, repeated, rtol=1e-4, atol=1e-4)


def test_padded_batches_and_generation_still_work_with_varlen():
    """transformers' own use of a model loaded with varlen: left-padded generation equals that with SDPA."""
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    outputs = []
    for attention in ("varlen", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", attn_implementation=attention)
        outputs.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("window", [None, 5])
def test_several_new_tokens_after_a_cache(window):
    """A prompt read in two parts gives the logits of the prompt read at once."""
    model = embedded_model()
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    ids_BT = torch.arange(20, 32)[None]
    with torch.no_grad():
        whole = model(input_ids=ids_BT, use_cache=False).logits[0, -1]
        cache = model(input_ids=ids_BT[:, :7], use_cache=True).past_key_values
        parts = model(input_ids=ids_BT[:, 7:], past_key_values=cache, use_cache=True).logits[0, -1]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "phi": {},  # bias on lm_head
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0, "head_dim": 8},
    "gemma3_text": {"sliding_window": 4, "head_dim": 8},
    "mistral": {"sliding_window": 5},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mamba": {"hidden_size": 32, "state_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
NOT_CAUSAL = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_ctx": 64, "n_positions": 64},
}


def random_model(name, attention="varlen"):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model(
        name, **{**sizes, "num_key_value_heads": 2, "pad_token_id": 0, **(ARCHITECTURES | NOT_CAUSAL)[name]}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.token_stats = MethodType(sft.token_stats, model)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_self_check_accepts_what_is_right_and_packs_only_what_can_be(name):
    attention = {"gemma2": "eager", "mamba": "eager"}.get(name, "varlen")
    model = random_model(name, attention)
    packing = sft.self_check(model, torch.device("cpu"), torch.float32)
    assert packing == {"mamba": "alone", "lfm2": "alone", "gemma2": "packed"}.get(name, "shared")


@pytest.mark.parametrize("name", ["bloom", "codegen"])
def test_self_check_refuses_attention_that_sees_later_tokens(name):
    """These add the mask themselves, and varlen gives them none."""
    with pytest.raises(
        UserError, match="lets tokens see later ones with this --attention; use --attention eager"
    ):
        sft.self_check(random_model(name), torch.device("cpu"), torch.float32)
    sft.self_check(random_model(name, "eager"), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["mamba", "lfm2", "llama", "qwen3_moe"])
def test_self_check_sees_one_document_change_another_in_bfloat16(name):
    model = random_model(name, "eager" if name == "mamba" else "varlen").to(torch.bfloat16)
    packing = sft.self_check(model, torch.device("cpu"), torch.bfloat16)
    assert packing == ("shared" if name in ("llama", "qwen3_moe") else "alone")


def test_self_check_refuses_unknown_logit_transforms():
    model = random_model("cohere")
    model.config.logit_scale = None
    with pytest.raises(UserError, match="cohere: log-probs from hidden states differ"):
        sft.self_check(model, torch.device("cpu"), torch.float32)


def test_soft_capped_attention_is_refused_by_varlen():
    with pytest.raises(UserError, match="use --attention eager"):
        sft.self_check(random_model("gemma2"), torch.device("cpu"), torch.float32)


def test_length_dependent_rotary_scaling_is_not_packed():
    model = random_model("llama")
    model.config.rope_parameters = {"rope_type": "longrope"}
    assert sft.self_check(model, torch.device("cpu"), torch.float32) == "alone"
