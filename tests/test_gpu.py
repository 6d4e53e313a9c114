"""What needs CUDA. Run on a GPU machine with `pytest -m gpu`."""

import copy
import json
import math
import random
import shutil
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ASSETS, train, write_rows
from transformers import AutoModelForCausalLM

import gkd
import grpo
import sft
from common import HFEngine, check_log_probs, register_attention, varlen_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def rows(tmp_path):
    rng, lines = random.Random(0), (ASSETS / "messages.jsonl").read_text().splitlines()
    turns = [[json.loads(rng.choice(lines))["messages"] for _ in range(3)] for _ in range(64)]
    return write_rows(tmp_path / "rows.jsonl", [{"messages": sum(chats, [])} for chats in turns])


def fit(output_dir, rows, name="loss", **flags):
    """Train on the rows -> that metric, step by step."""
    metrics = train(sft, output_dir, dataset=(rows,), **{"batch_size": 16, "max_steps": 8, **flags})
    return [row[name] for row in metrics if name in row]


@pytest.mark.parametrize(("name", "rel"), [("loss", 0.03), ("grad_norm", 0.1), ("eval/loss", 0.03)])
def test_bf16_mixed_precision_follows_float32(tmp_path, rows, name, rel):
    exact = fit(tmp_path / "a", rows, name, dtype="float32", attention="sdpa", eval_dataset=(rows,))
    assert fit(tmp_path / "b", rows, name, eval_dataset=(rows,)) == pytest.approx(exact, rel=rel)


@pytest.mark.parametrize("window", [None, 64])
def test_varlen_attention_equals_sdpa_of_each_document(window):
    torch.manual_seed(0)
    lengths = [3, 200, 129, 64]
    bounds = torch.tensor([0, 3, 203, 332, 396], dtype=torch.int32, device="cuda")
    qkv = [torch.randn(1, heads, 396, 64, device="cuda").bfloat16().requires_grad_() for heads in (8, 2, 2)]
    options = {"scaling": 0.1, "sliding_window": window, "cu_seq_lens_q": bounds, "max_length_q": 200}
    out, _ = varlen_attention(None, *qkv, **options)
    upstream, pieces = torch.randn_like(out), []
    found = [out, *torch.autograd.grad(out, qkv, upstream)]
    for n, *parts in zip(lengths, *(tensor.float().split(lengths, 2) for tensor in qkv), strict=True):
        mask = torch.ones(n, n, dtype=torch.bool, device="cuda").tril().triu(1 - (window or n))
        pieces.append(F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=0.1, enable_gqa=True))
    expected = torch.cat(pieces, 2).transpose(1, 2)
    expected = [expected, *torch.autograd.grad(expected, qkv, upstream.float())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


def test_compile_follows_eager(tmp_path, rows):
    eager, compiled = fit(tmp_path / "a", rows), fit(tmp_path / "b", rows, compile=True)
    assert compiled == pytest.approx(eager, rel=0.03)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_lora_learns(tmp_path, rows, load_in_4bit):
    flags = {"lora_rank": 8, "learning_rate": 3e-3, "max_steps": 30, "load_in_4bit": load_in_4bit}
    losses = fit(tmp_path, rows, **flags)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_resume_is_exact_on_one_gpu(tmp_path, rows):
    straight = fit(tmp_path / "a", rows, save_every=4)
    for path in sorted((tmp_path / "a").glob("checkpoint-*"))[1:]:
        shutil.rmtree(path)
    assert fit(tmp_path / "a", rows, save_every=4, resume=True) == pytest.approx(straight, rel=1e-3)


def test_the_embedded_engine_has_the_trainers_log_probs_in_bf16():
    """With its cache, whose heads share keys and which loses sequences that have ended."""
    policy = AutoModelForCausalLM.from_pretrained(ASSETS / "model", dtype=torch.bfloat16).to("cuda")
    engine, prompts = HFEngine(copy.deepcopy(policy)), [[1, 286, 201, 291][:n] for n in (4, 2, 3)]
    register_attention()
    policy.set_attn_implementation("varlen")
    policy.token_stats = MethodType(grpo.token_stats, policy)
    engine.load_weights(policy.named_parameters(), 0)
    groups = engine.generate(prompts, [(n,) for n in range(3)], 8, [200, 100, 50], 1.0, [2])
    assert len({len(sample.ids) for group in groups for sample in group}) > 3
    check_log_probs(engine, sum(groups, []), policy, 1.0)
    assert engine.unchecked_syncs == 0


N, VOCABULARY = 16384, 152_000  # float32 logits alone are 9.3 GiB


def head():
    """Hidden states and the weight of a head, in bf16."""
    hidden, weight = (torch.randn(n, 1024, device="cuda") for n in (N, VOCABULARY))
    return hidden.bfloat16().requires_grad_(), (weight * 0.02).bfloat16().requires_grad_()


def memory():
    """Bytes that are in use; the peak begins here."""
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def test_log_probs_at_vocabulary_152k_need_less_than_logits():
    (hidden, weight), labels, part = head(), torch.randint(VOCABULARY, (N,), device="cuda"), slice(0, 512)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))
    model.get_output_embeddings = lambda: SimpleNamespace(weight=weight, bias=None)
    model.base_model = lambda: SimpleNamespace(last_hidden_state=hidden[None])
    batch = SimpleNamespace(inputs={}, positions_N=torch.arange(N, device="cuda"), labels_N=labels)
    before = memory()
    logps, entropy, _ = sft.token_stats(model, batch)
    logps.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 5 * 2**30
    expected = (hidden[part].float() @ weight.float().T).log_softmax(-1)
    expected = expected.gather(1, labels[part, None])[:, 0], -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close((logps[part], entropy[part]), expected, rtol=1e-3, atol=1e-3)


def test_divergence_at_vocabulary_152k_needs_less_than_logits():
    """In bf16, against whole float32 logits on a part of the positions."""
    (hidden, weight), (teacher_hidden, teacher_weight), part = head(), head(), slice(0, 256)

    def function(products_CV, chunk):
        teacher_logits_CV = teacher_hidden[chunk][: len(products_CV)] @ teacher_weight.T
        teacher_logps_CV = teacher_logits_CV.detach().float().log_softmax(-1)
        return [gkd.divergence(products_CV.log_softmax(-1), teacher_logps_CV, 0.5)]

    before = memory()
    gkd.ChunkedLoss.apply(function, hidden, weight).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 5 * 2**30
    (found,) = gkd.ChunkedLoss.apply(function, hidden[part], weight).detach()
    pairs = (hidden.detach(), weight.detach()), (teacher_hidden.detach(), teacher_weight.detach())
    logps, teacher_logps = ((x[part].float() @ matrix.float().T).log_softmax(-1) for x, matrix in pairs)
    mixture_logps = torch.logaddexp(logps, teacher_logps) - math.log(2)
    expected = sum((p.exp() * (p - mixture_logps)).sum() / 2 for p in (logps, teacher_logps))
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3)


def test_distillation_in_bf16_follows_float32(tmp_path):
    """With the teacher in bf16, off policy: samples would part at the first token that rounding changes."""
    flags = {"max_steps": 8, "batch_size": gkd.Args.batch_size, "lmbda": 0.0}
    exact = train(gkd, tmp_path / "a", dtype="float32", attention="sdpa", **flags)
    mixed = train(gkd, tmp_path / "b", **flags)
    assert [row["loss"] for row in mixed] == pytest.approx([row["loss"] for row in exact], rel=0.05)
