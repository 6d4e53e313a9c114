"""The vLLM engine: its checks and retries against a server that is a script, the rest against a real one on CPU."""

import json
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ASSETS, kill, read_metrics, run, start, wait_for_step
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import common
import grpo
from common import EngineError, RefusedError, ServerNeeds, UserError, VLLMEngine, VLLMServer, side_by_side

needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM: see the README's first lines")
NEEDS = ServerNeeds(str(ASSETS / "model"), "float32", 512, "gloo")
PROMPT = [1, 286, 201, 291, 274, 223, 20, 23, 13, 24, 18, 33, 2, 201, 1, 293, 201]  # "What is 25+60?"
CONFIG = {
    "model_config": {
        "logprobs_mode": "processed_logprobs",
        "dtype": "torch.float32",
        "max_model_len": 512,
        "enable_sleep_mode": False,
    },
    "weight_transfer_config": {"backend": "gloo"},
    "scheduler_config": {"enable_chunked_prefill": False},
}

# ---- What is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "whole"),
    [
        (["q_proj", "v_proj"], None),
        ("all-linear", None),
        (["embed_tokens", "down_proj"], None),
        (["q_proj"], ["norm"]),
    ],
)
def test_with_lora_every_weight_is_sent_as_peft_merges_it(targets, whole):
    """All of them: of the fused weights of vLLM none can be loaded in part. `whole` modules have no adapter, but are
    trained themselves."""
    model = policy_like(ASSETS / "model")
    if "embed_tokens" in targets:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=whole))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_()
    sent = dict(grpo.whole_weights(policy))
    merged = dict(policy.merge_and_unload().named_parameters())
    assert sent.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(sent[name], weight)


# ---- A server that is a script ---------------------------------------------------------------------------------------


def choice(version="3", reason="stop"):
    return {
        "token_ids": [5, 2],
        "weight_versions": [{"version": version, "start": 0, "end": 2}],
        "finish_reason": reason,
        "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}]},
    }


@pytest.fixture
def scripted():
    """A server that answers each path as `answers` says: path -> (status, JSON), or a list of them in turn; `calls` is
    what it was asked."""
    state = SimpleNamespace(calls=[], bodies=[], answers={})

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            path = self.path.lstrip("/").partition("?")[0]
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            state.calls.append(path)
            state.bodies.append(json.loads(body or "null"))
            known = state.answers.get(path, (200, {}))
            if isinstance(known, list):
                known = known.pop(0) if len(known) > 1 else known[0]
            status, said = known
            if status == "hang":
                time.sleep(said)
                status, said = 200, {}
            text = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()


