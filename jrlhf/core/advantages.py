"""From scores to rewards per token to advantages."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Real

from jrlhf.core.masks import last_token_mask


def shape_rewards(
    scores: Real[Array, "B"],
    kl: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "B T"]:
    """r_t = -β · KL_t, plus the score on the last unmasked token; 0 where masked. Stiennon et al. 2020, section 3.4.

    The result is float32 whatever dtype the scores have: integers would cut the penalty off. A row that is all masked
    gets no reward at all, not even its score.
    """
    penalty = -kl_coef * jnp.where(mask, kl.astype(jnp.float32), 0.0)
    return penalty + jnp.where(last_token_mask(mask), scores.astype(jnp.float32)[:, None], 0.0)


def gae(
    rewards: Float[Array, "T"],
    values: Float[Array, "T"],
    mask: Bool[Array, "T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
    """Aₜ = δₜ + γλ·Aₜ₊₁ with δₜ = rₜ + γ·Vₜ₊₁ - Vₜ, and returns A + V; both 0 where masked.

    Schulman et al. 2016, eq. 16. "Next" means the next unmasked token; after the last one V and A are 0. One
    trajectory: the caller vmaps.

    Example: mask ``[0, 1, 1, 0]`` (prompt, two response tokens, padding) bootstraps index 1 from ``values[2]`` and
    index 2 from 0; whatever stands at 0 and 3 is never read.
    """

    def backward(carry: tuple[Array, Array], x: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_advantage, next_value = carry
        reward, value, real = x
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(real, advantage, next_advantage), jnp.where(real, value, next_value)
        return carry, jnp.where(real, advantage, 0.0)

    rewards, values = rewards.astype(jnp.float32), values.astype(jnp.float32)
    end = jnp.zeros((), jnp.float32)
    _, advantages = lax.scan(backward, (end, end), (rewards, values, mask), reverse=True)
    return advantages, jnp.where(mask, advantages + values, 0.0)
