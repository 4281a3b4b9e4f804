"""The rules of a config: their selection, the columns that they read, and the scores of a batch of answers."""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple

import regex

from jrlhf.config import ConfigError
from jrlhf.config.rewards import (
    AnswerRuleConfig,
    BannedRuleConfig,
    EndpointRuleConfig,
    FunctionRuleConfig,
    JSONRuleConfig,
    LengthRuleConfig,
    MarkdownRuleConfig,
    RefusalRuleConfig,
    RepetitionRuleConfig,
    RequiredRuleConfig,
    RewardsConfig,
)
from jrlhf.data import Columns, DataError
from jrlhf.rules import (
    REFUSALS,
    EndpointError,
    Episode,
    by_endpoint,
    by_function,
    length_band,
    load_function,
    markdown,
    matching_fraction,
    refusal,
    repetition,
    same_number,
    same_text,
    valid_json,
    words,
    yes_or_no,
)
from jrlhf.system.errors import RunError, reason_of

logger = logging.getLogger("jrlhf.rewards")

Scores = list[float]


class Rule(NamedTuple):
    """A rule with a weight; its scores depend on the answers alone."""

    name: str
    weight: float
    score: Callable[[Sequence[Episode]], Scores]


def make_rules(rewards: RewardsConfig, *, stage: str) -> tuple[Rule, ...]:
    """Build the rules with a weight. Raise ConfigError, which names the ``stage``, if a rule cannot read its file."""
    option, prompts = f"{stage}.rewards", f"{stage}.prompts"
    table: tuple[tuple[str, float, Callable[[], Callable[[Sequence[Episode]], Scores]]], ...] = (
        ("json", rewards.json.weight, lambda: _json(rewards.json, option)),
        ("markdown", rewards.markdown.weight, lambda: _markdown(rewards.markdown)),
        ("length", rewards.length.weight, lambda: _length(rewards.length)),
        ("stop", rewards.stop.weight, lambda: _each(lambda episode: float(episode.stopped))),
        ("repetition", rewards.repetition.weight, lambda: _repetition(rewards.repetition)),
        ("banned", rewards.banned.weight, lambda: _patterns(rewards.banned, sign=-1.0)),
        ("required", rewards.required.weight, lambda: _patterns(rewards.required, sign=1.0)),
        ("refusal", rewards.refusal.weight, lambda: _refusal(rewards.refusal, prompts)),
        ("answer", rewards.answer.weight, lambda: _answer(rewards.answer, prompts)),
        ("function", rewards.function.weight, lambda: _function(rewards.function, option)),
        ("endpoint", rewards.endpoint.weight, lambda: _endpoint(rewards.endpoint, rewards.timeout, option)),
    )
    return tuple(Rule(name, weight, _in_turn(make())) for name, weight, make in table if weight)


def _in_turn(score: Callable[[Sequence[Episode]], Scores]) -> Callable[[Sequence[Episode]], Scores]:
    """Score one batch at a time, because a user's function need not be thread-safe."""
    turn = Lock()

    def alone(episodes: Sequence[Episode]) -> Scores:
        with turn:
            return score(episodes)

    return alone


def columns_read(rewards: RewardsConfig, *, stage: str) -> Columns:
    """Return the columns of a prompt's row that the rules with a weight read."""
    required = (rewards.answer.column,) if rewards.answer.weight else ()
    external = bool(rewards.function.weight or rewards.endpoint.weight)
    optional = (rewards.refusal.column,) if rewards.refusal.weight else ()
    return Columns(required, optional, every=external, reader=f"a rule of {stage}.rewards")


