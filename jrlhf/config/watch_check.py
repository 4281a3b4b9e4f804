"""What the values of ``ppo.guards``, ``ppo.canary`` and ``safety`` must satisfy. Imports no JAX."""

from collections.abc import Iterator

from jrlhf.config.rewards_check import Rule, pattern_rules
from jrlhf.config.schema import PPOConfig
from jrlhf.config.watch import GuardConfig, GuardsConfig, SafetyConfig


def guards_rules(path: str, guards: GuardsConfig) -> Iterator[Rule]:
    for name, guard in vars(guards).items():
        if isinstance(guard, GuardConfig):
            yield guard.patience >= 1, f"{path}.{name}.patience", guard.patience, "1 or more"
    yield guards.length.bound > 1, f"{path}.length.bound", guards.length.bound, "above 1"
    yield guards.rollbacks >= 0, f"{path}.rollbacks", guards.rollbacks, "0 or more"
    yield 0 < guards.rollback_lr <= 1, f"{path}.rollback_lr", guards.rollback_lr, "above 0 and up to 1"
    yield guards.rollback_beta >= 1, f"{path}.rollback_beta", guards.rollback_beta, "1 or more"


def canary_rules(path: str, ppo: PPOConfig) -> Iterator[Rule]:
    canary = ppo.canary
    yield canary.errors >= 0, f"{path}.canary.errors", canary.errors, "0 or more"
    unread = bool(canary.judge.path) and canary.action == "off"
    off = f"empty, as {path}.canary.action is off and so nobody would ask it"
    yield not unread, f"{path}.canary.judge.path", canary.judge.path, off
    if canary.action != "off":
        why = f"as {path}.canary.action is {canary.action}"
        yield bool(ppo.prompts.eval), f"{path}.prompts.eval", ppo.prompts.eval, f"set, {why}"
        yield (
            ppo.checkpoint.keep_best >= 1,
            f"{path}.checkpoint.keep_best",
            ppo.checkpoint.keep_best,
            f"1 or more, {why}",
        )
        saved = ppo.log.eval_every % max(ppo.checkpoint.every, 1) == 0
        every = f"a divisor of {path}.log.eval_every ({ppo.log.eval_every}), {why}"
        yield saved, f"{path}.checkpoint.every", ppo.checkpoint.every, every


def safety_rules(path: str, safety: SafetyConfig) -> Iterator[Rule]:
    named = bool(safety.column) and safety.column != "prompt"
    yield named, f"{path}.column", safety.column, "a column other than prompt"
    yield from pattern_rules(path, safety.patterns, safety.match_timeout)
