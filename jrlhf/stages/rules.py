"""The rules of a config: which are on, what they read of a row, and how a batch of answers goes through them."""

import time
from collections.abc import Callable, Sequence
from threading import Thread
from typing import NamedTuple

from jrlhf.config_rewards import JSONRuleConfig, LengthRuleConfig, RewardsConfig
from jrlhf.data import Columns
from jrlhf.rules import Episode, length_band, valid_json, words

Scores = list[float]


class Rule(NamedTuple):
    """One that is on. Its scores of a batch are of the answers alone, whoever asks and how often."""

    name: str
    weight: float
    score: Callable[[Sequence[Episode]], Scores]


def make_rules(rewards: RewardsConfig) -> tuple[Rule, ...]:
    """Those with a weight. ConfigError for a file that one needs and cannot read."""
    made: tuple[tuple[str, float, Callable[[], Callable[[Sequence[Episode]], Scores]]], ...] = (
        ("json", rewards.json.weight, lambda: _json(rewards.json)),
        ("length", rewards.length.weight, lambda: _length(rewards.length)),
    )
    return tuple(Rule(name, weight, make()) for name, weight, make in made if weight)


def columns_read(rewards: RewardsConfig) -> Columns:
    """What the rules that are on read of a prompt's row."""
    return Columns()


def start_rules(
    rules: Sequence[Rule], episodes: Sequence[Episode], *, timeout: float
) -> Callable[[], dict[str, Scores]]:
    """Begin to score, a thread a rule; what is returned waits for all of them, each rule's scores by its name.

    RuntimeError, which names the rule, for one that fails or is not done in ``timeout`` seconds: its thread is left
    behind, and does not keep the program from ending.
    """
    found: dict[str, Scores | Exception] = {}

    def run(rule: Rule) -> None:
        try:
            found[rule.name] = rule.score(episodes)
        except Exception as error:
            found[rule.name] = error

    threads = [Thread(target=run, args=(rule,), daemon=True, name=f"rule {rule.name}") for rule in rules]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()

    def wait() -> dict[str, Scores]:
        scores: dict[str, Scores] = {}
        for rule, thread in zip(rules, threads, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            answer = found.get(rule.name)
            if answer is None:
                raise RuntimeError(f"ppo.rewards.{rule.name}: not done in {timeout:g} s (ppo.rewards.timeout)")
            if isinstance(answer, Exception):
                raise RuntimeError(f"ppo.rewards.{rule.name}: {type(answer).__name__}: {answer}") from answer
            scores[rule.name] = answer
        return scores

    return wait


def _each(score: Callable[[Episode], float]) -> Callable[[Sequence[Episode]], Scores]:
    return lambda episodes: [float(score(episode)) for episode in episodes]


def _json(rule: JSONRuleConfig) -> Callable[[Sequence[Episode]], Scores]:
    return _each(lambda episode: valid_json(episode.completion, fenced=rule.fenced))


def _length(rule: LengthRuleConfig) -> Callable[[Sequence[Episode]], Scores]:
    def length(episode: Episode) -> int:
        return episode.tokens if rule.unit == "tokens" else len(words(episode.completion))

    return _each(lambda episode: length_band(length(episode), low=rule.min, high=rule.max))
