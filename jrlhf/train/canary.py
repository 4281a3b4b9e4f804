"""The canary compares each held-out evaluation with the best one so far."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jrlhf.config import CanaryConfig


class Regression(NamedTuple):
    """An evaluation that is worse than the best one by more than chance explains."""

    metric: str
    value: float
    best: float
    best_step: int
    margin: float
    """Greatest fall that chance explains: ``canary.errors`` standard errors of the difference."""

    def __str__(self) -> str:
        return (
            f"canary: {self.metric} is {self.value:.4g}, {self.best - self.value:.4g} below the {self.best:.4g} of "
            f"step {self.best_step}; chance explains {self.margin:.4g}"
        )


class Canary:
    """Remembers the best evaluation by ``metric``, a mean whose standard error is ``..._stderr``.

    A resumed run passes the result of ``keep`` as ``snapshot``. The canary treats the two samples as independent,
    although they answer the same prompts, so the margin is rather too wide.
    """

    def __init__(self, config: CanaryConfig, metric: str, snapshot: Mapping[str, Any] | None) -> None:
        self._errors, self.action = config.errors, config.action
        self._metric = metric
        self._best: dict[str, Any] | None = dict(snapshot) if snapshot else None

    def keep(self) -> dict[str, Any] | None:
        """Return a snapshot of the best evaluation for JSON; None before the first one."""
        return self._best

    def compare(self, step: int, figures: Mapping[str, float], *, passes: bool) -> Regression | None:
        """Compare an evaluation with the best one; return a regression or None.

        ``passes`` says whether the model passes the gates. A failing model is the best only while no model has passed.
        """
        value = float(figures[self._metric])
        error = float(figures[self._metric.removesuffix("_mean") + "_stderr"])
        best = self._best
        regression = None
        if best is not None:
            margin = self._errors * math.hypot(error, best["error"])
            # The condition is not "fall > margin", so that NaN counts as a regression too.
            if not best["value"] - value <= margin:
                regression = Regression(self._metric, value, best["value"], best["step"], margin)
        better = best is None or (passes and (value > best["value"] or not best["passes"]))
        if better and math.isfinite(value):
            self._best = {"step": step, "value": value, "error": error, "passes": passes}
        return regression
