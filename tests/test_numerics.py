"""Log-probs, losses, packing, attention and architectures against independent references."""

import random
import subprocess
import sys
from itertools import pairwise
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ASSETS, ROOT, embedded_model, read_rows, train, write_rows
from peft import LoraConfig
from torch.distributions import Categorical
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import LabelSmoother

import sft
from common import UserError, collate, encode_sft, split_batch, whole_weights
from sft import lr_factor, sft_loss

# ---- Log-probs without logits ----


def model_of(hidden_ND, weight_VD, bias_V=None, **config):
    """What token_stats needs of a model, with given hidden states at its positions."""
    return SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config)),
        base_model=lambda **_: SimpleNamespace(last_hidden_state=hidden_ND[None]),
        get_output_embeddings=lambda: SimpleNamespace(weight=weight_VD, bias=bias_V),
    )


def stats_of(model, labels_N, function=sft.PerToken.apply, temperature=1.0):
    batch = SimpleNamespace(inputs={}, positions_N=torch.arange(len(labels_N)), labels_N=labels_N)
    return sft.token_stats(model, batch, function, temperature)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "softcap": {"final_logit_softcapping": 3.0},
    "all": {"bias": True, "logits_scaling": 2.0, "final_logit_softcapping": 2.0, "temperature": 0.7},
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("chunk", [7 * 50, 10**9])
def test_log_probs_equal_those_of_whole_logits(name, chunk, monkeypatch):
    """Values and gradients against naive float64, for each thing that architectures do to logits."""
    monkeypatch.setattr(sft, "CHUNK_ELEMENTS", (chunk, chunk))
    config = HEADS[name].copy()
    has_bias, temperature = config.pop("bias", False), config.pop("temperature", 1.0)
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((23, 16), (50, 16), (50,))]
    labels, weights = torch.randint(50, (23,)), torch.randn(3, 23, dtype=torch.float64)
    labels[3] = (tensors[0] @ tensors[1].T)[3].argmax()
    hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in tensors)
    logits = (hidden @ weight.T + (bias if has_bias else 0)) * config.get("logit_scale", 1)
    logits = logits / config.get("logits_scaling", 1)
    if cap := config.get("final_logit_softcapping"):
        logits = cap * torch.tanh(logits / cap)
    logits = logits / temperature
    logps, entropy = -F.cross_entropy(logits, labels, reduction="none"), Categorical(logits=logits).entropy()
    expected = [logps, entropy, logits.argmax(-1) == labels, logits.log_softmax(-1).mean(-1)]
    (torch.stack([*expected[:2], expected[3]]) * weights).sum().backward()
    expected += [hidden.grad, weight.grad] + [bias.grad] * has_bias
    hidden, weight, bias = (tensor.float().requires_grad_() for tensor in tensors)
    model = model_of(hidden, weight, bias if has_bias else None, **config)
    found = [*stats_of(model, labels, sft.with_mean_logps, temperature)]
    (torch.stack([*found[:2], found[3]]) * weights).sum().backward()
    found += [hidden.grad, weight.grad] + [bias.grad] * has_bias
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)
    assert found[2].any(), "one label is the arg-max"


@pytest.mark.parametrize("chunk", [2 * 9, 10**9])
def test_log_probs_alone_and_a_micro_batch_that_trains_nothing(chunk, monkeypatch):
    """Training differentiates the log-probs alone; a rank without documents still has a gradient, of zero."""
    monkeypatch.setattr(sft, "CHUNK_ELEMENTS", (chunk, chunk))
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    labels = torch.arange(5)
    stats_of(model_of(hidden, weight), labels)[0].sum().backward()
    loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close((-hidden.grad, -weight.grad), torch.autograd.grad(loss, (hidden, weight)))
    weight.grad = None
    stats_of(model_of(hidden, weight), labels[:0])[0].sum().backward()
    assert weight.grad.abs().max() == 0