def test_as_many_requests_as_there_are_descriptors():
    """Shells often allow 1024 by default, and a step or an evaluation may have more prompts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        VLLMServer(NEEDS, "http://127.0.0.1:9")
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert allowed > 256
    assert allowed >= min(65536, hard) or hard == resource.RLIM_INFINITY


def engine_at(url, version=3, timeout=5.0):
    engine = VLLMEngine([VLLMServer(NEEDS, url, timeout=timeout)], None, torch.float32)
    engine.version = version
    return engine


def ask(engine, num_samples=1):
    return engine.generate([PROMPT], [(0, 1)], num_samples, [8], 1.0, [2])


def test_every_sampling_setting_is_given(scripted):
    scripted.answers["inference/v1/generate"] = (200, {"choices": [choice()]})
    [[rollout]] = ask(engine_at(scripted.url))
    assert (rollout.ids, rollout.logps, rollout.is_finished) == ([5, 2], [-0.5, -0.25], True)
    params = scripted.bodies[0]["sampling_params"]
    neutral = {
        "top_p": 1,
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }
    assert (
        params.items()
        >= {**neutral, "temperature": 1, "max_tokens": 8, "stop_token_ids": [2], "logprobs": 0}.items()
    )


def test_kept_caches_count_for_one_version_only(scripted):
    """The server would take keys and values of the same prompt that older weights made."""
    scripted.answers["inference/v1/generate"] = (200, {"choices": [choice()]})
    servers = [VLLMServer(NEEDS, scripted.url, timeout=5.0)]
    for keep_kv, versions in ((True, (3, 4)), (False, (3,))):
        engine = VLLMEngine(servers, in_flight=True, keep_kv=keep_kv)
        for engine.version in versions:
            ask(engine)
    assert [body.get("cache_salt") for body in scripted.bodies] == ["version 3", "version 4", None]


def test_samples_and_prompts_have_seeds_of_their_own(scripted):
    scripted.answers["inference/v1/generate"] = (200, {"choices": [choice()]})
    engine = engine_at(scripted.url)
    engine.generate([PROMPT] * 3, [(0, 1), (0, 2), (0, 1)], 1, [8] * 3, 1.0, [2])
    seeds = [body["sampling_params"]["seed"] for body in scripted.bodies]
    assert len(set(seeds)) == 2, seeds


def test_a_server_error_is_asked_again(scripted):
    scripted.answers["inference/v1/generate"] = [(503, {}), (200, {"choices": [choice()]})]
    assert ask(engine_at(scripted.url))[0][0].ids == [5, 2]
    assert len(scripted.calls) == 2


def test_a_refused_prompt_is_not_asked_again(scripted):
    scripted.answers["inference/v1/generate"] = (400, {"error": "longer than max_model_len"})
    with pytest.raises(RefusedError, match=r"400.*longer than max_model_len"):
        ask(engine_at(scripted.url))
    assert len(scripted.calls) == 1


def test_a_dead_server_is_an_error_at_the_deadline():
    began = time.monotonic()
    with pytest.raises(EngineError, match="does not generate"):
        ask(engine_at("http://127.0.0.1:9", timeout=1.0))
    assert time.monotonic() - began < 4


def test_a_silent_server_is_an_error_at_the_deadline(scripted):
    scripted.answers["inference/v1/generate"] = ("hang", 20)
    began = time.monotonic()
    with pytest.raises(EngineError, match="ReadTimeout"):
        ask(engine_at(scripted.url, timeout=1.0))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("version", "reason", "message"),
    [("default", "stop", "has weights default, not 3"), ("3", "abort", "abort")],
)
def test_old_weights_and_aborted_samples_are_errors(scripted, version, reason, message):
    scripted.answers["inference/v1/generate"] = (200, {"choices": [choice(version, reason)]})
    with pytest.raises(EngineError, match=message):
        ask(engine_at(scripted.url))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model_config", "logprobs_mode", "raw_logprobs", "--logprobs-mode is raw_logprobs"),
        ("model_config", "dtype", "torch.bfloat16", "--dtype is bfloat16, not float32"),
        ("model_config", "max_model_len", 128, "--max-model-len is 128, below 512"),
        (None, "weight_transfer_config", None, "--weight-transfer-config is None, not gloo"),
        ("scheduler_config", "enable_chunked_prefill", True, "--no-enable-chunked-prefill is missing"),
    ],
)
def test_wrong_server_flags_are_named_with_the_right_command(scripted, section, key, value, message):
    config = json.loads(json.dumps(CONFIG))
    (config[section] if section else config)[key] = value
    scripted.answers = {
        "server_info": (200, {"vllm_config": config}),
        "weight_info": (200, {"weight_version": "default"}),
    }
    with pytest.raises(UserError) as caught:
        VLLMServer(NEEDS, scripted.url).check()
    assert message in str(caught.value)
    assert NEEDS.shell(scripted.url) in str(caught.value)


def test_servers_without_the_routes_are_refused(scripted):
    scripted.answers["server_info"] = (404, {})
    with pytest.raises(UserError, match="needs VLLM_SERVER_DEV_MODE=1"):
        VLLMServer(NEEDS, scripted.url).check()
    scripted.answers = {"server_info": (200, {"vllm_config": CONFIG}), "inference/v1/generate": (403, {})}
    with pytest.raises(UserError, match="needs --enable-scale-out"):
        VLLMServer(NEEDS, scripted.url).check()


def test_the_command_serves_at_the_url_that_was_given():
    words = NEEDS.shell("http://10.0.0.2:8123").split()
    assert words[words.index("--host") + 1 :][:3] == ["10.0.0.2", "--port", "8123"]
    words = NEEDS.shell("http://127.0.0.1:8000").split()
    assert words[words.index("--host") + 1 :][:3] == ["127.0.0.1", "--port", "8000"]


def test_a_server_that_is_named_twice_is_refused():
    """It would have two connections for weights, of which the second ends the first."""
    urls = ("http://127.0.0.1:9", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="name each server once"):
        grpo.check_args(grpo.Args(engine="vllm", vllm_url=urls))


def test_a_server_that_goes_during_its_check_is_not_accused_of_missing_flags(scripted):
    scripted.answers["server_info"] = (500, {})
    with pytest.raises(EngineError, match="answers /server_info with 500"):
        VLLMServer(NEEDS, scripted.url).check()
    scripted.answers = {"server_info": (200, {"vllm_config": CONFIG}), "inference/v1/generate": ("hang", 5)}
    with pytest.raises(EngineError, match="does not answer"):
        VLLMServer(NEEDS, scripted.url, timeout=1.0).check()


def test_wrong_flags_after_a_restart_can_be_mended(scripted):
    """The run then ends with a checkpoint, as with any EngineError."""
    scripted.answers["server_info"] = (404, {})
    with pytest.raises(EngineError, match="needs VLLM_SERVER_DEV_MODE=1"):
        engine_at(scripted.url).recover()


def test_a_given_server_is_not_left_paused(scripted):
    scripted.answers["start_weight_update"] = (500, {})
    scripted.answers["get_world_size"] = (200, {"world_size": 1})
    server = VLLMServer(replace(NEEDS, transport="gloo"), scripted.url, timeout=2.0)
    server.sender = common.GlooSender.__new__(common.GlooSender)
    server.sender.server = server
    with pytest.raises(EngineError, match="start_weight_update"):
        server.load_weights({"a": torch.ones(2)}, 1)
    scripted.calls.clear()
    server.stop()
    cut = ["abort_requests", "start_weight_update", "finish_weight_update"]
    assert scripted.calls == ["update_weight_version", *cut, "resume"]
    server.stop()
    assert len(scripted.calls) == 5


def test_a_fitting_server_passes(scripted):
    scripted.answers = {
        "server_info": (200, {"vllm_config": CONFIG}),
        "weight_info": (200, {"weight_version": "default"}),
    }
    server = VLLMServer(NEEDS, scripted.url)
    server.check()
    assert server.version == "default"


def test_a_server_that_is_not_there_is_waited_for_in_vain():
    with pytest.raises(EngineError, match=r"waited 1 s. Start it with\nVLLM_SERVER_DEV_MODE=1"):
        VLLMServer(NEEDS, "http://127.0.0.1:9", timeout=1.0).wait()
    with pytest.raises(EngineError, match=r"stopped by a signal\. Start it with"):
        VLLMServer(NEEDS, "http://127.0.0.1:9", timeout=600.0).wait([15])


def test_side_by_side_ends_at_the_first_failure_and_at_the_deadline():
    def fail():
        raise RuntimeError("no such backend")

    began = time.monotonic()
    with pytest.raises(EngineError, match="no such backend"):
        side_by_side(began + 30, lambda: time.sleep(20), fail)
    with pytest.raises(EngineError, match="not done in time"):
        side_by_side(time.monotonic() + 0.2, lambda: time.sleep(20))
    assert time.monotonic() - began < 5
    assert side_by_side(time.monotonic() + 5, lambda: 1, lambda: 2) == [1, 2]


# ---- vLLM's own transfers, against the script ------------------------------------------------------------------------

UPDATE = ["start_weight_update", "update_weights", "finish_weight_update"]
AFTER = ["update_weight_version", "reset_prefix_cache", "resume", "weight_info"]


def transfer(scripted, transport, **server):
    """Send two tensors twice -> paths in the order in which the server was asked for them."""
    scripted.answers["get_world_size"] = (200, {"world_size": 2})
    scripted.answers["weight_info"] = [(200, {"weight_version": "1"}), (200, {"weight_version": "2"})]
    server = VLLMServer(replace(NEEDS, transport=transport), scripted.url, timeout=20.0, **server)
    for version in (1, 2):
        server.load_weights({"a": torch.ones(2, 3), "b": torch.zeros(4)}, version)
    return scripted.calls


@needs_vllm
def test_nccl_calls_come_in_order(scripted, monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine

    sent = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: sent.append(info.world_size))
    monkeypatch.setattr(
        nccl_engine.NCCLTrainerWeightTransferEngine,
        "_broadcast",
        lambda self, source, meta: sent.append([name for name, _ in self._checked_iter(source, meta)]),
    )
    once = ["get_world_size", "init_weight_transfer_engine"]
    assert transfer(scripted, "nccl") == ["pause", *once, *UPDATE, *AFTER, "pause", *UPDATE, *AFTER]
    assert sent == [3, ["a", "b"], ["a", "b"]]
    update = scripted.bodies[scripted.calls.index("update_weights")]["update_info"]
    assert (update["names"], update["shapes"]) == (["a", "b"], [[2, 3], [4]])


@needs_vllm
def test_ipc_calls_come_in_order(scripted, monkeypatch):
    from vllm.distributed.weight_transfer import ipc_engine

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setattr(ipc_engine, "reduce_tensor", lambda weight: (None, ("handle", tuple(weight.shape))))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    calls = transfer(scripted, "ipc")
    assert calls == ["pause", "init_weight_transfer_engine", *UPDATE, *AFTER, "pause", *UPDATE, *AFTER]


def test_a_started_gpu_server_sleeps_while_the_trainer_works(scripted):
    server = VLLMServer(replace(NEEDS, transport="ipc"), scripted.url)
    engine = VLLMEngine([server], None, torch.float32)
    engine.wake(), engine.sleep(), engine.sleep(), engine.wake(), engine.wake()
    assert scripted.calls == ["sleep", "wake_up"]
    VLLMEngine([VLLMServer(NEEDS, scripted.url)], None, torch.float32).sleep()
    assert len(scripted.calls) == 2, "a server with memory of its own never sleeps"


# ---- A real server ---------------------------------------------------------------------------------------------------


def serve(tmp_path, needs=NEEDS, timeout=180.0):
    server = VLLMServer(needs, log_path=tmp_path / "vllm.log", timeout=timeout)
    server.wait()
    return server


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not find_spec("vllm"):
        pytest.skip("needs vLLM: see the README's first lines")
    server = serve(tmp_path_factory.mktemp("vllm"))
    yield server
    server.stop()


def policy_like(path, scale=0.0, seed=0):
    """The model at `path`, its weights moved by noise of their own size times `scale`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * weight.std().nan_to_num(0) * torch.randn_like(weight)
    return model


