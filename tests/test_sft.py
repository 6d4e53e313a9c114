"""sft.py as it runs: against transformers and TRL, on any split of the work, stopped and resumed, saved and loaded."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ASSETS,
    ROOT,
    SHORT,
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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import sft
from common import UserError

ROWS = [json.loads(line) for line in (ASSETS / "messages.jsonl").read_text().splitlines()[:200]]


@pytest.fixture
def ragged(tmp_path):
    """37 conversations of 1 to 5 exchanges."""
    rng = random.Random(0)
    rows = [
        {"messages": sum((rng.choice(ROWS)["messages"] for _ in range(rng.randint(1, 5))), [])}
        for _ in range(37)
    ]
    return write_rows(tmp_path / "ragged.jsonl", rows)


def train(output_dir, **flags):
    """Run sft.main in this process -> its metrics."""
    if "dataset" in flags and isinstance(flags["dataset"], str):
        flags["dataset"] = (flags["dataset"],)
    sft.main(replace(sft.Args(output_dir=str(output_dir)), **{**SHORT, **flags}))
    return read_metrics(output_dir)


# ---- The right loss --------------------------------------------------------------------------------------------------


def reference_curve(dataset, learning_rates, clip=1.0, **adamw):
    """Losses and gradient norms of a plain padded loop with transformers' own loss, whole batches."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, **adamw)
    examples = []
    for line in Path(dataset).read_text().splitlines():
        ids, labels = [], []
        for message in json.loads(line)["messages"]:
            head = tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"]
            body = tokenizer(f"{message['content']}<|im_end|>")["input_ids"]
            tail = tokenizer("\n")["input_ids"]
            ids += head + body + tail
            labels += (
                [-100] * len(head)
                + (body if message["role"] == "assistant" else [-100] * len(body))
                + [-100] * len(tail)
            )
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


