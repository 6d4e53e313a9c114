"""Log-probs, losses, packing, attention and architectures against independent references."""

import json
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
from conftest import ASSETS, ROOT, train, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import LabelSmoother

import sft
from common import UserError, collate, encode_sft, split_batch
from sft import Chunked, lr_factor, per_token, sft_loss, with_mean

# ---- The chunked op ----


def naive(logits_NV, labels_N):
    """Log-prob of the label, entropy, whether the label is the arg-max, and the mean log-prob, from whole logits."""
    logps_NV = logits_NV.log_softmax(-1)
    logps_N = F.cross_entropy(logits_NV, labels_N, reduction="none").neg()
    entropy_N = torch.distributions.Categorical(logits=logits_NV).entropy()
    return logps_N, entropy_N, logps_NV.argmax(-1) == labels_N, logps_NV.mean(-1)


@pytest.mark.parametrize("chunk", [7 * 50, 10**9])
@pytest.mark.parametrize("function", [per_token, with_mean])
def test_chunks_of_logits_give_the_values_and_gradients_of_whole_logits(chunk, function, monkeypatch):
    monkeypatch.setattr(Chunked, "ELEMENTS", (chunk, chunk))
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((23, 16), (50, 16)))
    labels, weights = torch.randint(50, (23,)), torch.randn(3, 23, dtype=torch.float64)
    labels[3] = (hidden @ weight.T)[3].argmax()
    results = []
    for dtype in (torch.float64, torch.float32):
        h, w = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight))
        if dtype == torch.float64:
            outputs = naive(h @ w.T, labels)[: 3 + (function is with_mean)]
        else:
            outputs = Chunked.map(function, h, w, labels)
        floats = torch.stack([x.double() for x in outputs if x.is_floating_point()])
        (floats * weights[: len(floats)]).sum().backward()
        results.append([*outputs, h.grad, w.grad])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-4)
    assert results[0][2].any(), "one label is the arg-max"


@pytest.mark.parametrize("chunk", [2 * 9, 10**9])
def test_log_probs_alone_and_a_micro_batch_that_trains_nothing(chunk, monkeypatch):
    """Training differentiates the log-probs alone; a rank without documents still has a gradient, of zero."""
    monkeypatch.setattr(Chunked, "ELEMENTS", (chunk, chunk))
    hidden, weight, labels = torch.randn(5, 8), torch.randn(9, 8, requires_grad=True), torch.arange(5)
    hidden.requires_grad_()
    Chunked.map(per_token, hidden, weight, labels)[0].sum().backward()
    loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close((-hidden.grad, -weight.grad), torch.autograd.grad(loss, (hidden, weight)))
    weight.grad = None
    Chunked.map(per_token, hidden[:0], weight, labels[:0])[0].sum().backward()
    assert weight.grad.abs().max() == 0


PEAK = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from sft import Chunked, per_token
hidden, weight = torch.randn(4096, 32, requires_grad=True), torch.randn(64_000, 32, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Chunked.map(per_token, hidden, weight, torch.zeros(4096, dtype=torch.long))[0].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_of_log_probs_is_bounded():
    code = [sys.executable, "-c", PEAK.format(root=str(ROOT))]
    peak = float(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    assert peak < 500, "whole logits take 1,000 MiB, and as much again for their gradient"


# ---- Losses, schedules, noise ----


def test_losses():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 6, 11), torch.randint(11, (1, 6))
    labels[0, 2] = -100
    logps_NV = logits[0].log_softmax(-1)[labels[0] != -100]
    logps, mean = logps_NV.gather(1, labels[0][labels[0] != -100, None])[:, 0], logps_NV.mean(-1)
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, labels)
    torch.testing.assert_close(sft_loss(logps, mean, "nll", 0.1).mean(), expected)
    expected = F.cross_entropy(logits[0], labels[0])
    torch.testing.assert_close(sft_loss(logps, mean, "nll", 0.0).mean(), expected)
    logps = logps.clone().requires_grad_()
    sft_loss(logps, mean, "dft", 0.0).sum().backward()
    torch.testing.assert_close(logps.grad, -logps.detach().exp())  # the weight is not differentiated


