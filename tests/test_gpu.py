"""What needs CUDA. Run on a GPU machine with `pytest -m gpu`."""

import json
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ASSETS, read_metrics, write_rows

import gkd
import sft
from common import collate, varlen_attention
from sft import ChunkedLogProbs, Head

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


def test_log_probs_at_vocabulary_152k_need_less_than_logits():
    hidden = torch.randn(16384, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(152_000, 1024, device="cuda") * 0.02).bfloat16().requires_grad_()
    labels = torch.randint(152_000, (16384,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logps, entropy, *_ = ChunkedLogProbs.apply(hidden, weight, None, labels, Head(1, 0, 1), False, False)
    logps.sum().backward()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert peak < 5, f"{peak:.1f} GiB, where float32 logits alone are 9.3"
    part = slice(0, 512)
    expected = (hidden[part].float() @ weight.float().T).log_softmax(-1)
    torch.testing.assert_close(
        logps[part], expected.gather(1, labels[part, None])[:, 0], rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(entropy[part], -(expected.exp() * expected).sum(-1), rtol=1e-3, atol=1e-3)


def test_divergence_at_vocabulary_152k_needs_less_than_logits():
    """In bf16, against whole float32 logits on a part of the positions."""
    n, vocabulary, part = 16384, 152_000, slice(0, 256)
    hidden = torch.randn(n, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, teacher_weight = ((torch.randn(vocabulary, 1024, device="cuda") * 0.02).bfloat16() for _ in "12")
    teacher = gkd.HeadInputs(torch.randn_like(hidden), teacher_weight, None, Head(1, 0, 1))
    labels = torch.zeros(n, dtype=torch.long, device="cuda")
    given = hidden, weight.requires_grad_(), None, labels, Head(1, 0, 1), teacher, ("jsd", 0.5, 0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, divergence_N, *_ = gkd.ChunkedDivergence.apply(*given)
    loss.backward()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert peak < 5, f"{peak:.1f} GiB, where float32 logits of one model alone are 9.3"
    logps, teacher_logps = (
        (states[part].float() @ head.float().T).log_softmax(-1)
        for states, head in ((hidden.detach(), weight.detach()), teacher[:2])
    )
    mixture_logps = torch.logaddexp(logps, teacher_logps) - math.log(2)
    kls = [(p.exp() * (p - mixture_logps)).sum(-1) for p in (logps, teacher_logps)]
    torch.testing.assert_close(divergence_N[part], sum(kls) / 2, rtol=1e-2, atol=1e-3)


def test_distillation_in_bf16_follows_float32(tmp_path):
    """With the teacher in bf16, off policy: samples would part at the first token that rounding changes."""
    curves = []
    for dtype in ("float32", "auto"):
        flags = {"eval_dataset": (), "wandb": "disabled", "max_steps": 8, "lmbda": 0.0, "dtype": dtype}
        flags |= {"attention": "sdpa" if dtype == "float32" else "varlen"}
        gkd.main(replace(gkd.Args(output_dir=str(tmp_path / dtype)), **flags))
        curves.append([row["loss"] for row in read_metrics(tmp_path / dtype)])
    assert curves[1] == pytest.approx(curves[0], rel=0.05)
