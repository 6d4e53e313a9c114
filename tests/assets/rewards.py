"""Reward functions for tests: some are right, others go wrong."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import subprocess
import time
from dataclasses import dataclass


def good(completions, bonus, **_):
    return [len(text) + extra for text, extra in zip(completions, bonus, strict=True)]


def length(completions, **_):
    return [len(messages[-1]["content"]) for messages in completions]


async def slow_but_right(completions, **_):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)


def bad(completions, **_):
    values = []
    for text in completions:
        if text == "hang":
            subprocess.Popen(["sleep", "600"])
            time.sleep(60)
        if text == "crash":
            os._exit(3)
        if text == "raise":
            raise RuntimeError("no")
        values += [{"nan": math.nan, "inf": math.inf, "none": None}.get(text, 0.5)]
    return values + [0.0] * completions.count("count")


def mapping(completions, **_):
    return dict.fromkeys(range(len(completions)), 1.0)


def has_processes(completions, **_):
    with multiprocessing.Pool(1) as pool:
        return pool.map(float, [len(text) for text in completions])


def hangs(completions, **_):
    time.sleep(60)


@dataclass
class Row:
    x: int
