"""Pure maths over arrays: masks, log-probs, KL, advantages, losses, sampling. JAX only, never a config."""

from jrlhf.core.advantages import gae, shape_rewards
from jrlhf.core.decoding import uncached_decode_fns
from jrlhf.core.groups import Baseline, equal_scores, group_advantages
from jrlhf.core.kl import KLEstimator, kl_penalty, update_kl_coef
from jrlhf.core.logprobs import (
    align_to_tokens,
    from_logits,
    logprobs_and_entropy,
    next_token_logprobs,
    predictable,
    token_logprobs,
)
from jrlhf.core.losses import (
    cispo_loss,
    importance_ratio,
    kwise_centering_loss,
    kwise_ranking_loss,
    ordered_pairs,
    ppo_policy_loss,
    ppo_value_loss,
    ranking_loss,
    truncated_weights,
)
from jrlhf.core.masks import (
    at_last_token,
    last_token_mask,
    masked_mean,
    masked_sum,
    masked_whiten,
    positions_from_mask,
    real_tokens,
)
from jrlhf.core.preferences import (
    PreferenceLoss,
    dpo_loss,
    kto_loss,
    kwise_dpo_loss,
    normalises_length,
    pair_differences,
    reference_point,
)
from jrlhf.core.sampling import answer_keys, sample, sample_at, truncate_logits, uniforms
from jrlhf.core.trees import combine, partition

__all__ = [
    "Baseline",
    "KLEstimator",
    "PreferenceLoss",
    "align_to_tokens",
    "answer_keys",
    "at_last_token",
    "cispo_loss",
    "combine",
    "dpo_loss",
    "equal_scores",
    "from_logits",
    "gae",
    "group_advantages",
    "importance_ratio",
    "kl_penalty",
    "kto_loss",
    "kwise_centering_loss",
    "kwise_dpo_loss",
    "kwise_ranking_loss",
    "last_token_mask",
    "logprobs_and_entropy",
    "masked_mean",
    "masked_sum",
    "masked_whiten",
    "next_token_logprobs",
    "normalises_length",
    "ordered_pairs",
    "pair_differences",
    "partition",
    "positions_from_mask",
    "ppo_policy_loss",
    "ppo_value_loss",
    "predictable",
    "ranking_loss",
    "real_tokens",
    "reference_point",
    "sample",
    "sample_at",
    "shape_rewards",
    "token_logprobs",
    "truncate_logits",
    "truncated_weights",
    "uncached_decode_fns",
    "uniforms",
    "update_kl_coef",
]
