"""gkd.py: divergences against whole logits and TRL, tokenizers, teachers, any split of the work, resume, learning."""

import copy
import functools
import json
import math
import shutil
from types import MethodType, SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import ASSETS, assert_same_curve, read_completions, read_rows, run_well, write_rows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Cohere2Config, Gemma2Config
from trl.experimental.gkd import GKDTrainer

import gkd
from common import EngineError, HFEngine, Sample, UserError, collate, load_tokenizer

MODEL, TEACHER, URL = str(ASSETS / "model"), str(ASSETS / "teacher"), "http://127.0.0.1:9"  # nobody is there
ROWS = read_rows(ASSETS / "messages.jsonl")
BETAS = [0.0, 0.1, 0.5, 1.0]


train = functools.partial(conftest.train, gkd, batch_size=16, max_length=100)


def rows_file(path, n):
    """A data file of the first n conversations, as --dataset takes it."""
    return (write_rows(path, ROWS[:n]),)


def naive(logps, teacher_logps, loss_type, beta, k, labels):
    """Loss at each position from whole distributions; k: of the teacher's likeliest, chosen one row at a time."""
    if loss_type == "sampled":
        ours, theirs = (x.gather(1, labels[:, None])[:, 0] for x in (logps, teacher_logps))
        return (ours - theirs).detach() * ours
    if k:
        rows = []
        for pair in zip(logps, teacher_logps, strict=True):
            order = sorted(range(len(pair[1])), key=lambda i, pair=pair: -pair[1][i].item())
            rows.append([torch.cat([x[order[:k]], x[order[k:]].exp().sum().log()[None]]) for x in pair])
        logps, teacher_logps = (torch.stack(side) for side in zip(*rows, strict=True))
    p, q = logps.exp(), teacher_logps.exp()
    if beta in (0, 1):
        return (q * (teacher_logps - logps) if beta == 0 else p * (logps - teacher_logps)).sum(-1)
    m = ((1 - beta) * p + beta * q).log()
    return (beta * q * (teacher_logps - m) + (1 - beta) * p * (logps - m)).sum(-1)