PEAK = """
import resource, torch
from test_numerics import model_of, stats_of
hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(64_000, 8, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stats_of(model_of(hidden, weight), torch.zeros(4096, dtype=torch.long))[0].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_of_log_probs_is_bounded():
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=ROOT / "tests")
    assert float(result.stdout) < 700, "MiB; whole logits are 1,000, their gradient and softmax as much again"


# ---- Losses, schedules, noise ----


def test_losses():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 6, 11), torch.randint(11, (1, 6))
    labels[0, 2] = -100
    logps_NV = logits[0].log_softmax(-1)[labels[0] != -100]
    logps, mean = logps_NV.gather(1, labels[0][labels[0] != -100, None])[:, 0], logps_NV.mean(-1)
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, labels)
    torch.testing.assert_close(sft_loss("nll", 0.1, logps, mean).mean(), expected)
    expected = F.cross_entropy(logits[0], labels[0])
    torch.testing.assert_close(sft_loss("nll", 0.0, logps).mean(), expected)
    logps = logps.clone().requires_grad_()
    sft_loss("dft", 0.0, logps).sum().backward()
    torch.testing.assert_close(logps.grad, -logps.detach().exp())  # the weight is not differentiated


def test_schedules():
    for name in ("constant", "linear", "cosine", "wsd"):
        factors = [lr_factor(step, 110, 10, name) for step in range(110)]
        assert factors[:11] == [*((step + 1) / 10 for step in range(10)), 1]
        assert all(a >= b for a, b in pairwise(factors[10:]))
    cases = {
        (60, "linear"): 0.5,
        (60, "cosine"): 0.5,
        (89, "wsd"): 1,
        (100, "wsd"): 0.5,
        (109, "constant"): 1,
    }
    cases |= {(109, "linear"): 0.01}  # the last step still learns
    for (step, name), expected in cases.items():
        assert lr_factor(step, 110, 10, name) == pytest.approx(expected)


def test_neftune_noise_is_uniform_up_to_alpha_over_the_root_of_length_times_width(monkeypatch, tmp_path):
    """What a run adds to the embeddings of documents of two lengths."""
    noises, add_neftune = {}, sft.add_neftune

    def note(module, inputs, output):
        for token in inputs[0].unique().tolist():
            noises[token] = (output - module.weight[inputs[0]])[inputs[0] == token].detach()

    monkeypatch.setattr(
        sft, "add_neftune", lambda e, *rest: (add_neftune(e, *rest), e.register_forward_hook(note))
    )
    data = (write_rows(tmp_path / "rows.jsonl", [{"text": "2" * 4}, {"text": "3" * 100}]),)
    train(sft, tmp_path / "run", dataset=data, neftune_alpha=5.0, max_steps=1)
    for digit, length in (("2", 5), ("3", 101)):  # with the token that ends a text
        noise = noises[AutoTokenizer.from_pretrained(ASSETS / "model")(digit)["input_ids"][0]]
        bound = 5.0 / (length * noise.shape[-1]) ** 0.5
        assert 0.95 * bound < noise.abs().max() <= bound * 1.001
        assert noise.std() == pytest.approx(bound / 3**0.5, rel=0.1)


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


def test_collate_aligns_labels_with_the_position_that_predicts_them():
    first = np.array([5, 6, 7]), np.array([False, False, True])
    batch = collate([first, (np.array([8, 9]), np.array([True, True]))])
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch.positions_N.tolist() == [1, 3]  # 6 predicts 7, 8 predicts 9; nothing predicts 8
    assert batch.labels_N.tolist() == [7, 9]
    assert batch.documents_N.tolist() == [0, 1]
    assert len(collate([]).positions_N) == 0


@pytest.mark.parametrize("window", [None, 7])
def test_packed_equals_alone(window):
    """Log-probs and gradients of a packed row equal those of transformers' own forward on each document alone."""
    model, rng = embedded_model(sft, window), np.random.default_rng(0)
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
    model, rng, packed = embedded_model(sft, window), np.random.default_rng(0), []
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


# ---- Architectures ----

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512, "rotary_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
PLAIN = ["llama", "qwen2", "qwen3", "gemma", "olmo", "olmo2", "phi", "phi3", "glm", "glm4", "smollm3", "gpt_neox"]  # fmt: skip
# What an architecture's config needs beyond SIZES.
PACKED = {name: {} for name in PLAIN} | {
    "mistral": {"sliding_window": 5}, "gemma3_text": {"sliding_window": 4}, "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0}, "gpt2": GPT, "mixtral": EXPERTS, "qwen3_moe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}  # fmt: skip
GEMMA2 = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0}
EAGER = {"gemma2": GEMMA2, "gpt_oss": EXPERTS | {"sliding_window": 8}, "bloom": GPT, "codegen": GPT}
CONV = {"layer_types": ["conv", "full_attention"]}
ALONE = {"falcon_h1": FALCON, "mamba": MAMBA, "mamba2": MAMBA, "lfm2": CONV}


def save_random_model(name, path):
    """A tiny model of an architecture, with every weight moved, beside the embedded tokenizer."""
    options = (PACKED | EAGER | ALONE)[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SIZES | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", [*PACKED, *EAGER, *ALONE])
def test_an_architecture_trains_and_reloads_to_the_same_loss(name, tmp_path, monkeypatch):
    """eval/loss after two steps equals that of final/, as transformers loads it, by its own forward row by row."""
    packed, self_check = [], sft.self_check
    monkeypatch.setattr(sft, "self_check", lambda *args: packed.append(self_check(*args)) or packed[0])
    rows = read_rows(ASSETS / "messages.jsonl")[:24]
    data = (write_rows(tmp_path / "rows.jsonl", rows),)
    flags = {"dataset": data, "eval_dataset": data, "batch_size": 24, "max_steps": 2}
    flags |= {"attention": "eager"} if name in EAGER or name == "mamba" else {}
    last = train(sft, tmp_path / "run", model=save_random_model(name, tmp_path / "model"), **flags)[-1]
    assert name in EAGER or packed == [name in PACKED]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", attn_implementation="eager")
    tokenizer, losses, hits = AutoTokenizer.from_pretrained(tmp_path / "run" / "final"), [], []
    for row in rows:
        encoded = encode_sft(row, tokenizer)
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["loss_mask"])[1:]
        with torch.no_grad():
            logits_TV = model(input_ids=ids[None], use_cache=False).logits[0, :-1][mask]
        losses.append(F.cross_entropy(logits_TV, ids[1:][mask], reduction="none"))
        hits.append(logits_TV.argmax(-1) == ids[1:][mask])
    assert last["eval/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert last["eval/mean_token_accuracy"] == pytest.approx(torch.cat(hits).float().mean().item(), abs=0.02)
    exact_match = np.mean([hit.all().item() for hit in hits])
    assert last["eval/exact_match"] == pytest.approx(exact_match, abs=0.05)


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
        sft.self_check(model, torch.device("cpu"), torch.float32)


def test_whole_weights_add_adapters_as_the_model_does():
    """GPT-2's layers hold their weights transposed."""
    config = AutoConfig.for_model("gpt2", **(SIZES | GPT))
    model = AutoModelForCausalLM.from_config(config)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    for name_of, weight in model.named_parameters():
        if "lora_B" in name_of:
            torch.nn.init.normal_(weight)
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict(dict(whole_weights(model)), strict=False)
    ids_BT = torch.arange(8)[None]
    torch.testing.assert_close(plain(ids_BT).logits, model.eval()(ids_BT).logits, rtol=1e-4, atol=1e-4)
