"""The child's half of compare.py's protocol: warm up, say so, then work when asked to and wait in between.

A child prints one line of facts once it is warm. ``go N`` on its standard input asks for N calls, which it answers
with one line, ``{"seconds": [...], "peak_mb": ...}``; the end of its input ends it. Standard library only.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

WARM_UP = 2
"""Calls before the first line: one that compiles, whose seconds are a fact, and one more."""


class Rounds:
    """Times calls. A side ticks at the end of each one, and is held there while nobody asks for the next.

    So a trainer that only runs as a whole can be held too, from a callback at the end of its step.
    """

    def __init__(self, asks: TextIO, answers: TextIO) -> None:
        self._asks, self._answers = asks, answers
        self._facts: dict[str, Any] = {}
        self._seconds: list[float] = []
        self._wanted = WARM_UP
        self._since = time.perf_counter()

    def start(self, **facts: Any) -> None:
        """The model is made; the first call begins. ``facts``: what the line says once the side is warm."""
        self._facts = facts
        self._since = time.perf_counter()

    def tick(self, **facts: Any) -> None:
        """A call has ended, and all that it computes is there. ``facts``: what the line says besides."""
        self._seconds.append(time.perf_counter() - self._since)
        if len(self._seconds) == self._wanted:
            took = {"first_seconds": self._seconds[0]} if self._facts else {"seconds": self._seconds}
            line = self._facts | took | facts | {"peak_mb": peak_memory_mb()}
            print(json.dumps(line), file=self._answers, flush=True)
            self._facts, self._seconds, self._wanted = {}, [], self._next()
        self._since = time.perf_counter()

    def _next(self) -> int:
        ask = self._asks.readline().split()
        if not ask:
            sys.exit(0)
        return int(ask[1])


def repeat(rounds: Rounds, call: Callable[[], dict[str, Any]]) -> None:
    """For what can be called one by one; each call returns what the line is to say of it."""
    while True:
        rounds.tick(**call())


def open_rounds() -> Rounds:
    """Over standard input and output. What libraries print goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return Rounds(sys.stdin, answers)


def read_spec() -> dict[str, Any]:
    """What to do, as compare.py put it on the command line; see ``cases.py``."""
    return json.loads(sys.argv[1])


def median_seconds(call: Callable[[], Any], *, repeats: int = 9) -> float:
    """Of ``repeats`` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_memory_mb() -> int:
    """This process's high-water mark, libraries included."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(peak) // 1024