def tiny(config_class, vocab, hidden, seed, **options):
    torch.manual_seed(seed)
    options |= {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
    config = config_class(attn_implementation="eager", tie_word_embeddings=False, **options)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30  # so that the distributions have peaks
    model.head_inputs = MethodType(gkd.head_inputs, model)
    return model


# ---- Divergences: against whole logits, the definition and TRL ---------------------------------------------

TERMS = [("jsd", beta, k) for beta in BETAS for k in (0, 5)] + [("sampled", 0.5, 0)]


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_losses_and_gradients_equal_those_of_whole_logits_in_float64(terms, monkeypatch):
    """With heads that scale and cap, one of which is padded; in one chunk or several; and of a server's scores."""
    student = tiny(Gemma2Config, 97, 24, 0, final_logit_softcapping=3.0)
    teacher = tiny(Cohere2Config, 90, 32, 1, logit_scale=0.25)
    (loss_type, beta, k), ids = terms, np.random.default_rng(0).integers(3, 90, 24)
    batch, close = collate([(ids, np.arange(24) >= 4)]), {"rtol": 1e-3, "atol": 3e-4}
    for temperature, chunk, is_served in [(0.7, 10**9, 0), (0.7, 7 * 97, 0), (1.0, 7 * 97, 1)]:
        if is_served and loss_type == "jsd" and not k:
            continue
        both = [model(torch.from_numpy(ids)[None]).logits[0, 3:-1, :90] for model in (student, teacher)]
        logps, teacher_logps = ((logits.double() / temperature).log_softmax(-1) for logits in both)
        losses = naive(logps, teacher_logps.detach(), loss_type, beta, k, batch.labels_N)
        expected = torch.autograd.grad(losses.sum(), list(student.parameters()))
        top, top_ids = teacher_logps.detach().topk(k or 1)
        buckets = torch.cat([top, (1 - top.exp().sum(1, keepdim=True)).log()], 1)
        label_logps = teacher_logps.detach().gather(1, batch.labels_N[:, None])[:, 0]
        scores = (buckets.float(), top_ids, label_logps.float()) if is_served else None

        monkeypatch.setattr(gkd.ChunkedLoss, "ELEMENTS", (chunk, chunk))
        args = gkd.Args(temperature=temperature, loss_type=loss_type, beta=beta, teacher_top_k=k)
        sums = gkd.distill(student, None if is_served else teacher, scores, batch, 90, args)
        found = torch.autograd.grad(0.3 * sums[0], list(student.parameters()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, 0.3 * b, **close)
        entropies = [-(x.exp() * x).sum() for x in (logps, buckets if is_served else teacher_logps)]
        agreement = (logps.argmax(-1) == teacher_logps.argmax(-1)).sum().double()
        value = (logps.gather(1, batch.labels_N[:, None])[:, 0] - label_logps).sum()
        value = value if loss_type == "sampled" else losses.sum()
        expected = torch.stack([losses.sum(), value, entropies[0], agreement, entropies[1]])
        torch.testing.assert_close(sums, expected, **close)


def test_divergence_by_hand_and_of_trl():
    """On two tokens; and TRL's generalized_jsd_loss, at the temperature that its trainer does not give to it."""
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.9, 0.1], [0.4, 0.6]))
    assert gkd.divergence(p, q, 0).item() == pytest.approx(0.4 * math.log(0.4 / 0.9) + 0.6 * math.log(6))
    assert gkd.divergence(p, q, 1).item() == pytest.approx(0.9 * math.log(0.9 / 0.4) - 0.1 * math.log(6))
    buckets = gkd.to_buckets(torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log(), torch.tensor([[1, 0]])).exp()
    torch.testing.assert_close(buckets, torch.tensor([[0.3, 0.5, 0.2]]))
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 20, 31, dtype=torch.float64)
    labels = torch.zeros(1, 20, dtype=torch.long).index_fill(1, torch.arange(5), -100)
    for beta in BETAS:
        expected = GKDTrainer.generalized_jsd_loss(*logits, labels=labels, beta=beta, temperature=1.3)
        found = gkd.divergence(*(logits[:, 0, 5:] / 1.3).log_softmax(-1), beta)
        assert found.mean().item() == pytest.approx(expected.item())
        far = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)  # probabilities underflow
        value = gkd.divergence(far.log_softmax(-1), (-far.detach()).log_softmax(-1), beta)
        assert torch.autograd.grad(value.sum(), far)[0].isfinite().all()


