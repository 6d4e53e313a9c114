"""What needs CUDA. Run on a GPU machine with `pytest -m gpu`."""

import json
import math
import random
import shutil
from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ASSETS, read_metrics, write_rows
from transformers import AutoModelForCausalLM

import gkd
import grpo
import sft
from common import HFEngine, check_log_probs, collate, varlen_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def rows(tmp_path):
    rng, lines = random.Random(0), (ASSETS / "messages.jsonl").read_text().splitlines()
    chats = [
        {"messages": sum((json.loads(rng.choice(lines))["messages"] for _ in range(3)), [])}
        for _ in range(64)
    ]
    return write_rows(tmp_path / "rows.jsonl", chats)


def train(output_dir, rows, **flags):
    flags = {"eval_dataset": (), "wandb": "disabled", "batch_size": 16, "max_steps": 8, **flags}
    sft.main(replace(sft.Args(dataset=(rows,), output_dir=str(output_dir)), **flags))
    return read_metrics(output_dir)


def test_bf16_mixed_precision_follows_float32(tmp_path, rows):
    exact = train(tmp_path / "a", rows, dtype="float32", attention="sdpa", eval_dataset=(rows,))
    mixed = train(tmp_path / "b", rows, eval_dataset=(rows,))
    for a, b in zip(exact, mixed, strict=True):
        if "eval/loss" in a:
            assert b["eval/loss"] == pytest.approx(a["eval/loss"], rel=0.03)
            continue
        assert b["loss"] == pytest.approx(a["loss"], rel=0.03)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)


@pytest.mark.parametrize("window", [None, 64])
def test_varlen_attention_equals_sdpa_of_each_document(window):
    torch.manual_seed(0)
    lengths = [3, 200, 129, 64]
    batch = collate([(np.zeros(n, np.int64), np.ones(n, bool)) for n in lengths], "cuda")
    shapes = [(1, 8, sum(lengths), 64), (1, 2, sum(lengths), 64), (1, 2, sum(lengths), 64)]
    qkv = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    out, _ = varlen_attention(None, *qkv, None, scaling=0.1, sliding_window=window, **{
        key: value for key, value in batch.inputs.items() if key.startswith(("cu_seq", "max_length"))
    })  # fmt: skip
    upstream = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, qkv, upstream)]
    pieces, start = [], 0
    for n in lengths:
        q, k, v = (tensor[:, :, start : start + n].float() for tensor in qkv)
        mask = torch.ones(n, n, dtype=torch.bool, device="cuda").tril().triu(1 - (window or n))
        pieces.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.1, enable_gqa=True))
        start += n
    expected = torch.cat(pieces, 2).transpose(1, 2)
    expected = [expected, *torch.autograd.grad(expected, qkv, upstream.float())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


def test_compile_follows_eager(tmp_path, rows):
    eager, compiled = train(tmp_path / "a", rows), train(tmp_path / "b", rows, compile=True)
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in eager], rel=0.03)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_lora_learns(tmp_path, rows, load_in_4bit):
    if load_in_4bit:
        pytest.importorskip("bitsandbytes", reason="tests/requirements.txt installs it")
    losses = [row["loss"] for row in train(tmp_path / "a", rows, lora_rank=8, learning_rate=3e-3, max_steps=30, load_in_4bit=load_in_4bit)]  # fmt: skip
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_resume_is_exact_on_one_gpu(tmp_path, rows):
    straight = train(tmp_path / "a", rows, save_every=4)
    for path in sorted((tmp_path / "a").glob("checkpoint-*"))[1:]:
        shutil.rmtree(path)
    resumed = train(tmp_path / "a", rows, save_every=4, resume=True)
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in straight], rel=1e-3)


