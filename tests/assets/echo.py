"""An environment for tests: it says what it is told, or does what goes wrong."""

import asyncio
import ctypes
import os
import threading
import time


class Echo:
    async def reset(self, start="", seed=None, **row):
        self.done, self.said = False, []
        self.loop, self.thread = asyncio.get_running_loop(), threading.get_ident()
        if start == "raise":
            raise RuntimeError("no start")
        return f" seed {seed}" if start == "seed" else start or None

    def __len__(self):
        return 0  # an environment may be empty

    def say(self, text: str) -> str:
        """Say a text.

        Args:
            text: What to say.
        """
        assert self.thread == threading.get_ident()
        self.said.append(text)
        return text

    async def later(self, text: str, seconds: float):
        """Say a text, later.

        Args:
            text: What to say.
            seconds: How much later.
        """
        assert self.loop is asyncio.get_running_loop()
        time.sleep(seconds)  # blocks its own event loop alone
        return {"said": text}

    def go_wrong(self, how: str):
        """Go wrong.

        Args:
            how: In which way.
        """
        match how:
            case "raise":
                raise KeyError("gone")
            case "exit":
                raise SystemExit(1)
            case "hang":
                time.sleep(60)
            case "crash":
                os._exit(3)
            case "freeze":
                ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock
            case "end":
                self.done = True
        return 7

    def get_reward(self):
        if "broken" in self.said:
            raise ValueError("no reward")
        return float("nan") if "nan" in self.said else float(len(self.said))


class NoReset:
    def f(self):
        """Do nothing."""


class NoTools:
    def reset(self): ...

    def _f(self): ...


class NoHints(NoTools):
    def f(self, x):
        """Do nothing.

        Args:
            x: Something.
        """
