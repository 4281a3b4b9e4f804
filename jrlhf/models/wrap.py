"""A user's own module as the protocols of ``jrlhf.types``. NNX and Equinox are imported only by those who use them.

A module is called with ``tokens`` and the mask of real tokens, and returns logits (an ``ApplyFn``) or one scalar at
every position (a ``ScoreFn``). Positions and attention must follow from the mask: ``jrlhf.core.positions_from_mask``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.types import Params

if TYPE_CHECKING:
    from flax import nnx

ModuleFn = Callable[[Params, Array, Array], Array]
"""``(params, tokens [B, T], mask [B, T]) -> [B, T, V]`` or ``[B, T]``: an ``ApplyFn`` or a ``ScoreFn``."""


def from_linen(module: nn.Module) -> ModuleFn:
    """Flax Linen: ``module(tokens, mask)`` on a batch. Its params are ``module.init(key, tokens, mask)["params"]``."""

    def fn(params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], /) -> Float[Array, "B T *V"]:
        output: Any = module.apply({"params": params}, tokens, mask)
        return output

    return fn


def from_nnx(module: "nnx.Module") -> tuple[Params, ModuleFn]:
    """Flax NNX: ``module(tokens, mask)`` on a batch. The module itself stays as it is.

    The params are its ``nnx.Param`` state; other state is held as it is now, and the module is in evaluation mode.
    """
    from flax import nnx

    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def fn(params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], /) -> Float[Array, "B T *V"]:
        merged = nnx.merge(graphdef, params, rest)
        merged.eval()
        return merged(tokens, mask)

    return params, fn


def from_equinox(module: Any) -> tuple[Params, ModuleFn]:
    """Equinox: ``module(tokens, mask)`` on one sequence, as is the custom there; it is vmapped over the batch.

    The params are its floating-point arrays; the rest is held as it is now, in inference mode.
    """
    import equinox as eqx

    params, static = eqx.partition(eqx.nn.inference_mode(module), eqx.is_inexact_array)

    def fn(params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], /) -> Float[Array, "B T *V"]:
        return jax.vmap(eqx.combine(params, static))(tokens, mask)

    return params, fn
