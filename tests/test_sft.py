"""sft.py as it runs: against transformers and TRL, on any split of the work, stopped and resumed, saved and loaded."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ASSETS,
    ROOT,
    assert_same_curve,
    command,
    flags_of,
    kill,
    read_metrics,
    run,
    start,
    wait_for_step,
    weights,
    write_rows,
)
from conftest import train as train_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import sft
from common import UserError, encode_sft

ROWS = [json.loads(line) for line in (ASSETS / "messages.jsonl").read_text().splitlines()[:200]]
train = functools.partial(train_script, sft)


@pytest.fixture
def ragged(tmp_path):
    """A file of 37 conversations of 1 to 5 exchanges, as --dataset takes it."""
    rng = random.Random(0)
    chats = [[rng.choice(ROWS)["messages"] for _ in range(rng.randint(1, 5))] for _ in range(37)]
    return (write_rows(tmp_path / "ragged.jsonl", [{"messages": sum(chat, [])} for chat in chats]),)


def encoded(dataset):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    return [encode_sft(json.loads(line), tokenizer) for line in Path(dataset[0]).read_text().splitlines()]


def save_model(path, model):
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(path)
    return str(path)


def untied_model(path):
    """The embedded model with a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
    return save_model(path, model)


# ---- The right loss ----


def reference_curve(dataset, learning_rates, clip=1.0, **adamw):
    """Losses and gradient norms of a plain padded loop with transformers' own loss and a mask written by hand."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, **adamw)
    examples = []
    for line in Path(dataset[0]).read_text().splitlines():
        ids, labels = [], []
        for message in json.loads(line)["messages"]:
            head = tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"]
            body, tail = (tokenizer(text)["input_ids"] for text in (f"{message['content']}<|im_end|>", "\n"))
            ids += head + body + tail
            is_trained = message["role"] == "assistant"
            labels += [-100] * len(head) + (body if is_trained else [-100] * len(body)) + [-100] * len(tail)
        examples.append((ids, labels))
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples])
    curve = []
    for learning_rate in learning_rates:
        optimizer.param_groups[0]["lr"] = learning_rate
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        curve.append((loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()))
        optimizer.step()
        optimizer.zero_grad()
    return curve


BETAS = {
    "adam_beta1": 0.5,
    "adam_beta2": 0.7,
    "max_grad_norm": 0.3,
    "warmup_steps": 2,
    "lr_schedule": "cosine",
}
CURVES = {  # flags, the learning rates that they mean, clipping and AdamW of the reference
    "defaults": ({"warmup_steps": 0}, [1e-3, 0.75e-3, 0.5e-3, 0.25e-3], 1.0, {}),
    "betas, cosine, clip": (BETAS, [5e-4, 1e-3, 1e-3, 0.75e-3, 0.25e-3], 0.3, {"betas": (0.5, 0.7)}),
    "share, no clip": ({"warmup_steps": 0.5, "max_grad_norm": 0}, [5e-4, 1e-3, 1e-3, 5e-4], float("inf"), {}),
}


@pytest.mark.parametrize("name", CURVES)
def test_loss_curve_equals_that_of_transformers(tmp_path, ragged, name):
    flags, rates, clip, adamw = CURVES[name]
    flags |= {"batch_size": 37, "max_steps": len(rates), "micro_batch_tokens": 300}
    found = train(tmp_path / "run", dataset=ragged, **flags)
    assert [row["learning_rate"] for row in found] == pytest.approx(rates)
    for row, (loss, grad_norm) in zip(found, reference_curve(ragged, rates, clip, **adamw), strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((loss, grad_norm), rel=1e-3)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_loss_curve_equals_that_of_trl(tmp_path, ragged, loss_type):
    """TRL 1.16 on the same batch of pre-tokenized rows (its own template handling would train the prompts)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = []
    for row in encoded(ragged):
        pairs = zip(row["input_ids"], row["loss_mask"], strict=True)
        rows.append(
            {
                "input_ids": row["input_ids"],
                "labels": [id if is_trained else -100 for id, is_trained in pairs],
            }
        )
    found = train(tmp_path / "run", dataset=ragged, batch_size=37, loss_type=loss_type)
    config = SFTConfig(output_dir=str(tmp_path / "trl"), per_device_train_batch_size=37, num_train_epochs=3, learning_rate=1e-3,
                       loss_type=loss_type, bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no",
                       logging_steps=1, report_to="none", model_init_kwargs={"dtype": "float32"}, max_length=None)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    data = Dataset.from_list(rows)
    trainer = SFTTrainer(str(ASSETS / "model"), args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    expected = [row for row in trainer.state.log_history if "loss" in row]
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "learning_rate"):
        values = [float(row[key]) for row in expected]
        assert [row[key] for row in found] == pytest.approx(values, rel=2e-3, abs=1e-6), key