def test_sampled_losses_have_in_expectation_the_gradient_of_the_reverse_kl():
    """Over all tokens, weighed by the student's probability; the log-ratio itself, differentiated, has none."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    logps, teacher_logps = logits.log_softmax(-1), torch.randn(7, dtype=torch.float64).log_softmax(-1)
    kl, ratio = ((x * (logps - teacher_logps)).sum() for x in (logps.exp(), logps.exp().detach()))
    assert torch.autograd.grad(ratio, logits, retain_graph=True)[0].abs().max() < 1e-12
    whole, probs = teacher_logps.expand(7, 7), logps.detach().exp()
    inputs = logits.expand(7, 7), torch.arange(7), whole, teacher_logps, None, "sampled", 0.5
    losses, values, *_ = gkd.distillation_terms(*inputs)
    found, expected = (torch.autograd.grad(x, logits)[0] for x in ((probs * losses).sum(), kl))
    torch.testing.assert_close(found, expected)
    assert (probs * values).sum().item() == pytest.approx(kl.item())


def test_no_tensor_holds_the_logits_of_all_positions(monkeypatch):
    monkeypatch.setattr(gkd.ChunkedLoss, "ELEMENTS", (2**12, 2**12))
    student, teacher = tiny(Gemma2Config, 2000, 8, 0), tiny(Gemma2Config, 2000, 8, 1)
    batch = collate([(np.random.default_rng(0).integers(3, 2000, 200), np.ones(200, bool))])
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(outputs) if torch.is_tensor(x))
            return outputs

    for k in (0, 20):
        with Sizes():
            gkd.distill(student, teacher, None, batch, 2000, gkd.Args(teacher_top_k=k))[0].backward()
    assert max(sizes) < 200 * 2000 / 2


def teacher_with(path, change):
    """A copy of the embedded teacher with its tokenizer.json changed."""
    shutil.copytree(TEACHER, path)
    data = json.loads((path / "tokenizer.json").read_text())
    change(data)
    (path / "tokenizer.json").write_text(json.dumps(data))
    return str(path)


def swap_two_ids(data):
    tokens = {id: token for token, id in data["model"]["vocab"].items()}
    data["model"]["vocab"] |= {tokens[300]: 417, tokens[417]: 300}


def read_otherwise(data):
    data.update(pre_tokenizer=None, normalizer={"type": "Lowercase"})


def test_a_teacher_with_other_tokens_is_refused(tmp_path, served):
    """A local one, and a server's."""
    data = {"dataset": rows_file(tmp_path / "rows.jsonl", 8)}
    for change, message in ((swap_two_ids, "in their tokens: "), (read_otherwise, "in their ids of a text")):
        path = teacher_with(tmp_path / change.__name__, change)
        served.tokenizer = load_tokenizer(path)
        for flags in ({"teacher": path}, {"teacher": URL, "teacher_top_k": 4}):
            with pytest.raises(UserError, match=message):
                train(tmp_path / "run", **data, **flags)
    template = (ASSETS / "teacher/chat_template.jinja").read_text().replace("<|im_end|>", "<|im_end|> ")
    (tmp_path / "template.jinja").write_text(template)
    served.tokenizer = load_tokenizer(TEACHER)
    for flags in ({"teacher": TEACHER}, {"teacher": URL, "teacher_top_k": 4}):
        with pytest.raises(UserError, match="in their chat templates"):
            train(tmp_path / "run", chat_template=str(tmp_path / "template.jinja"), **data, **flags)
    assert not (tmp_path / "run").exists()


# ---- The step ----------------------------------------------------------------------------------------------


def naive_step(documents, beta, temperature=1.0):
    """Mean divergence over the trained tokens of documents, by the models' own forwards, and its gradient norm."""
    values, models = [], [AutoModelForCausalLM.from_pretrained(path) for path in (MODEL, TEACHER)]
    for ids, mask in documents:
        both = [model(torch.tensor([list(ids)])).logits[0, :-1].double() / temperature for model in models]
        logps, teacher_logps = (logits.log_softmax(-1) for logits in both)
        losses = naive(logps, teacher_logps.detach(), "jsd", beta, 0, None)
        values.append(losses[torch.tensor(list(mask[1:])).bool()])
    loss = torch.cat(values).mean()
    gradients = torch.autograd.grad(loss, list(models[0].parameters()))
    return [loss.item(), torch.stack([grad.norm() for grad in gradients]).norm().item()]


