"""Checks of each stage's config. Imports no JAX."""

from collections.abc import Iterator

from jrlhf.config.rewards_check import rewards_checks
from jrlhf.config.schema import SamplingConfig
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
from jrlhf.config.watch_check import canary_checks, guards_checks


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
    yield from data_checks(f"{path}.prompts", ppo.prompts)
    yield from lora_checks(f"{path}.lora", ppo.lora)
    yield from optim_checks(f"{path}.optim", ppo.optim)
    yield from checkpoint_checks(f"{path}.checkpoint", ppo.checkpoint)
    yield from log_checks(f"{path}.log", ppo.log)
    yield from data_checks(f"{path}.ptx", ppo.ptx)
    yield from _ppo_sampling_checks(f"{path}.sampling", ppo.sampling)
    yield from _ppo_batch_checks(path, ppo)
    yield _old_logprobs_check(path, ppo)
    yield from _ppo_loss_checks(path, ppo)
    yield ppo.kl.coef >= 0, f"{path}.kl.coef", ppo.kl.coef, "0 or more"
    yield ppo.kl.target >= 0, f"{path}.kl.target", ppo.kl.target, "0 or more"
    yield ppo.kl.horizon >= 1, f"{path}.kl.horizon", ppo.kl.horizon, "1 or more"
    yield ppo.max_skipped >= 1, f"{path}.max_skipped", ppo.max_skipped, "1 or more"
    yield ppo.best_of_n >= 0 and ppo.best_of_n != 1, f"{path}.best_of_n", ppo.best_of_n, "2 or more, or 0 (off)"
    held_out = not ppo.best_of_n or bool(ppo.prompts.eval)
    yield held_out, f"{path}.prompts.eval", ppo.prompts.eval, f"set, because {path}.best_of_n is {ppo.best_of_n}"
    yield from guards_checks(f"{path}.guards", ppo.guards)
    yield from canary_checks(path, ppo)
    yield from gate_checks(f"{path}.gates", ppo.gates, ppo.prompts.eval, f"{path}.prompts.eval")
    yield from rewards_checks(f"{path}.rewards", ppo.rewards, value_from=ppo.value_from)


def _ppo_sampling_checks(path: str, sampling: SamplingConfig) -> Iterator[Check]:
    same = "because the update uses the distribution of the sampler"
    yield from sampling_checks(path, sampling)
    yield sampling.temperature != 0, f"{path}.temperature", sampling.temperature, f"above 0, {same}"
    yield sampling.top_k == 0, f"{path}.top_k", sampling.top_k, f"0 (off), {same}"
    yield sampling.top_p == 1, f"{path}.top_p", sampling.top_p, f"1 (off), {same}"


def _ppo_batch_checks(path: str, ppo: PPOConfig) -> Iterator[Check]:
    yield ppo.iterations >= 1, f"{path}.iterations", ppo.iterations, "1 or more"
    yield ppo.episodes >= 1, f"{path}.episodes", ppo.episodes, "1 or more"
    yield ppo.rollout_parts >= 1, f"{path}.rollout_parts", ppo.rollout_parts, "1 or more"
    divides = ppo.rollout_parts < 1 or ppo.episodes % ppo.rollout_parts == 0
    yield divides, f"{path}.rollout_parts", ppo.rollout_parts, f"a divisor of {path}.episodes ({ppo.episodes})"
    yield ppo.epochs >= 1, f"{path}.epochs", ppo.epochs, "1 or more"
    yield ppo.minibatches >= 1, f"{path}.minibatches", ppo.minibatches, "1 or more"
    divides = ppo.minibatches < 1 or ppo.episodes % ppo.minibatches == 0
    yield divides, f"{path}.minibatches", ppo.minibatches, f"a divisor of {path}.episodes ({ppo.episodes})"
    yield ppo.microbatch >= 0, f"{path}.microbatch", ppo.microbatch, "0 (automatic) or more"


def _old_logprobs_check(path: str, ppo: PPOConfig) -> Check:
    exact = ppo.model.dtype == "float32" and ppo.sampling.kv_cache == "compute" and ppo.value_from != "shared"
    must = f"policy, unless {path}.model.dtype is float32, {path}.sampling.kv_cache compute, and value_from not shared"
    return exact or ppo.old_logprobs == "policy", f"{path}.old_logprobs", ppo.old_logprobs, must


def _ppo_loss_checks(path: str, ppo: PPOConfig) -> Iterator[Check]:
    yield ppo.value_lr >= 0, f"{path}.value_lr", ppo.value_lr, "0 or more"
    yield 0 <= ppo.gamma <= 1, f"{path}.gamma", ppo.gamma, "from 0 to 1"
    yield 0 <= ppo.lam <= 1, f"{path}.lam", ppo.lam, "from 0 to 1"
    yield 0 < ppo.clip < 1, f"{path}.clip", ppo.clip, "above 0 and below 1"
    yield ppo.dual_clip == 0 or ppo.dual_clip > 1, f"{path}.dual_clip", ppo.dual_clip, "above 1, or 0 (off)"
    yield ppo.value_clip > 0, f"{path}.value_clip", ppo.value_clip, "above 0"
    yield ppo.value_coef >= 0, f"{path}.value_coef", ppo.value_coef, "0 or more"
    yield ppo.entropy_coef >= 0, f"{path}.entropy_coef", ppo.entropy_coef, "0 or more"
    yield ppo.missing_eos_penalty >= 0, f"{path}.missing_eos_penalty", ppo.missing_eos_penalty, "0 or more"
    yield ppo.target_approx_kl >= 0, f"{path}.target_approx_kl", ppo.target_approx_kl, "0 or more"
    yield ppo.critic_warmup >= 0, f"{path}.critic_warmup", ppo.critic_warmup, "0 or more"
    yield 0 <= ppo.ema_decay < 1, f"{path}.ema_decay", ppo.ema_decay, "from 0 to below 1"
    yield ppo.ptx_coef >= 0, f"{path}.ptx_coef", ppo.ptx_coef, "0 or more"
    has_rows = ppo.ptx_coef <= 0 or bool(ppo.ptx.train)
    yield has_rows, f"{path}.ptx.train", ppo.ptx.train, f"set, because {path}.ptx_coef is {ppo.ptx_coef}"