def test_the_embedded_engine_has_the_trainers_log_probs_in_bf16():
    """With its cache, whose heads share keys and which loses sequences that have ended."""
    policy = AutoModelForCausalLM.from_pretrained(
        ASSETS / "model", dtype=torch.bfloat16, attn_implementation="varlen"
    )
    policy.token_stats = MethodType(grpo.token_stats, policy.to("cuda"))
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", dtype=torch.bfloat16).to("cuda")
    engine, prompts = HFEngine(model), [[1, 286, 201, 291][:n] for n in (4, 2, 3)]
    engine.load_weights(policy.named_parameters(), 0)
    groups = engine.generate(prompts, [(n,) for n in range(3)], 8, [200, 100, 50], 1.0, [2])
    assert len({len(sample.ids) for group in groups for sample in group}) > 3
    check_log_probs(engine, sum(groups, []), policy, 1.0)
    assert engine.unchecked_syncs == 0


N, VOCABULARY = 16384, 152_000  # float32 logits alone are 9.3 GiB


def head():
    """Hidden states and the weight of a head, in bf16."""
    hidden = torch.randn(N, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return hidden, (torch.randn(VOCABULARY, 1024, device="cuda") * 0.02).bfloat16().requires_grad_()


def peak_of(function):
    """-> what function() returns, and how many GiB it takes at most."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return function(), (torch.cuda.max_memory_allocated() - before) / 2**30


def test_log_probs_at_vocabulary_152k_need_less_than_logits():
    (hidden, weight), labels, part = head(), torch.randint(VOCABULARY, (N,), device="cuda"), slice(0, 512)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))
    model.get_output_embeddings = lambda: SimpleNamespace(weight=weight, bias=None)
    model.base_model = lambda: SimpleNamespace(last_hidden_state=hidden[None])
    batch = SimpleNamespace(inputs={}, positions_N=torch.arange(N, device="cuda"), labels_N=labels)

    def run():
        logps, entropy, _ = sft.token_stats(model, batch)
        logps.sum().backward()
        return logps, entropy

    (logps, entropy), peak = peak_of(run)
    assert peak < 5, f"{peak:.1f} GiB"
    expected = (hidden[part].float() @ weight.float().T).log_softmax(-1)
    labels_N1 = labels[part, None]
    torch.testing.assert_close(logps[part], expected.gather(1, labels_N1)[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(entropy[part], -(expected.exp() * expected).sum(-1), rtol=1e-3, atol=1e-3)


def test_divergence_at_vocabulary_152k_needs_less_than_logits():
    """In bf16, against whole float32 logits on a part of the positions."""
    (hidden, weight), (teacher_hidden, teacher_weight), part = head(), head(), slice(0, 256)

    def function(products_CV, chunk):
        with torch.no_grad():
            teacher_logps_CV = (
                (teacher_hidden[chunk][: len(products_CV)] @ teacher_weight.T).float().log_softmax(-1)
            )
        return [gkd.divergence(products_CV.log_softmax(-1), teacher_logps_CV, 0.5)]

    def run():
        (loss,) = gkd.ChunkedLoss.apply(function, hidden, weight)
        loss.backward()

    _, peak = peak_of(run)
    assert peak < 5, f"{peak:.1f} GiB"
    logps, teacher_logps = (
        (states[part].float() @ matrix.float().T).log_softmax(-1)
        for states, matrix in ((hidden.detach(), weight.detach()), (teacher_hidden, teacher_weight))
    )
    mixture_logps = torch.logaddexp(logps, teacher_logps) - math.log(2)
    expected = sum((p.exp() * (p - mixture_logps)).sum() / 2 for p in (logps, teacher_logps))
    with torch.no_grad():
        (found,) = gkd.ChunkedLoss.apply(function, hidden[part], weight)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3)


def test_distillation_in_bf16_follows_float32(tmp_path):
    """With the teacher in bf16, off policy: samples would part at the first token that rounding changes."""
    curves = []
    for dtype in ("float32", "auto"):
        flags = {"eval_dataset": (), "wandb": "disabled", "max_steps": 8, "lmbda": 0.0, "dtype": dtype}
        flags |= {"attention": "sdpa" if dtype == "float32" else "varlen"}
        gkd.main(replace(gkd.Args(output_dir=str(tmp_path / dtype)), **flags))
        curves.append([row["loss"] for row in read_metrics(tmp_path / dtype)])
    assert curves[1] == pytest.approx(curves[0], rel=0.05)