def test_loss_curve_equals_that_of_transformers(tmp_path, ragged):
    found = train(tmp_path / "run", dataset=ragged, batch_size=37, max_steps=4, micro_batch_tokens=300)
    expected = reference_curve(ragged, [1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert [(row["loss"], row["grad_norm"]) for row in found] == [
        pytest.approx(pair, rel=1e-4) for pair in expected
    ]


def test_optimizer_flags_do_what_they_say(tmp_path, ragged):
    """Betas, schedule, warm-up and clipping against the plain loop."""
    flags = {
        "adam_beta1": 0.5,
        "adam_beta2": 0.7,
        "max_grad_norm": 0.3,
        "warmup_steps": 2,
        "lr_schedule": "cosine",
    }
    rates = [5e-4, 1e-3, 1e-3, 0.75e-3, 0.25e-3]  # 2 steps up; then 1/2 + 1/2 cos(pi t), t = 0, 1/3, 2/3
    found = train(tmp_path / "run", dataset=ragged, batch_size=37, max_steps=5, **flags)
    assert [row["learning_rate"] for row in found] == pytest.approx(rates)
    expected = reference_curve(ragged, rates, clip=0.3, betas=(0.5, 0.7))
    for row, (loss, grad_norm) in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["grad_norm"] == pytest.approx(grad_norm, rel=1e-3)
    share = train(tmp_path / "share", dataset=ragged, batch_size=37, max_steps=4, warmup_steps=0.5)
    assert [row["learning_rate"] for row in share] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


def test_seed_orders_the_data_and_draws_the_noise(tmp_path, ragged):
    def first_losses(name, **flags):
        return [row["loss"] for row in train(tmp_path / name, dataset=ragged, learning_rate=1e-12, **flags)]

    assert first_losses("a") == first_losses("b") != first_losses("c", seed=1)
    noisy = {"batch_size": 37, "neftune_alpha": 20.0}  # whole epochs: only the noise differs
    assert first_losses("d", **noisy) == first_losses("e", **noisy) != first_losses("f", seed=1, **noisy)
    one, two, _ = first_losses("g", **noisy)
    assert one != two


def test_epochs_have_orders_of_their_own():
    first, second = (sft.epoch_order(100, 0, epoch).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second


def test_norm_of_zero_never_clips(tmp_path, ragged):
    found = train(tmp_path / "run", dataset=ragged, batch_size=37, max_steps=2, max_grad_norm=0.0)
    expected = reference_curve(ragged, [1e-3, 0.5e-3], clip=float("inf"))
    assert [row["loss"] for row in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)


def test_a_models_own_dropout_is_left_out(tmp_path, ragged):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    expected = train(tmp_path / "a", dataset=ragged)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(tmp_path / "model")
    assert train(tmp_path / "b", dataset=ragged, model=str(tmp_path / "model")) == expected


def test_lora_dropout_drops(tmp_path, ragged):
    """The first step's loss is without it: a new adapter is 0. The gradient is not."""
    flags = {"dataset": ragged, "lora_rank": 4, "max_steps": 1}
    plain, dropped = (train(tmp_path / str(p), lora_dropout=p, **flags)[0] for p in (0.0, 0.5))
    assert dropped["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert dropped["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-2)


def test_bfloat16_on_a_cpu_trains_all_weights_like_float32(tmp_path, ragged):
    """bf16 compute on float32 weights: to bf16's rounding the same curve, and the head, untied here, learns, too."""
    model = untied_model(tmp_path / "model")
    flags = {"dataset": ragged, "model": str(model), "batch_size": 37, "max_steps": 3}
    exact, rounded = train(tmp_path / "a", **flags), train(tmp_path / "b", dtype="bfloat16", **flags)
    for a, b in zip(exact, rounded, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)  # CPUs round differently
    before = AutoModelForCausalLM.from_pretrained(model).lm_head.weight
    moved = [weights(tmp_path / run)["lm_head.weight"].float() - before for run in ("a", "b")]
    assert torch.nn.functional.cosine_similarity(*(m.flatten() for m in moved), dim=0) > 0.8


def test_gradients_are_reduced_in_float32(tmp_path, ragged, monkeypatch):
    seen, shard = [], sft.fully_shard
    monkeypatch.setattr(
        sft,
        "fully_shard",
        lambda module, **options: seen.append(options["mp_policy"]) or shard(module, **options),
    )
    train(tmp_path / "run", dataset=ragged, dtype="bfloat16", max_steps=1)
    assert {(policy.param_dtype, policy.reduce_dtype) for policy in seen} == {(torch.bfloat16, torch.float32)}


def test_stop_tokens_join_the_generation_config(tmp_path, ragged):
    """Of a model whose own EOS is another than what the chat template ends turns with."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    model.generation_config.eos_token_id = 0
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    train(tmp_path / "run", dataset=ragged, model=str(tmp_path / "model"))
    config = json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_resumed_run_has_the_wandb_id_it_began_with(tmp_path, ragged, monkeypatch):
    import wandb

    ids, init = [], wandb.init
    monkeypatch.setattr(
        wandb, "init", lambda **options: ids.append((options["id"], options["mode"])) or init(**options)
    )
    for resume in (False, True):
        train(tmp_path / "run", dataset=ragged, wandb="offline", save_every=1, resume=resume)
    assert ids == [(json.loads((tmp_path / "run" / "args.json").read_text())["wandb_id"], "offline")] * 2


def test_ranks_with_other_rows_are_told_apart(tmp_path, ragged, monkeypatch):
    def other(gathered, mine):
        gathered[:] = [mine, ("another", None)]

    monkeypatch.setattr(sft.dist, "all_gather_object", other)
    with pytest.raises(UserError, match="the rows of ranks 0 and 1 differ: give all machines the same data"):
        train(tmp_path / "run", dataset=ragged)
    assert not (tmp_path / "run").exists()


def test_log_every(tmp_path, ragged):
    rows = train(tmp_path / "run", dataset=ragged, log_every=2, max_steps=5)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["loss"] for row in rows] == [
        r["loss"] for r in train(tmp_path / "b", dataset=ragged, max_steps=5) if r["step"] in (2, 4, 5)
    ]


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_loss_curve_equals_that_of_trl(tmp_path, ragged, loss_type):
    """TRL 1.16 on the same batch of pre-tokenized rows (its own template handling would train the prompts)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from common import encode_sft

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    rows = []
    for line in Path(ragged).read_text().splitlines():
        encoded = encode_sft(json.loads(line), tokenizer)
        labels = [
            token if m else -100 for token, m in zip(encoded["input_ids"], encoded["loss_mask"], strict=True)
        ]
        rows.append({"input_ids": encoded["input_ids"], "labels": labels})
    found = train(tmp_path / "run", dataset=ragged, batch_size=37, loss_type=loss_type)
    config = SFTConfig(output_dir=str(tmp_path / "trl"), per_device_train_batch_size=37, num_train_epochs=3, learning_rate=1e-3,
                       loss_type=loss_type, bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no",
                       logging_steps=1, report_to="none", model_init_kwargs={"dtype": "float32"}, max_length=None)  # fmt: skip
    trainer = SFTTrainer(
        str(ASSETS / "model"), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    expected = [row for row in trainer.state.log_history if "loss" in row]
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "learning_rate"):
        assert [row[key] for row in found] == pytest.approx(
            [float(row[key]) for row in expected], rel=2e-3, abs=1e-6
        ), key


# ---- Any split of the work -------------------------------------------------------------------------------------------


def test_micro_batches_do_not_change_the_curve(tmp_path, ragged):
    whole = train(tmp_path / "whole", dataset=ragged, max_steps=5, label_smoothing=0.1)
    longest = max(len(row["input_ids"]) for row in encoded(ragged))
    for tokens in (longest, 250):  # one or two documents a row, and more
        cut = train(
            tmp_path / str(tokens),
            dataset=ragged,
            max_steps=5,
            label_smoothing=0.1,
            micro_batch_tokens=tokens,
        )
        assert_same_curve(cut, whole)
    assert whole[4]["epoch"] == 1.0  # the last batch of the epoch is smaller, and trained
    assert whole[4]["tokens"] == sum(len(row["input_ids"]) for row in encoded(ragged))


def encoded(path):
    from common import encode_sft

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    return [encode_sft(json.loads(line), tokenizer) for line in Path(path).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"lora_rank": 4, "gradient_checkpointing": True}, {"micro_batch_tokens": 128}]
)
def test_two_ranks_equal_one(tmp_path, ragged, flags):
    """37 rows in batches of 9: the last batch has one, so that one of the ranks runs a micro-batch that trains nothing."""
    flags = {"dataset": (ragged,), "batch_size": 9, "max_steps": 6, "learning_rate": 1e-3, **flags}
    flags |= {"eval_dataset": (ragged,), "eval_every": 3}
    one = train(tmp_path / "one", **flags)
    result = run("sft.py", *flags_of(output_dir=tmp_path / "two", **flags), ranks=2)
    assert result.returncode == 0, result.stderr[-6000:]
    assert_same_curve(read_metrics(tmp_path / "two"), one, rtol=1e-3)
    assert len([row for row in one if "eval/loss" in row]) == 3


# ---- Stopped and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_at_random_instants_then_resume_is_exact(tmp_path, ragged, ranks):
    """Bit for bit, metrics.jsonl (times aside) and weights; every fifth step is the boundary of two epochs."""
    flags = {
        "dataset": (ragged,),
        "max_steps": 80,
        "save_every": 5,
        "eval_dataset": (ragged,),
        "eval_every": 4,
    }
    flags |= {"lora_rank": 4, "lora_dropout": 0.1, "lora_merge": True, "neftune_alpha": 5.0}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = run("sft.py", *flags_of(output_dir=straight, **flags), ranks=ranks)
    assert result.returncode == 0, result.stderr[-6000:]
    rng = random.Random(ranks)
    for attempt, step in enumerate([3, 25, 50]):
        process = start("sft.py", *flags_of(output_dir=killed, resume=attempt > 0, **flags), ranks=ranks)
        wait_for_step(process, killed, step)
        time.sleep(rng.random() * 0.3)
        kill(process, killed)
    result = run("sft.py", *flags_of(output_dir=killed, resume=True, **flags), ranks=ranks)
    assert result.returncode == 0, result.stderr[-6000:]
    assert "resuming after step" in result.stdout
    assert read_metrics(killed) == read_metrics(straight)
    a, b = weights(killed), weights(straight)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_on_another_number_of_ranks_keeps_the_curve(tmp_path, ragged, before, after):
    flags = {"dataset": (ragged,), "max_steps": 60, "save_every": 3, "batch_size": 9, "learning_rate": 1e-4}
    expected = train(tmp_path / "straight", **flags)
    process = start("sft.py", *flags_of(output_dir=tmp_path / "moved", **flags), ranks=before)
    wait_for_step(process, tmp_path / "moved", 7)
    kill(process, tmp_path / "moved")
    result = run("sft.py", *flags_of(output_dir=tmp_path / "moved", resume=True, **flags), ranks=after)
    assert result.returncode == 0, result.stderr[-6000:]
    assert "resuming after step" in result.stdout
    assert_same_curve(read_metrics(tmp_path / "moved"), expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_the_last_completed_step_and_says_how_to_go_on(tmp_path, ragged, ranks):
    flags = {"dataset": (ragged,), "max_steps": 400, "learning_rate": 1e-4}
    output_dir = tmp_path / "run"
    process = start("sft.py", *flags_of(output_dir=output_dir, **flags), ranks=ranks)
    wait_for_step(process, output_dir, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if ranks == 1 else 1), output[
        -2000:
    ]  # torchrun returns 1 when it was signalled
    assert f"--output-dir {output_dir} --resume" in output
    done = read_metrics(output_dir)[-1]["step"]
    assert [path.name for path in sft.complete_checkpoints(output_dir)] == [f"checkpoint-{done:08d}"]
    assert not (output_dir / "final").exists()


def test_resume_at_the_same_step_repeats_nothing(tmp_path, ragged):
    flags = {"dataset": ragged, "save_every": 2, "max_steps": 4, "eval_dataset": (ragged,), "eval_every": 2}
    expected = train(tmp_path / "run", **flags)
    assert train(tmp_path / "run", resume=True, **flags) == expected
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "\n".join(lines[:-1]) + "\n"
    )  # killed before the last evaluation
    assert train(tmp_path / "run", resume=True, **flags) == expected


def test_without_a_checkpoint_resume_begins_again_and_says_so(tmp_path, ragged, capsys):
    expected = train(tmp_path / "run", dataset=ragged)
    assert train(tmp_path / "run", dataset=ragged, resume=True) == expected
    assert "has no complete checkpoint" in capsys.readouterr().out
    (tmp_path / "run" / "checkpoint-00000002").mkdir()  # as a directory without its last file is not complete
    assert train(tmp_path / "run", dataset=ragged, resume=True) == expected


def test_old_checkpoints_are_deleted(tmp_path, ragged):
    train(tmp_path / "run", dataset=ragged, save_every=1, max_steps=5, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*"))
    assert names == ["checkpoint-00000004", "checkpoint-00000005"]


def test_remains_of_a_killed_run_are_in_nobodys_way(tmp_path, ragged):
    """A checkpoint without progress.json is none; what is aside goes with the next one that is saved."""
    flags = {"dataset": ragged, "save_every": 2}
    train(tmp_path / "run", **flags)
    (tmp_path / "run" / "checkpoint-00000003" / "progress.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000002")
    for name in ("checkpoint-00000002", ".checkpoint-00000007.partial"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "junk").write_text("x")
    train(tmp_path / "run", **flags, resume=True)
    names = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*"))
    assert names == ["checkpoint-00000002", "checkpoint-00000003"]
    assert not (tmp_path / "run" / names[0] / "junk").exists()


def test_checkpoints_and_records_that_cannot_be_read_are_named(tmp_path, ragged):
    train(tmp_path / "run", dataset=ragged, save_every=2)
    for path in (tmp_path / "run" / "checkpoint-00000003").glob("*.distcp"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint-00000003 cannot be read .*; delete it"):
        train(tmp_path / "run", dataset=ragged, save_every=2, resume=True)
    sft.dist.destroy_process_group()
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000003")
    assert train(tmp_path / "run", dataset=ragged, save_every=2, resume=True)[-1]["step"] == 3
    (tmp_path / "run" / "args.json").write_text("{")
    with pytest.raises(UserError, match=r"args.json is damaged"):
        train(tmp_path / "run", dataset=ragged, save_every=2, resume=True)


def test_training_is_saved_where_the_model_cannot_be_written(tmp_path, ragged, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(sft, "write_model", fail)
        with pytest.raises(UserError, match=r"no space left\. Training is saved"):
            train(tmp_path / "run", dataset=ragged)
    sft.dist.destroy_process_group()
    train(tmp_path / "run", dataset=ragged, resume=True)
    train(tmp_path / "straight", dataset=ragged)
    assert torch.equal(*(weights(tmp_path / name)["model.norm.weight"] for name in ("run", "straight")))


def test_a_generation_config_that_transformers_would_not_save(tmp_path, ragged):
    """Older repositories have a temperature without sampling; it must not lose the run at its end."""
    shutil.copytree(ASSETS / "model", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "temperature": 0.6}))
    train(tmp_path / "run", dataset=ragged, model=str(tmp_path / "model"))
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").generation_config
    assert (
        AutoTokenizer.from_pretrained(ASSETS / "model").convert_tokens_to_ids("<|im_end|>")
        in final.eos_token_id
    )


@pytest.mark.slow
def test_full_disk_leaves_the_previous_checkpoint_and_an_error(tmp_path, ragged):
    """A limit on the size of files stands in for the full disk: the write of the second checkpoint fails in its middle."""
    flags = flags_of(output_dir=tmp_path / "run", dataset=(ragged,), max_steps=2, save_every=2)
    assert run("sft.py", *flags).returncode == 0
    limited = subprocess.Popen(
        command("sft.py", *flags_of(output_dir=tmp_path / "run2", dataset=(ragged,), max_steps=4, save_every=2)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not (tmp_path / "run2" / "checkpoint-00000002").exists():
        assert limited.poll() is None, limited.communicate()[0][-2000:]
        time.sleep(0.002)
    resource.prlimit(limited.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))  # weights and moments take 10 MiB
    output, _ = limited.communicate(timeout=120)
    assert limited.returncode == 1
    assert "the checkpoint of step 4 cannot be written" in output
    assert "Complete are: checkpoint-00000002" in output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "run2").glob("*checkpoint*")] == ["checkpoint-00000002"]
    resumed = run(
        "sft.py",
        *flags_of(output_dir=tmp_path / "run2", dataset=(ragged,), max_steps=4, save_every=2, resume=True),
    )
    assert resumed.returncode == 0
    assert "resuming after step 2," in resumed.stdout


@pytest.mark.parametrize("bad", [1, 3])
def test_non_finite_loss_stops_before_the_update_and_names_the_rows(tmp_path, ragged, monkeypatch, bad):
    real, calls = sft.sft_loss, []

    def poisoned(logps_N, *rest):
        calls.append(1)
        return real(logps_N, *rest) * (float("nan") if len(calls) == bad else 1.0)

    monkeypatch.setattr(sft, "sft_loss", poisoned)
    with pytest.raises(
        UserError, match=rf"step {bad}: the loss is nan.*8 rows concerned.* The first: \d+ of .*ragged.jsonl"
    ):
        train(tmp_path / "run", dataset=ragged, save_every=1)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, bad))
    assert len(sft.complete_checkpoints(tmp_path / "run")) == min(bad - 1, 2)