def test_schedules():
    for name in ("constant", "linear", "cosine", "wsd"):
        factors = [lr_factor(step, 110, 10, name) for step in range(110)]
        assert factors[:11] == [*((step + 1) / 10 for step in range(10)), 1]
        assert all(a >= b for a, b in pairwise(factors[10:]))
    assert lr_factor(60, 110, 10, "linear") == 0.5
    assert lr_factor(60, 110, 10, "cosine") == pytest.approx(0.5)
    assert lr_factor(89, 110, 10, "wsd") == 1
    assert lr_factor(100, 110, 10, "wsd") == pytest.approx(0.5)
    assert lr_factor(109, 110, 10, "constant") == 1
    assert 0 < lr_factor(109, 110, 10, "linear") < 0.02  # the last step still learns


def test_neftune_noise_is_uniform_up_to_alpha_over_the_root_of_length_times_width():
    embedding = torch.nn.Embedding(10, 64)
    sft.add_neftune(embedding, 5.0)
    embedding.lengths_T = torch.tensor([4] * 4 + [100] * 100)
    ids_BT = torch.zeros(1, 104, dtype=torch.long)
    noisy_BTD = embedding(ids_BT)
    with torch.no_grad():
        noise = noisy_BTD - embedding(ids_BT)
    for part, length in ((noise[:, :4], 4), (noise[:, 4:], 100)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound * 1.001
        assert part.std() == pytest.approx(bound / 3**0.5, rel=0.1)


# ---- Packing ----


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
        assert not alone or max(len(batch) for rank in plan for batch in rank) == 1
    loads = [sum(lengths[i] for b in rank for i in b) for rank in split_batch(lengths, world_size, 120)]
    assert max(loads) - min(loads) <= 0.1 * sum(lengths)


def test_split_batch_of_a_whole_evaluation_set_is_quick():
    began = time.process_time()
    (plan,) = split_batch([5000] * 4000, 1, 8192)
    assert time.process_time() - began < 5  # 0.3 s; a minute when the count grew by one
    assert len(plan) <= 4100


def test_collate_aligns_labels_with_the_position_that_predicts_them():
    first = np.array([5, 6, 7]), np.array([False, False, True])
    batch = collate([first, (np.array([8, 9]), np.array([True, True]))])
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch.positions_N.tolist() == [1, 3]  # 6 predicts 7, 8 predicts 9; nothing predicts 8
    assert batch.labels_N.tolist() == [7, 9]
    assert batch.documents_N.tolist() == [0, 1]
    assert len(collate([]).positions_N) == 0


def embedded_model(window=None, **options):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", attn_implementation="varlen", **options)
    model.token_stats = MethodType(sft.token_stats, model)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    return model


@pytest.mark.parametrize("window", [None, 7])
def test_packed_equals_alone(window):
    """Log-probs and gradients of a packed row equal those of transformers' own forward on each document alone."""
    model, rng = embedded_model(window), np.random.default_rng(0)
    packed = [(rng.integers(0, 512, n), np.ones(n, bool)) for n in (3, 40, 41, 2, 300, 33, 280, 5)]
    logps_N = model.token_stats(collate(packed))[0]
    logps_N.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = []
    model.set_attn_implementation("sdpa")
    for ids, _ in packed:
        ids_BT = torch.from_numpy(ids)[None]
        band = torch.ones(len(ids), len(ids), dtype=torch.bool).tril().triu(1 - (window or len(ids)))
        mask = {"full_attention": band[None, None]}
        logits = model(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits[0, :-1]
        expected.append(logits.log_softmax(-1).gather(1, ids_BT[0, 1:, None])[:, 0])
    expected = torch.cat(expected)
    expected.sum().backward()
    torch.testing.assert_close(logps_N, expected, rtol=1e-4, atol=1e-4)
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("window", [None, 7])
def test_prompts_that_stand_in_the_row_once_change_nothing(window):
    """Log-probs and gradients, with families of several completions, long and short, and documents that share nothing."""
    model, rng, packed = embedded_model(window), np.random.default_rng(0), []
    families = [(30, (5, 40, 6)), (280, (3, 90)), (1, (4, 4)), (12, (7,)), (0, (9, 9))]
    for prompt_length, completions in families:
        prompt = rng.integers(0, 512, prompt_length)
        for n in completions:
            mask = np.arange(prompt_length + n) >= prompt_length
            packed.append((np.append(prompt, rng.integers(0, 512, n)), mask))
    results, sizes = [], []
    for share_prompts in (False, True):
        batch = collate(packed, share_prompts=share_prompts)
        logps_N = model.token_stats(batch)[0]
        (logps_N * torch.linspace(-1, 1, len(logps_N))).sum().backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([logps_N, batch.labels_N, batch.documents_N, *gradients])
        sizes.append(batch.inputs["input_ids"].numel())
        model.zero_grad()
    assert sizes[0] - sizes[1] == sum(length * (len(each) - 1) for length, each in families)
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


# ---- Architectures ----

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512, "rotary_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
FALCON_H1 = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
# How documents stand in a micro-batch, the architecture, and what its config needs beyond SIZES.
PROMPTS_SHARED = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "olmo": {}, "olmo2": {}, "phi3": {}, "glm": {}, "glm4": {},
    "phi": {},  # its head has a bias
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 4},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt2": GPT,
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "starcoder2": {}, "smollm3": {}, "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}  # fmt: skip
EAGER = {
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0},
    "gpt_oss": EXPERTS | {"sliding_window": 8},
    "bloom": GPT,
    "codegen": GPT,
}
ALONE = {
    "falcon_h1": FALCON_H1,
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def save_random_model(name, path):
    """A tiny model of an architecture, with every weight moved, beside the embedded tokenizer."""
    options = (PROMPTS_SHARED | EAGER | ALONE)[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SIZES | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", [*PROMPTS_SHARED, *EAGER, *ALONE])
def test_a_model_of_each_architecture_trains_and_reloads_to_the_same_loss(name, tmp_path, capsys):
    """eval/loss after two steps equals that of final/, as transformers loads it, by its own forward row by row."""
    lines = (ASSETS / "messages.jsonl").read_text().splitlines()[:24]
    rows = [json.loads(line) for line in lines]
    data = (write_rows(tmp_path / "rows.jsonl", rows),)
    flags = {"dataset": data, "eval_dataset": data, "batch_size": 24, "max_steps": 2}
    flags |= {"attention": "eager"} if name in EAGER or name == "mamba" else {}
    last = train(sft, tmp_path / "run", model=save_random_model(name, tmp_path / "model"), **flags)[-1]
    printed = capsys.readouterr().out
    assert name not in PROMPTS_SHARED or "documents are shared" in printed
    assert name not in ALONE or "documents are alone" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", attn_implementation="eager")
    tokenizer, losses = AutoTokenizer.from_pretrained(tmp_path / "run" / "final"), []
    for row in rows:
        encoded = encode_sft(row, tokenizer)
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["loss_mask"])[1:]
        with torch.no_grad():
            logits_TV = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits_TV[mask], ids[1:][mask], reduction="none"))
    assert last["eval/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "changed"), [("bloom", {}), ("gemma2", {}), ("cohere", {"logit_scale": None})]
)
def test_self_check_refuses_what_it_cannot_compute(name, changed, tmp_path):
    """Attention that ignores varlen, and logits that are scaled in a way that token_stats does not know."""
    path = save_random_model(name, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="varlen")
    for key, value in changed.items():
        setattr(model.config, key, value)
    model.token_stats = MethodType(sft.token_stats, model)
    with pytest.raises(UserError, match="eager"):
        sft.self_check(model, torch.device("cpu"), 1e-3)
