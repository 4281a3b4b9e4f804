"""The steps since the last log line: means, maxima, counts as rates, and what share of the time went where."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from jrlhf.types import Metrics


class Rate(NamedTuple):
    """A metric that counts, summed over the steps of a log line, as so many ``unit`` a second; it is not logged."""

    of: str
    name: str
    unit: float = 1.0
    during: str | None = None
    """The metric of seconds that it is divided by; None: wall time."""


class Window:
    """What is logged of the steps since the last line: means, but of ``maxima`` the greatest.

    ``kept``: what ``keep`` gave for an unfinished line.
    """

    def __init__(
        self,
        rates: tuple[Rate, ...],
        clock: Callable[[], float] = time.perf_counter,
        *,
        maxima: Collection[str] = (),
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        self._rates, self._maxima = rates, maxima
        self._clock = clock
        self._restart()
        if kept is not None:
            self._steps, self._apart = list(kept["steps"]), dict(kept["apart"])
            self._since -= kept["seconds"]

    def _restart(self) -> None:
        self._steps: list[Metrics | dict[str, float]] = []
        self._apart: dict[str, float] = {}
        self._since = self._clock()

    def add(self, metrics: Metrics) -> None:
        self._steps.append(metrics)

    @contextmanager
    def apart(self, name: str, state: Any) -> Iterator[None]:
        """What the block takes is no part of any rate; ``state`` is awaited first, which belongs to the steps."""
        jax.block_until_ready(state)
        start = self._clock()
        yield
        self._apart[name] = self._apart.get(name, 0.0) + self._clock() - start

    def keep(self) -> dict[str, Any]:
        """As JSON: a run that goes on with it logs what it would have logged without a break."""
        steps = [{name: float(value) for name, value in step.items()} for step in jax.device_get(self._steps)]
        return {"steps": steps, "apart": dict(self._apart), "seconds": self._clock() - self._since}

    def skipped(self) -> list[bool]:
        """Of each step, whether it left the state as it was, for numbers that are not finite. Waits for the device."""
        self._steps = jax.device_get(self._steps)
        return [bool(step["skipped"] > 0 and step.get("policy/updates", 0.0) == 0) for step in self._steps]

    def close(self) -> dict[str, float]:
        """Wait for the device, and start anew. What a skipped step says is in no mean, unless all were skipped."""
        skipped = np.asarray(self.skipped())
        steps = self._steps
        whole = self._clock() - self._since
        columns = {name: np.asarray([step[name] for step in steps], np.float64) for name in steps[0]}
        told = np.ones_like(skipped) if skipped.all() else ~skipped
        counts = {rate.of for rate in self._rates}
        line = {
            name: float(values[told].max() if name in self._maxima else values[told].mean())
            for name, values in columns.items()
            if name not in counts
        }
        line["skipped"] = float(columns["skipped"].sum())
        training = whole - sum(self._apart.values())
        for rate in self._rates:
            seconds = training if rate.during is None else columns[rate.during].sum()
            line[rate.name] = float(np.nansum(columns[rate.of]) / seconds / rate.unit)
        phases = {name: columns[name].sum() for name in columns if name.startswith("seconds/")}
        phases |= {f"seconds/{name}": seconds for name, seconds in self._apart.items()}
        line |= {name.replace("seconds/", "share/"): float(seconds / whole) for name, seconds in phases.items()}
        self._restart()
        return line
