"""The schema of ``ppo.rewards``: what an answer's score is made of besides the reward model. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal

from jrlhf.system.paths import PathText, WithPaths


@dataclass(frozen=True)
class RuleConfig(WithPaths):
    """What every rule has."""

    weight: float = 0.0
    """Of the rule in the score; 0 is off."""


@dataclass(frozen=True)
class JSONRuleConfig(RuleConfig):
    """1 for an answer that is valid JSON, else 0."""

    schema: PathText = ""
    """A JSON Schema file that the answer must fit too (pip install "jrlhf[rules]"). Empty: any JSON."""
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
class MarkdownRuleConfig(RuleConfig):
    """The share of what is asked for that holds of an answer's Markdown; all its code fences must be closed."""

    headings: int = 0
    """So many at least; 0: not asked for."""
    lists: int = 0
    """So many list items at least; 0: not asked for."""


@dataclass(frozen=True)
class StopRuleConfig(RuleConfig):
    """1 for an answer that a stop token ended, 0 for one that the length limit did."""


@dataclass(frozen=True)
class RepetitionRuleConfig(RuleConfig):
    """Minus the share of the runs of n words that were there before in the answer."""

    n: int = 3
    """Words of a run."""


@dataclass(frozen=True)
class BannedRuleConfig(RuleConfig):
    """Minus the share of the patterns that are found in the answer."""

    patterns: tuple[str, ...] = ()
    """Regular expressions, as the regex package reads them."""
    match_timeout: float = 1.0
    """Seconds a pattern may take on an answer before the run ends and names it."""


@dataclass(frozen=True)
class RequiredRuleConfig(RuleConfig):
    """The share of the patterns that are found in the answer."""

    patterns: tuple[str, ...] = ()
    """As in banned."""
    match_timeout: float = 1.0
    """As in banned."""


@dataclass(frozen=True)
class RefusalRuleConfig(RuleConfig):
    """1 for a refusal where the prompt's row wants one, minus benign_penalty for one where it does not; else 0."""

    column: str = "refusal"
    """Of the prompt's row: true where a refusal is wanted. A row without it wants none."""
    benign_penalty: float = 1.0
    """Taken for the refusal of what should be answered."""
    patterns: tuple[str, ...] = ()
    """What a refusal is told by, in the first 400 characters of an answer. Empty: the usual phrases of English ones."""
    match_timeout: float = 1.0
    """As in banned."""


@dataclass(frozen=True)
class AnswerRuleConfig(RuleConfig):
    """1 for an answer that comes to the reference's result, else 0: GSM8K's form, "#### 42", is read in both."""

    column: str = "answer"
    """Of the prompt's row: the reference."""
    match: Literal["number", "text"] = "number"
    """number: the one after ####, else the last one (1,234.50 is 1234.5). text: what is after ####, else all, but for
    case and white space."""


@dataclass(frozen=True)
class FunctionRuleConfig(RuleConfig):
    """What a Python function of your own says: (prompts=[...], completions=[...], **columns) -> a list of floats."""

    path: str = ""
    """my_module:reward; modules in the current folder are found. It is code that you choose to run."""


@dataclass(frozen=True)
class EndpointRuleConfig(RuleConfig):
    """What a server says: POST {"prompts", "completions", "columns"}, and it answers {"scores": [...]}."""

    url: str = ""
    """https, or http on this machine."""
    timeout: float = 10.0
    """Seconds to wait for it."""
    retries: int = 3
    """Tries after the first, for a server that is not reached, too slow, or answers 429 or 5xx. None begins when nine
    tenths of ppo.rewards.timeout have passed."""
    batch_size: int = 64
    """Answers a request, at most."""
    on_failure: Literal["error", "skip"] = "error"
    """A request without scores ends the run, or its answers are left out of the update and counted
    (reward/left_out)."""


@dataclass(frozen=True)
class RewardsConfig(WithPaths):
    """Score = model_weight · learned + Σ weight · rule. Rules are read off the text, on the host."""

    model_weight: float = 1.0
    """Of the reward model; 0: none is loaded, and the value network starts from the policy."""
    models: tuple[PathText, ...] = ()
    """Further reward models, as ppo.reward.path; each may have a tokenizer of its own."""
    combine: Literal["mean", "lower_bound"] = "mean"
    """Of all reward models' scores of an answer. lower_bound: the mean less lower_bound_coef standard deviations."""
    lower_bound_coef: float = 1.0
    """What the models' disagreement costs."""
    timeout: float = 120.0
    """Seconds a rule may take for one batch of answers before the run ends."""
    json: JSONRuleConfig = field(default_factory=JSONRuleConfig)
    markdown: MarkdownRuleConfig = field(default_factory=MarkdownRuleConfig)
    length: LengthRuleConfig = field(default_factory=LengthRuleConfig)
    stop: StopRuleConfig = field(default_factory=StopRuleConfig)
    repetition: RepetitionRuleConfig = field(default_factory=RepetitionRuleConfig)
    banned: BannedRuleConfig = field(default_factory=BannedRuleConfig)
    required: RequiredRuleConfig = field(default_factory=RequiredRuleConfig)
    refusal: RefusalRuleConfig = field(default_factory=RefusalRuleConfig)
    answer: AnswerRuleConfig = field(default_factory=AnswerRuleConfig)
    function: FunctionRuleConfig = field(default_factory=FunctionRuleConfig)
    endpoint: EndpointRuleConfig = field(default_factory=EndpointRuleConfig)

    @property
    def uses_model(self) -> bool:
        """Whether a learned reward has a part in the score."""
        return self.model_weight > 0
