"""Distillation: divergences against whole logits and TRL, tokenizers, teachers, invariance, resume, and learning."""

import copy
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext as nothing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ASSETS,
    ROOT,
    assert_same_curve,
    command,
    flags_of,
    read_metrics,
    run,
    weights,
    write_rows,
)
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl.experimental.gkd import GKDTrainer

import gkd
from common import (
    EngineError,
    ServerNeeds,
    UserError,
    VLLMServer,
    collate,
    encode_distillation,
    load_tokenizer,
)
from gkd import ChunkedDivergence, Head, HeadInputs, Scores

TEACHER = str(ASSETS / "teacher")
URL = "http://127.0.0.1:9"  # where nobody listens
CHECK = gkd.TeacherServer.check
BETAS = [0, 0.1, 0.5, 1]
needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM: see the README's first lines")


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
        value, _ = gkd.divergence(logps, logps.exp(), teacher_logps, teacher_logps.exp(), weight)
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
    found = gkd.top_k_divergence(logps, top_logps, top_logps.exp(), ids, beta)
    whole = gkd.divergence(logps, logps.exp(), teacher_logps, teacher_logps.exp(), beta)
    for a, b in zip(found, whole, strict=True):
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
        buckets = torch.cat([top_logps, rest], 1)
        values.append(gkd.top_k_divergence(logps, buckets, buckets.exp(), ids, beta)[0])
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
    torch.testing.assert_close(stats[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        stats[1].double(), (logps - teacher_logps).detach()[:, 0], rtol=1e-4, atol=1e-5
    )
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
    scores = Scores(torch.cat([top_logps, rest], 1).float(), ids, label_logps.float())
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
ChunkedDivergence.CHUNK_ELEMENTS = 2**18, 2**18
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for v in (8_000, 128_000):
    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)
    teacher = HeadInputs(torch.randn(256, 8), torch.randn(v, 8), None, Head(1, 0, 1))
    for k in (0, 20):
        given = hidden, weight, None, torch.zeros(256, dtype=torch.long), Head(1, 0, 1), teacher, ("jsd", 0.5, k)
        ChunkedDivergence.apply(*given)[0].backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_bounded_while_the_vocabulary_grows():
    """Of each model, float32 logits are 8 and then 125 MiB; the teacher's, the mixture's and gradients as many."""
    code = PEAK.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, large = map(float, done.stdout.split())
    assert large < 60, (small, large)


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


# ---- Rows ------------------------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "What is 1+2?"}, {"role": "assistant", "content": "3"}
PROMPT = "<|im_start|>user\nWhat is 1+2?<|im_end|>\n<|im_start|>assistant\n"
ROWS = {  # a row -> what a model is asked, and what the row answers
    "messages": ({"messages": [USER, ANSWER]}, PROMPT, "3<|im_end|>"),
    "two turns": ({"messages": [USER, ANSWER, USER, ANSWER]}, PROMPT + "3<|im_end|>\n" + PROMPT, "3<|im_end|>3<|im_end|>"),
    "a turn without an answer": ({"messages": [USER, ANSWER, USER]}, PROMPT + "3<|im_end|>\n" + PROMPT, "3<|im_end|>"),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "What is 1+2?"}, {"from": "gpt", "value": "3"}]}, PROMPT, "3<|im_end|>"),
    "prompt messages": ({"prompt": [USER], "completion": [ANSWER]}, PROMPT, "3<|im_end|>"),
    "prompt": ({"prompt": "1+2=", "completion": "3"}, "1+2=", "3<|im_end|>"),
    "two answers": ({"messages": [USER, ANSWER, ANSWER]}, PROMPT, "3<|im_end|>3<|im_end|>"),
    "tokens": ({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9]}, [5, 6, 7], None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_prompts_of_rows(name):
    row, prompt, answer = ROWS[name]
    tokenizer = load_tokenizer(TEACHER)
    for use_answer in (True, False):
        encoded = encode_distillation(row, tokenizer, room=99, use_answer=use_answer)
        ids = encoded["prompt_ids"]
        assert (tokenizer.decode(ids) if isinstance(prompt, str) else ids) == prompt
        assert encoded["dropped"] == ""
        trained = [i for i, on in zip(encoded["input_ids"], encoded["loss_mask"], strict=True) if on]
        assert not trained if not use_answer else not answer or tokenizer.decode(trained) == answer
    assert encode_distillation(row, tokenizer, room=2, use_answer=False)["dropped"].startswith("longer than")
    assert encode_distillation(row, tokenizer)["prompt_ids"] == [], "where nobody writes, no prompt is needed"


def test_rows_without_answers_and_without_prompts():
    tokenizer = load_tokenizer(TEACHER)
    for row in ({"prompt": [USER], "answer": "3"}, {"messages": [USER]}):
        encoded = encode_distillation(row, tokenizer, room=99, use_answer=False)
        assert tokenizer.decode(encoded["prompt_ids"]) == PROMPT
        with pytest.raises(UserError, match=r"--lmbda 1|nothing to train") if "prompt" in row else nothing():
            encoded = encode_distillation(row, tokenizer, room=99)
            assert encoded["dropped"] == "nothing to train"
    with pytest.raises(UserError, match="700"):
        encode_distillation({"input_ids": [5, 700, 6]}, tokenizer, vocab_size=512, room=99, use_answer=False)
    for row in ({"text": "1+2=3"}, {"messages": [ANSWER]}):
        encoded = encode_distillation(row, tokenizer, room=99)
        assert encoded["dropped"] == "without a prompt that could be answered"


# ---- Tokenizers and vocabularies -------------------------------------------------------------------------------------


def copy_of(tmp_path, name="teacher", change=None):
    """A copy of an embedded model with its tokenizer.json changed."""
    path = tmp_path / f"other-{name}"
    shutil.copytree(ASSETS / name, path)
    if change:
        data = json.loads((path / "tokenizer.json").read_text())
        change(data)
        (path / "tokenizer.json").write_text(json.dumps(data))
    return path