def start_rules(
    rules: Sequence[Rule], episodes: Sequence[Episode], *, timeout: float, stage: str
) -> Callable[[], dict[str, Scores]]:
    """Start one thread per rule; return a function that waits for all of them and returns scores by rule name.

    It raises RuntimeError, which names the stage's rule, if a rule fails or is not done in ``timeout`` seconds. The
    thread of such a rule runs on, but does not keep the program from exiting.
    """
    results: dict[str, Scores | Exception] = {}

    def run(rule: Rule) -> None:
        try:
            results[rule.name] = rule.score(episodes)
        except Exception as error:
            results[rule.name] = error

    threads = [Thread(target=run, args=(rule,), daemon=True, name=f"rule {rule.name}") for rule in rules]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()

    def wait() -> dict[str, Scores]:
        scores: dict[str, Scores] = {}
        for rule, thread in zip(rules, threads, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            result = results.get(rule.name)
            if result is None:
                raise RunError(f"{stage}.rewards.{rule.name}: not done in {timeout:g} s ({stage}.rewards.timeout)")
            if isinstance(result, DataError):
                raise DataError(f"{stage}.rewards.{rule.name}: {result}") from result
            if isinstance(result, Exception):
                raise RunError(f"{stage}.rewards.{rule.name}: {reason_of(result)}") from result
            scores[rule.name] = result
        return scores

    return wait


def _each(score: Callable[[Episode], float]) -> Callable[[Sequence[Episode]], Scores]:
    return lambda episodes: [float(score(episode)) for episode in episodes]


def _json(rule: JSONRuleConfig, option: str) -> Callable[[Sequence[Episode]], Scores]:
    fits = _schema(rule.schema, f"{option}.json.schema") if rule.schema else None
    return _each(lambda episode: valid_json(episode.completion, fenced=rule.fenced, fits=fits))


def _schema(path: str, option: str) -> Callable[[Any], bool]:
    """Return a check of values against the schema of a file; it does not follow references to other files or URLs."""
    try:
        validators, registry = import_module("jsonschema.validators"), import_module("referencing").Registry()
    except ImportError as error:
        raise ConfigError(f'{option}: needs jsonschema: pip install "jrlhf[rules]"') from error
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{option}: {path}: {reason}") from error
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except import_module("jsonschema.exceptions").SchemaError as error:
        raise ConfigError(f"{option}: {path}: {error.json_path}: {error.message}") from error
    return kind(schema, registry=registry).is_valid


def _markdown(rule: MarkdownRuleConfig) -> Callable[[Sequence[Episode]], Scores]:
    return _each(lambda episode: markdown(episode.completion, headings=rule.headings, lists=rule.lists))


def _repetition(rule: RepetitionRuleConfig) -> Callable[[Sequence[Episode]], Scores]:
    return _each(lambda episode: repetition(episode.completion, n=rule.n))


def _patterns(rule: BannedRuleConfig | RequiredRuleConfig, *, sign: float) -> Callable[[Sequence[Episode]], Scores]:
    patterns = [regex.compile(pattern) for pattern in rule.patterns]
    return _each(lambda episode: sign * matching_fraction(episode.completion, patterns, timeout=rule.match_timeout))


def _refusal(rule: RefusalRuleConfig, prompts: str) -> Callable[[Sequence[Episode]], Scores]:
    patterns = [regex.compile(pattern) for pattern in rule.patterns or REFUSALS]

    def score(episode: Episode) -> float:
        try:
            expected = yes_or_no(episode.row.get(rule.column))
        except ValueError as error:
            raise DataError(f"column {rule.column} of {prompts}: {error}") from error
        at = {"penalty": rule.benign_penalty, "timeout": rule.match_timeout}
        return refusal(episode.completion, patterns, expected=expected, **at)

    return _each(score)


def _answer(rule: AnswerRuleConfig, prompts: str) -> Callable[[Sequence[Episode]], Scores]:
    same = same_number if rule.match == "number" else same_text

    def score(episode: Episode) -> float:
        try:
            return same(episode.completion, str(episode.row[rule.column]))
        except ValueError as error:
            raise DataError(f"column {rule.column} of {prompts}: {error}") from error

    return _each(score)


def _length(rule: LengthRuleConfig) -> Callable[[Sequence[Episode]], Scores]:
    def length(episode: Episode) -> int:
        return episode.tokens if rule.unit == "tokens" else len(words(episode.completion))

    return _each(lambda episode: length_band(length(episode), low=rule.min, high=rule.max))


def _function(rule: FunctionRuleConfig, option: str) -> Callable[[Sequence[Episode]], Scores]:
    try:
        function = load_function(rule.path)
    except ValueError as error:
        raise ConfigError(f"{option}.function.path: {error}") from error

    def score(episodes: Sequence[Episode]) -> Scores:
        try:
            return by_function(function, episodes)
        except Exception as error:
            raise RunError(f"{rule.path}: {reason_of(error)}") from error

    return score


def _endpoint(rule: EndpointRuleConfig, limit: float, option: str) -> Callable[[Sequence[Episode]], Scores]:
    """Return scores from an endpoint; with ``on_failure`` other than error, a failed request scores NaN.

    The requests of a batch share nine tenths of ``limit`` seconds. The remaining answers then score NaN too, before
    the run would end for the timeout.
    """

    def request(episodes: Sequence[Episode], deadline: float) -> Scores:
        at = {"timeout": rule.timeout, "retries": rule.retries, "limit": f"{option}.timeout"}
        try:
            return by_endpoint(rule.url, episodes, deadline=deadline, **at)
        except EndpointError as error:
            if rule.on_failure == "error":
                raise
            logger.warning("%s.endpoint: %s; the update leaves out %d answers", option, error, len(episodes))
            return [math.nan] * len(episodes)

    def score(episodes: Sequence[Episode]) -> Scores:
        starts, deadline = range(0, len(episodes), rule.batch_size), time.monotonic() + 0.9 * limit
        return [value for start in starts for value in request(episodes[start : start + rule.batch_size], deadline)]

    return score
