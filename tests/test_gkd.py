"""Distillation: divergences against whole logits and TRL, tokenizers, teachers, invariance, resume, and learning."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ASSETS,
    ROOT,
    assert_same_curve,
    flags_of,
    read_metrics,
    run,
    weights,
    write_rows,
)
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl.experimental.gkd import GKDTrainer

import gkd
from common import UserError, collate, encode_distillation, load_tokenizer
from gkd import ChunkedDivergence, Head, HeadInputs, Scores

TEACHER = str(ASSETS / "teacher")
BETAS = [0, 0.1, 0.5, 1]


def train(output_dir, **flags):
    """Run gkd.py in this process -> the rows of metrics.jsonl without what depends on the clock."""
    short = {"eval_dataset": (), "wandb": "disabled", "batch_size": 16, "max_steps": 3}
    gkd.main(replace(gkd.Args(output_dir=str(output_dir)), **{**short, **flags}))
    return metrics_of(output_dir)


def metrics_of(output_dir):
    return [
        {key: value for key, value in row.items() if key != "generate_seconds"}
        for row in read_metrics(output_dir)
    ]


# ---- Divergences -----------------------------------------------------------------------------------------------------


def kl(p, q):
    """Of two distributions, the terms one by one."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_the_ends_and_the_middle_by_hand():
    """On two tokens, from the definition."""
    p, q, beta = [0.9, 0.1], [0.4, 0.6], 0.3  # student, teacher
    logps, teacher_logps = (torch.tensor([x], dtype=torch.float64).log() for x in (p, q))
    mixture = [(1 - beta) * a + beta * b for a, b in zip(p, q, strict=True)]
    for weight, expected in (
        (0, kl(q, p)), (1, kl(p, q)), (beta, beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)),
    ):  # fmt: skip
        value, _ = gkd.divergence(logps, logps.exp(), teacher_logps, weight)
        assert value.item() == pytest.approx(expected)


def whole_logits(hidden, weight, bias, head):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / head.temperature).log_softmax(-1)


def naive(logps, teacher_logps, beta, k=0):
    """Divergence of each position from whole distributions in float64; autograd gives the gradient. k: of the
    teacher's likeliest k tokens, chosen one row at a time, and the sum of the others."""
    if k:
        pairs = []
        for own, theirs in zip(logps, teacher_logps, strict=True):
            best = set(sorted(range(len(theirs)), key=lambda i, theirs=theirs: -theirs[i].item())[:k])
            rest = [i for i in range(len(theirs)) if i not in best]
            pairs.append([
                torch.cat([x[sorted(best)], x[rest].exp().sum().log()[None]]) for x in (own, theirs)
            ])  # fmt: skip
        logps, teacher_logps = (torch.stack(side) for side in zip(*pairs, strict=True))
    p, q = logps.exp(), teacher_logps.exp()
    if beta == 0:
        return (q * (teacher_logps - logps)).sum(-1)
    if beta == 1:
        return (p * (logps - teacher_logps)).sum(-1)
    m = (1 - beta) * p + beta * q
    return (beta * q * (teacher_logps - m.log()) + (1 - beta) * p * (logps - m.log())).sum(-1)


HEADS = {
    "plain": (Head(1.0, 0.0, 1.0), Head(1.0, 0.0, 1.0), False),
    "warm": (Head(1.0, 0.0, 1.7), Head(1.0, 0.0, 1.7), True),
    "cool, soft-capped student": (Head(0.5, 2.0, 0.6), Head(1.0, 0.0, 0.6), True),
    "scaled teacher": (Head(1.0, 0.0, 2.0), Head(0.25, 3.0, 2.0), False),
}


def make_heads(n=23, vocab=50, d=16, e=12):
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    student = [torch.randn(n, d, **double), torch.randn(vocab, d, **double) / 2, torch.randn(vocab, **double)]
    teacher = [torch.randn(n, e, **double), torch.randn(vocab, e, **double) / 2, torch.randn(vocab, **double)]
    return student, teacher, torch.randint(vocab, (n,))


@pytest.mark.parametrize("chunk", [7 * 50, 10**9])
@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("beta", BETAS)
def test_chunked_divergence_equals_whole_logits(beta, name, k, chunk, monkeypatch):
    """Value, gradients, entropies and agreement; the models' hidden sizes and heads differ."""
    monkeypatch.setattr(ChunkedDivergence, "CHUNK_ELEMENTS", (chunk, chunk))
    head, teacher_head, with_bias = HEADS[name]
    student, teacher, labels = make_heads()
    exact = [tensor.clone().requires_grad_() for tensor in student]
    logps = whole_logits(*exact[:2], exact[2] if with_bias else None, head)
    teacher_logps = whole_logits(*teacher[:2], None, teacher_head)
    expected = naive(logps, teacher_logps, beta, k)
    (0.3 * expected.sum()).backward()

    ours = [tensor.float().requires_grad_() for tensor in student]
    states = HeadInputs(teacher[0].float(), teacher[1].float(), None, teacher_head)
    given = *ours[:2], ours[2] if with_bias else None, labels, head, states, ("jsd", beta, k)
    loss, divergence_N, entropy_N, teacher_entropy_N, agrees_N = ChunkedDivergence.apply(*given)
    (0.3 * loss).backward()
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(divergence_N.double(), expected, **close)
    torch.testing.assert_close(loss.double(), expected.sum(), **close)
    for found, other in zip(ours[: 2 + with_bias], exact, strict=False):
        torch.testing.assert_close(found.grad.double(), other.grad, **close)
        assert found.grad.abs().max() > 1e-4
    for found, of in ((entropy_N, logps), (teacher_entropy_N, teacher_logps)):
        torch.testing.assert_close(found.double(), -(of.exp() * of).sum(-1), **close)
    assert agrees_N.tolist() == (logps.argmax(-1) == teacher_logps.argmax(-1)).float().tolist()