def test_evaluation_is_over_the_whole_set_by_token(tmp_path, ragged):
    """Against transformers' own forward, row by row."""
    row = train(tmp_path / "run", dataset=ragged, eval_dataset=ragged, max_steps=1)[0]
    model, losses, hits, exact = AutoModelForCausalLM.from_pretrained(ASSETS / "model"), [], [], []
    for example in encoded(ragged):
        ids, mask = torch.tensor(example["input_ids"]), torch.tensor(example["loss_mask"])[1:]
        with torch.no_grad():
            logps_TV = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        losses.append(-logps_TV.gather(1, ids[1:, None])[:, 0][mask])
        hits.append((logps_TV.argmax(-1) == ids[1:])[mask])
        exact.append(hits[-1].all())
    assert row["eval/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert row["eval/mean_token_accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())
    assert row["eval/exact_match"] == pytest.approx(sum(exact).item() / len(exact))


def test_seed_orders_the_data_and_draws_the_noise(tmp_path, ragged):
    def losses(name, **flags):
        flags |= {"max_steps": 2, "learning_rate": 1e-12}
        return [row["loss"] for row in train(tmp_path / name, dataset=ragged, **flags)]

    assert losses("a") == losses("b") != losses("c", seed=1)
    noisy = {
        "batch_size": 37,
        "neftune_alpha": 20.0,
        "eval_dataset": ragged,
    }  # whole epochs: only the noise differs
    one, two = (train(tmp_path / f"noise{i}", dataset=ragged, max_steps=1, **noisy) for i in range(2))
    other = train(tmp_path / "other", dataset=ragged, max_steps=1, seed=1, **noisy)
    assert one == two
    assert one[0] == other[0], "no noise in evaluation"
    assert one[1]["loss"] != other[1]["loss"]
    first, second = (sft.epoch_order(100, 0, epoch).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second


def test_weight_decay_is_on_matrices_only_and_dropout_of_the_model_is_left_out(tmp_path, ragged):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    model.config.attention_dropout = 0.5
    flags = {"dataset": ragged, "learning_rate": 1e-12, "weight_decay": 1e9, "max_steps": 1}
    expected = train(tmp_path / "a", **flags)
    assert train(tmp_path / "b", model=save_model(tmp_path / "model", model), **flags) == expected
    before, after = load_file(ASSETS / "model" / "model.safetensors"), weights(tmp_path / "a")
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-7) == (before[name].ndim < 2), name


def test_bfloat16_trains_all_weights_like_float32_and_reduces_in_float32(tmp_path, ragged, monkeypatch):
    """To bf16's rounding the same curve, and the head, untied here, learns, too."""
    policies, shard = [], sft.fully_shard

    def note(module, **options):
        policies.append(options["mp_policy"])
        return shard(module, **options)

    monkeypatch.setattr(sft, "fully_shard", note)
    model = untied_model(tmp_path / "model")
    flags = {"dataset": ragged, "model": model, "batch_size": 37, "max_steps": 3}
    exact, rounded = train(tmp_path / "a", **flags), train(tmp_path / "b", dtype="bfloat16", **flags)
    assert {(policy.param_dtype, policy.reduce_dtype) for policy in policies} == {
        (torch.bfloat16, torch.float32)
    }
    for a, b in zip(exact, rounded, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)  # CPUs round differently
    before = AutoModelForCausalLM.from_pretrained(model).lm_head.weight
    moved = [weights(tmp_path / run)["lm_head.weight"].float() - before for run in ("a", "b")]
    assert torch.nn.functional.cosine_similarity(*(m.flatten() for m in moved), dim=0) > 0.8


