"""Checks of each stage's config. Imports no JAX."""

from collections.abc import Iterator

from jrlhf.config.rollout_check import is_exact, old_logprobs_check, rollout_checks
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
from jrlhf.config.stages import PPOConfig, RewardConfig, SFTConfig


def sft_checks(path: str, sft: SFTConfig) -> Iterator[Check]:
    yield from data_checks(f"{path}.data", sft.data)
    yield from lora_checks(f"{path}.lora", sft.lora)
    yield trained_model_check(path, sft.model, sft.lora)
    yield from optim_checks(f"{path}.optim", sft.optim)
    yield from checkpoint_checks(f"{path}.checkpoint", sft.checkpoint)
    yield from log_checks(f"{path}.log", sft.log)
    yield from sampling_checks(f"{path}.sampling", sft.sampling)
    yield sft.epochs > 0, f"{path}.epochs", sft.epochs, "above 0"
    yield from batch_checks(path, sft.batch_size, sft.microbatch)
    yield from packing_checks(path, sft.pack_length, sft.data.max_length)
    yield sft.max_skipped >= 1, f"{path}.max_skipped", sft.max_skipped, "1 or more"
    yield from gate_checks(f"{path}.gates", sft.gates, sft.data.eval, f"{path}.data.eval")
    yield sft.candidates >= 1, f"{path}.candidates", sft.candidates, "1 or more"


def reward_checks(path: str, reward: RewardConfig) -> Iterator[Check]:
    yield from data_checks(f"{path}.data", reward.data)
    yield from lora_checks(f"{path}.lora", reward.lora)
    yield trained_model_check(path, reward.model, reward.lora)
    yield from optim_checks(f"{path}.optim", reward.optim)
    yield from checkpoint_checks(f"{path}.checkpoint", reward.checkpoint)
    yield from log_checks(f"{path}.log", reward.log)
    yield reward.epochs > 0, f"{path}.epochs", reward.epochs, "above 0"
    yield from batch_checks(path, reward.batch_size, reward.microbatch)
    yield from packing_checks(path, reward.pack_length, reward.data.max_length)
    yield reward.max_skipped >= 1, f"{path}.max_skipped", reward.max_skipped, "1 or more"
    yield from gate_checks(f"{path}.gates", reward.gates, reward.data.eval, f"{path}.data.eval")
    yield reward.center_coef >= 0, f"{path}.center_coef", reward.center_coef, "0 or more"


def ppo_checks(path: str, ppo: PPOConfig) -> Iterator[Check]:
    yield from rollout_checks(path, ppo)
    yield from data_checks(f"{path}.ptx", ppo.ptx)
    exact = is_exact(ppo) and ppo.value_from != "shared"
    yield old_logprobs_check(path, ppo, exact=exact, also=", and value_from not shared")
    yield from _ppo_loss_checks(path, ppo)
    has_start = ppo.value_from != "reward" or ppo.rewards.uses_model
    must = f"auto or policy, because {path}.rewards.model_weight is 0"
    yield has_start, f"{path}.value_from", ppo.value_from, must


def _ppo_loss_checks(path: str, ppo: PPOConfig) -> Iterator[Check]:
    yield ppo.value_lr >= 0, f"{path}.value_lr", ppo.value_lr, "0 or more"
    yield 0 <= ppo.gamma <= 1, f"{path}.gamma", ppo.gamma, "from 0 to 1"
    yield 0 <= ppo.lam <= 1, f"{path}.lam", ppo.lam, "from 0 to 1"
    yield 0 < ppo.clip < 1, f"{path}.clip", ppo.clip, "above 0 and below 1"
    yield ppo.dual_clip == 0 or ppo.dual_clip > 1, f"{path}.dual_clip", ppo.dual_clip, "above 1, or 0 (off)"
    yield ppo.value_clip > 0, f"{path}.value_clip", ppo.value_clip, "above 0"
    yield ppo.value_coef >= 0, f"{path}.value_coef", ppo.value_coef, "0 or more"
    yield ppo.entropy_coef >= 0, f"{path}.entropy_coef", ppo.entropy_coef, "0 or more"
    yield ppo.target_approx_kl >= 0, f"{path}.target_approx_kl", ppo.target_approx_kl, "0 or more"
    yield ppo.critic_warmup >= 0, f"{path}.critic_warmup", ppo.critic_warmup, "0 or more"
    yield 0 <= ppo.ema_decay < 1, f"{path}.ema_decay", ppo.ema_decay, "from 0 to below 1"
    yield ppo.ptx_coef >= 0, f"{path}.ptx_coef", ppo.ptx_coef, "0 or more"
    has_rows = ppo.ptx_coef <= 0 or bool(ppo.ptx.train)
    yield has_rows, f"{path}.ptx.train", ppo.ptx.train, f"set, because {path}.ptx_coef is {ppo.ptx_coef}"