def documents_of(answers):
    """The documents that completions.jsonl tells of."""
    tokenizer, documents = load_tokenizer(TEACHER), []
    for row in answers:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"] + "<|im_end|>" * row["is_finished"])["input_ids"]
        documents.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return documents


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_first_loss_is_the_models_divergence_on_data_and_on_samples(tmp_path, beta):
    """With a temperature, and divided by the tokens that were trained: by those of samples, though the data's
    answers are much longer. And so is its gradient."""
    tokenizer, rows = load_tokenizer(TEACHER), copy.deepcopy(ROWS[:16])
    for row in rows:
        row["messages"][1]["content"] += " 1234567"
    flags = {"dataset": (write_rows(tmp_path / "rows.jsonl", rows),), "beta": beta, "max_steps": 1}
    encoded = [gkd.encode_distillation(row, tokenizer, max_length=100) for row in rows]
    documents = [(row["input_ids"], row["loss_mask"]) for row in encoded]
    (found,) = train(tmp_path / "off", lmbda=0.0, temperature=0.8, **flags)
    assert [found["loss"], found["grad_norm"]] == pytest.approx(naive_step(documents, beta, 0.8), rel=1e-3)
    kinds = {"student": {"lmbda": 1.0, "temperature": 0.8}, "teacher": {"lmbda": 0.0, "seq_kd": True}}
    for writer, kind in kinds.items():
        (found,) = train(tmp_path / writer, **flags, **kind)
        answers = read_completions(tmp_path / writer)
        documents = documents_of(answers)
        expected = naive_step(documents, beta, kind.get("temperature", 1.0))
        assert [found["loss"], found["grad_norm"]] == pytest.approx(expected, rel=1e-2)
        assert found["completions/clipped_ratio"] == np.mean([not row["is_finished"] for row in answers])
        length = np.mean([sum(mask) for _, mask in documents])
        assert found["completions/mean_length"] == pytest.approx(length, abs=0.2)
        assert {row["writer"] for row in answers} == {writer}
    sums = [eval(row["prompt"].split("What is ")[1].split("?")[0]) for row in answers]
    right = [row["completion"] == str(value) for row, value in zip(answers, sums, strict=True)]
    assert np.mean(right) > 0.9, "the teacher adds well"
    ids, mask = gkd.sample_documents([Sample([1, 2], ids=[5, 9, 600, 7])], 512)[0]  # only one model knows 600
    assert (ids.tolist(), mask.tolist()) == ([1, 2, 5, 9], [False, False, True, True])


def test_a_step_samples_from_its_own_weights(tmp_path):
    """At a temperature near 0, where samples are the arg-max: what transformers generates from the model before
    the step. A warm student that does not change answers a prompt anew each time."""
    flags = {"dataset": rows_file(tmp_path / "rows.jsonl", 8), "batch_size": 8, "lmbda": 1.0}
    cold = {"temperature": 0.02, "beta": 0.0, "learning_rate": 3e-3, "lr_schedule": "constant"}
    for steps in (1, 2):
        train(tmp_path / str(steps), max_steps=steps, warmup_steps=0, **flags, **cold)
    answers, tokenizer, expected = read_completions(tmp_path / "2"), load_tokenizer(TEACHER), []
    for step, path in ((1, MODEL), (2, tmp_path / "1" / "final")):
        model = AutoModelForCausalLM.from_pretrained(path)
        for row in (row for row in answers if row["step"] == step):
            ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16}
            (output,) = model.generate(ids, **options)
            expected.append(tokenizer.decode(output[len(ids[0]) :], skip_special_tokens=True))
    assert [row["completion"] for row in answers] == expected
    assert sorted(expected[:8]) != sorted(expected[8:]), "the first step has changed them"
    assert [row["version"] for row in answers] == [0] * 8 + [1] * 8
    train(tmp_path / "warm", temperature=2.0, learning_rate=1e-12, max_steps=2, **flags)
    answers = sorted(read_completions(tmp_path / "warm"), key=lambda row: (row["step"], row["prompt"]))
    assert sum(a["completion"] != b["completion"] for a, b in zip(answers[:8], answers[8:], strict=True)) > 4


MODES = [{"lmbda": 0.0, "beta": 0.0}, {"lmbda": 1.0, "beta": 1.0, "temperature": 0.9}, {"teacher_top_k": 8}]


@pytest.mark.parametrize("mode", [*MODES, {"lmbda": 1.0, "loss_type": "sampled"}], ids=str)
def test_micro_batches_do_not_change_the_curve(tmp_path, mode):
    flags = {"dataset": rows_file(tmp_path / "rows.jsonl", 48), "max_length": 50, **mode}
    curves = [train(tmp_path / str(n), micro_batch_tokens=n, **flags) for n in (60, 8192)]
    assert_same_curve(*curves, rtol=2e-3)