def swap_two_ids(data):
    vocab = data["model"]["vocab"]
    one, two = (next(token for token, id in vocab.items() if id == number) for number in (300, 417))
    vocab[one], vocab[two] = 417, 300


def swap_two_bytes(data):
    """Of no text by themselves, so that both decode to the replacement character: 0xD0 and 0xD1 begin Cyrillic letters."""
    vocab = data["model"]["vocab"]
    vocab["Ð"], vocab["Ñ"] = vocab["Ñ"], vocab["Ð"]


def drop_last_id(data):
    del data["model"]["vocab"]["".join(data["model"]["merges"].pop())]


def test_the_embedded_tokenizers_are_one():
    assert gkd.local_difference(*(load_tokenizer(str(ASSETS / name)) for name in ("model", "teacher"))) == ""


def test_a_swapped_id_is_named(tmp_path):
    path = copy_of(tmp_path, change=swap_two_ids)
    with pytest.raises(UserError, match=r"2 of 512 ids, the first of which are 300: '.+' and '.+'; 417:"):
        train(tmp_path / "run", teacher=str(path))
    assert not (tmp_path / "run").exists()
    path = copy_of(tmp_path / "less", change=drop_last_id)
    for flags, sides in (
        ({"teacher": str(path)}, "'ime' and None"),
        ({"model": str(path)}, "None and 'ime'"),
    ):
        with pytest.raises(UserError, match=f"1 of 512 ids, the first of which are 511: {sides}"):
            train(tmp_path / "run", **flags)


def test_text_that_becomes_other_ids_is_seen(tmp_path):
    path = copy_of(
        tmp_path, change=lambda data: data.update(pre_tokenizer=None, normalizer={"type": "Lowercase"})
    )
    with pytest.raises(UserError, match=r"differ \(student's first\) in the ids of"):
        train(tmp_path / "run", teacher=str(path))


def test_another_end_and_another_template_are_seen(tmp_path):
    path = copy_of(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    theirs = load_tokenizer(str(path))
    if theirs.eos_token_id is not None:
        assert "EOS token: <|im_end|> and <|endoftext|>" in gkd.local_difference(
            load_tokenizer(TEACHER), theirs
        )
    template = tmp_path / "template.jinja"
    template.write_text(
        (ASSETS / "teacher" / "chat_template.jinja").read_text().replace("<|im_end|>", "<|im_end|> ")
    )
    with pytest.raises(UserError, match=r"differ .* in the chat template: .*; --chat-template changes"):
        train(tmp_path / "run", chat_template=str(template))


def test_what_only_some_conversations_show_is_seen(tmp_path):
    """How a system message is framed, and whether the frame's tokens are control tokens."""
    ours, theirs = load_tokenizer(TEACHER), load_tokenizer(TEACHER)
    theirs.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + ours.chat_template
    )
    assert "the chat template: ('<|im_start|>system" in gkd.local_difference(ours, theirs)
    assert gkd.local_difference(theirs, theirs) == ""

    def no_control_token(data):
        data["model"]["vocab"]["<|im_start|>"] = ours.convert_tokens_to_ids("<|im_start|>")
        data["added_tokens"] = [one for one in data["added_tokens"] if one["content"] != "<|im_start|>"]

    theirs = load_tokenizer(str(copy_of(tmp_path, change=no_control_token)))
    assert "the chat template: ('<|im_start|>user" in gkd.local_difference(ours, theirs)


