"""Bounds on what a rollout says of itself, and what is done where one is crossed."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jrlhf.config.watch import GuardConfig, GuardsConfig
from jrlhf.train.optim import scale_rate
from jrlhf.train.state import RunState

BASELINES = ("length/mean", "repetition")
"""What drift is measured from: the first rollout's."""
OTHER_SAMPLER = (
    "answers are not drawn from the policy that is trained: look for top_k, top_p, another temperature, a token that "
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


class GuardStop(RuntimeError):
    """A guard has ended the run. The newest checkpoint is of before."""


class Watch:
    """Looks at each rollout's metrics. ``kept``: what ``keep`` gave, for a run that goes on."""

    def __init__(self, config: GuardsConfig, kept: Mapping[str, Any] | None) -> None:
        self._config = config
        self._guards: dict[str, GuardConfig] = {name: vars(config)[name] for name in CAUSES}
        kept = kept or {"baseline": {}, "in_row": {}, "rollbacks": 0}
        self._baseline, self._in_row = dict(kept["baseline"]), dict(kept["in_row"])
        self.rollbacks: int = kept["rollbacks"]

    def keep(self) -> dict[str, Any]:
        """As JSON."""
        return {"baseline": self._baseline, "in_row": self._in_row, "rollbacks": self.rollbacks}

    def judge(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """The guards that fire now: at the last of ``patience`` crossings in a row, and not again before one is not."""
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
                return float(metrics["kl"])
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
        return any(guard.action == "rollback" for guard in self._guards.values())

    @property
    def crossings(self) -> int:
        """Rollouts in a row, this one included, in which some guard that would act has crossed its bound."""
        acting = ("stop", "rollback")
        return max((count for name, count in self._in_row.items() if self._guards[name].action in acting), default=0)

    @property
    def may_go_back(self) -> bool:
        """Whether a rollback is left."""
        return self.rollbacks < self._config.rollbacks

    def gone_back(self, now: RunState, good: RunState) -> RunState:
        """``good`` with a lower learning rate and a higher beta, at ``now``'s place in the data."""
        if not self.may_go_back:
            raise GuardStop(f"rolled back {self.rollbacks} times, which is all that guards.rollbacks allows")
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
