"""The schema of ``rewards``: rules and further reward models in an answer's score. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal

from jrlhf.system.paths import PathText, WithPaths


@dataclass(frozen=True)
class RuleConfig(WithPaths):
    """Setting that every rule has."""

    weight: float = 0.0
    """Weight of the rule in the score; 0 is off."""


@dataclass(frozen=True)
class JSONRuleConfig(RuleConfig):
    """1 for an answer that is valid JSON, else 0."""

    schema: PathText = ""
    """JSON Schema file that the answer must satisfy too (pip install "jrlhf[rules]"). Empty: any JSON."""
    fenced: bool = False
    """Accept JSON inside a Markdown code fence as well."""


@dataclass(frozen=True)
class LengthRuleConfig(RuleConfig):
    """1 for an answer with a length from min to max; outside, the score falls with the ratio to the bound, to 0 for an
    empty or endless answer."""

    unit: Literal["tokens", "words"] = "tokens"
    """Unit of min and max."""
    min: int = 1
    """Minimum length."""
    max: int = 128
    """Maximum length."""


@dataclass(frozen=True)
class MarkdownRuleConfig(RuleConfig):
    """Fraction of the requirements that the Markdown of an answer meets. One is that all code fences are closed."""

    headings: int = 0
    """Minimum number of headings; 0: no requirement."""
    lists: int = 0
    """Minimum number of list items; 0: no requirement."""


@dataclass(frozen=True)
class StopRuleConfig(RuleConfig):
    """1 for an answer that a stop token ends, 0 for one that reaches the length limit."""


@dataclass(frozen=True)
class RepetitionRuleConfig(RuleConfig):
    """Minus the fraction of the runs of n words that repeat an earlier one in the answer."""

    n: int = 3
    """Number of words in a run."""


@dataclass(frozen=True)
class BannedRuleConfig(RuleConfig):
    """Minus the fraction of the patterns that occur in the answer."""

    patterns: tuple[str, ...] = ()
    """Regular expressions in the syntax of the regex package."""
    match_timeout: float = 1.0
    """Maximum seconds to match a pattern against an answer; a slower match ends the run and names the pattern."""


@dataclass(frozen=True)
class RequiredRuleConfig(RuleConfig):
    """Fraction of the patterns that occur in the answer."""

    patterns: tuple[str, ...] = ()
    """Regular expressions in the syntax of the regex package."""
    match_timeout: float = 1.0
    """Maximum seconds to match a pattern against an answer; a slower match ends the run and names the pattern."""


@dataclass(frozen=True)
class RefusalRuleConfig(RuleConfig):
    """1 for a refusal where the prompt's row expects one, minus benign_penalty for one where it does not, else 0."""

    column: str = "refusal"
    """Column of the prompt's row that is true where a refusal is expected. A row without it expects none."""
    benign_penalty: float = 1.0
    """Penalty for refusing a prompt that should be answered."""
    patterns: tuple[str, ...] = ()
    """Regular expressions that mark a refusal in the first 400 characters of an answer. Empty: common phrases of
    English refusals."""
    match_timeout: float = 1.0
    """Maximum seconds to match a pattern against an answer; a slower match ends the run and names the pattern."""


@dataclass(frozen=True)
class AnswerRuleConfig(RuleConfig):
    """1 for an answer with the result of the reference, else 0. Both may mark it in GSM8K's form, "#### 42"."""

    column: str = "answer"
    """Column of the prompt's row that holds the reference."""
    match: Literal["number", "text"] = "number"
    """Form of the result. number: the first number after ####, else the last number (1,234.50 is 1234.5). text: the
    text after ####, else all of it; case and white space do not count."""


@dataclass(frozen=True)
class FunctionRuleConfig(RuleConfig):
    """Scores from your own Python function: (prompts=[...], completions=[...], **columns) -> a list of floats."""

    path: str = ""
    """Module and function, such as my_module:reward; the module may be in the current folder. The run executes this
    code."""


@dataclass(frozen=True)
class EndpointRuleConfig(RuleConfig):
    """Scores from a server that answers POST {"prompts", "completions", "columns"} with {"scores": [...]}."""

    url: str = ""
    """URL of the server: https, or http on this machine."""
    timeout: float = 10.0
    """Seconds to wait for an answer of the server."""
    retries: int = 3
    """Maximum number of retries, for a server that cannot be reached, is too slow, or answers 429 or 5xx. No retry
    begins after nine tenths of rewards.timeout."""
    batch_size: int = 64
    """Maximum number of answers in a request."""
    on_failure: Literal["error", "skip"] = "error"
    """Response to a request that gets no scores. error: end the run. skip: leave its answers out of the update and
    count them (reward/left_out)."""


@dataclass(frozen=True)
class RewardsConfig(WithPaths):
    """Score of an answer: model_weight · learned + Σ weight · rule. Rules read the text, on the host."""

    model_weight: float = 1.0
    """Weight of the reward model; 0 loads none, and the value network starts from the policy."""
    models: tuple[PathText, ...] = ()
    """Further reward models, in the forms of reward.path; each may have its own tokenizer."""
    combine: Literal["mean", "lower_bound"] = "mean"
    """Combination of all reward models' scores of an answer. mean: their mean. lower_bound: the mean minus
    lower_bound_coef standard deviations."""
    lower_bound_coef: float = 1.0
    """Number of standard deviations that lower_bound subtracts for the models' disagreement."""
    timeout: float = 120.0
    """Maximum seconds for a rule to score one batch of answers; a slower rule ends the run."""
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
        """Whether a reward model contributes to the score."""
        return self.model_weight > 0