@torch.no_grad()
def trainer_logps(model, rollout, temperature=1.0):
    ids = torch.tensor([rollout.prompt_ids + rollout.ids])
    logps = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None]).flatten()[-len(rollout.ids) :]


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
class TestRealServer:
    def test_it_passes_its_own_check(self, real):
        real.check()

    def test_too_long_a_context_is_refused(self, real):
        with pytest.raises(UserError, match="--max-model-len is 512, below 4096"):
            VLLMServer(replace(NEEDS, max_length=4096), real.url).check()

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_its_logps_are_the_trainers(self, real, temperature):
        model = policy_like(ASSETS / "model", scale=0.02)
        engine = VLLMEngine([real], model, torch.float32)
        engine.load_weights(model.named_parameters(), 1)
        groups = engine.generate([PROMPT] * 4, [(0, i) for i in range(4)], 4, [12] * 4, temperature, [2])
        for rollout in [rollout for group in groups for rollout in group]:
            assert rollout.is_finished == (rollout.ids[-1] == 2)
            np.testing.assert_allclose(rollout.logps, trainer_logps(model, rollout, temperature), atol=2e-5)

    def test_a_seed_draws_the_same_again(self, real):
        engine = VLLMEngine([real], policy_like(ASSETS / "model"), torch.float32)
        engine.load_weights(engine.model.named_parameters(), 2)
        once, again = (
            engine.generate([PROMPT] * 8, [(5, i) for i in range(8)], 4, [12] * 8, 2.0, [2]) for _ in range(2)
        )
        assert [[r.ids for r in group] for group in once] == [[r.ids for r in group] for group in again]
        assert len({tuple(r.ids) for group in once for r in group}) > 8, "samples differ from each other"

    def test_many_prompts_at_once(self, real):
        """More than a batch of vLLM's holds; with seeds, its CPU worker does not survive prompts cut in two."""
        engine = VLLMEngine([real], policy_like(ASSETS / "model"), torch.float32)
        engine.load_weights(engine.model.named_parameters(), 3)
        groups = engine.generate([PROMPT * 10] * 128, [(i,) for i in range(128)], 2, [4] * 128, 1.0, [2])
        assert sum(map(len, groups)) == 256

    def test_new_weights_reach_a_request_in_flight(self, real):
        """Its tokens say which weights they come from, and have the log-probs that those give."""
        before, after = policy_like(ASSETS / "model"), policy_like(ASSETS / "model", scale=0.05)
        engine = VLLMEngine([real], before, torch.float32)
        params = {"n": 1, "temperature": 1.0, "logprobs": 0, "max_tokens": 400, "seed": 1, "ignore_eos": True}
        body = {"token_ids": PROMPT, "sampling_params": params}
        for version in range(10, 50, 2):  # until the weights come between the first token and the last
            engine.model = before
            engine.load_weights(before.named_parameters(), version)
            with ThreadPoolExecutor() as pool:
                answer = pool.submit(real.request, "POST", "inference/v1/generate", json=body)
                time.sleep(0.02 * (version - 10) / 2)
                engine.model = after
                engine.load_weights(after.named_parameters(), version + 1)
            [found] = answer.result()["choices"]
            spans = [(int(span["version"]), span["start"], span["end"]) for span in found["weight_versions"]]
            if len(spans) == 2:
                break
        assert [version for version, _, _ in spans] == [version, version + 1], spans
        logps = np.array([token["logprob"] for token in found["logprobs"]["content"]])
        rollout = common.Rollout(PROMPT, found["token_ids"], [], False)
        for model, (_, begin, end) in zip((before, after), spans, strict=True):
            expected = trainer_logps(model, rollout)[begin:end]
            np.testing.assert_allclose(logps[begin:end], expected, atol=2e-4)

    @pytest.mark.parametrize("keep_kv", [False, True])
    def test_tokens_in_flight_carry_their_versions(self, real, keep_kv):
        """As async_grpo.py's rollout process reads them. With keys and values computed again, log-probs are those that a
        trainer's forward gives under the recorded weights; with kept ones they need not be, but for the first."""
        hot = 2.0
        models = [policy_like(ASSETS / "model", 0.5, seed) for seed in (1, 2)]
        for model in models:  # they hardly ever stop
            with torch.no_grad():
                model.get_output_embeddings().weight[model.generation_config.eos_token_id] = 0
        trainer = VLLMEngine([real], models[0], torch.float32, keep_kv=keep_kv)
        sampler = VLLMEngine([VLLMServer(None, real.url)], in_flight=True, keep_kv=keep_kv)
        for version in range(50, 90, 2):  # until the weights come between the first token and the last
            trainer.model = models[0]
            trainer.load_weights(models[0].named_parameters(), version)
            sampler.version = version
            with ThreadPoolExecutor() as pool:
                asked = [PROMPT] * 64, [(version, i) for i in range(64)], 1, [400] * 64, hot, []
                answer = pool.submit(sampler.generate, *asked)
                time.sleep(0.1 * (version - 50) / 2)
                trainer.model = models[1]
                trainer.load_weights(models[1].named_parameters(), version + 1)
            rollouts = [rollout for [rollout] in answer.result()]
            mixed = [rollout for rollout in rollouts if len(set(rollout.versions)) == 2]
            if mixed:
                break
        assert mixed
        for rollout in mixed:
            assert len(rollout.versions) == len(rollout.ids) == len(rollout.logps)
            assert rollout.versions == sorted(rollout.versions)
            assert {*rollout.versions} == {version, version + 1}
            is_old = np.array(rollout.versions) == version
            old, new = (trainer_logps(model, rollout, hot).numpy() for model in models)
            logps = np.array(rollout.logps)
            np.testing.assert_allclose(logps[is_old], old[is_old], atol=2e-4)
            if not keep_kv:
                np.testing.assert_allclose(logps[~is_old], new[~is_old], atol=2e-4)
            else:
                assert np.abs(logps - new)[~is_old].max() > 2e-4, "older keys and values were kept"

    def test_another_architecture_cannot_be_sent(self, real):
        teacher = policy_like(ASSETS / "teacher")
        engine = VLLMEngine([VLLMServer(NEEDS, real.url, timeout=30.0)], teacher, torch.float32)
        with pytest.raises(EngineError, match=r"weight transfer|answers"):
            engine.load_weights(teacher.named_parameters(), 20)
        real.request("POST", "resume")

    @pytest.mark.parametrize("how", ["killed", "failed", "another model"])
    def test_an_update_that_was_cut_short_is_made_good(self, real, how):
        """A trainer killed in it leaves the server paused, and vLLM in an update; one that fails leaves layers half
        loaded, which vLLM would go on with."""
        model = policy_like(ASSETS / "model", scale=0.02)
        engine = VLLMEngine([VLLMServer(NEEDS, real.url, timeout=60.0)], model, torch.float32)
        weights = dict(model.named_parameters())
        engine.load_weights(weights.items(), 30)
        if how == "killed":
            real.request("POST", "pause", params={"mode": "keep"})
            real.request("POST", "start_weight_update")
            engine = VLLMEngine([VLLMServer(NEEDS, real.url, timeout=60.0)], model, torch.float32)
            engine.servers[0].check()
            assert engine.servers[0].version == "incomplete"
        else:
            some = {name: weight for name, weight in weights.items() if "q_proj" in name or "k_proj" in name}
            some = {**some, "model.no_such_layer.weight": torch.ones(2)}
            if how == "another model":
                some = dict(policy_like(ASSETS / "teacher").named_parameters())
            with pytest.raises(EngineError, match="update_weights"):
                engine.servers[0].load_weights(some, 31)
            engine.recover()
        engine.load_weights(weights.items(), 31)
        [[rollout]] = engine.generate([PROMPT], [(1,)], 1, [12], 1.0, [2])
        np.testing.assert_allclose(rollout.logps, trainer_logps(model, rollout), atol=2e-5)
        assert real.request("GET", "is_paused") == {"is_paused": False}


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_untied_weights_and_a_server_killed_while_it_gets_them(tmp_path, monkeypatch):
    """The run ends its wait at once, starts the server again and sends everything again."""
    model = policy_like(ASSETS / "model")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.1)
    path = tmp_path / "untied"
    model.save_pretrained(path)
    (path / "tokenizer.json").write_bytes((ASSETS / "model" / "tokenizer.json").read_bytes())
    (path / "tokenizer_config.json").write_bytes((ASSETS / "model" / "tokenizer_config.json").read_bytes())
    server = serve(tmp_path, replace(NEEDS, model=str(path)))
    try:
        model = policy_like(path, scale=0.02)
        engine = VLLMEngine([server], model, torch.float32)
        engine.load_weights(model.named_parameters(), 1)
        [[rollout]] = engine.generate([PROMPT], [(1,)], 1, [12], 1.0, [2])
        np.testing.assert_allclose(rollout.logps, trainer_logps(model, rollout), atol=2e-5)

        began, request = time.monotonic(), server.request

        def kill_at_update(method, route, **kwargs):
            if route == "update_weights":
                os.killpg(server.process.pid, signal.SIGKILL)
            return request(method, route, **kwargs)

        monkeypatch.setattr(server, "request", kill_at_update)
        with pytest.raises(EngineError, match="weight transfer"):
            engine.load_weights(model.named_parameters(), 2)
        assert time.monotonic() - began < 30
        monkeypatch.setattr(server, "request", request)
        engine.recover()
        assert engine.version is None
        engine.load_weights(model.named_parameters(), 2)
        [[again]] = engine.generate([PROMPT], [(1,)], 1, [12], 1.0, [2])
        assert again.ids == rollout.ids
    finally:
        server.stop()


