"""Factories of pure training steps over any model that speaks the protocols of ``jrlhf.types``."""

from jrlhf.steps.dpo import (
    AnswerLogprobs,
    DPOSettings,
    answer_logprobs,
    compared,
    make_dpo_step,
    preference_means,
    preference_sums,
)
from jrlhf.steps.experience import make_experience, make_readings, make_targets, rollout_metrics
from jrlhf.steps.generate import make_generate
from jrlhf.steps.groups import group_metrics, make_group_targets, make_policy_readings
from jrlhf.steps.grpo import GRPOSettings, make_grpo_step
from jrlhf.steps.kto import KTOSettings, Labelled, kto_figures, labelled, make_kto_step
from jrlhf.steps.networks import Networks, separate, shared
from jrlhf.steps.packing import without_padding
from jrlhf.steps.ppo import PPOSettings, make_ppo_step
from jrlhf.steps.reward import make_reward_step, score_completions, score_sequences
from jrlhf.steps.sft import make_sft_eval, make_sft_step, trained_tokens

__all__ = [
    "AnswerLogprobs",
    "DPOSettings",
    "GRPOSettings",
    "KTOSettings",
    "Labelled",
    "Networks",
    "PPOSettings",
    "answer_logprobs",
    "compared",
    "group_metrics",
    "kto_figures",
    "labelled",
    "make_dpo_step",
    "make_experience",
    "make_generate",
    "make_group_targets",
    "make_grpo_step",
    "make_kto_step",
    "make_policy_readings",
    "make_ppo_step",
    "make_readings",
    "make_reward_step",
    "make_sft_eval",
    "make_sft_step",
    "make_targets",
    "preference_means",
    "preference_sums",
    "rollout_metrics",
    "score_completions",
    "score_sequences",
    "separate",
    "shared",
    "trained_tokens",
    "without_padding",
]
