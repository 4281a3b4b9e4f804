"""The schema of ``ppo.rewards``: what an answer's score is made of besides the reward model. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RuleConfig:
    """What every rule has."""

    weight: float = 0.0
    """Of the rule in the score; 0 is off."""


@dataclass(frozen=True)
class JSONRuleConfig(RuleConfig):
    """1 for an answer that is valid JSON, else 0."""

    fenced: bool = False
    """JSON inside a Markdown code fence counts as well."""


@dataclass(frozen=True)
class LengthRuleConfig(RuleConfig):
    """1 for an answer as long as asked for; outside it falls with the ratio, to 0 for one that is empty or endless."""

    unit: Literal["tokens", "words"] = "tokens"
    """What is counted."""
    min: int = 1
    """Least that counts as inside."""
    max: int = 128
    """Most that counts as inside."""


@dataclass(frozen=True)
class RewardsConfig:
    """Score = model_weight · learned + Σ weight · rule. Rules are read off the text, on the host."""

    model_weight: float = 1.0
    """Of the reward model; 0: none is loaded, and the value network starts from the policy."""
    timeout: float = 120.0
    """Seconds a rule may take for one batch of answers before the run ends."""
    json: JSONRuleConfig = field(default_factory=JSONRuleConfig)
    length: LengthRuleConfig = field(default_factory=LengthRuleConfig)

    @property
    def uses_model(self) -> bool:
        """Whether a learned reward has a part in the score."""
        return self.model_weight > 0
