"""KL estimators and the adaptive KL coefficient."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KLEstimator = Literal["k1", "k2", "k3"]


def kl_penalty(
    logprobs: Float[Array, "*S"], ref_logprobs: Float[Array, "*S"], *, estimator: KLEstimator
) -> Float[Array, "*S"]:
    """Estimate KL(π ‖ π_ref) per token from one sample, with x = log π - log π_ref, in nats.

    k1 = x (unbiased, may be negative), k2 = x²/2 (the one whose gradient is that of the reverse KL),
    k3 = exp(-x) - 1 + x (unbiased, never negative; its exponent is clipped to 20 so that it cannot overflow).
    Schulman, "Approximating KL divergence" (2020).
    """
    x = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return x
        case "k2":
            return 0.5 * jnp.square(x)
        case "k3":
            return jnp.expm1(jnp.minimum(-x, 20.0)) + x


def update_kl_coef(
    coef: Float[Array, ""],
    observed_kl: Float[Array, ""],
    n: int | Int[Array, ""],
    *,
    target: float,
    horizon: int | float,
) -> Float[Array, ""]:
    """β ← β · (1 + e · n / horizon), e = clip(KL / target - 1, -0.2, 0.2).

    ``observed_kl``: mean over sequences of the KL summed over tokens, in nats; ``n``: episodes since the last update.
    Ziegler et al. 2019, section 2.2.
    """
    error = jnp.clip(observed_kl / target - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * jnp.asarray(n, jnp.float32) / horizon)
