"""Held-out evaluations compared with the best one so far, as a deployment is with the one it replaces."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jrlhf.config import CanaryConfig


class Regression(NamedTuple):
    """An evaluation that is worse than the best one by more than chance."""

    metric: str
    value: float
    best: float
    best_step: int
    margin: float
    """What the fall exceeds: so many standard errors of the difference."""

    def __str__(self) -> str:
        return (
            f"canary: {self.metric} is {self.value:.4g}, {self.best - self.value:.4g} below the {self.best:.4g} of "
            f"step {self.best_step}; chance explains {self.margin:.4g}"
        )


class Canary:
    """Remembers the best evaluation by ``metric``, a mean whose standard error is ``..._stderr``.

    ``kept``: what ``keep`` gave, for a run that goes on.
    The two samples are taken as independent, though they answer the same prompts: the margin errs on the wide side.
    """

    def __init__(self, config: CanaryConfig, metric: str, kept: Mapping[str, Any] | None) -> None:
        self._errors, self.action = config.errors, config.action
        self._metric = metric
        self._best: dict[str, Any] | None = dict(kept) if kept else None

    def keep(self) -> dict[str, Any] | None:
        """As JSON."""
        return self._best

    def judge(self, step: int, figures: Mapping[str, float], *, passes: bool) -> Regression | None:
        """A regression, or None. ``passes``: whether the gates let the model through; only such a one may be the best,
        unless there has been none."""
        value = float(figures[self._metric])
        error = float(figures[self._metric.removesuffix("_mean") + "_stderr"])
        best = self._best
        worse = None
        if best is not None:
            margin = self._errors * math.hypot(error, best["error"])
            # Not "fall > margin": a figure that is not a number is no good sign either.
            if not best["value"] - value <= margin:
                worse = Regression(self._metric, value, best["value"], best["step"], margin)
        better = best is None or (passes and (value > best["value"] or not best["passes"]))
        if better and math.isfinite(value):
            self._best = {"step": step, "value": value, "error": error, "passes": passes}
        return worse