@pytest.mark.parametrize("beta", BETAS)
def test_top_k_of_all_tokens_without_the_rest_is_the_whole(beta):
    torch.manual_seed(0)
    logps, teacher_logps = torch.randn(2, 9, 31, dtype=torch.float64).log_softmax(-1)
    top_logps, ids = teacher_logps.topk(31)
    found = gkd.top_k_divergence(logps, top_logps, ids, beta)
    for a, b in zip(found, gkd.divergence(logps, logps.exp(), teacher_logps, beta), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("beta", BETAS)
def test_buckets_never_say_more_than_tokens(beta):
    """The data processing inequality, and more with every further token."""
    torch.manual_seed(0)
    logps, teacher_logps = (2 * torch.randn(2, 40, 31, dtype=torch.float64)).log_softmax(-1)
    whole, values = naive(logps, teacher_logps, beta), []
    for k in (1, 3, 10, 30):
        top_logps, ids = teacher_logps.topk(k)
        rest = (1 - top_logps.exp().sum(1, keepdim=True)).log()
        values.append(gkd.top_k_divergence(logps, torch.cat([top_logps, rest], 1), ids, beta)[0])
    for less, more in zip(values, [*values[1:], whole], strict=True):
        assert (less <= more + 1e-9).all()


def test_extreme_logits_give_finite_losses_and_gradients():
    """Probabilities that float32 cannot hold: 0 times the log of 0 must not come up."""
    hidden = torch.tensor([[300.0], [-300.0], [0.0]], requires_grad=True)
    weight, teacher_weight = torch.tensor([[1.0], [-1.0], [0.5]]), torch.tensor([[-1.0], [1.0], [0.2]])
    for beta in BETAS:
        for k in (0, 1):
            states = HeadInputs(hidden.detach(), teacher_weight, None, Head(1, 0, 1))
            given = hidden, weight, None, torch.zeros(3).long(), Head(1, 0, 1), states, ("jsd", beta, k)
            loss = ChunkedDivergence.apply(*given)[0]
            assert loss.isfinite(), (beta, k)
            assert torch.autograd.grad(loss, hidden)[0].isfinite().all(), (beta, k)


def test_a_models_divergence_from_itself_is_zero():
    (hidden, weight, bias), _, labels = make_heads()
    hidden = hidden.float().requires_grad_()
    states = HeadInputs(hidden.detach(), weight.float(), bias.float(), Head(1, 0, 1))
    for beta in BETAS:
        given = hidden, weight.float(), bias.float(), labels, Head(1, 0, 1), states, ("jsd", beta, 0)
        loss = ChunkedDivergence.apply(*given)[0]
        assert loss.item() == pytest.approx(0, abs=1e-4)
        assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-5


def test_sampled_losses_have_in_expectation_the_reverse_kls_gradient():
    """Over all tokens, weighed by the student's probability; the estimate itself, differentiated, has none."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    teacher_logps = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    logps = logits.log_softmax(-1)
    exact = (logps.exp() * (logps - teacher_logps)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    estimate = (logps.exp().detach() * (logps - teacher_logps)).sum()
    (useless,) = torch.autograd.grad(estimate, logits)
    assert useless.abs().max() < 1e-12
    own = logps.detach().expand(7, 7)
    labels = torch.arange(7)[:, None]
    given = own, own.exp(), labels, teacher_logps.expand(7, 7).gather(1, labels)
    loss, value, grad = gkd.sampled_reverse_kl(*given)
    torch.testing.assert_close(own[0].exp() @ grad, expected)
    assert (own[0].exp() @ value).item() == pytest.approx(exact.item())
    # The gradient is that of the loss with its advantage held.
    free = own.clone().requires_grad_()
    held = ((own - teacher_logps).gather(1, labels) * free.log_softmax(-1).gather(1, labels)).squeeze(1)
    torch.testing.assert_close(loss, held.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(held.sum(), free)[0])


def test_the_sampled_loss_through_the_chunks(monkeypatch):
    monkeypatch.setattr(ChunkedDivergence, "CHUNK_ELEMENTS", (7 * 50, 7 * 50))
    student, teacher, labels = make_heads()
    exact = [tensor.clone().requires_grad_() for tensor in student[:2]]
    head = Head(1, 0, 1.3)
    logps = whole_logits(*exact, None, head).gather(1, labels[:, None])
    teacher_logps = whole_logits(*teacher[:2], None, head).gather(1, labels[:, None])
    expected = -((teacher_logps - logps).detach() * logps).sum()
    expected.backward()
    ours = [tensor.float().requires_grad_() for tensor in student[:2]]
    states = HeadInputs(teacher[0].float(), teacher[1].float(), None, head)
    stats = ChunkedDivergence.apply(*ours, None, labels, head, states, ("sampled", 0.5, 0))
    stats[0].backward()
    torch.testing.assert_close(stats[0].double(), expected)
    torch.testing.assert_close(stats[1].double(), (logps - teacher_logps).detach()[:, 0], rtol=1e-4, atol=1e-5)
    for found, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [("jsd", 0, 5), ("jsd", 0.5, 5), ("jsd", 1, 5), ("sampled", 0.5, 0)])
def test_scores_of_a_server_train_as_the_model_does(mode):
    """The same numbers by the other way in: likeliest tokens, their log-probs and the label's."""
    student, teacher, labels = make_heads()
    head, k = Head(1, 0, 1), mode[2] or 1
    states = HeadInputs(teacher[0].float(), teacher[1].float(), None, head)
    teacher_logps = whole_logits(*teacher[:2], None, head)
    top_logps, ids = teacher_logps.topk(k)
    rest = (1 - top_logps.exp().sum(1, keepdim=True)).log()
    label_logps = teacher_logps.gather(1, labels[:, None])[:, 0]
    scores = Scores(ids, torch.cat([top_logps, rest], 1).float(), label_logps.float())
    results = []
    for given in (states, scores):
        ours = [tensor.float().requires_grad_() for tensor in student[:2]]
        loss, *stats = ChunkedDivergence.apply(*ours, None, labels, head, given, mode)
        loss.backward()
        results.append([loss, stats[0], stats[1], stats[3], *(tensor.grad for tensor in ours)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_equals_trls(beta):
    """TRL's generalized_jsd_loss, at the temperature that is given to it. Its trainer gives it none, whatever
    --temperature is; that is not reproduced here."""
    student, teacher, labels = make_heads()
    head = Head(1, 0, 1.3)
    logits = [hidden @ weight.T for hidden, weight, _ in (student, teacher)]
    mask = labels.clone()
    mask[:5] = -100
    expected = GKDTrainer.generalized_jsd_loss(
        logits[0][None], logits[1][None], labels=mask[None], beta=beta, temperature=1.3
    )
    rows = slice(5, None)
    states = HeadInputs(teacher[0].float()[rows], teacher[1].float(), None, head)
    given = student[0].float()[rows], student[1].float(), None, labels[rows], head, states, ("jsd", beta, 0)
    loss = ChunkedDivergence.apply(*given)[0] / (len(labels) - 5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


PEAK = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from gkd import ChunkedDivergence, Head, HeadInputs
torch.set_num_threads(1)
n, v = 256, {vocabulary}
hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)
teacher = HeadInputs(torch.randn(n, 8), torch.randn(v, 8), None, Head(1, 0, 1))
ChunkedDivergence.CHUNK_ELEMENTS = 2**18, 2**18
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
given = hidden, weight, None, torch.zeros(n, dtype=torch.long), Head(1, 0, 1), teacher, ("jsd", 0.5, {k})
ChunkedDivergence.apply(*given)[0].backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("k", [0, 20])
def test_memory_is_bounded_while_the_vocabulary_grows(k):
    peaks = {}
    for vocabulary in (8_000, 128_000):  # of each model, logits of 8 and 125 MiB
        code = PEAK.format(root=str(ROOT), vocabulary=vocabulary, k=k)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks[vocabulary] = float(done.stdout)
    assert peaks[128_000] < 60, peaks


def test_head_inputs_give_the_models_own_distributions():
    """head_inputs has a copy of token_stats' head: both must agree, on a model that has everything."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(
        vocab_size=97, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, **sizes
    )
    model = Gemma2ForCausalLM(config)
    for method in (gkd.token_stats, gkd.head_inputs, gkd.divergence_stats):
        setattr(model, method.__name__, MethodType(method, model))
    ids = torch.randint(97, (9,)).numpy()
    batch = collate([(ids, np.ones(9))])
    stats = model.token_stats(batch, 0.7)
    states = model.head_inputs(batch, 0.7, 97)
    found = model.divergence_stats(batch, HeadInputs(*(t.detach() if torch.is_tensor(t) else t for t in states)),
                                   ("sampled", 0, 0), 0.7, 97)  # fmt: skip
    torch.testing.assert_close(found.entropy_N, stats.entropy_N.detach())
    assert found.divergence_N.abs().max() < 1e-5
    logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
    torch.testing.assert_close(-(logits / 0.7).log_softmax(-1).exp().mul((logits / 0.7).log_softmax(-1)).sum(-1),
                               found.entropy_N, rtol=1e-4, atol=1e-5)  # fmt: skip
