"""The vLLM engine: what it sends and refuses, against a server that is a script; log-probs, weights and versions, against a
real one on a CPU, which one start serves all tests."""

import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ASSETS, read_metrics, start, train, wait_for_step
from simulated_vllm import listen
from transformers import AutoModelForCausalLM

import async_grpo
import common
import gkd
import grpo
from common import EngineError, Sample, UserError, VLLMEngine, check_log_probs, on_all_ranks

MODEL = str(ASSETS / "model")
PROMPT = [1, 286, 201, 291, 274, 223, 20, 23, 13, 24, 18, 33, 2, 201, 1, 293, 201]  # "What is 25+60?"
needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM: see the README's first lines")


def policy_like(path=MODEL, scale=0.0, seed=0):
    """The model at `path`, its weights moved by noise of their own size times `scale`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * weight.std().nan_to_num(0) * torch.randn_like(weight)
    return model


@torch.no_grad()
def trainer_logps(model, sample, temperature=1.0):
    ids = torch.tensor([sample.prompt_ids + sample.ids])
    logps = (model(ids, use_cache=False).logits[0, :-1] / temperature).log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None]).flatten()[-len(sample.ids) :].numpy()


# ---- A server that is a script ---------------------------------------------------------------------------------------


@pytest.fixture
def scripted():
    """A server that answers as `answers` says, path -> JSON or (HTTP status, JSON); `calls` is what it was asked."""
    answers = {"v1/models": {"data": [{"max_model_len": 512}]}, "get_world_size": {"world_size": 2}}
    state = SimpleNamespace(calls=[], bodies=[], hang=0, answers=answers)

    def answer(path, body):
        state.calls.append(path)
        state.bodies.append(body)
        time.sleep(state.hang)
        return state.answers.get(path, {})

    listener = listen(answer)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{listener.server_address[1]}"
    yield state
    listener.shutdown()


def engine_at(url, transport="file", seconds=5.0):
    engine = VLLMEngine([url], [url], torch.nn.Identity(), torch.float32, transport, seconds)
    engine.remedy = "Start it so"
    engine.version = engine.newest = 3
    return engine


def ask(engine, max_lengths=8):
    return engine.generate([PROMPT] * 3, [(0, 1), (0, 2), (0, 1)], 1, max_lengths, 1.0, [2])


def choice(versions="33", reason="stop", logps=(-0.5, -0.25)):
    spans = [{"version": version, "start": n, "end": n + 1} for n, version in enumerate(versions)]
    logps = {"content": [{"logprob": logp} for logp in logps]}
    return {"token_ids": [5, 2], "weight_versions": spans, "finish_reason": reason, "logprobs": logps}


def test_every_sampling_setting_and_a_seed_are_given(scripted):
    scripted.answers["inference/v1/generate"] = {"choices": [choice()]}
    groups = ask(engine_at(scripted.url), max_lengths=[8, 9, 8])
    assert groups[0] == [Sample(PROMPT, [5, 2], [True] * 2, [-0.5, -0.25], [3, 3], True)]
    params = [body["sampling_params"] for body in scripted.bodies]
    neutral = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
    neutral |= {"frequency_penalty": 0, "temperature": 1, "stop_token_ids": [2], "logprobs": 0, "n": 1}
    assert all(given.items() >= neutral.items() for given in params)
    assert sorted(given["max_tokens"] for given in params) == [8, 8, 9]
    assert len({given["seed"] for given in params}) == 2  # two of the three keys are equal
    engine = engine_at(scripted.url)
    engine.newest, scripted.answers["inference/v1/generate"] = 4, {"choices": [choice("34")]}
    assert ask(engine)[0][0].versions == [3, 4]  # new weights came meanwhile


@pytest.mark.parametrize(("visible", "expected"), [("3,5", "5"), ("GPU-a,GPU-b", "GPU-b"), (None, "1")])
def test_a_server_gets_the_gpu_of_its_rank_and_nothing_of_torchrun(tmp_path, monkeypatch, visible, expected):
    monkeypatch.setattr(common.subprocess, "Popen", Popen := Mock())
    ours = {
        "CUDA_VISIBLE_DEVICES": visible,
        "RANK": "1",
        "MASTER_ADDR": "here",
        "PYTORCH_CUDA_ALLOC_CONF": "x",
        "PATH": "p",
    }
    for name, value in ours.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    common.start_server("A=1 python -m vllm --model m", tmp_path / "log", torch.device("cuda", 1))
    (words,), options = Popen.call_args
    assert words[:2] + words[3:] == ["env", "A=1", "-m", "vllm", "--model", "m"]
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == expected
    assert not {"RANK", "MASTER_ADDR", "PYTORCH_CUDA_ALLOC_CONF"} & options["env"].keys()


@pytest.mark.parametrize(("reply", "problem"), [
    ({"choices": [choice("34")]}, "Does another run give it weights"),
    ({"choices": [choice("23")]}, "Does another run give it weights"),
    ({"choices": [choice(["default"] * 2)]}, "ours are 3"),
    ({"choices": [choice(reason="abort")]}, "abort"),
    ({"choices": [choice(logps=[-0.5])]}, "drew 2 tokens"),
    ((400, {"error": "longer than max_model_len"}), "400: .*longer than max_model_len"),
    ((503, {}), "503"),
])  # fmt: skip
def test_samples_of_other_weights_and_refusals_are_errors(scripted, reply, problem):
    scripted.answers["inference/v1/generate"], engine = reply, engine_at(scripted.url)
    with pytest.raises(EngineError, match=problem):
        ask(engine)


def test_a_dead_or_silent_server_is_an_error_in_time(scripted):
    scripted.hang, began = 3, time.monotonic()
    for url in ("http://127.0.0.1:9", scripted.url):
        with pytest.raises(EngineError, match=r"does not answer /inference.*--vllm-timeout"):
            ask(engine_at(url, seconds=0.5))
    with pytest.raises(UserError, match=r"(?s)cannot be used: .* does not answer /v1/models.*Start it so"):
        engine_at("http://127.0.0.1:9", seconds=0.5).check(512)
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(("route", "reply", "problem"), [
    ("v1/models", {"data": [{"max_model_len": 128}]}, "--max-model-len is 128, below 512"),
    ("resume", (404, {}), "/resume: 404"),  # without VLLM_SERVER_DEV_MODE=1
    ("inference/v1/generate", (403, {}), "/inference/v1/generate: 403"),  # without --enable-scale-out
])  # fmt: skip
def test_a_server_with_wrong_flags_is_refused_with_the_right_command(scripted, route, reply, problem):
    engine_at(scripted.url).check(512)
    scripted.answers[route] = reply
    with pytest.raises(UserError, match=f"(?s)cannot be used: .*{problem}.*Start it so"):
        engine_at(scripted.url).check(512)


@pytest.mark.parametrize(("world_size", "asked", "controlled"), [
    (1, ["ab"], ["ab"]), (2, ["a", "b"], ["a", "b"]), (3, ["a", "b", "a"], ["a", "b", ""]),
])  # fmt: skip
def test_ranks_share_given_servers(monkeypatch, world_size, asked, controlled):
    monkeypatch.setattr(VLLMEngine, "check", lambda *_: None)
    monkeypatch.setattr(common, "on_all_ranks", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    args = SimpleNamespace(engine="vllm", model="M", vllm_args="--x 1", vllm_timeout=1.0)
    args.vllm_url = "http://a:8000/", "http://b:8000"
    for rank in range(world_size):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        engine = common.make_engine(args, None, torch.device("cpu"), torch.float32, 512, Path("out"))
        assert engine.urls == [f"http://{host}:8000" for host in asked[rank]]
        assert engine.controlled == [f"http://{host}:8000" for host in controlled[rank]]
        assert "\nVLLM_CPU_KVCACHE_SPACE=1 VLLM_SERVER_DEV_MODE=1 python -m vllm." in engine.remedy
        assert f" --model M --host {asked[rank][0]} --port 8000 " in engine.remedy
        assert "--x 1" not in engine.remedy  # it is for servers that we start


def test_an_error_on_one_rank_is_raised_on_all(monkeypatch):
    def gather(errors, error):
        errors[:] = [error, EngineError("rank 1's server is gone")]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(EngineError, match="rank 1's"):
        on_all_ranks(lambda: 1)
    monkeypatch.undo()
    assert on_all_ranks(max, 1, 2) == 2


def test_a_trainer_with_other_log_probs_finds_out():
    """New tokens are compared, twice; older weights drew the others."""
    policy, other = policy_like(), policy_like(scale=0.5)
    for model in (policy, other):
        common.register_attention()
        model.set_attn_implementation("varlen")
        model.token_stats = MethodType(grpo.token_stats, model)
    sample = Sample(PROMPT, [5, 9, 2], [True] * 3, versions=[0, 1, 1])
    sample.logps = [-9.0, *trainer_logps(policy, sample)[1:].tolist()]
    engine = SimpleNamespace(version=None, unchecked_syncs=2, dtype=torch.float32, remedy="Start it so")
    check_log_probs(engine, [sample], other, 1.0, version=2)  # nothing is new
    check_log_probs(engine, [sample], policy, 1.0, version=1)
    assert engine.unchecked_syncs == 1
    with pytest.raises(UserError, match=r"(?s)differ by .* in log-probs.*Start it so"):
        check_log_probs(engine, [sample], other, 1.0, version=1)
    check_log_probs(engine, [sample], other, 1.0, version=1)  # it compares no third time


def test_a_rank_that_controls_no_server_holds_one_weight_at_a_time():
    engine, seen = VLLMEngine(["http://elsewhere"], dtype=torch.float32), []

    def weights():
        for _ in range(3):
            assert sum(weight() is not None for weight in seen) <= 1
            seen.append(weakref.ref(weight := torch.ones(2)))
            yield "name", weight
            del weight

    engine.load_weights(weights(), 3)
    assert (engine.version, [weight() for weight in seen]) == (3, [None] * 3)


UPDATE = ["start_weight_update", "update_weights", "finish_weight_update", "update_weight_version"]


def give_weights(scripted, transport):
    """Send two tensors twice, asleep the second time if the transport allows it -> what the server was asked."""
    engine = engine_at(scripted.url, transport, 20.0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for version in (4, 5):
        engine.load_weights(iter([("a", torch.ones(2, 3)), ("b", torch.zeros(4))]), version)
        engine.load_weights(iter([]), version)  # the server has them
        engine.sleep()
    assert (engine.version, [sender.source for sender in engine.senders.values()]) == (5, [None])
    return scripted.calls


@needs_vllm
def test_nccl_calls_come_in_order(scripted, monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine

    sent = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: sent.append(info.world_size))

    def broadcast(self, source, meta):
        sent.append([name for name, _ in self._checked_iter(source, meta)])

    monkeypatch.setattr(nccl_engine.NCCLTrainerWeightTransferEngine, "_broadcast", broadcast)
    sync = [*UPDATE, "reset_prefix_cache", "resume"]
    once = ["get_world_size", "init_weight_transfer_engine"]
    assert give_weights(scripted, "nccl") == ["pause?mode=keep", *once, *sync, "pause?mode=keep", *sync]
    assert sent == [3, ["a", "b"], ["a", "b"]]
    update = scripted.bodies[scripted.calls.index("update_weights")]["update_info"]
    assert (update["names"], update["shapes"]) == (["a", "b"], [[2, 3], [4]])


@needs_vllm
def test_ipc_calls_come_in_order_and_the_server_sleeps_between(scripted, monkeypatch):
    """Awake, it takes weights before it takes memory for its cache."""
    from vllm.distributed.weight_transfer import ipc_engine

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setattr(ipc_engine, "reduce_tensor", lambda weight: (None, ("handle", tuple(weight.shape))))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    first = ["pause?mode=keep", "init_weight_transfer_engine", *UPDATE, "reset_prefix_cache", "resume"]
    second = ["wake_up?tags=weights", *UPDATE, "wake_up?tags=kv_cache", "sleep"]
    assert give_weights(scripted, "ipc") == [*first, "sleep", *second]


# ---- A real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    args = SimpleNamespace(engine="vllm", model=MODEL, vllm_url=(), vllm_args="", vllm_timeout=300.0)
    output_dir, device = tmp_path_factory.mktemp("vllm"), torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = common.make_engine(args, policy_like(), device, torch.float32, 512, output_dir)
    dist.destroy_process_group()
    yield engine
    engine.stop()


def fresh(real, seconds=60.0):
    """Another engine for the same server, as another run has."""
    return VLLMEngine(real.urls, real.urls, real.model, torch.float32, "file", seconds)


@needs_vllm
@pytest.mark.vllm
class TestRealServer:
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_log_probs_are_the_trainers_after_each_of_three_syncs(self, real, temperature):
        """The head is tied to the embeddings; a sample ends by a stop token or by its length."""
        engine = fresh(real)
        for version in range(3):
            model = policy_like(scale=0.03 * version, seed=version)
            engine.load_weights(model.named_parameters(), version)
            keys, lengths = [(0, n) for n in range(4)], [12, 12, 2, 2]
            samples = sum(engine.generate([PROMPT] * 4, keys, 4, lengths, temperature, [2]), [])
            assert {sample.is_finished for sample in samples} == {True, False}
            for sample in samples:
                assert (sample.is_finished, {*sample.versions}) == (sample.ids[-1] == 2, {version})
                np.testing.assert_allclose(sample.logps, trainer_logps(model, sample, temperature), atol=2e-5)

    def test_a_seed_draws_the_same_again(self, real):
        """Among more prompts than a batch of vLLM's holds; its CPU worker does not survive them cut in two."""
        engine = fresh(real)
        engine.load_weights(real.model.named_parameters(), 0)
        keys, limits = [(n % 64,) for n in range(128)], (2, 4, 2.0, [2])
        first, second = (engine.generate([PROMPT * 10] * 128, keys, *limits) for _ in range(2))
        ids = [[sample.ids for sample in group] for group in first]
        assert ids == [[sample.ids for sample in group] for group in second]
        assert ids[:64] == ids[64:]
        assert len({tuple(sample) for group in ids for sample in group}) > 40, "samples differ"

    def test_new_weights_reach_requests_in_flight(self, real):
        """Each token carries the version that drew it, and has the log-prob that these weights give."""
        hot, models = 2.0, [policy_like(scale=0.5, seed=seed) for seed in (1, 2)]
        for model in models:  # they hardly ever stop
            model.get_output_embeddings().weight.data[model.generation_config.eos_token_id] = 0
        engine = fresh(real)
        for version in range(0, 40, 2):  # until the weights come between the first token and the last
            engine.load_weights(models[0].named_parameters(), version)
            with ThreadPoolExecutor() as pool:
                keys = [(version, n) for n in range(32)]
                answer = pool.submit(engine.generate, [PROMPT] * 32, keys, 1, 300, hot, [])
                time.sleep(0.1 * (version + 2) / 2)
                engine.load_weights(models[1].named_parameters(), version + 1)
            mixed = [sample for (sample,) in answer.result() if len({*sample.versions}) == 2]
            if mixed:
                break
        assert mixed
        for sample in mixed:
            assert sample.versions == sorted(sample.versions)
            is_old = np.array(sample.versions) == version
            expected = np.where(is_old, *(trainer_logps(model, sample, hot) for model in models))
            np.testing.assert_allclose(sample.logps, expected, atol=2e-4)

    def test_a_teacher_tells_log_probs_of_given_tokens(self, real):
        with pytest.raises(UserError, match=r"--max-model-len is 512, below 4096\. .*with\nVLLM_CPU"):
            real.check(4096)
        fresh(real).load_weights(real.model.named_parameters(), 0)
        ids, mask = np.array(PROMPT), np.arange(len(PROMPT)) > 11
        teacher = gkd.VLLMTeacher(real.urls[0] + "/", 3, 500)
        logps_NB, ids_NK, label_logps_N = teacher.score([(ids, mask), (ids, mask)], "cpu")
        logits_TV = real.model(torch.from_numpy(ids)[None], use_cache=False).logits[0, 11:-1].detach()
        logps_NV, labels_N1 = logits_TV.log_softmax(-1).repeat(2, 1), torch.tensor([*ids[12:]] * 2)[:, None]
        top = logps_NV.topk(3)
        torch.testing.assert_close(logps_NB[:, :3], top.values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logps_NB.exp().sum(1), torch.ones(len(logps_NB)))
        assert torch.equal(ids_NK, top.indices)
        torch.testing.assert_close(label_logps_N, logps_NV.gather(1, labels_N1)[:, 0], atol=1e-4, rtol=1e-4)
        assert [len(part) for part in teacher.score([], "cpu")] == [0, 0, 0]
        with pytest.raises(UserError, match=r"(?s)--max-model-len is 512.*--max-logprobs 20"):
            gkd.VLLMTeacher(real.urls[0], 3, 512)
        with pytest.raises(UserError, match=r"(?s)cannot be used: .* with\npython .*--max-logprobs 50"):
            gkd.VLLMTeacher(real.urls[0], 50, 500)

    @pytest.mark.parametrize("script", [grpo, async_grpo])
    def test_a_run_with_a_given_server(self, real, tmp_path, script):
        """LoRA on two of the three weights that vLLM fuses: the server gets all, with W + delta."""
        flags = {"engine": "vllm", "vllm_url": real.urls, "max_length": 512, "batch_size": 32, "max_steps": 2}
        flags |= {"lora_rank": 8, "lora_targets": ("q_proj", "v_proj"), "learning_rate": 1e-2}
        rows = train(script, tmp_path, num_generations=4, **flags)
        assert [row["step"] for row in rows] == [1, 2]
        if script is grpo:
            assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 1e-4

    def test_another_architecture_cannot_be_sent(self, real):
        """It comes last: the server has then other shapes than its model."""
        engine = fresh(real)
        engine.model = policy_like(ASSETS / "teacher")
        with pytest.raises(EngineError, match="collective_rpc"):
            engine.load_weights(engine.model.named_parameters(), 20)


def server_processes(log_path):
    """Ids of processes that write to a log below `log_path`."""
    outputs = {path.parts[2]: os.path.realpath(path) for path in Path("/proc").glob("[0-9]*/fd/1")}
    return [int(pid) for pid, path in outputs.items() if path.startswith(str(log_path))]


@needs_vllm
@pytest.mark.vllm
def test_a_started_server_ends_with_its_run(tmp_path):
    """Even one that does not react, if the run is killed."""
    out = tmp_path / "run"
    flags = ["--engine", "vllm", "--batch-size", 32, "--num-generations", 4, "--wandb", "disabled"]
    process = start("grpo.py", *flags, "--eval-every", 0, "--max-steps", 2000, "--output-dir", out)
    try:
        wait_for_step(process, out, 2, timeout=300)
        servers = server_processes(out)
        assert len(servers) >= 2
        for pid in servers:
            os.kill(pid, signal.SIGSTOP)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while server_processes(out):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    rows = [row for row in read_metrics(out) if "loss" in row]
    assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 1e-4
