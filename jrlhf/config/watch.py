"""The schema of what a run is watched by: ``ppo.guards`` and ``safety``. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal

from jrlhf.system.paths import PathText, WithPaths


@dataclass(frozen=True)
class GuardConfig:
    """A bound on a figure of each rollout."""

    bound: float = 0.0
    """What is crossed."""
    patience: int = 1
    """Rollouts in a row that cross it before anything is done."""
    action: Literal["off", "warn", "stop", "rollback"] = "warn"
    """warn: an event in events.jsonl and a line on stderr. stop: also, the run ends. rollback: also, it goes back to
    the newest checkpoint of before."""


@dataclass(frozen=True)
class GuardsConfig:
    """What a run is stopped or put back for."""

    kl: GuardConfig = field(default_factory=lambda: GuardConfig(bound=100.0, action="rollback"))
    """Nats a sequence to the SFT model, above bound."""
    negative_kl: GuardConfig = field(default_factory=lambda: GuardConfig(bound=-1.0, patience=2))
    """The same, below bound: answers do not come from the policy that is trained."""
    sampler: GuardConfig = field(default_factory=lambda: GuardConfig(bound=0.5))
    """The largest difference of a token's log-prob in the sampler and in the update, nats, above bound: the same, seen
    at once. In float32 it is some 1e-5 where all is well."""
    entropy: GuardConfig = field(default_factory=lambda: GuardConfig(bound=0.01, patience=3))
    """Nats a token, below bound."""
    length: GuardConfig = field(default_factory=lambda: GuardConfig(bound=4.0, patience=3))
    """Mean answer length: more than bound times the first rollout's, or less than the first's divided by bound."""
    repetition: GuardConfig = field(default_factory=lambda: GuardConfig(bound=0.3, patience=3))
    """Share of answer tokens that end a run of three seen before in the answer: so much above the first rollout's."""
    explained_variance: GuardConfig = field(default_factory=lambda: GuardConfig(bound=-1.0, patience=20))
    """Of the returns by the value network, below bound."""
    rollbacks: int = 2
    """So often a run goes back; then it stops. Parameters, optimizer, averages and beta are those of the checkpoint;
    the data goes on."""
    rollback_lr: float = 0.5
    """Each time the learning rates are multiplied by this."""
    rollback_beta: float = 2.0
    """And beta by this."""


@dataclass(frozen=True)
class SafetyConfig(WithPaths):
    """Prompts of which some should be refused, answered with each held-out evaluation of SFT and PPO: refusal_rate of
    those, and benign_refusal_rate of the others, are figures for gates."""

    prompts: PathText = ""
    """As data.eval; read as sft.data or ppo.prompts say. Empty: none."""
    column: str = "refusal"
    """True where a refusal is wanted; a row without it wants none."""
    patterns: tuple[str, ...] = ()
    """What a refusal is told by, as in ppo.rewards.refusal."""
    match_timeout: float = 1.0
    """As in ppo.rewards.banned."""
