"""A server that answers as vLLM does, in the time that a GPU would take: its completions are real, their latency is not.

    python tests/simulated_vllm.py --model tests/assets/model --port 8000 --median-seconds 0.5 --spread 1

It samples with the embedded engine, has honest log-probs, reloads weights from a file and labels them. The request's seed
draws its latency from a log-normal distribution; requests do not wait for each other. With `--die-at ROUTE` it ends, as by
kill -9, when ROUTE is asked for the `--die-after`-th time. test_vllm.py has the tests with a real server.
"""

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file
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


class Server:
    """What the routes share."""

    def __init__(self, args):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
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
            case "v1/models":
                return {"data": [{"max_model_len": self.args.max_model_len}]}
            case "pause" if not self.is_paused:
                self.lock.acquire()  # not in the midst of a completion
                self.is_paused = True
            case "collective_rpc":
                weights = load_file(f"{body['kwargs']['weights_path']}/model.safetensors")
                known = {name: weight for name, weight in weights.items() if name in self.engine.parameters}
                self.engine.load_weights(known.items(), object())  # a version that it never has
            case "update_weight_version":
                self.label = body["new_version"]
            case "resume" if self.is_paused:
                self.is_paused = False
                self.lock.release()
            case "inference/v1/generate":
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
                    chosen = [request for request in batch if request[0] == settings]
                    _, ids, seeds, lengths, answers = zip(*chosen, strict=True)
                    n, temperature, stops = settings
                    keys = [(seed,) for seed in seeds]
                    groups = self.engine.generate(list(ids), keys, n, list(lengths), temperature, list(stops))
                    for answer, group in zip(answers, groups, strict=True):
                        answer.put((group, self.label))

    def generate(self, ids, params):
        seed, began, answer = params.get("seed", 0), time.monotonic(), queue.SimpleQueue()
        settings = params.get("n", 1), params.get("temperature", 1.0), tuple(params.get("stop_token_ids", ()))
        self.waiting.put((settings, ids, seed, params["max_tokens"], answer))
        group, label = answer.get()
        latency = self.args.median_seconds * random.Random(seed).lognormvariate(0, self.args.spread)
        time.sleep(max(0.0, began + latency - time.monotonic()))
        return {
            "choices": [
                {
                    "token_ids": sample.ids,
                    "weight_versions": [{"version": label, "start": 0, "end": len(sample.ids)}],
                    "finish_reason": "stop" if sample.is_finished else "length",
                    "logprobs": {"content": [{"logprob": logp} for logp in sample.logps]},
                }
                for sample in group
            ]
        }


class Listener(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 512, True


def listen(answer, port=0):
    """A Listener at this port (0: a free one) that answers with answer(path, body): JSON, or an HTTP status and JSON."""

    class Handler(BaseHTTPRequestHandler):
        wbufsize = -1  # an answer is one packet

        def respond(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            reply = answer(self.path.lstrip("/"), json.loads(body or "null"))
            status, reply = reply if isinstance(reply, tuple) else (200, reply)
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = respond

        def log_message(self, *_):
            pass

    return Listener(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    server = Server(args)
    listen(lambda path, body: server.answer(path.partition("?")[0], body), args.port).serve_forever()
