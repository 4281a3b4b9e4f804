"""The steps since the last log line: means and maxima of their metrics, rates, and shares of the time."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from jrlhf.types import Metrics


class Rate(NamedTuple):
    """A rate in a log line: the sum of the count ``of``, which is not logged itself, in ``unit`` per second."""

    of: str
    name: str
    unit: float = 1.0
    during: str | None = None
    """Name of the metric of seconds that divides the sum; None stands for the wall time of training."""


class Window:
    """Collects the metrics of steps for the next log line: the maximum for names in ``maxima``, else the mean.

    A resumed run passes the result of ``keep`` as ``snapshot``.
    """

    def __init__(
        self,
        rates: tuple[Rate, ...],
        clock: Callable[[], float] = time.perf_counter,
        *,
        maxima: Collection[str] = (),
        snapshot: Mapping[str, Any] | None = None,
    ) -> None:
        self._rates, self._maxima = rates, maxima
        self._clock = clock
        self._restart()
        if snapshot is not None:
            self._steps, self._apart = list(snapshot["steps"]), dict(snapshot["apart"])
            self._since -= snapshot["seconds"]

    def _restart(self) -> None:
        self._steps: list[Metrics | dict[str, float]] = []
        self._apart: dict[str, float] = {}
        self._since = self._clock()

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of a step without waiting for the device."""
        self._steps.append(metrics)

    @contextmanager
    def apart(self, name: str, state: Any) -> Iterator[None]:
        """Exclude the time of the block from all rates. Wait for ``state`` first, which still counts as training."""
        jax.block_until_ready(state)
        start = self._clock()
        yield
        self._apart[name] = self._apart.get(name, 0.0) + self._clock() - start

    def keep(self) -> dict[str, Any]:
        """Return a snapshot of the unfinished line for JSON; a run that resumes from it logs the same line."""
        steps = [{name: float(value) for name, value in step.items()} for step in jax.device_get(self._steps)]
        return {"steps": steps, "apart": dict(self._apart), "seconds": self._clock() - self._since}

    def skipped(self) -> list[bool]:
        """Return for each step whether its numbers were not finite and it changed nothing. Wait for the device."""
        self._steps = jax.device_get(self._steps)
        return [bool(step["skipped"] > 0 and step.get("policy/updates", 0.0) == 0) for step in self._steps]

    def close(self) -> dict[str, float]:
        """Wait for the device, return the log line and start the next one.

        Skipped steps count in no mean or maximum, unless all steps were skipped.
        """
        skipped = np.asarray(self.skipped())
        steps = self._steps
        whole = self._clock() - self._since
        columns = {name: np.asarray([step[name] for step in steps], np.float64) for name in steps[0]}
        mask = np.ones_like(skipped) if skipped.all() else ~skipped
        counts = {rate.of for rate in self._rates}
        line = {
            name: float(values[mask].max() if name in self._maxima else values[mask].mean())
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