# ---- Any split of the work ----


@pytest.mark.parametrize("how", ["smallest", "of 250", "alone", "checkpointed"])
def test_micro_batches_do_not_change_the_curve(tmp_path, ragged, how, monkeypatch):
    flags = {"dataset": ragged, "max_steps": 5, "label_smoothing": 0.1}
    whole = train(tmp_path / "whole", **flags)
    lengths = [len(row["input_ids"]) for row in encoded(ragged)]
    if how == "alone":
        monkeypatch.setattr(sft, "self_check", lambda *_: "alone")
    flags |= {"micro_batch_tokens": {"smallest": max(lengths), "of 250": 250}.get(how, 8192)}
    calls, forward = [], Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    cut = train(tmp_path / "cut", gradient_checkpointing=how == "checkpointed", **flags)
    assert_same_curve(cut, whole)
    assert len(calls) > 50, (
        "4 layers x 5 steps, once and more: by more micro-batches, or again in the backward"
    )
    assert whole[4]["epoch"] == 1.0  # the last batch of the epoch is smaller, and trained
    assert whole[4]["tokens"] == sum(lengths)


@pytest.mark.parametrize(
    "flags",
    [
        {"micro_batch_tokens": 128},
        pytest.param({"lora_rank": 4, "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one(tmp_path, ragged, flags):
    """37 rows in batches of 9: the last batch has one, so that one of the ranks runs a micro-batch that trains nothing."""
    flags = {
        "dataset": ragged,
        "batch_size": 9,
        "max_steps": 6,
        "eval_dataset": ragged,
        "eval_every": 3,
        **flags,
    }
    one = train(tmp_path / "one", **flags)
    result = run("sft.py", *flags_of(output_dir=tmp_path / "two", **flags), ranks=2)
    assert result.returncode == 0, result.stderr[-6000:]
    rtol = 0.05 if "dtype" in flags else 1e-3
    assert_same_curve(read_metrics(tmp_path / "two"), one, rtol)
    assert len([row for row in one if "eval/loss" in row]) == 3
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=rtol, atol=rtol / 10)


# ---- Stopped and resumed ----


def assert_same_run(found, expected):
    """Bit for bit: metrics.jsonl (times aside) and weights."""
    assert read_metrics(found) == read_metrics(expected)
    a, b = weights(found), weights(expected)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("step", [3, 5])  # the fifth step is the last of the first epoch
@pytest.mark.parametrize("mode", [{}, {"lora_rank": 4, "neftune_alpha": 5.0, "lr_schedule": "cosine"}])
def test_resume_is_exact(tmp_path, ragged, step, mode):
    """From a checkpoint in the middle of an epoch and at its end; what a killed run left aside is in nobody's way."""
    flags = {
        "dataset": ragged,
        "max_steps": 8,
        "save_every": step,
        "eval_dataset": ragged,
        "eval_every": 2,
        **mode,
    }
    train(tmp_path / "straight", **flags)
    train(tmp_path / "cut", **flags)
    for path in (tmp_path / "cut").glob("*"):
        if path.is_dir() and path.name != f"checkpoint-{step:08d}":
            shutil.rmtree(path)
    for name in ("checkpoint-00000007", ".checkpoint-00000006.partial"):  # not complete: no progress.json
        (tmp_path / "cut" / name).mkdir()
        (tmp_path / "cut" / name / "junk").write_text("x")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # killed in the middle of a line
    train(tmp_path / "cut", resume=True, **flags)
    assert_same_run(tmp_path / "cut", tmp_path / "straight")
    train(tmp_path / "cut", resume=True, **flags)  # a run that is done repeats nothing
    assert_same_run(tmp_path / "cut", tmp_path / "straight")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_at_random_instants_then_resume_is_exact(tmp_path, ragged, ranks):
    flags = {"dataset": ragged, "max_steps": 60, "save_every": 5, "eval_dataset": ragged, "eval_every": 4}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    if ranks == 1:
        train(straight, **flags)
    else:
        assert run("sft.py", *flags_of(output_dir=straight, **flags), ranks=ranks).returncode == 0
    process = start("sft.py", *flags_of(output_dir=killed, **flags), ranks=ranks)
    wait_for_step(process, killed, 12)
    time.sleep(random.random() * 0.3)
    kill(process, killed)
    result = run("sft.py", *flags_of(output_dir=killed, resume=True, **flags), ranks=ranks)
    assert result.returncode == 0, result.stderr[-6000:]
    assert_same_run(killed, straight)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_on_another_number_of_ranks_keeps_the_curve(tmp_path, ragged, before, after):
    flags = {"dataset": ragged, "max_steps": 20, "save_every": 3, "batch_size": 9, "learning_rate": 1e-4}
    expected, moved = train(tmp_path / "straight", **flags), tmp_path / "moved"
    process = start("sft.py", *flags_of(output_dir=moved, **flags), ranks=before)
    wait_for_step(process, moved, 7)
    kill(process, moved)
    result = run("sft.py", *flags_of(output_dir=moved, resume=True, **flags), ranks=after)
    assert result.returncode == 0, result.stderr[-6000:]
    assert_same_curve(read_metrics(moved), expected, rtol=1e-3)


def test_sigterm_finishes_the_step_saves_it_and_says_how_to_go_on(tmp_path, ragged, monkeypatch, capsys):
    flags = {"dataset": ragged, "max_steps": 6, "micro_batch_tokens": 128}
    train(tmp_path / "straight", **flags)
    taken, step = [], torch.optim.AdamW.step

    def signalled(*args, **options):
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", signalled)
        rows = train(tmp_path / "run", **flags)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-00000003"]
    assert not (tmp_path / "run" / "final").exists()
    assert f"--output-dir {tmp_path / 'run'} --resume" in capsys.readouterr().out
    train(tmp_path / "run", resume=True, **flags)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_sigterm_on_two_ranks_saves_one_step(tmp_path, ragged):
    process = start("sft.py", *flags_of(output_dir=tmp_path / "run", dataset=ragged, max_steps=400), ranks=2)
    wait_for_step(process, tmp_path / "run", 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output[-2000:]  # as torchrun returns when it was signalled
    assert f"--output-dir {tmp_path / 'run'} --resume" in output
    done = read_metrics(tmp_path / "run")[-1]["step"]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{done:08d}"]


def test_resume_refuses_other_flags_and_other_data(tmp_path, ragged):
    train(tmp_path / "run", dataset=ragged, save_every=2)
    with pytest.raises(UserError, match=r"--learning-rate .*0\.001.*0\.1"):
        train(tmp_path / "run", dataset=ragged, save_every=2, resume=True, learning_rate=0.1)
    sft.dist.destroy_process_group()
    Path(ragged[0]).write_text(Path(ragged[0]).read_text().replace("1", "22"))
    with pytest.raises(UserError, match="rows"):
        train(tmp_path / "run", dataset=ragged, save_every=2, resume=True)


def test_two_checkpoints_are_kept(tmp_path, ragged):
    train(tmp_path / "run", dataset=ragged, save_every=1, max_steps=5)
    names = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*"))
    assert names == ["checkpoint-00000004", "checkpoint-00000005"]


@pytest.mark.parametrize("bad", [1, 3])
def test_a_non_finite_loss_stops_before_the_update_and_names_the_rows(tmp_path, ragged, monkeypatch, bad):
    real, calls = sft.sft_loss, []

    def poisoned(logps_N, *rest):
        calls.append(1)
        return real(logps_N, *rest) * (float("nan") if len(calls) == bad else 1.0)

    monkeypatch.setattr(sft, "sft_loss", poisoned)
    with pytest.raises(UserError, match=rf"step {bad}: the loss is nan.*row \d+ of .*ragged.jsonl"):
        train(tmp_path / "run", dataset=ragged, save_every=1)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, bad))
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == bad - 1


# ---- Saved and loaded ----


@pytest.mark.parametrize("kind", ["tied", "untied", "LoRA", "LoRA, untied"])
def test_final_gives_the_logits_of_the_trained_policy(tmp_path, ragged, kind, monkeypatch):
    """As transformers loads it; so do adapter/ and the base, by PEFT."""
    from peft import PeftModel

    kept, export = [], sft.export

    def note(args, output_dir, policy, *rest):
        with torch.no_grad():
            kept.append(policy(input_ids=torch.arange(40)[None]).logits)
        return export(args, output_dir, policy, *rest)

    monkeypatch.setattr(sft, "export", note)
    model = untied_model(tmp_path / "untied") if "untied" in kind else str(ASSETS / "model")
    targets = {"lora_rank": 4, "lora_targets": ("q_proj", "mlp.up_proj")} if "LoRA" in kind else {}
    before_mask = os.umask(0o027)
    try:
        train(tmp_path / "run", dataset=ragged, model=model, learning_rate=1e-2, **targets)
    finally:
        os.umask(before_mask)
    final, adapter = tmp_path / "run" / "final", tmp_path / "run" / "adapter"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in final.iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE(final.stat().st_mode) == 0o750
    base = AutoModelForCausalLM.from_pretrained(model)
    loaded = [AutoModelForCausalLM.from_pretrained(final)]
    with torch.no_grad():
        before = base(input_ids=torch.arange(40)[None]).logits
    assert adapter.exists() == ("LoRA" in kind)
    if "LoRA" in kind:
        loaded.append(PeftModel.from_pretrained(base, adapter))
        names = load_file(adapter / "adapter_model.safetensors").keys()
        assert {name.split(".")[-3] for name in names} == {"q_proj", "up_proj"}
        changed = [
            n
            for n, w in weights(tmp_path / "run").items()
            if not torch.equal(w, load_file(f"{model}/model.safetensors")[n])
        ]
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "up_proj"}
    for each in loaded:
        with torch.no_grad():
            found = each(input_ids=torch.arange(40)[None]).logits
        torch.testing.assert_close(found, kept[0], rtol=1e-4, atol=1e-4)
        assert (found - before).abs().max() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(ASSETS / "model").chat_template
    assert json.loads((final / "generation_config.json").read_text())["eos_token_id"] == [
        tokenizer.eos_token_id
    ]


def test_generation_config_gets_the_stop_tokens_and_is_made_valid(tmp_path, ragged):
    """A model with another EOS than the chat template's, and with a temperature but no sampling, as older ones have."""
    shutil.copytree(ASSETS / "model", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    changed = {"do_sample": False, "temperature": 0.6, "eos_token_id": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    train(tmp_path / "run", dataset=ragged, model=str(tmp_path / "model"), max_steps=1)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").generation_config
    end = AutoTokenizer.from_pretrained(ASSETS / "model").convert_tokens_to_ids("<|im_end|>")
    assert final.eos_token_id == [0, end]


# ---- Modes ----


def test_the_gradient_of_adapters_is_scaled_by_alpha_over_rank(tmp_path, ragged):
    """A new adapter's B is 0, so that its gradient is proportional to the scale."""
    flags = {"dataset": ragged, "lora_rank": 4, "max_steps": 1, "learning_rate": 1e-3}
    plain, half = (train(tmp_path / f"{alpha}", lora_alpha=alpha, **flags)[0] for alpha in (32.0, 16.0))
    assert half["grad_norm"] == pytest.approx(plain["grad_norm"] / 2, rel=1e-4)


@pytest.mark.slow
def test_compile_changes_nothing(tmp_path, ragged):
    expected = train(tmp_path / "a", dataset=ragged)
    assert_same_curve(train(tmp_path / "b", dataset=ragged, compile=True), expected, 1e-4)


def test_four_bit_base(tmp_path, ragged):
    """The same as training adapters on the weights that the 4 bits stand for; resumed in the middle, it goes on the same."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    flags = {
        "dataset": ragged,
        "lora_rank": 8,
        "load_in_4bit": True,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "save_every": 3,
    }
    found = train(tmp_path / "run", **flags)
    nf4 = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    config = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    quantized = AutoModelForCausalLM.from_pretrained(
        ASSETS / "model", quantization_config=config, dtype=torch.float32
    )
    plain = load_file(ASSETS / "model" / "model.safetensors")
    for name, weight in quantized.named_parameters():
        if hasattr(weight, "quant_state"):
            plain[name] = dequantize_4bit(weight.data, weight.quant_state).to(plain[name])
    shutil.copytree(ASSETS / "model", tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    expected = train(tmp_path / "b", **{**flags, "load_in_4bit": False, "model": str(tmp_path / "plain")})
    assert_same_curve(found, expected, 1e-2)
    assert (
        found[0]["loss"]
        != train(tmp_path / "c", **{**flags, "load_in_4bit": False, "max_steps": 1})[0]["loss"]
    )
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000006")
    assert train(tmp_path / "run", resume=True, **flags) == found


def test_output_directory_has_all_that_a_run_needs(tmp_path, ragged, monkeypatch):
    """A resumed run has the id in wandb that it began with."""
    import wandb

    ids, init = [], wandb.init

    def note(**options):
        ids.append((options["id"], options["mode"]))
        return init(**options)

    monkeypatch.setattr(wandb, "init", note)
    for resume in (False, True):
        train(tmp_path / "run", dataset=ragged, wandb="offline", save_every=1, resume=resume, max_steps=1)
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["args"]["batch_size"] == 8
    assert record["versions"]["torch"]
    assert (tmp_path / "run" / "script.py").read_text() == (ROOT / "sft.py").read_text()
    assert (tmp_path / "run" / "common.py").read_text() == (ROOT / "common.py").read_text()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert ids == [(record["wandb_id"], "offline")] * 2


@pytest.mark.parametrize("flags", [["--help"], ["--batch-size", "0", "--lora-alpha", "8"]])
def test_help_and_refused_flags_are_quick_and_all_problems_come_at_once(flags):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run("grpo.py", *flags)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4, "seconds of CPU time"
    output = result.stdout + result.stderr
    assert "Traceback" not in output
    if flags != ["--help"]:
        assert result.returncode == 1
        assert all(flag in output for flag in ("--batch-size", "--lora-alpha", "--lora-rank"))


# ---- The default run ----


@pytest.mark.learn
def test_default_run_learns_and_its_model_answers(tmp_path):
    """No flags: at most two minutes, from about half of the held-out sums to nine in ten. Then final/ answers by itself."""
    began = time.time()
    words = command("sft.py", "--output-dir", tmp_path / "run")
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-6000:]
    assert time.time() - began < 120 * float(os.environ.get("TIME_FACTOR", 1))
    evals = [row for row in read_metrics(tmp_path / "run") if "eval/exact_match" in row]
    assert 0.35 < evals[0]["eval/exact_match"] < 0.65
    assert evals[-1]["eval/exact_match"] >= 0.9
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    right, options = 0, {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    for line in (ASSETS / "messages_eval.jsonl").read_text().splitlines()[:100]:
        question, answer = json.loads(line)["messages"]
        inputs = tokenizer.apply_chat_template([question], **options)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert output[-1] == tokenizer.eos_token_id, "generation does not stop at the end of the turn"
        right += tokenizer.decode(output, skip_special_tokens=True) == answer["content"]
    assert right >= 85
