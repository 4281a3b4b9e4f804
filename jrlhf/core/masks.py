"""Masked reductions. Masked means ``where``: a NaN in a masked slot changes nothing."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jrlhf.types import TokenMask


def masked_sum(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, ""]:
    """Σ x over the unmasked elements, in float32."""
    return jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0))


def masked_mean(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, ""]:
    """Σ x / n over the n unmasked elements, in float32; 0 where there are none."""
    return masked_sum(x, mask) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def masked_whiten(x: Float[Array, "*S"], mask: Bool[Array, "*S"], *, shift_mean: bool) -> Float[Array, "*S"]:
    """(x - μ) · rsqrt(σ² + 1e-8), μ and the population σ² over unmasked elements; masked elements become 0.

    ``shift_mean=False`` puts μ back: rewards keep their sign, advantages do not (Huang et al. 2024, arXiv 2403.17031).
    """
    mean = masked_mean(x, mask)
    centred = jnp.where(mask, x.astype(jnp.float32) - mean, 0.0)
    variance = masked_mean(jnp.square(centred), mask)
    whitened = centred * lax.rsqrt(variance + 1e-8)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def real_tokens(mask: TokenMask) -> Bool[Array, "B T"]:
    """A boolean mask of the real tokens, from a mask or from segment numbers."""
    return mask if mask.dtype == jnp.bool_ else mask > 0


def positions_from_mask(mask: TokenMask) -> Int[Array, "B T"]:
    """The index of each real token among the real tokens of its row, or of its segment; -1 for padding.

    ``[pad, pad, a, b] -> [-1, -1, 0, 1]`` and ``[a, b, pad, pad] -> [0, 1, -1, -1]``: padding side does not matter.
    Segments ``[1, 1, 2, 2, 2, 0] -> [0, 1, 0, 1, 2, -1]``; each stands in one piece.
    """
    real = real_tokens(mask)
    index = jnp.cumsum(real, axis=-1, dtype=jnp.int32) - 1
    if mask.dtype != jnp.bool_:
        # A row's first token is compared with its last, which does not matter: its index is 0 either way.
        begins = real & (mask != jnp.roll(mask, 1, axis=1))
        index = index - lax.cummax(jnp.where(begins, index, 0), axis=1)
    return jnp.where(real, index, -1)


def last_token_mask(mask: Bool[Array, "... T"]) -> Bool[Array, "... T"]:
    """True at each row's last unmasked token only; all False for a row that has none.

    ``[pad, a, b, pad] -> [False, False, True, False]``. By position, never by ``tokens == pad``: pad may equal EOS.
    """
    after = lax.cumsum(mask.astype(jnp.int32), axis=mask.ndim - 1, reverse=True)
    return mask & (after == 1)


def at_last_token(x: Shaped[Array, "... T"], mask: Bool[Array, "... T"]) -> Shaped[Array, "..."]:
    """``x`` at each row's last unmasked token; 0 for a row that has none."""
    return jnp.sum(jnp.where(last_token_mask(mask), x, jnp.zeros((), x.dtype)), axis=-1)
