"""A server that answers as vLLM does, in the time that a GPU would take: its completions are real, their latency is not.

    python tests/simulated_vllm.py --model tests/assets/model --port 8000 --median-seconds 0.5 --spread 1

It samples with the embedded engine, has honest log-probs, takes weights by gloo, labels them, and answers a request after
a latency drawn from a log-normal distribution by the request's seed; requests do not wait for each other. `--die-at ROUTE`
ends it as kill -9 would when ROUTE is asked for the `--die-after`-th time; every `--refuse-every`-th generation is refused
with the HTTP status `--refuse-with`. It holds the benchmark of asynchrony and the
faults that a real server cannot be told to have; tests with real servers stand in test_vllm.py and test_async.py.
"""

import itertools
import json
import os
import queue
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import HFEngine


@dataclass(frozen=True)
class Args:
    model: str
    port: int = 8000
    max_model_len: int = 512
    median_seconds: float = 0.0
    """Median latency of a request."""
    spread: float = 1.0
    """Standard deviation of the logarithm of latencies."""
    die_at: str = ""
    die_after: int = 1
    refuse_every: int = 0
    refuse_with: int = 500


class Server:
    """What the routes share."""

    def __init__(self, args):
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32, attn_implementation="varlen"
        )
        self.args, self.engine, self.label, self.asked = args, HFEngine(model), "default", Counter()
        self.lock, self.is_paused = threading.Lock(), False  # who pauses the server holds the lock
        self.waiting = queue.SimpleQueue()
        threading.Thread(target=self.sample, daemon=True).start()

    def answer(self, path, body):
        """-> the JSON of an answer."""
        self.asked[path] += 1
        if path == self.args.die_at and self.asked[path] == self.args.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        match path:
            case "weight_info":
                return {"weight_version": self.label}
            case "get_world_size":
                return {"world_size": 1}
            case "server_info":
                model = {
                    "logprobs_mode": "processed_logprobs",
                    "dtype": "torch.float32",
                    "enable_sleep_mode": False,
                }
                model["max_model_len"] = self.args.max_model_len
                scheduler, transfer = {"enable_chunked_prefill": False}, {"backend": "gloo"}
                config = {
                    "model_config": model,
                    "weight_transfer_config": transfer,
                    "scheduler_config": scheduler,
                }
                return {"vllm_config": config}
            case "init_weight_transfer_engine":
                info = body["init_info"]
                timeout = timedelta(seconds=info["timeout"])
                store = dist.TCPStore(
                    info["host"], info["port"], info["world_size"], is_master=False, timeout=timeout
                )
                self.group = dist.ProcessGroupGloo(store, 1, info["world_size"], timeout)
            case "update_weights":
                info = body["update_info"]
                for name, shape in zip(info["names"], info["shapes"], strict=True):
                    weight = torch.empty(shape)
                    self.group.broadcast(weight, 0).wait()
                    self.engine.load_weights([(name, weight)], None)
            case "update_weight_version":
                self.label = body["new_version"]
            case "pause" if not self.is_paused:
                self.lock.acquire()  # not in the midst of a completion
                self.is_paused = True
            case "resume" if self.is_paused:
                self.is_paused = False
                self.lock.release()
            case "inference/v1/generate" if body:  # empty: is the route there?
                return self.generate(body["token_ids"], body["sampling_params"])
        return {}

    def sample(self):
        """Requests that wait are sampled together, as far as their settings agree."""
        while True:
            batch = [self.waiting.get()]
            time.sleep(0.002)  # for those that were sent at the same time
            while not self.waiting.empty():
                batch.append(self.waiting.get())
            with self.lock:
                for settings in {settings for settings, *_ in batch}:
                    some = [request for request in batch if request[0] == settings]
                    _, ids, seeds, lengths, answers = zip(*some, strict=True)
                    n, temperature, stops = settings
                    keys = [(seed,) for seed in seeds]
                    groups = self.engine.generate(list(ids), keys, n, list(lengths), temperature, list(stops))
                    for answer, group in zip(answers, groups, strict=True):
                        answer.put((group, self.label))

    def generate(self, ids, params):
        seed, began, answer = params.get("seed", 0), time.monotonic(), queue.SimpleQueue()
        stops = tuple(params.get("stop_token_ids", []))
        settings = params.get("n", 1), params.get("temperature", 1.0), stops
        self.waiting.put((settings, ids, seed, params["max_tokens"], answer))
        group, label = answer.get()
        latency = self.args.median_seconds * random.Random(seed).lognormvariate(0, self.args.spread)
        time.sleep(max(0.0, began + latency - time.monotonic()))
        return {
            "choices": [
                {
                    "token_ids": rollout.ids,
                    "weight_versions": [{"version": label, "start": 0, "end": len(rollout.ids)}],
                    "finish_reason": "stop" if rollout.is_finished else "length",
                    "logprobs": {"content": [{"logprob": logp} for logp in rollout.logps]},
                }
                for rollout in group
            ]
        }


def main(args):
    server = Server(args)
    torch.set_num_threads(1)
    answers = itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        wbufsize, protocol_version = -1, "HTTP/1.1"  # an answer is one packet, of a connection that stays

        def answer(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            said = server.answer(self.path.lstrip("/").partition("?")[0], json.loads(body or "null"))
            text, status = json.dumps(said).encode(), 200
            if "choices" in said and args.refuse_every and next(answers) % args.refuse_every == 0:
                status = args.refuse_with
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size, daemon_threads = 512, True

    Listener(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main(tyro.cli(Args))
