"""Checks of every stage that learns from answers which its own policy samples. Imports no JAX."""

from collections.abc import Iterator

from jrlhf.config.rewards_check import rewards_checks
from jrlhf.config.rollout import RolloutConfig
from jrlhf.config.schema import SamplingConfig
from jrlhf.config.schema_check import (
    Check,
    checkpoint_checks,
    data_checks,
    gate_checks,
    log_checks,
    lora_checks,
    optim_checks,
    sampling_checks,
)
from jrlhf.config.watch_check import canary_checks, guards_checks


def rollout_checks(path: str, section: RolloutConfig) -> Iterator[Check]:
    yield from data_checks(f"{path}.prompts", section.prompts)
    yield from lora_checks(f"{path}.lora", section.lora)
    yield from optim_checks(f"{path}.optim", section.optim)
    yield from checkpoint_checks(f"{path}.checkpoint", section.checkpoint)
    yield from log_checks(f"{path}.log", section.log)
    same = "because the update uses the distribution of the sampler"
    yield from policy_sampling_checks(f"{path}.sampling", section.sampling, reason=same)
    yield from _batch_checks(path, section)
    yield from _weight_cap_checks(path, section)
    penalty = section.missing_eos_penalty
    yield penalty >= 0, f"{path}.missing_eos_penalty", penalty, "0 or more"
    yield section.kl.coef >= 0, f"{path}.kl.coef", section.kl.coef, "0 or more"
    yield section.kl.target >= 0, f"{path}.kl.target", section.kl.target, "0 or more"
    yield section.kl.horizon >= 1, f"{path}.kl.horizon", section.kl.horizon, "1 or more"
    yield section.max_skipped >= 1, f"{path}.max_skipped", section.max_skipped, "1 or more"
    number, held_out = section.best_of_n, section.prompts.eval
    yield number >= 0 and number != 1, f"{path}.best_of_n", number, "2 or more, or 0 (off)"
    has_prompts = not number or bool(held_out)
    yield has_prompts, f"{path}.prompts.eval", held_out, f"set, because {path}.best_of_n is {number}"
    yield from guards_checks(f"{path}.guards", section.guards)
    yield from canary_checks(path, section)
    yield from gate_checks(f"{path}.gates", section.gates, section.prompts.eval, f"{path}.prompts.eval")
    yield from rewards_checks(f"{path}.rewards", section.rewards)


def policy_sampling_checks(path: str, sampling: SamplingConfig, *, reason: str) -> Iterator[Check]:
    """Check that answers are drawn from the policy itself; ``reason`` says why they must be."""
    yield from sampling_checks(path, sampling)
    yield sampling.temperature != 0, f"{path}.temperature", sampling.temperature, f"above 0, {reason}"
    yield sampling.top_k == 0, f"{path}.top_k", sampling.top_k, f"0 (off), {reason}"
    yield sampling.top_p == 1, f"{path}.top_p", sampling.top_p, f"1 (off), {reason}"


def _batch_checks(path: str, section: RolloutConfig) -> Iterator[Check]:
    episodes, parts, minibatches = section.episodes, section.rollout_parts, section.minibatches
    yield section.iterations >= 1, f"{path}.iterations", section.iterations, "1 or more"
    yield episodes >= 1, f"{path}.episodes", episodes, "1 or more"
    yield parts >= 1, f"{path}.rollout_parts", parts, "1 or more"
    divides = parts < 1 or episodes % parts == 0
    yield divides, f"{path}.rollout_parts", parts, f"a divisor of {path}.episodes ({episodes})"
    yield section.epochs >= 1, f"{path}.epochs", section.epochs, "1 or more"
    yield minibatches >= 1, f"{path}.minibatches", minibatches, "1 or more"
    divides = minibatches < 1 or episodes % minibatches == 0
    yield divides, f"{path}.minibatches", minibatches, f"a divisor of {path}.episodes ({episodes})"
    yield section.microbatch >= 0, f"{path}.microbatch", section.microbatch, "0 (automatic) or more"


def _weight_cap_checks(path: str, section: RolloutConfig) -> Iterator[Check]:
    cap, key = section.sampler_weight_cap, f"{path}.sampler_weight_cap"
    yield cap == "auto" or cap >= 0, key, cap, "auto, or 0 (off) or more"
    compares = section.old_logprobs == "policy" or cap in ("auto", 0)
    yield compares, key, cap, f"0 or auto, because {path}.old_logprobs sampler leaves nothing to compare with"


def is_exact(section: RolloutConfig) -> bool:
    """Return whether the sampler's log-probs are the trainer's up to rounding in float32."""
    return section.model.dtype == "float32" and section.sampling.kv_cache == "compute"


def old_logprobs_check(path: str, section: RolloutConfig, *, exact: bool, also: str = "") -> Check:
    """Refuse the sampler's log-probs where they are not ``exact``; ``also`` ends the list of conditions."""
    join = ", " if also else " and "
    must = f"policy, unless {path}.model.dtype is float32{join}{path}.sampling.kv_cache compute{also}"
    return exact or section.old_logprobs == "policy", f"{path}.old_logprobs", section.old_logprobs, must