# ---- The script ------------------------------------------------------------------------------------------------------

FLAGS = [
    "--engine",
    "vllm",
    "--batch-size",
    "32",
    "--num-generations",
    "4",
    "--wandb",
    "disabled",
    "--eval-every",
    "0",
]


def server_processes(log_path=""):
    """Ids of processes that serve with vLLM and write to a log below `log_path`."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and str(log_path) in os.readlink(f"/proc/{entry}/fd/1"):
                found.append(int(entry))
        except OSError:
            continue
    return found


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_a_run_survives_its_servers_death_and_takes_it_along(tmp_path):
    """Killed in the midst of generation, the server is started again; killed itself, the run leaves no server, not even
    one that does not react."""
    out = tmp_path / "run"
    process = start("grpo.py", *FLAGS, "--max-steps", "2000", "--output-dir", out)
    try:
        wait_for_step(process, out, 3, timeout=240)
        servers = server_processes(out)
        assert servers
        for pid in servers:
            os.kill(pid, signal.SIGKILL)
        wait_for_step(process, out, 12, timeout=240)
        for pid in server_processes(out):
            os.kill(pid, signal.SIGSTOP)
    finally:
        kill(process, out)
    assert [row["step"] for row in read_metrics(out)][:12] == [0, *range(1, 12)]
    deadline = time.monotonic() + 40
    while server_processes(out) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not server_processes(out)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_a_given_server_that_dies_ends_the_run_with_a_checkpoint(tmp_path):
    """The run is resumed when it is there again; then it is there again in time, but with the weights of its start.
    LoRA on two of the three weights that vLLM fuses: the server gets all, with W + delta."""
    out = tmp_path / "run"
    server = serve(tmp_path)
    flags = [
        *FLAGS,
        "--vllm-url",
        server.url,
        "--vllm-timeout",
        "20",
        "--lora-rank",
        "8",
        "--lora-targets",
        "q_proj",
        "v_proj",
        "--learning-rate",
        "1e-3",
    ]
    flags += ["--max-steps", "20", "--output-dir", out, "--max-length", "512"]
    process = start("grpo.py", *flags)
    wait_for_step(process, out, 3, timeout=240)
    server.kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "mend it, then --resume" in output
    assert "Traceback" not in output
    steps = [row["step"] for row in read_metrics(out)]
    server.launch()
    try:
        server.wait()
        process = start("grpo.py", *flags, "--resume", "--vllm-timeout", "180")
        wait_for_step(process, out, steps[-1] + 2, timeout=240)
        server.kill()
        server.launch()
        output, _ = process.communicate(timeout=300)
        server.wait()
        assert server.request("GET", "is_paused") == {"is_paused": False}
    finally:
        server.stop()
    assert process.returncode == 0, output
    rows = read_metrics(out)
    assert f"resuming after step {steps[-1]}" in output
    assert "it is started again" in output
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows if "loss" in row) < 1e-3


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_with_another_model_is_refused(tmp_path):
    model = policy_like(ASSETS / "model", scale=0.5)
    model.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((ASSETS / "model" / name).read_bytes())
    server = serve(tmp_path, replace(NEEDS, model=str(tmp_path / "other")))
    try:
        flags = [*FLAGS, "--vllm-url", server.url, "--max-length", "512", "--max-steps", "2"]
        done = run("grpo.py", *flags, "--output-dir", tmp_path / "run")
    finally:
        server.stop()
    assert done.returncode == 1
    assert "do not agree on the log-probs" in done.stderr
    assert "does each server have" in done.stderr
    assert (
        f"--model {ASSETS / 'model'} --host 127.0.0.1 --port {server.url.rpartition(':')[2]}" in done.stderr
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_two_ranks_have_a_server_each(tmp_path):
    done = run("grpo.py", *FLAGS, "--max-steps", "3", "--output-dir", tmp_path / "run", ranks=2, timeout=400)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").glob("vllm-*.log")} == {"vllm-0.log", "vllm-1.log"}
    assert not server_processes(tmp_path)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.learn
def test_default_run_learns_through_a_server(tmp_path):
    done = run(
        "grpo.py", "--engine", "vllm", "--output-dir", tmp_path / "run", "--wandb", "disabled", timeout=1800
    )
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/reward" in row]
    assert 0.45 < rows[0]["eval/reward"] < 0.55
    assert rows[-1]["eval/reward"] >= 0.85