# ---- Saved and loaded ------------------------------------------------------------------------------------------------


def untied_model(path):
    """The embedded model with a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["tied", "untied", "adapter", "merged"])
def test_final_gives_the_logits_of_the_trained_policy(tmp_path, ragged, kind, monkeypatch):
    kept = {}
    real = sft.export

    def export(args, output_dir, policy, *rest):
        policy.eval()
        with torch.no_grad():
            kept["logits"] = policy(input_ids=torch.arange(40)[None]).logits
        return real(args, output_dir, policy, *rest)

    monkeypatch.setattr(sft, "export", export)
    lora = (
        {"lora_rank": 4, "lora_rslora": True, "lora_merge": kind == "merged"}
        if kind in ("adapter", "merged")
        else {}
    )
    model = str(untied_model(tmp_path / "untied")) if kind == "untied" else str(ASSETS / "model")
    train(tmp_path / "run", dataset=ragged, model=model, **lora)
    final = tmp_path / "run" / "final"
    loaded = AutoModelForCausalLM.from_pretrained(final)
    with torch.no_grad():
        found = loaded(input_ids=torch.arange(40)[None]).logits
        before = AutoModelForCausalLM.from_pretrained(model)(input_ids=torch.arange(40)[None]).logits
    torch.testing.assert_close(found, kept["logits"], rtol=1e-5, atol=1e-4 if lora else 1e-6)
    assert (found - before).abs().max() > 0.01
    assert (final / "adapter_config.json").exists() == (kind == "adapter")
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(ASSETS / "model").chat_template
    generation = json.loads((final / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_token_id]


def test_two_ranks_export_what_one_does(tmp_path, ragged):
    flags = {"dataset": (ragged,), "batch_size": 8, "max_steps": 2, "eval_dataset": (ragged,)}
    train(tmp_path / "one", **flags)
    result = run("sft.py", *flags_of(output_dir=tmp_path / "two", **flags), ranks=2)
    assert result.returncode == 0, result.stderr[-6000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "two/final/config.json").read_text())["architectures"] == [
        "Qwen3ForCausalLM"
    ]


# ---- Modes -----------------------------------------------------------------------------------------------------------


def test_lora_trains_adapters_only(tmp_path, ragged):
    train(tmp_path / "run", dataset=ragged, lora_rank=4, lora_targets=("q_proj", "mlp.up_proj"))
    adapter = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "up_proj"}
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in adapter.values())


def test_adapters_are_made_as_asked(tmp_path, ragged):
    flags = {"dataset": ragged, "lora_rank": 4, "max_steps": 2}
    plain = train(tmp_path / "a", **flags)
    train(tmp_path / "b", lora_alpha=8.0, lora_rslora=True, **flags)
    config = json.loads((tmp_path / "b" / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8.0, True)
    # A new adapter is 0, and the gradient of its B is proportional to the scale: 32 / 4 by default, 16 / sqrt(4) is the same.
    same = train(tmp_path / "c", lora_alpha=16.0, lora_rslora=True, **flags)
    other = train(tmp_path / "d", lora_alpha=16.0, **flags)
    assert_same_curve(same, plain, 1e-5)
    assert other[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"] / 2, rel=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradient_checkpointing_changes_nothing(tmp_path, ragged, lora_rank, monkeypatch):
    calls, forward = [], Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: calls.append(self.training) or forward(self, x))
    expected = train(tmp_path / "a", dataset=ragged, lora_rank=lora_rank)
    once = sum(calls)
    calls.clear()
    found = train(tmp_path / "b", dataset=ragged, lora_rank=lora_rank, gradient_checkpointing=True)
    assert_same_curve(found, expected, 1e-5)
    assert sum(calls) == 2 * once > 0, "each layer runs again in the backward"


@pytest.mark.slow
def test_compile_changes_nothing(tmp_path, ragged):
    expected = train(tmp_path / "a", dataset=ragged)
    assert_same_curve(train(tmp_path / "b", dataset=ragged, compile=True), expected, 1e-4)


def test_four_bit_base(tmp_path, ragged):
    from bitsandbytes.functional import dequantize_4bit

    flags = {"dataset": ragged, "lora_rank": 8, "load_in_4bit": True, "max_steps": 12, "learning_rate": 3e-3}
    found = train(tmp_path / "run", **flags)
    assert found[0]["loss"] != train(tmp_path / "exact", **{**flags, "load_in_4bit": False})[0]["loss"]
    # The same as training adapters on the weights that the 4 bits stand for.
    args = replace(sft.Args(), lora_rank=8, load_in_4bit=True)
    quantized = sft.unwrap(sft.load_policy(args, sft.load_config(args), torch.device("cpu")))
    weights = load_file(ASSETS / "model" / "model.safetensors")
    for name, module in quantized.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            plain = name.replace(".base_layer", "") + ".weight"
            weights[plain] = dequantize_4bit(module.weight.data, module.weight.quant_state).to(weights[plain])
    shutil.copytree(ASSETS / "model", tmp_path / "dequantized")
    save_file(weights, tmp_path / "dequantized" / "model.safetensors", {"format": "pt"})
    expected = train(
        tmp_path / "b", **{**flags, "load_in_4bit": False, "model": str(tmp_path / "dequantized")}
    )
    assert_same_curve(found, expected, 1e-2)
    # Resumed in the middle, it goes on the same.
    with pytest.raises(KeyboardInterrupt):
        train_until(6, tmp_path / "cut", save_every=5, **flags)
    sft.dist.destroy_process_group()
    assert train(tmp_path / "cut", resume=True, save_every=5, **flags) == found


def train_until(steps, output_dir, **flags):
    """Run until the optimizer is to take step number `steps`, then stop as if killed."""
    taken, step = [], torch.optim.AdamW.step

    def stop(*args, **kwargs):
        taken.append(1)
        if len(taken) >= steps:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop)
        train(output_dir, **flags)


def test_mixture_of_experts_aux_loss(tmp_path, ragged):
    """The router's loss is logged, equals transformers' on one batch, and changes the gradient."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=512, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_experts=4,
                            num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                            head_dim=8, router_aux_loss_coef=0.5, max_position_embeddings=512)  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    for layer, scale in zip(model.model.layers, (30, 90), strict=True):  # unbalanced, each in its own way
        layer.mlp.gate.weight.data *= scale
    model.save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(tmp_path / "moe")
    flags = {"model": str(tmp_path / "moe"), "dataset": ragged, "batch_size": 37, "max_steps": 1}
    (with_aux,) = train(tmp_path / "with", **flags)
    (without,) = train(tmp_path / "without", router_aux_loss_coef=0.0, **flags)
    # transformers' own, on the same tokens: each document alone gives the same router logits; the loss is over all of them.
    routers = [[], []]
    for row in encoded(ragged):
        outputs = model(input_ids=torch.tensor(row["input_ids"])[None], output_router_logits=True)
        for layer, logits in zip(routers, outputs.router_logits, strict=True):
            layer.append(logits)
    expected = load_balancing_loss_func(tuple(torch.cat(layer) for layer in routers), 4, 2).item()
    assert expected != pytest.approx(2.0, rel=1e-3), "what perfect balance gives"
    assert with_aux["aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert "aux_loss" not in without
    assert with_aux["loss"] == pytest.approx(without["loss"], rel=1e-6)
    assert with_aux["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)


def test_neftune_adds_noise_in_training_only(tmp_path, ragged):
    flags = {"dataset": ragged, "eval_dataset": (ragged,), "max_steps": 1, "learning_rate": 1e-12}
    plain, noisy = train(tmp_path / "a", **flags), train(tmp_path / "b", neftune_alpha=20.0, **flags)
    assert plain[1]["loss"] != noisy[1]["loss"]
    assert plain[0] == noisy[0]
    assert plain[2]["eval/loss"] == pytest.approx(noisy[2]["eval/loss"], rel=1e-6)


def test_neftune_noise_is_uniform_up_to_alpha_over_the_root_of_length_times_width():
    embedding = torch.nn.Embedding(10, 64)
    sft.add_neftune(embedding, 5.0)
    embedding.lengths_T = torch.tensor([4] * 4 + [100] * 100)
    ids_BT = torch.zeros(1, 104, dtype=torch.long)
    noise = (embedding(ids_BT) - embedding.eval()(ids_BT)).detach()
    for part, length in ((noise[:, :4], 4), (noise[:, 4:], 100)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound * 1.001
        assert part.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_one_document_a_row_where_attention_cannot_pack(tmp_path, ragged, monkeypatch):
    expected = train(tmp_path / "a", dataset=ragged)
    monkeypatch.setattr(sft, "self_check", lambda *_: "alone")
    assert_same_curve(train(tmp_path / "b", dataset=ragged), expected)


def test_weight_decay_is_on_matrices_only(tmp_path, ragged):
    train(tmp_path / "a", dataset=ragged, learning_rate=1e-12, weight_decay=1e9, max_grad_norm=1.0)
    before, after = load_file(ASSETS / "model" / "model.safetensors"), weights(tmp_path / "a")
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-7) == (before[name].ndim < 2), name


def test_output_directory_has_all_that_a_run_needs(tmp_path, ragged):
    train(tmp_path / "run", dataset=ragged, wandb="offline")
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["args"]["batch_size"] == 8
    assert record["versions"]["torch"]
    assert (tmp_path / "run" / "script.py").read_text() == (ROOT / "sft.py").read_text()
    assert (tmp_path / "run" / "common.py").read_text() == (ROOT / "common.py").read_text()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_eval_is_over_the_whole_set_by_token(tmp_path, ragged):
    """Against transformers' own forward, row by row."""
    (row,) = [
        row
        for row in train(tmp_path / "run", dataset=ragged, eval_dataset=(ragged,), max_steps=1)
        if row["step"] == 0
    ]
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


# ---- The default run -------------------------------------------------------------------------------------------------


@pytest.mark.learn
def test_default_run_learns_and_its_model_answers(tmp_path):
    """No flags: at most two minutes, from about half of the held-out sums to nine in ten. Then final/ answers by itself."""
    began = time.time()
    result = subprocess.run(
        command("sft.py", "--output-dir", tmp_path / "run"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-6000:]
    assert time.time() - began < 120 * float(os.environ.get("TIME_FACTOR", 1))
    evals = [row for row in read_metrics(tmp_path / "run") if "eval/exact_match" in row]
    assert 0.35 < evals[0]["eval/exact_match"] < 0.65
    assert evals[-1]["eval/exact_match"] >= 0.9
    assert f"eval/exact_match: {evals[0]['eval/exact_match']:.4f} before training" in result.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    rows = [
        json.loads(line)["messages"]
        for line in (ASSETS / "messages_eval.jsonl").read_text().splitlines()[:100]
    ]
    right = 0
    for messages in rows:
        inputs = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert output[-1] == tokenizer.eos_token_id, "generation does not stop at the end of the turn"
        right += tokenizer.decode(output, skip_special_tokens=True) == messages[1]["content"]
    assert right >= 85