def test_two_ranks_give_the_curve_of_one(tmp_path):
    """The teacher is sharded; draws and samples, of either model, are the same. The last step has one row, so
    that one of two ranks has nothing to do."""
    flags = {"dataset": rows_file(tmp_path / "rows.jsonl", 19), "batch_size": 6, "max_steps": 4}
    flags |= {"lora_rank": 4, "learning_rate": 1e-2, "teacher_top_k": 8, "seq_kd": True, "max_length": 100}
    conftest.assert_two_ranks_train_as_one(gkd, tmp_path, 1e-2, **flags)
    assert {row["on_policy"] for row in conftest.read_metrics(tmp_path / "1")} == {0, 1}
    assert read_completions(tmp_path / "1") == read_completions(tmp_path / "2")


def test_no_answer_of_the_data_is_used_on_policy(tmp_path):
    """--lmbda 1 trains the same on conversations, on those with other answers, and on prompts alone."""
    chats, curves = [row["messages"] for row in ROWS[:16]], []
    kinds = [{"messages": chat} for chat in chats], [{"prompt": chat[:1]} for chat in chats]
    for rows in (*kinds, [{"messages": [chat[0], {**chat[1], "content": "7"}]} for chat in chats]):
        path = write_rows(tmp_path / f"{len(curves)}.jsonl", rows)
        curves.append(train(tmp_path / str(len(curves)), dataset=(path,), lmbda=1.0, max_steps=2))
    assert curves[0] == curves[1] == curves[2]


# ---- Served teachers, what is lost, resume, flags, learning ------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    """A served teacher in this process, the embedded one; from its call `fails_at` on it is gone."""
    state = SimpleNamespace(calls=0, fails_at=math.inf, tokenizer=load_tokenizer(TEACHER))

    class Served(gkd.VLLMTeacher):
        def __init__(self, url, k, max_length, seconds):
            self.k, self.model = k or 1, AutoModelForCausalLM.from_pretrained(TEACHER)
            self.urls, self.process = [url], None

        def ask(self, url, route, body):
            if route == "detokenize":
                return {"prompt": state.tokenizer.decode(body["tokens"])}
            template = {"tokenize": False, "add_generation_prompt": False}
            text = body.get("prompt") or state.tokenizer.apply_chat_template(body["messages"], **template)
            return {"tokens": state.tokenizer(text)["input_ids"]}

        @torch.no_grad()
        def score(self, documents, device):
            state.calls += 1
            if state.calls >= state.fails_at:
                raise EngineError("the teacher is gone")
            parts = []
            for ids, mask in documents:
                logps = self.model(torch.tensor([list(ids)])).logits[0, :-1].log_softmax(-1)[mask[1:]]
                top, top_ids = logps.topk(self.k)
                rest = (1 - top.exp().sum(1, keepdim=True)).clamp(min=1e-5).log()
                labels = torch.from_numpy(ids[1:])[mask[1:], None]
                parts.append((torch.cat([top, rest], 1), top_ids, logps.gather(1, labels)[:, 0]))
            return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    monkeypatch.setattr(gkd, "VLLMTeacher", Served)
    return state


SERVED = [{"teacher_top_k": 8}, {"teacher_top_k": 8, "beta": 1.0, "micro_batch_tokens": 120}]


@pytest.mark.parametrize("mode", [*SERVED, {"loss_type": "sampled", "lmbda": 1.0}], ids=str)
def test_what_a_server_says_trains_as_the_local_teacher(tmp_path, served, mode):
    flags = {"dataset": rows_file(tmp_path / "rows.jsonl", 48), **mode}
    local, remote = (train(tmp_path / teacher[-4:], teacher=teacher, **flags) for teacher in (TEACHER, URL))
    for row in (*local, *remote):
        row.pop("teacher_entropy")  # of the buckets only, by the server
    assert_same_curve(remote, local, rtol=1e-2)
    assert served.calls == 3, "one call for all documents of a step"


