"""Checks of ``guards``, ``canary`` and ``safety``. Imports no JAX."""

from collections.abc import Iterator

from jrlhf.config.rewards_check import pattern_checks
from jrlhf.config.rollout import RolloutConfig
from jrlhf.config.schema_check import Check
from jrlhf.config.watch import GuardConfig, RolloutGuardsConfig, SafetyConfig


def guards_checks(path: str, guards: RolloutGuardsConfig) -> Iterator[Check]:
    for name, guard in vars(guards).items():
        if isinstance(guard, GuardConfig):
            yield guard.patience >= 1, f"{path}.{name}.patience", guard.patience, "1 or more"
    yield guards.length.bound > 1, f"{path}.length.bound", guards.length.bound, "above 1"
    yield guards.rollbacks >= 0, f"{path}.rollbacks", guards.rollbacks, "0 or more"
    yield 0 < guards.rollback_lr <= 1, f"{path}.rollback_lr", guards.rollback_lr, "above 0 and up to 1"
    yield guards.rollback_beta >= 1, f"{path}.rollback_beta", guards.rollback_beta, "1 or more"


def canary_checks(path: str, section: RolloutConfig) -> Iterator[Check]:
    canary = section.canary
    yield canary.errors >= 0, f"{path}.canary.errors", canary.errors, "0 or more"
    unread = bool(canary.judge.path) and canary.action == "off"
    off = f"empty, because {path}.canary.action is off and would not use it"
    yield not unread, f"{path}.canary.judge.path", canary.judge.path, off
    if canary.action != "off":
        reason = f"because {path}.canary.action is {canary.action}"
        yield bool(section.prompts.eval), f"{path}.prompts.eval", section.prompts.eval, f"set, {reason}"
        yield (
            section.checkpoint.keep_best >= 1,
            f"{path}.checkpoint.keep_best",
            section.checkpoint.keep_best,
            f"1 or more, {reason}",
        )
        saved = section.log.eval_every % max(section.checkpoint.every, 1) == 0
        every = f"a divisor of {path}.log.eval_every ({section.log.eval_every}), {reason}"
        yield saved, f"{path}.checkpoint.every", section.checkpoint.every, every


def safety_checks(path: str, safety: SafetyConfig) -> Iterator[Check]:
    valid = bool(safety.column) and safety.column != "prompt"
    yield valid, f"{path}.column", safety.column, "a column other than prompt"
    yield from pattern_checks(path, safety.patterns, safety.match_timeout)
