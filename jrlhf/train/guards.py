"""Guards are bounds on the metrics of a rollout; crossing one warns, rolls the run back or stops it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jrlhf.config.watch import GuardConfig, RolloutGuardsConfig
from jrlhf.system.errors import RunError
from jrlhf.train.optim import scale_rate
from jrlhf.train.state import RunState

BASELINES = ("length/mean", "repetition")
"""Metrics whose drift is measured from their value in the first rollout."""
OTHER_SAMPLER = (
    "the sampler and the trained policy disagree: look for top_k, top_p, another temperature, a token that "
    "the sampler masks, or old weights"
)
CAUSES = {
    "kl": "the policy has left the SFT model: the learning rate is too high, or beta too low",
    "negative_kl": OTHER_SAMPLER,
    "sampler": OTHER_SAMPLER,
    "entropy": "the policy has collapsed onto few answers",
    "length": "the reward pays for length, or answers end too early",
    "repetition": "the policy repeats itself",
    "explained_variance": "the value network does not follow its returns",
}


class Alarm(NamedTuple):
    """A guard whose bound was crossed ``patience`` times in a row."""

    guard: str
    value: float
    bound: float
    action: str

    def __str__(self) -> str:
        return f"{self.guard} guard ({self.action}): {self.value:.4g}, bound {self.bound:.4g}: {CAUSES[self.guard]}"


class GuardStop(RunError):
    """A guard has stopped the run; the newest checkpoint is from before that step."""


class Watch:
    """Checks the metrics of each rollout. A resumed run passes the result of ``keep`` as ``snapshot``."""

    def __init__(self, config: RolloutGuardsConfig, snapshot: Mapping[str, Any] | None) -> None:
        self._config = config
        self._guards: dict[str, GuardConfig] = {n: vars(config)[n] for n in CAUSES if n in vars(config)}
        snapshot = snapshot or {"baseline": {}, "in_row": {}, "rollbacks": 0}
        self._baseline, self._in_row = dict(snapshot["baseline"]), dict(snapshot["in_row"])
        self.rollbacks: int = snapshot["rollbacks"]

    def keep(self) -> dict[str, Any]:
        """Return a snapshot of the baseline and the counts for JSON."""
        return {"baseline": self._baseline, "in_row": self._in_row, "rollbacks": self.rollbacks}

    def check(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Return the alarms of this rollout.

        A guard fires at its ``patience``-th crossing in a row, and again only after a rollout within its bound.
        """
        if not self._baseline:
            self._baseline = {name: float(metrics[name]) for name in BASELINES}
        alarms = []
        for name, guard in self._guards.items():
            value = self._value(name, metrics)
            if guard.action == "off" or math.isnan(value):
                continue
            self._in_row[name] = self._in_row.get(name, 0) + 1 if _crossed(name, value, guard.bound) else 0
            if self._in_row[name] == guard.patience:
                alarms.append(Alarm(name, value, guard.bound, guard.action))
        return alarms

    def _value(self, name: str, metrics: Mapping[str, Any]) -> float:
        match name:
            case "kl" | "negative_kl":
                # A run without a reference has no KL.
                return float(metrics.get("kl", math.nan))
            case "length":
                return float(metrics["length/mean"]) / max(self._baseline["length/mean"], 1.0)
            case "repetition":
                return float(metrics["repetition"]) - self._baseline["repetition"]
            case "explained_variance":
                return float(metrics["value/explained_variance"])
            case "sampler":
                return float(metrics["sampler/max_abs_logprob_diff"])
            case _:
                return float(metrics[name])

    @property
    def can_roll_back(self) -> bool:
        """Whether the action of some guard is a rollback."""
        return any(guard.action == "rollback" for guard in self._guards.values())

    @property
    def crossings(self) -> int:
        """Number of consecutive rollouts, up to this one, that crossed the bound of a stop or rollback guard."""
        acting = ("stop", "rollback")
        return max((count for name, count in self._in_row.items() if self._guards[name].action in acting), default=0)

    @property
    def has_rollback(self) -> bool:
        """Whether ``guards.rollbacks`` allows another rollback."""
        return self.rollbacks < self._config.rollbacks

    def rollback_state(self, now: RunState, good: RunState) -> RunState:
        """Return ``good`` with a lower learning rate and a higher beta, at the place of ``now`` in the data."""
        if not self.has_rollback:
            raise GuardStop(f"rolled back {self.rollbacks} times, the maximum of guards.rollbacks")
        self.rollbacks += 1
        self._in_row = {}
        train = good.train._replace(opt_state=scale_rate(good.train.opt_state, self._config.rollback_lr))
        beta = good.kl_coef * self._config.rollback_beta
        return good._replace(train=train, key=now.key, cursor=now.cursor, kl_coef=beta)


def _crossed(name: str, value: float, bound: float) -> bool:
    match name:
        case "kl" | "repetition" | "sampler":
            return value > bound
        case "length":
            return value > bound or value < 1.0 / bound
        case _:
            return value < bound
