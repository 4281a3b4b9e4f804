"""Checks of the DPO stage's config. Imports no JAX."""

from collections.abc import Iterator

from jrlhf.config.rewards_check import rewards_checks
from jrlhf.config.rollout_check import policy_sampling_checks
from jrlhf.config.schema_check import (
    Check,
    batch_checks,
    checkpoint_checks,
    data_checks,
    gate_checks,
    log_checks,
    lora_checks,
    optim_checks,
    packing_checks,
    sampling_checks,
    trained_model_check,
)
from jrlhf.config.stages import DPOConfig

LOW_SIMPO_BETA = 1.0
"""Half of the lowest β in SimPO's paper."""


def dpo_checks(path: str, dpo: DPOConfig) -> Iterator[Check]:
    yield from data_checks(f"{path}.data", dpo.data)
    yield from lora_checks(f"{path}.lora", dpo.lora)
    yield trained_model_check(path, dpo.model, dpo.lora)
    yield from optim_checks(f"{path}.optim", dpo.optim)
    yield from checkpoint_checks(f"{path}.checkpoint", dpo.checkpoint)
    yield from log_checks(f"{path}.log", dpo.log)
    yield from sampling_checks(f"{path}.sampling", dpo.sampling)
    yield dpo.epochs > 0, f"{path}.epochs", dpo.epochs, "above 0"
    yield from batch_checks(path, dpo.batch_size, dpo.microbatch)
    yield from packing_checks(path, dpo.pack_length, dpo.data.max_length)
    yield dpo.max_skipped >= 1, f"{path}.max_skipped", dpo.max_skipped, "1 or more"
    yield from gate_checks(f"{path}.gates", dpo.gates, dpo.data.eval, f"{path}.data.eval")
    yield from _loss_checks(path, dpo)
    yield from _answer_checks(path, dpo)


def dpo_advice(path: str, dpo: DPOConfig) -> str:
    """Return a warning about settings that are valid but most likely a mistake; empty if there are none."""
    if dpo.loss != "simpo" or dpo.beta >= LOW_SIMPO_BETA:
        return ""
    return (
        f"{path}.beta: {dpo.beta:g} is low for loss simpo, which scales log-probs that are means over tokens; "
        "Meng et al. (2024, arXiv 2405.14734) use 2 to 2.5, and up to 10 with larger models"
    )


def _answer_checks(path: str, dpo: DPOConfig) -> Iterator[Check]:
    """Check the evaluation on held-out prompts, and that nothing is set for it where there is none."""
    prompts, none = dpo.prompts, DPOConfig()
    yield not prompts.train, f"{path}.prompts.train", prompts.train, f"empty, because {path} learns from rankings"
    yield from data_checks(f"{path}.prompts", prompts)
    if prompts.eval:
        same = f"because the KL of answers to {path}.prompts.eval is that of the policy itself"
        yield from policy_sampling_checks(f"{path}.sampling", dpo.sampling, reason=same)
        yield from rewards_checks(f"{path}.rewards", dpo.rewards)
        return
    unread = f"as by default, because {path}.prompts.eval is empty"
    yield dpo.reward == none.reward, f"{path}.reward", dpo.reward, unread
    yield dpo.rewards == none.rewards, f"{path}.rewards", dpo.rewards, unread


def _loss_checks(path: str, dpo: DPOConfig) -> Iterator[Check]:
    yield dpo.beta > 0, f"{path}.beta", dpo.beta, "above 0, else nothing is learnt from the order of answers"
    # From one half on, the worse answer would be learnt as the better one.
    yield 0 <= dpo.label_smoothing < 0.5, f"{path}.label_smoothing", dpo.label_smoothing, "from 0 to below 0.5"
    smooth = dpo.loss == "sigmoid" or dpo.label_smoothing == 0
    only = f"0, because {path}.loss is {dpo.loss}"
    yield smooth, f"{path}.label_smoothing", dpo.label_smoothing, f"{only} and only sigmoid has smooth labels"
    yield dpo.gamma >= 0, f"{path}.gamma", dpo.gamma, "0 or more"
    margin = dpo.loss == "simpo" or dpo.gamma == 0
    yield margin, f"{path}.gamma", dpo.gamma, f"{only} and only simpo has this margin"
    for name in ("desirable_weight", "undesirable_weight"):
        weight: float = vars(dpo)[name]
        yield weight > 0, f"{path}.{name}", weight, "above 0, because kto learns from both kinds of answers"
        weighs = dpo.loss == "kto" or weight == 1
        yield weighs, f"{path}.{name}", weight, f"1, because {path}.loss is {dpo.loss} and only kto has this weight"
