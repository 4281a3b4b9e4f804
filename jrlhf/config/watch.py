"""The schema of ``guards`` and ``safety``, which watch a run. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal

from jrlhf.system.paths import PathText, WithPaths


@dataclass(frozen=True)
class GuardConfig:
    """A bound on a figure of each rollout."""

    bound: float = 0.0
    """Bound of the figure."""
    patience: int = 1
    """Number of consecutive rollouts beyond the bound before the guard acts."""
    action: Literal["off", "warn", "stop", "rollback"] = "warn"
    """Response of the guard. warn: write an event to events.jsonl and a line to stderr. stop: also end the run.
    rollback: warn, and return to the newest checkpoint from before the crossing."""


@dataclass(frozen=True)
class RolloutGuardsConfig:
    """Bounds whose crossing warns, stops the run or rolls it back."""

    kl: GuardConfig = field(default_factory=lambda: GuardConfig(bound=100.0, action="rollback"))
    """KL per sequence to the SFT model, in nats, above bound; off without a reference (grpo.kl.coef 0)."""
    negative_kl: GuardConfig = field(default_factory=lambda: GuardConfig(bound=-1.0, patience=2))
    """Estimated KL per sequence to the SFT model, in nats, below bound: a sign that answers do not come from the policy
    in training."""
    sampler: GuardConfig = field(default_factory=lambda: GuardConfig(bound=0.5))
    """Largest difference of a token's log-prob between sampler and update, in nats, above bound: a sign that answers do
    not come from the policy in training. About 1e-5 is normal in float32."""
    entropy: GuardConfig = field(default_factory=lambda: GuardConfig(bound=0.01, patience=3))
    """Entropy per token, in nats, below bound."""
    length: GuardConfig = field(default_factory=lambda: GuardConfig(bound=4.0, patience=3))
    """Mean answer length above bound times the first rollout's, or below the first rollout's divided by bound."""
    repetition: GuardConfig = field(default_factory=lambda: GuardConfig(bound=0.3, patience=3))
    """Fraction of answer tokens that end a repeated 3-gram, more than bound above the first rollout's."""
    rollbacks: int = 2
    """Maximum number of rollbacks; the next one stops the run. Parameters, optimizer, their average and β come from the
    checkpoint; prompts are not rewound."""
    rollback_lr: float = 0.5
    """Factor on the learning rates at each rollback."""
    rollback_beta: float = 2.0
    """Factor on β at each rollback."""


@dataclass(frozen=True)
class GuardsConfig(RolloutGuardsConfig):
    """Bounds whose crossing warns, stops the run or rolls it back; one of them on the value network."""

    explained_variance: GuardConfig = field(default_factory=lambda: GuardConfig(bound=-1.0, patience=20))
    """Explained variance of the returns by the value network, below bound."""


@dataclass(frozen=True)
class SafetyConfig(WithPaths):
    """Prompts of which some should be refused. SFT, DPO, PPO and GRPO answer them at each held-out evaluation: the
    refusal_rate of those and the benign_refusal_rate of the others are figures for gates."""

    prompts: PathText = ""
    """Prompts, in the forms of data.eval; SFT and DPO read them by the settings of their data, PPO and GRPO by those of
    their prompts. Empty: none."""
    column: str = "refusal"
    """Column of a row that is true where a refusal is expected. A row without it expects none."""
    patterns: tuple[str, ...] = ()
    """Regular expressions that mark a refusal in the first 400 characters of an answer. Empty: common phrases of
    English refusals."""
    match_timeout: float = 1.0
    """Maximum seconds to match a pattern against an answer; a slower match ends the run and names the pattern."""