def test_what_a_server_says_is_not_rounded_in_bfloat16(tmp_path, served, monkeypatch):
    """FSDP casts what it finds in arguments; a log-prob of -5 in bfloat16 is wrong by up to 0.016."""
    terms, rounded = gkd.distillation_terms, []

    def watch(logits_CV, labels_C, teacher_logps, label_logps_C, *rest):
        rounded.extend(torch.equal(x, x.bfloat16().float()) for x in (teacher_logps, label_logps_C))
        return terms(logits_CV, labels_C, teacher_logps, label_logps_C, *rest)

    monkeypatch.setattr(gkd, "distillation_terms", watch)
    flags = {"dataset": rows_file(tmp_path / "rows.jsonl", 16), "dtype": "bfloat16", "max_steps": 1}
    train(tmp_path / "run", teacher=URL, teacher_top_k=4, **flags)
    assert rounded == [False, False]


def test_a_lost_teacher_or_engine_ends_the_run_with_a_checkpoint(tmp_path, served, monkeypatch):
    flags = {"teacher": URL, "teacher_top_k": 4, "max_steps": 4, "lmbda": 0.6}
    flags["dataset"] = rows_file(tmp_path / "rows.jsonl", 48)
    straight, generate, calls = train(tmp_path / "straight", **flags), HFEngine.generate, iter(range(9))

    def fragile(*inputs, **options):
        if next(calls) == 1:
            raise EngineError("the engine is gone")
        return generate(*inputs, **options)

    for name in ("teacher", "engine"):
        served.calls, served.fails_at = 0, 3 if name == "teacher" else math.inf
        with monkeypatch.context() as patch:
            patch.setattr(HFEngine, "generate", fragile if name == "engine" else generate)
            with pytest.raises(UserError, match=rf"the {name} is gone\nThe run is saved as of step [1-3];"):
                train(tmp_path / name, **flags)
        served.fails_at = math.inf
        assert train(tmp_path / name, resume=True, **flags) == straight


BAD_FLAGS = [
    ({"beta": 1.5, "lmbda": -0.1}, r"--beta is 1.5; it must be .* 0 .* 1\n *--lmbda is -0.1"),
    ({"loss_type": "sampled"}, "--loss-type sampled needs --lmbda 1"),
    ({"loss_type": "sampled", "lmbda": 1.0, "beta": 1.0}, "--beta has no effect"),
    ({"seq_kd": True, "lmbda": 1.0}, "--seq-kd has no effect"),
    ({"lmbda": 0.0, "engine": "vllm"}, "--engine has no effect"),
    ({"lmbda": 0.0, "max_completion_length": 9}, "--max-completion-length has no effect"),
    ({"teacher": URL, "temperature": 0.9}, "which needs --temperature 1"),
    ({"teacher": URL}, "which needs --teacher-top-k"),
    ({"lmbda": 1.0, "loss_on": "all"}, "--loss-on has no effect"),
    ({"teacher_top_k": 512}, "--teacher-top-k must be below the vocabulary, 512"),
    ({"max_completion_length": 100}, "--max-completion-length leaves -?\\d+ tokens for prompts"),
    ({"teacher": "/nowhere"}, "/nowhere"),
]


def test_bad_flags(tmp_path):
    for flags, message in BAD_FLAGS:
        with pytest.raises((UserError, OSError), match=message):
            train(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.learn
@pytest.mark.parametrize("flags", [[], ["--lmbda", "1"]], ids=["defaults", "on policy"])
def test_default_run_learns(tmp_path, flags):
    """From about half of the held-out sums to nine in ten."""
    rows = run_well("gkd.py", tmp_path / "run", *flags)
    right = [row["eval/exact_match"] for row in rows if "eval/exact_match" in row]
    assert 0.4 < right[0] < 0.6 < 0.9 <= right[-1]