def padded(tmp_path, name, rows):
    """An embedded model with more rows of embeddings than tokens; the new ones are likely, if nobody looks."""
    path = copy_of(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(512 + rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[512:] = 0.0
    model.save_pretrained(path)
    return str(path)


def test_rows_that_pad_either_head_change_nothing(tmp_path):
    """Sliced, a padded teacher and a padded student give the losses of the plain ones."""
    expected = train(tmp_path / "plain", lmbda=0.0)
    teacher, student = padded(tmp_path, "teacher", 64), padded(tmp_path, "model", 32)
    for name, flags in (("a", {"teacher": teacher}), ("b", {"model": student})):
        assert_same_curve(train(tmp_path / name, lmbda=0.0, **flags), expected, rtol=1e-3)
    both = train(tmp_path / "c", lmbda=1.0, model=student, max_length=100)
    assert all(math.isfinite(row["loss"]) for row in both)


def test_a_sample_ends_before_an_id_that_only_the_student_knows():
    rollouts = [[SimpleNamespace(prompt_ids=[1], ids=[5, 9, 600, 7], is_finished=True)]]
    engine = SimpleNamespace(generate=lambda *_: rollouts)
    (answer,) = gkd.write_answers(gkd.Args(), engine, [{"prompt_ids": [1]}], [0], 0, [], 512)
    assert answer == gkd.Answer([1], [5, 9], False)


def test_too_few_embeddings_are_refused(tmp_path):
    config = Qwen3Config(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, head_dim=32)  # fmt: skip
    path = copy_of(tmp_path)
    Qwen3ForCausalLM(config).save_pretrained(path)
    with pytest.raises(UserError, match="the tokenizer has 512 ids, --model 512 and --teacher 300"):
        train(tmp_path / "run", teacher=str(path))


# ---- The step --------------------------------------------------------------------------------------------------------


def naive_step(student, teacher, documents, beta, temperature):
    """Mean divergence over the trained tokens, a document at a time, by the models' own forwards -> it, and the norm of
    its gradient."""
    values = []
    for ids, mask in documents:
        ids_BT = torch.tensor([list(ids)])
        logps = [
            (m(ids_BT).logits[0, :-1].double() / temperature).log_softmax(-1) for m in (student, teacher)
        ]
        values.append(naive(*logps, beta)[torch.tensor(list(mask[1:])).bool()])
    loss = torch.cat(values).mean()
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    return loss.item(), torch.stack([grad.norm() for grad in gradients]).norm().item()


def both_models():
    return [AutoModelForCausalLM.from_pretrained(ASSETS / name).eval() for name in ("model", "teacher")]


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_first_loss_is_the_models_divergence_on_data_and_on_samples(tmp_path, beta):
    """With a temperature, divided by the tokens that were trained, the samples' own where there are samples, though the
    data's answers are much longer; and so is its gradient."""
    tokenizer, models = load_tokenizer(TEACHER), both_models()
    rows = [json.loads(line) for line in (ASSETS / "messages.jsonl").read_text().splitlines()[:16]]
    for row in rows:
        row["messages"][1]["content"] += " 1234567"
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = {"dataset": (path,), "beta": beta, "temperature": 0.8, "max_steps": 1}
    encoded = [encode_distillation(row, tokenizer) for row in rows]
    off = [(row["input_ids"], row["loss_mask"]) for row in encoded]
    (found,) = train(tmp_path / "off", lmbda=0.0, **flags)
    assert [found["loss"], found["grad_norm"]] == pytest.approx(naive_step(*models, off, beta, 0.8), rel=1e-3)
    (found,) = train(tmp_path / "on", lmbda=0.99, **flags)
    assert found["on_policy"] == 1
    said = [json.loads(line) for line in (tmp_path / "on" / "completions.jsonl").read_text().splitlines()]
    on = []
    for row in said:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"] + "<|im_end|>" * row["is_finished"])["input_ids"]
        on.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    assert [found["loss"], found["grad_norm"]] == pytest.approx(naive_step(*models, on, beta, 0.8), rel=1e-2)
    assert found["completions/clipped_ratio"] == np.mean([not row["is_finished"] for row in said])
    assert found["completions/mean_length"] == pytest.approx(np.mean([sum(mask) for _, mask in on]), abs=0.2)


def test_where_trls_trainer_is_not_followed():
    """It gives the loss no temperature, and divides that of samples by the tokens of the data that they replaced, which
    transformers counted before. (Nor does it multiply by the ranks, over which gradients are then averaged.)"""
    models, ids = both_models(), np.random.default_rng(0).integers(3, 500, 20)
    mask = np.arange(20) >= 8  # a sample of 12 tokens, where the data had 3
    labels = np.where(mask, ids, -100)
    inputs = {name: torch.tensor(value)[None] for name, value in (("input_ids", ids), ("labels", labels))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    trainer = SimpleNamespace(
        teacher_model=models[1],
        beta=0.5,
        temperature=0.8,
        generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
    )
    with torch.no_grad():
        theirs = [
            GKDTrainer.compute_loss(trainer, models[0], inputs, num_items_in_batch=n).item() for n in (12, 3)
        ]
    warm, cool = (naive_step(*models, [(ids, mask)], 0.5, temperature)[0] for temperature in (1.0, 0.8))
    assert theirs[0] == pytest.approx(warm, rel=1e-4)
    assert theirs[1] == pytest.approx(4 * warm, rel=1e-4)
    assert abs(cool / warm - 1) > 0.01


def test_a_step_samples_from_its_own_weights_at_the_temperature(tmp_path):
    """Near 0, where samples are the arg-max: what transformers generates from the model before that step."""
    rows = [json.loads(line) for line in (ASSETS / "messages.jsonl").read_text().splitlines()[:8]]
    flags = {"dataset": (write_rows(tmp_path / "rows.jsonl", rows),), "batch_size": 8, "lmbda": 1.0}
    flags |= {
        "temperature": 0.02,
        "beta": 0.0,
        "learning_rate": 3e-3,
        "lr_schedule": "constant",
        "warmup_steps": 0,
    }
    for steps in (1, 2):
        train(tmp_path / str(steps), max_steps=steps, **flags)
    said = [json.loads(line) for line in (tmp_path / "2" / "completions.jsonl").read_text().splitlines()]
    tokenizer, answers = load_tokenizer(TEACHER), []
    for step, path in ((1, ASSETS / "model"), (2, tmp_path / "1" / "final")):
        model = AutoModelForCausalLM.from_pretrained(path)
        for row in (row for row in said if row["step"] == step):
            ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
            (out,) = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
            )
            answers.append(tokenizer.decode(out[len(ids[0]) :], skip_special_tokens=True))
    assert [row["completion"] for row in said] == answers
    assert sorted(answers[:8]) != sorted(answers[8:]), "the first step has changed them"


def test_a_prompt_is_answered_anew_each_time(tmp_path):
    """By a student that does not change."""
    rows = (ASSETS / "messages.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    flags = {"dataset": (str(tmp_path / "rows.jsonl"),), "batch_size": 8, "lmbda": 1.0, "max_steps": 2}
    train(tmp_path / "run", temperature=2.0, learning_rate=1e-12, **flags)
    said = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    first, second = (
        {row["prompt"]: row["completion"] for row in said if row["step"] == step} for step in (1, 2)
    )
    assert first.keys() == second.keys()
    assert sum(first[prompt] != second[prompt] for prompt in first) > 4


MODES = {
    "off policy": {"lmbda": 0.0, "beta": 0.0},
    "on policy": {"lmbda": 1.0, "beta": 1.0, "temperature": 0.9},
    "mixed, top k": {"teacher_top_k": 8},
    "sampled": {"lmbda": 1.0, "loss_type": "sampled"},
}


@pytest.mark.parametrize("name", MODES)
def test_micro_batches_do_not_change_the_curve(tmp_path, name):
    for budget in (8192, 60):
        train(tmp_path / str(budget), micro_batch_tokens=budget, max_length=50, **MODES[name])
    assert_same_curve(metrics_of(tmp_path / "60"), metrics_of(tmp_path / "8192"), rtol=2e-3)


RANKS = {
    "defaults": {},
    "lora, on its base, seq-kd, top k": {
        "lora_rank": 4, "learning_rate": 1e-2, "teacher": str(ASSETS / "model"), "seq_kd": True, "teacher_top_k": 8,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_give_the_curve_of_one(tmp_path, name):
    """The teacher is sharded, the draw of on-policy steps and the samples, of either, are the same. An epoch's last step
    has one row: one of two ranks has nothing to do."""
    (tmp_path / "rows.jsonl").write_text(
        "".join((ASSETS / "messages.jsonl").read_text().splitlines(keepends=True)[:37])
    )
    for ranks in (1, 2):
        flags = {"output_dir": tmp_path / str(ranks), "batch_size": 18, "max_steps": 6, **RANKS[name]}
        result = run("gkd.py", *flags_of(dataset=tmp_path / "rows.jsonl", **flags), ranks=ranks)
        assert result.returncode == 0, result.stderr[-2000:]
    rows = metrics_of(tmp_path / "1")
    assert_same_curve(metrics_of(tmp_path / "2"), rows, rtol=1e-2)
    assert {row["on_policy"] for row in rows} == {0, 1}
    for pattern in ("completions.jsonl", "teacher-*.jsonl"):
        said = [[path.read_text() for path in (tmp_path / ranks).glob(pattern)] for ranks in "12"]
        assert said[0] == said[1]


def test_lmbda_is_the_share_of_steps_on_the_students_samples(tmp_path):
    rows = train(tmp_path / "run", lmbda=0.3, max_steps=20, batch_size=4)
    steps = [row["step"] for row in rows if row["on_policy"]]
    assert 2 <= len(steps) <= 11
    assert rows[-1]["on_policy_share"] == len(steps) / 20
    said = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in said] == [step for step in steps for _ in range(4)]


def test_no_answer_of_the_data_is_used_on_policy(tmp_path):
    """--lmbda 1 trains the same on conversations, on conversations with other answers, and on prompts alone."""
    rows = [
        json.loads(line)["messages"] for line in (ASSETS / "messages.jsonl").read_text().splitlines()[:16]
    ]
    kinds = {
        "right": [{"messages": row} for row in rows],
        "wrong": [{"messages": [row[0], {**row[1], "content": "7"}]} for row in rows],
        "none": [{"prompt": row[:1]} for row in rows],
    }
    for name, some in kinds.items():
        train(tmp_path / name, dataset=(write_rows(tmp_path / f"{name}.jsonl", some),), lmbda=1.0)
    assert metrics_of(tmp_path / "right") == metrics_of(tmp_path / "wrong") == metrics_of(tmp_path / "none")


def test_what_ends_an_answer_is_known_without_one():
    """By the template: the tokenizer's EOS may be another."""
    tokenizer = load_tokenizer(TEACHER)
    flags = {"room": 50, "use_answer": False}
    chat = [{"role": "user", "content": "1+1="}]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encode_distillation({"prompt": chat}, tokenizer, **flags)["stop_id"] == stop
    row = {"messages": [*chat, {"role": "assistant", "content": "2"}]}
    assert encode_distillation(row, tokenizer, **flags)["stop_id"] == stop
    assert encode_distillation({"prompt": "1+1="}, tokenizer, **flags)["stop_id"] == -1


class FragileEngine(gkd.HFEngine):
    """As VLLMEngine, with a copy in this process: `events` are what was asked of it; where it is to fail at one of
    its generations, it does, and from `skewed_at` on its log-probs are not those of the model."""

    fails_at = skewed_at = math.inf
    servers = (SimpleNamespace(url=URL, needs=SimpleNamespace(shell=lambda url: "its command")),)

    def __init__(self, servers, model, dtype):
        model = copy.deepcopy(model)
        model.set_attn_implementation("varlen")
        super().__init__(model)
        self.count = 0

    def generate(self, *asked):
        self.count += 1
        self.events.append("generate")
        if self.count == self.fails_at:
            raise EngineError("it died")
        groups = super().generate(*asked)
        for rollout in itertools.chain(*groups) if self.count >= self.skewed_at else ():
            rollout.logps = [logp - 0.1 for logp in rollout.logps]
        return groups

    def recover(self, stopped):
        self.version = None
        self.events.append("recover")

    def sleep(self):
        self.events.append("sleep")


@pytest.fixture
def fragile(monkeypatch):
    check = gkd.check_engine
    events = FragileEngine.events = []
    monkeypatch.setattr(gkd, "VLLMEngine", FragileEngine)
    monkeypatch.setattr(gkd, "find_servers", lambda *_: [])
    monkeypatch.setattr(gkd, "check_engine", lambda *given: (events.append("check"), check(*given)))
    return events


def test_a_server_that_was_lost_is_compared_again(tmp_path, fragile, monkeypatch):
    """It may have been started with other weights. Between samples, its GPU is the trainer's."""
    flags = {"engine": "vllm", "lmbda": 1.0, "max_steps": 4}
    straight = train(tmp_path / "straight", **flags)
    checked, plain = ["check", "generate"], ["generate", "sleep"]
    assert fragile == [*checked, "sleep", *plain, *checked, *plain, *plain, *plain]
    fragile.clear()
    monkeypatch.setattr(FragileEngine, "fails_at", 6)
    assert train(tmp_path / "lost", **flags) == straight
    assert fragile == [
        *checked,
        "sleep",
        *plain,
        *checked,
        *plain,
        *plain,
        "generate",
        "recover",
        *checked,
        *plain,
    ]


def test_a_server_that_does_not_take_weights_ends_the_run_with_a_checkpoint(tmp_path, fragile, monkeypatch):
    monkeypatch.setattr(FragileEngine, "skewed_at", 3)
    with pytest.raises(UserError, match=r"do not agree[\s\S]*Stopped after step 1, which is saved; mend it"):
        train(tmp_path, engine="vllm", lmbda=1.0, max_steps=4)
    gkd.dist.destroy_process_group()
    assert (tmp_path / "checkpoint-00000001").is_dir()
    assert fragile.count("recover") == 1


# ---- Teachers --------------------------------------------------------------------------------------------------------


def test_an_adapter_of_the_head_is_refused(tmp_path):
    """The head is multiplied outside of its module: what an adapter adds would be left out."""
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    adapter = gkd.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    gkd.get_peft_model(base, adapter).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="its adapter changes the head"):
        train(tmp_path / "run", teacher=str(tmp_path / "adapter"), lora_rank=4)


def test_adapters_that_cannot_be_what_they_were_trained_as(tmp_path):
    """On tied embeddings, once they are merged; and files that are damaged."""
    tied = copy_of(tmp_path, "model")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    base = AutoModelForCausalLM.from_pretrained(tied)
    adapter = gkd.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    gkd.get_peft_model(base, adapter).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UserError, match="the embeddings or the head, and these are tied"):
        train(tmp_path / "merged", teacher=str(tmp_path / "adapter"))
    gkd.dist.destroy_process_group()
    flags = {"lora_rank": 4, "teacher": str(tied)}
    with pytest.raises(
        UserError, match="to sample, the adapter of the embeddings would change the output head"
    ):
        train(tmp_path / "sampled", model=str(tied), lora_targets=("embed_tokens",), **flags)
    gkd.dist.destroy_process_group()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"--teacher .* cannot be loaded"):
        train(tmp_path / "damaged", model=str(tied), **{**flags, "teacher": str(tmp_path / "adapter")})


def make_adapter(tmp_path, name="adapter"):
    """A LoRA adapter on the embedded student, with weights that change it."""
    train(tmp_path / f"{name}-run", lora_rank=4, learning_rate=3e-2, lmbda=0.0, lora_dropout=0.1)
    return str(tmp_path / f"{name}-run" / "final")


def merge(tmp_path, adapter):
    """The embedded student with an adapter merged, as a model of its own."""
    merged = tmp_path / "merged"
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    gkd.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(merged)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / "model" / name, merged)
    return str(merged)


