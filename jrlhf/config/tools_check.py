"""Checks of the configs of tools that need more than a line. Imports no JAX."""

from collections.abc import Iterator

from jrlhf.config.rewards_check import rewards_checks, rule_weights
from jrlhf.config.schema_check import Check
from jrlhf.config.tools import SampleConfig


def sample_checks(config: SampleConfig) -> Iterator[Check]:
    """Check how many answers are drawn, and what scores them."""
    samples, rewards = config.samples, config.rewards
    tasks = config.keep == "all"
    yield samples >= 2 and (samples <= 9 or not tasks), "samples", samples, "from 2 to 9" if tasks else "2 or more"
    temperature = config.sampling.temperature
    yield temperature != 0, "sampling.temperature", temperature, "above 0, else all answers are the same"
    scored = bool(config.score) or any(rule_weights(rewards).values())
    yield not (tasks and scored), "keep", config.keep, "best or best-worst, because score or rewards is set"
    if tasks:
        return
    yield scored, "score", config.score, f"set, or a rule of rewards have a weight, because keep is {config.keep}"
    yield not rewards.models, "rewards.models", rewards.models, "empty; score names the reward model"
    if config.score:
        yield rewards.model_weight > 0, "rewards.model_weight", rewards.model_weight, "above 0, because score is set"
    if scored:
        yield from rewards_checks("rewards", rewards)
