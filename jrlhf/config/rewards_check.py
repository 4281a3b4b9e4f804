"""Checks of ``rewards``. Imports no JAX."""

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import regex

from jrlhf.config.rewards import (
    BannedRuleConfig,
    LengthRuleConfig,
    RefusalRuleConfig,
    RequiredRuleConfig,
    RewardsConfig,
    RuleConfig,
)
from jrlhf.config.schema_check import Check

PENALTIES = "because what penalises is a rule with negative scores (repetition, banned, or a function of yours)"
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def rewards_checks(path: str, rewards: RewardsConfig) -> Iterator[Check]:
    weights = rule_weights(rewards)
    for name, weight in weights.items():
        yield weight >= 0, f"{path}.{name}.weight", weight, f"0 (off) or more, {PENALTIES}"
    yield rewards.model_weight >= 0, f"{path}.model_weight", rewards.model_weight, "0 (no reward model) or more"
    has_score = rewards.uses_model or any(weights.values())
    yield has_score, f"{path}.model_weight", rewards.model_weight, f"above 0, because no rule of {path} has a weight"
    used = not rewards.models or rewards.uses_model
    yield used and all(rewards.models), f"{path}.models", rewards.models, f"paths, with {path}.model_weight above 0"
    yield rewards.lower_bound_coef >= 0, f"{path}.lower_bound_coef", rewards.lower_bound_coef, "0 or more"
    yield rewards.timeout > 0, f"{path}.timeout", rewards.timeout, "above 0"
    yield from _length(f"{path}.length", rewards.length)
    yield from _outside(path, rewards)
    yield rewards.markdown.headings >= 0, f"{path}.markdown.headings", rewards.markdown.headings, "0 or more"
    yield rewards.markdown.lists >= 0, f"{path}.markdown.lists", rewards.markdown.lists, "0 or more"
    yield rewards.repetition.n >= 1, f"{path}.repetition.n", rewards.repetition.n, "1 or more"
    for name, rule in (("banned", rewards.banned), ("required", rewards.required), ("refusal", rewards.refusal)):
        yield from _patterns(f"{path}.{name}", rule)
    penalty = rewards.refusal.benign_penalty
    yield penalty >= 0, f"{path}.refusal.benign_penalty", penalty, "0 or more"
    for name, column in (("refusal", rewards.refusal.column), ("answer", rewards.answer.column)):
        yield bool(column) and column != "prompt", f"{path}.{name}.column", column, "a column other than prompt"


def _outside(path: str, rewards: RewardsConfig) -> Iterator[Check]:
    function, endpoint = rewards.function, rewards.endpoint
    valid = bool(DOTTED.fullmatch(function.path)) or not (function.weight or function.path)
    yield valid, f"{path}.function.path", function.path, "module:function, such as my_rewards:score"
    safe = endpoint.url.startswith("https://") or (endpoint.url.startswith("http://") and _is_local(endpoint.url))
    safe = safe or not (endpoint.weight or endpoint.url)
    yield safe, f"{path}.endpoint.url", endpoint.url, "an https URL, or an http URL of this machine"
    yield endpoint.timeout > 0, f"{path}.endpoint.timeout", endpoint.timeout, "above 0"
    yield endpoint.retries >= 0, f"{path}.endpoint.retries", endpoint.retries, "0 or more"
    yield endpoint.batch_size >= 1, f"{path}.endpoint.batch_size", endpoint.batch_size, "1 or more"


def _is_local(url: str) -> bool:
    try:
        return urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"}
    except ValueError:
        return False


def _patterns(path: str, rule: BannedRuleConfig | RequiredRuleConfig | RefusalRuleConfig) -> Iterator[Check]:
    has_patterns = isinstance(rule, RefusalRuleConfig) or bool(rule.patterns)
    yield not rule.weight or has_patterns, f"{path}.patterns", rule.patterns, "set, because the rule has a weight"
    yield from pattern_checks(path, rule.patterns, rule.match_timeout)


def pattern_checks(path: str, patterns: tuple[str, ...], match_timeout: float) -> Iterator[Check]:
    """Check regular expressions that are matched against answers."""
    for pattern in patterns:
        yield bool(pattern) and _compiles(pattern), f"{path}.patterns", pattern, "a regular expression"
    yield match_timeout > 0, f"{path}.match_timeout", match_timeout, "above 0"


def _compiles(pattern: str) -> bool:
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError):
        return False
    return True


def rule_weights(rewards: RewardsConfig) -> dict[str, float]:
    """Return the weight of each rule by its name."""
    return {name: part.weight for name, part in vars(rewards).items() if isinstance(part, RuleConfig)}


def _length(path: str, rule: LengthRuleConfig) -> Iterator[Check]:
    yield rule.min >= 1, f"{path}.min", rule.min, "1 or more"
    yield rule.max >= rule.min, f"{path}.max", rule.max, f"at least {path}.min ({rule.min})"