def test_an_adapter_on_the_students_base_shares_its_weights(tmp_path, capsys):
    """One model is loaded, and the losses are those of a teacher with the adapter merged. The adapter's dropout is off."""
    adapter = make_adapter(tmp_path)
    merged = merge(tmp_path, adapter)
    capsys.readouterr()
    shared = train(tmp_path / "shared", teacher=adapter, lora_rank=4, temperature=0.8)
    assert "on the student's base" in capsys.readouterr().out
    alone = train(tmp_path / "alone", teacher=merged, lora_rank=4, temperature=0.8)
    assert_same_curve(shared, alone, rtol=1e-3)
    assert shared[0]["loss"] > 1e-4
    of_full = train(tmp_path / "full", teacher=adapter, lmbda=0.0)  # a full student shares nothing
    assert of_full[0]["loss"] == pytest.approx(
        train(tmp_path / "full2", teacher=merged, lmbda=0.0)[0]["loss"], rel=1e-3
    )


def test_an_adapter_is_trained_further(tmp_path):
    """The student's samples and losses begin as those of the adapter merged; from itself it is nothing away."""
    adapter = make_adapter(tmp_path)
    flags = {"lmbda": 1.0, "max_steps": 2}
    further = train(tmp_path / "further", model=adapter, lora_rank=4, **flags)
    whole = train(tmp_path / "whole", model=merge(tmp_path, adapter), **flags)
    for key in ("loss", "entropy", "completions/mean_length"):
        assert further[0][key] == pytest.approx(whole[0][key], rel=1e-3)
    own = train(tmp_path / "own", model=adapter, teacher=adapter, lora_rank=4, **flags)
    assert own[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_a_base_teaches_its_lora_student(tmp_path):
    """From itself, the untrained student is nothing away."""
    rows = train(tmp_path / "run", teacher=str(ASSETS / "model"), lora_rank=4, learning_rate=1e-2)
    assert rows[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["top1_agreement"] == 1


def test_the_teachers_samples_are_drawn_once(tmp_path, monkeypatch):
    """--seq-kd: kept on disk with all that they depend on, continued where they end, and no data's answer is used."""
    rows = [json.loads(line) for line in (ASSETS / "prompts.jsonl").read_text().splitlines()[:40]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = {"dataset": (path,), "seq_kd": True, "lmbda": 0.0}
    monkeypatch.setattr(gkd, "ANSWERS_AT_ONCE", 16)
    expected = train(tmp_path / "run", **flags)
    (cache,) = (tmp_path / "run").glob("teacher-*.jsonl")
    said = [json.loads(line) for line in cache.read_text().splitlines()]
    tokenizer = load_tokenizer(TEACHER)
    right = [
        tokenizer.decode(one["ids"]) == f"{row['answer']}<|im_end|>"
        for one, row in zip(said, rows, strict=True)
    ]
    assert np.mean(right) > 0.9
    first = gkd.answer_documents([gkd.Answer(**said[row]) for row in gkd.epoch_order(40, 0, 0)[:16]])
    assert expected[0]["loss"] == pytest.approx(naive_step(*both_models(), first, 0.5, 1.0)[0], rel=1e-3)

    (tmp_path / "cut").mkdir()  # a run that was killed while the teacher wrote
    lines = cache.read_text().splitlines(keepends=True)
    (tmp_path / "cut" / cache.name).write_text("".join(lines[:20]) + lines[20][:9])
    assert train(tmp_path / "cut", **flags) == expected
    assert (tmp_path / "cut" / cache.name).read_text() == cache.read_text()

    def fail(*_):
        raise RuntimeError("generated again")

    monkeypatch.setattr(gkd, "teacher_engine", fail)
    (tmp_path / "again").mkdir()
    shutil.copy(cache, tmp_path / "again")
    assert train(tmp_path / "again", **flags) == expected
    fewer = write_rows(tmp_path / "fewer.jsonl", rows[:39])
    for name, value in (
        ("seed", 1), ("temperature", 0.9), ("max_completion_length", 8), ("engine", "vllm"), ("dataset", (fewer,)),
        ("teacher", str(ASSETS / "model")), ("dtype", "bfloat16"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        shutil.copy(cache, tmp_path / name)
        with pytest.raises(RuntimeError, match="generated again"):
            train(tmp_path / name, **{**flags, name: value})
        gkd.dist.destroy_process_group()


def test_a_teacher_that_samples_what_it_does_not_think_is_refused(tmp_path, monkeypatch):
    """--seq-kd with the embedded engine: nothing is drawn with it, nothing kept."""
    generate = gkd.HFEngine.generate

    def skewed(*asked):
        groups = generate(*asked)
        for rollout in itertools.chain(*groups):
            rollout.logps = [logp - 0.1 for logp in rollout.logps]
        return groups

    monkeypatch.setattr(gkd.HFEngine, "generate", skewed)
    with pytest.raises(UserError, match=r"do not agree .*\n.*\n.*\n.*try --engine vllm"):
        train(tmp_path, seq_kd=True, lmbda=0.0)
    gkd.dist.destroy_process_group()
    assert [path.read_text() for path in tmp_path.glob("teacher-*")] == [""]


def test_samples_of_another_teacher_are_not_taken(tmp_path, scripted, monkeypatch):
    """At the same address, a server may have another model; there may be /v1 at its end."""
    rows = (ASSETS / "prompts.jsonl").read_text().splitlines(keepends=True)[:4]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    served, drawn = {"id": "teacher", "root": "one", "max_model_len": 999}, []

    def request(self, method, path, **_):
        assert self.url == URL
        said = {"prompt_logprobs": [None, {"0": {"logprob": -1.0}}]}
        return {"data": [served]} if path == "v1/models" else said

    def generate(prompts, *_):
        drawn.append(served["root"])
        return [[SimpleNamespace(prompt_ids=ids, ids=[5, 9], is_finished=True)] for ids in prompts]

    engine = SimpleNamespace(generate=generate, stop=lambda: None)
    monkeypatch.setattr(gkd.TeacherServer, "check", CHECK)
    monkeypatch.setattr(VLLMServer, "request", request)
    monkeypatch.setattr(gkd, "teacher_engine", lambda *_: engine)
    flags = {"dataset": (str(tmp_path / "rows.jsonl"),), "seq_kd": True, "lmbda": 0.0, "teacher_top_k": 4}
    for root, url, times in (("one", URL, 1), ("one", f"{URL}/v1/", 1), ("two", URL, 2)):
        served["root"] = root
        train(tmp_path / "run", teacher=url, max_length=100, **flags)
        assert len(drawn) == times, (root, url)
        for path in (tmp_path / "run").iterdir():  # but for the samples, a new run
            if not path.name.startswith("teacher-"):
                (shutil.rmtree if path.is_dir() else Path.unlink)(path)


def test_a_server_without_log_probs_is_refused(scripted, monkeypatch):
    """vLLM's --logprobs-mode raw_logits, for one."""
    said = {"data": [{"id": "teacher", "root": "one", "max_model_len": 999}]}
    said |= {"prompt_logprobs": [None, {"0": {"logprob": 17.0}, "1": {"logprob": -3.0}}]}
    monkeypatch.setattr(gkd.TeacherServer, "check", CHECK)
    monkeypatch.setattr(VLLMServer, "request", lambda *_, **__: said)
    with pytest.raises(UserError, match=r"17\.0 is no log-prob: it needs --logprobs-mode raw_logprobs"):
        gkd.TeacherServer(gkd.Args(teacher=URL, teacher_top_k=2), 99, 512).check(())


def test_a_signal_while_the_teacher_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gkd, "catch_signals", lambda: [15])
    gkd.main(replace(gkd.Args(output_dir=str(tmp_path), seq_kd=True), eval_dataset=(), max_steps=1))
    assert "stopped by a signal; to go on, give the same flags with --output-dir" in capsys.readouterr().out
    assert not (tmp_path / "args.json").exists()


# ---- A teacher that is a server --------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """A server in this process that answers as vLLM does, with the embedded teacher. `calls` are the requests; from
    `fails_at` on, they fail."""
    model, state = both_models()[1], SimpleNamespace(calls=0, fails_at=math.inf)

    @torch.no_grad()
    async def answer(client, server, body, retries):
        state.calls += 1
        if state.calls >= state.fails_at:
            raise EngineError("the vLLM server does not generate")
        ids, k = body["token_ids"], body["sampling_params"]["prompt_logprobs"]
        said = [None]
        for logps, label in zip(model(torch.tensor([ids])).logits[0].log_softmax(-1), ids[1:], strict=False):
            order = logps.argsort(descending=True).tolist()
            ranks = {token: rank for rank, token in enumerate(order, 1) if rank <= k or token == label}
            row = {
                str(token): {"logprob": logps[token].item(), "rank": rank} for token, rank in ranks.items()
            }
            said.append(
                dict(sorted(row.items(), key=lambda item: item[0] != str(label)))
            )  # the label comes first
        return {"prompt_logprobs": said}

    monkeypatch.setattr(gkd, "ask_server", answer)
    monkeypatch.setattr(gkd.TeacherServer, "check", lambda self, stopped: None)
    monkeypatch.setattr(gkd.TeacherServer, "difference", lambda self, tokenizer: "")
    return state


SERVED = {
    "top k": {"teacher_top_k": 8},
    "reverse": {"teacher_top_k": 8, "beta": 1.0, "micro_batch_tokens": 120},
    "sampled": {"loss_type": "sampled", "lmbda": 1.0},
}


def assert_teaches_as_the_local_teacher(tmp_path, url, teacher, name, rtol):
    flags = {"max_length": 100, **SERVED[name]}
    local = train(tmp_path / f"{name} local", teacher=teacher, **flags)
    served = train(tmp_path / f"{name} served", teacher=url, **flags)
    for row in (*local, *served):
        row.pop("teacher_entropy")  # of the buckets only, by the server
    assert_same_curve(served, local, rtol)


@pytest.mark.parametrize("name", SERVED)
def test_what_a_server_says_trains_as_the_local_teacher(tmp_path, scripted, name):
    assert_teaches_as_the_local_teacher(tmp_path, URL, TEACHER, name, rtol=1e-2)
    assert scripted.calls == 48, "a request for each document"


@pytest.mark.parametrize("name", [*SERVED, "forward"])
def test_what_a_server_says_is_not_rounded_in_bfloat16(tmp_path, scripted, monkeypatch, name):
    """FSDP casts what it finds in arguments; a log-prob of -5 in bfloat16 is wrong by up to 0.016."""
    seen, divergence_stats = set(), gkd.divergence_stats

    @functools.wraps(divergence_stats)
    def watch(self, batch, said, *rest):
        seen.update({said.logps_NB.dtype, said.label_logps_N.dtype})
        return divergence_stats(self, batch, said, *rest)

    monkeypatch.setattr(gkd, "divergence_stats", watch)
    flags = SERVED.get(name, {"teacher_top_k": 4, "beta": 0.0})
    train(tmp_path, teacher=URL, dtype="bfloat16", max_length=100, **flags, max_steps=1)
    assert seen == {torch.float32}


def test_the_likeliest_token_may_be_none_where_only_the_sampled_one_counts():
    said = [None, {"3": {"logprob": -2.0, "rank": 2}, "600": {"logprob": -0.5, "rank": 1}}]
    given = np.array([1, 3]), np.array([False, True]), said
    scores = gkd.TeacherServer(gkd.Args(teacher=URL, loss_type="sampled", lmbda=1.0), 99, 512).read_scores(
        *given
    )
    assert scores.label_logps_N.tolist() == [-2.0]
    with pytest.raises(EngineError, match=r"--teacher-top-k 1: .* is id 600, of no token"):
        gkd.TeacherServer(gkd.Args(teacher=URL, teacher_top_k=1), 99, 512).read_scores(*given)


def test_a_server_that_dies_stops_the_run_with_a_checkpoint(tmp_path, scripted):
    flags = {"teacher": URL, "teacher_top_k": 4, "max_steps": 5}
    straight, scripted.calls = train(tmp_path / "straight", **flags), 0
    scripted.fails_at = 16 * 3
    with pytest.raises(UserError, match=r"does not generate\nStopped after step 2, which is saved"):
        train(tmp_path / "run", **flags)
    gkd.dist.destroy_process_group()
    scripted.fails_at = math.inf
    with pytest.raises(UserError, match=r"--teacher was http.*, is "):
        train(tmp_path / "run", resume=True, **flags | {"teacher": TEACHER})
    gkd.dist.destroy_process_group()
    flags["teacher"] = "http://127.0.0.1:9"  # it was started again elsewhere
    assert train(tmp_path / "run", resume=True, **flags) == straight
    train(tmp_path / "local", max_steps=1, save_every=1)
    with pytest.raises(UserError, match=r"--teacher was .*, is http.*\n.*--teacher-top-k was 0, is 4"):
        train(tmp_path / "local", resume=True, **{**flags, "max_steps": 1})
    gkd.dist.destroy_process_group()


def assert_samples_of(model, said, temperature=1.0):
    """Answers that a teacher wrote are as likely as its own tokens are."""
    documents = gkd.answer_documents([gkd.Answer(**one) for one in said])
    model.token_stats = MethodType(gkd.token_stats, model)
    with torch.no_grad():
        stats = model.token_stats(collate(documents), temperature)
    surprise = -stats.logps_N - stats.entropy_N  # 0 in expectation, for tokens that the model has sampled
    assert abs(surprise.mean()) < 5 * surprise.std() / len(surprise) ** 0.5


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_of_ours_writes_the_teachers_samples(tmp_path):
    """--seq-kd with a local teacher, an adapter: the server is started with its base, and gets it merged."""
    adapter = make_adapter(tmp_path)
    rows = (ASSETS / "prompts.jsonl").read_text().splitlines(keepends=True)[:64]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    flags = {"dataset": (str(tmp_path / "rows.jsonl"),), "seq_kd": True, "lmbda": 0.0, "temperature": 0.8}
    train(tmp_path / "run", teacher=adapter, engine="vllm", max_length=100, **flags)
    (cache,) = (tmp_path / "run").glob("teacher-*.jsonl")
    said = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len(said) == 64
    model = AutoModelForCausalLM.from_pretrained(merge(tmp_path, adapter), attn_implementation="varlen")
    assert_samples_of(model, said, temperature=0.8)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_teaches_as_the_local_teacher_does(tmp_path):
    """Log-probs of given ids, likeliest tokens, samples; and what is refused, with the line that would do. The teacher is
    the student moved by noise: vLLM's attention for CPUs has no heads of the size of the embedded teacher's."""
    teacher = copy_of(tmp_path, "model")
    model = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="varlen")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std().nan_to_num(0) * torch.randn_like(weight)
    model.save_pretrained(teacher)
    needs = ServerNeeds(str(teacher), "float32", 512, "gloo", ("--max-logprobs", "8"))
    running = VLLMServer(needs, log_path=tmp_path / "vllm.log", timeout=180.0)
    try:
        running.wait()
        url = {"teacher": running.url, "max_length": 100}
        for name in SERVED:
            assert_teaches_as_the_local_teacher(tmp_path, running.url, str(teacher), name, rtol=2e-2)
        tokenizer = load_tokenizer(TEACHER)
        server = gkd.TeacherServer(gkd.Args(teacher=running.url, teacher_top_k=8), 511, 512)
        server.check(())
        assert server.source == (str(teacher), str(teacher))
        assert server.difference(tokenizer) == ""
        other = load_tokenizer(str(copy_of(tmp_path, change=swap_two_ids)))
        assert server.difference(other).startswith("ids, the first of which is 300: ")
        other = load_tokenizer(str(copy_of(tmp_path / "less", change=drop_last_id)))
        assert server.difference(other).startswith("ids, the first of which is 511: '' and '")
        other = load_tokenizer(str(copy_of(tmp_path / "bytes", change=swap_two_bytes)))
        assert server.difference(other).startswith("the ids of ")
        other = load_tokenizer(TEACHER)
        other.chat_template = other.chat_template.replace("<|im_end|>", "<|im_end|> ")
        assert server.difference(other).startswith("the chat template: ")
        for k, longest, message in (
            (9, 511, r"--max-logprobs[\s\S]*Start it with\n.* --max-logprobs 20 --max-model-len 512"),
            (8, 512, r"its --max-model-len, 512, must be above --max-length, which is 512"),
        ):
            with pytest.raises(UserError, match=message):
                gkd.TeacherServer(gkd.Args(teacher=running.url, teacher_top_k=k), longest, 512).check(())

        rows = (ASSETS / "prompts.jsonl").read_text().splitlines(keepends=True)[:32]
        (tmp_path / "rows.jsonl").write_text("".join(rows))
        flags = {"dataset": (str(tmp_path / "rows.jsonl"),), "seq_kd": True, "lmbda": 0.0, "teacher_top_k": 4}
        train(tmp_path / "seq", **url, **flags)
        (cache,) = (tmp_path / "seq").glob("teacher-*.jsonl")
        said = [json.loads(line) for line in cache.read_text().splitlines()]
        assert all(one["is_finished"] == (one["ids"][-1] == tokenizer.eos_token_id) for one in said)
        assert_samples_of(model, said)
    finally:
        running.stop()
    with pytest.raises(UserError, match="does not answer"):
        train(tmp_path / "gone", **url, teacher_top_k=8, vllm_timeout=1.0)


# ---- Resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [{}, {"lora_rank": 4, "seq_kd": True, "dataset": None}], ids=["defaults", "lora, seq-kd"]
)
def test_resume_is_exact(tmp_path, flags):
    if "dataset" in flags:
        lines = (ASSETS / "messages.jsonl").read_text().splitlines(keepends=True)[:48]
        (tmp_path / "rows.jsonl").write_text("".join(lines))
        flags = {**flags, "dataset": (str(tmp_path / "rows.jsonl"),)}
    eval_path = tmp_path / "eval.jsonl"
    eval_path.write_text("".join((ASSETS / "messages_eval.jsonl").read_text().splitlines(keepends=True)[:50]))
    flags = {**flags, "eval_dataset": (str(eval_path),), "eval_every": 3, "max_steps": 7}
    straight = train(tmp_path / "straight", **flags)
    train(tmp_path / "resumed", save_every=2, keep_checkpoints=9, **flags)
    for checkpoint in (tmp_path / "resumed").glob("checkpoint-*"):
        if int(checkpoint.name[-2:]) > 4:
            (checkpoint / "progress.json").unlink()
    assert train(tmp_path / "resumed", save_every=2, keep_checkpoints=9, resume=True, **flags) == straight
    said = [(tmp_path / name / "completions.jsonl").read_text() for name in ("straight", "resumed")]
    assert said[0] == said[1] != ""
    if "lora_rank" not in flags:
        for name, weight in weights(tmp_path / "straight").items():
            assert torch.equal(weights(tmp_path / "resumed")[name], weight)


# ---- Bad input -------------------------------------------------------------------------------------------------------

BAD_FLAGS = {
    "beta": ({"beta": 1.5}, "--beta is 1.5; it must be from 0 to 1"),
    "lmbda": ({"lmbda": -0.1}, "--lmbda is -0.1; it must be from 0 to 1"),
    "temperature": ({"temperature": 0.0}, "--temperature is 0.0; it must be above 0"),
    "top k": ({"teacher_top_k": -1}, "--teacher-top-k is -1"),
    "sampled off policy": ({"loss_type": "sampled"}, "--lmbda 0.5 trains on others too; add --lmbda 1"),
    "sampled with beta": ({"loss_type": "sampled", "lmbda": 1.0, "beta": 1.0}, "--beta does not apply"),
    "seq-kd that is never used": ({"seq_kd": True, "lmbda": 1.0}, "--seq-kd does not apply"),
    "an engine for nothing": ({"lmbda": 0.0, "engine": "vllm"}, "--engine does not apply .* --lmbda above 0"),
    "a server's temperature": ({"teacher": URL, "temperature": 0.9}, "--temperature 0.9 needs a local --teacher"),
    "a server's whole": ({"teacher": URL}, "gives no whole distributions; add --teacher-top-k 20"),
    "no server": ({"teacher": URL, "teacher_top_k": 9, "vllm_timeout": 0.5, "max_length": 64},
                  r"does not answer[\s\S]*--max-logprobs 20 --max-model-len 65"),
    "an engine for a server's samples": (
        {"teacher": URL, "teacher_top_k": 9, "seq_kd": True, "lmbda": 0.0, "engine": "vllm"},
        "--engine does not apply .* --seq-kd with a local --teacher",
    ),
    "answers that nobody reads": ({"lmbda": 1.0, "loss_on": "all"}, "--loss-on does not apply"),
    "the teacher's answers instead": ({"lmbda": 0.0, "seq_kd": True, "overflow": "error"}, "--overflow does not apply"),
    "a top k of all": ({"teacher_top_k": 512}, "--teacher-top-k 512 is not below the 512 ids"),
    "no room in a micro-batch": (
        {"micro_batch_tokens": 30},
        r"more than --micro-batch-tokens 30; the smallest value that works is \d\d$",
    ),
    "no room": ({"max_completion_length": 9000}, "--max-completion-length 9000 leaves no room"),
    "no teacher": ({"teacher": "/nowhere"}, "--teacher /nowhere: its config cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path, name):
    flags, message = BAD_FLAGS[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


def test_a_server_for_the_teachers_samples_is_ours_beside_given_ones():
    """--vllm-url are the student's, so that flags of started servers count."""
    given = gkd.Args(engine="vllm", vllm_url=(URL,), vllm_gpu_memory_utilization=0.7, seq_kd=True)
    gkd.check_args(given)
    with pytest.raises(UserError, match="--vllm-gpu-memory-utilization does not apply"):
        gkd.check_args(replace(given, seq_kd=False))


@pytest.mark.learn
@pytest.mark.parametrize("flags", [[], ["--lmbda", "1"]], ids=["defaults", "on policy"])
def test_default_run_learns(tmp_path, flags):
    """In at most three minutes, from about half of the held-out sums to nine in ten."""
    began = time.time()
    words = command("gkd.py", *flags, "--output-dir", tmp_path / "run")
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert time.time() - began < 180 * float(os.environ.get("TIME_FACTOR", 1))
    rows = {row["step"]: row for row in metrics_of(tmp_path / "run") if "eval/exact_match" in row}
    assert 0.4 < rows[0]["eval/exact_match"] < 0.6
    assert rows[max(rows)]["eval/exact_match"] >= 0.9
