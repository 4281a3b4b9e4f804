"""Checks of the GRPO stage's config. Imports no JAX."""

from collections.abc import Iterator

from jrlhf.config.grpo import GRPOConfig
from jrlhf.config.rewards_check import rule_weights
from jrlhf.config.rollout_check import is_exact, old_logprobs_check, rollout_checks
from jrlhf.config.schema_check import Check, trained_model_check


def grpo_checks(path: str, grpo: GRPOConfig) -> Iterator[Check]:
    yield from rollout_checks(path, grpo)
    if not grpo.has_reference:
        # With a reference the stage reads its frozen weights; without one all weights are the trained ones.
        yield trained_model_check(path, grpo.model, grpo.lora)
    yield old_logprobs_check(path, grpo, exact=is_exact(grpo))
    yield from _group_checks(path, grpo)
    yield from _kl_checks(f"{path}.kl", grpo)
    yield from _loss_checks(path, grpo)
    yield from _overlong_checks(path, grpo)
    yield from _normalise_checks(path, grpo)


def _group_checks(path: str, grpo: GRPOConfig) -> Iterator[Check]:
    samples, episodes, parts = grpo.samples, grpo.episodes, grpo.rollout_parts
    yield (
        samples >= 2,
        f"{path}.samples",
        samples,
        "2 or more, because an answer is set against the others of its group",
    )
    yield grpo.resample >= 0, f"{path}.resample", grpo.resample, "0 (off) or more"
    divides = samples < 1 or episodes % samples == 0
    yield divides, f"{path}.samples", samples, f"a divisor of {path}.episodes ({episodes})"
    whole = samples < 1 or parts < 1 or episodes // samples % parts == 0
    must = f"a divisor of the rollout's prompts, {path}.episodes / {path}.samples ({episodes // max(samples, 1)})"
    yield whole, f"{path}.rollout_parts", parts, must


def _kl_checks(path: str, grpo: GRPOConfig) -> Iterator[Check]:
    kl = grpo.kl
    steers = kl.target <= 0 or kl.coef > 0
    yield steers, f"{path}.target", kl.target, f"0, because {path}.coef is 0, which leaves nothing to adapt"
    is_placed = kl.place == "auto" or kl.coef > 0
    yield is_placed, f"{path}.place", kl.place, f"auto, because {path}.coef is 0, which leaves no penalty to place"
    has_gradient = kl.place == "reward" or kl.estimator != "k1"
    must = f"k2 or k3, because {path}.place is {kl.place}, and in the loss k1's gradient is 0 on average"
    yield has_gradient, f"{path}.estimator", kl.estimator, must


def _loss_checks(path: str, grpo: GRPOConfig) -> Iterator[Check]:
    if grpo.loss == "cispo":
        reason = f"because {path}.loss cispo weighs each token by its own ratio"
        yield 0 < grpo.clip <= 1, f"{path}.clip", grpo.clip, "above 0 and at most 1 (off)"
        yield grpo.ratio == "token", f"{path}.ratio", grpo.ratio, f"token, {reason}"
        off = f"0 (off), because {path}.loss cispo has no clipped loss to bound"
        yield grpo.dual_clip == 0, f"{path}.dual_clip", grpo.dual_clip, off
    else:
        yield 0 < grpo.clip < 1, f"{path}.clip", grpo.clip, "above 0 and below 1"
        yield grpo.dual_clip == 0 or grpo.dual_clip > 1, f"{path}.dual_clip", grpo.dual_clip, "above 1, or 0 (off)"
    yield grpo.clip_high >= 0, f"{path}.clip_high", grpo.clip_high, "0 (as clip) or more"
    yield grpo.entropy_coef >= 0, f"{path}.entropy_coef", grpo.entropy_coef, "0 or more"
    yield grpo.target_approx_kl >= 0, f"{path}.target_approx_kl", grpo.target_approx_kl, "0 or more"
    yield 0 <= grpo.ema_decay < 1, f"{path}.ema_decay", grpo.ema_decay, "from 0 to below 1"


def _overlong_checks(path: str, grpo: GRPOConfig) -> Iterator[Check]:
    buffer, penalty, limit = grpo.overlong_buffer, grpo.overlong_penalty, grpo.sampling.max_new_tokens
    within = f"from 0 (off) to {path}.sampling.max_new_tokens ({limit})"
    yield 0 <= buffer <= limit, f"{path}.overlong_buffer", buffer, within
    yield penalty >= 0, f"{path}.overlong_penalty", penalty, "0 or more"
    together = (buffer > 0) == (penalty > 0)
    must = f"above 0 if and only if {path}.overlong_buffer is ({buffer})"
    yield together, f"{path}.overlong_penalty", penalty, must


def _normalise_checks(path: str, grpo: GRPOConfig) -> Iterator[Check]:
    if grpo.normalise == "sum":
        return
    key, rewards = f"{path}.normalise", grpo.rewards
    several = rewards.uses_model + sum(weight > 0 for weight in rule_weights(rewards).values())
    yield several >= 2, key, grpo.normalise, f"sum, unless several rewards of {path}.rewards have a weight"
    yield grpo.scale, f"{path}.scale", grpo.scale, f"true, because {key} each brings every reward to one scale"
    alone = f"0, because {key} each has no sum to take it from; give the rule stop or length of {path}.rewards a weight"
    penalties = {"missing_eos_penalty": grpo.missing_eos_penalty, "overlong_penalty": grpo.overlong_penalty}
    for name, penalty in penalties.items():
        yield penalty == 0, f"{path}.{name}", penalty, alone
    in_loss = grpo.kl_place != "reward"
    yield in_loss, f"{path}.kl.place", grpo.kl.place, f"loss, because {key} each has no sum to take the KL from"
