"""The dtype of frozen weights, which no optimizer moves. Trained weights are always float32."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jrlhf.types import Params

FrozenDtype = Literal["auto", "float32", "bfloat16"]
"""Dtype of frozen weights; "auto" is the compute dtype, with which no result changes."""

CAST_LEAVES = frozenset({"kernel", "embed", "position_embed", "lora_a", "lora_b"})
"""Names of the decoder's leaves that are cast to the compute dtype before they are used; norms compute in float32."""


def is_cast(path: tuple[Any, ...]) -> bool:
    """Tell whether computation casts the leaf at a path of JAX's keys; a scalar head's kernel computes in float32."""
    names = [entry.key for entry in path]
    return names[-1] in CAST_LEAVES and names[0] != "head"


ExactFn = Callable[[tuple[str, ...], Any], Any]
"""``(path, leaf) -> the leaf in float32``: for a leaf of a model that was rounded, the weights of its source."""


def as_it_is(path: tuple[str, ...], leaf: Any) -> Any:
    """Return the leaf, an ``ExactFn`` of a model that is not rounded."""
    del path
    return leaf


def stored_shapes(shapes: Params, weights: FrozenDtype, compute: Any) -> Params:
    """Return the shapes of a model's tree with the dtypes of its frozen weights in memory.

    Only leaves that computation casts are rounded, so with the compute dtype ``compute`` "auto" changes no result.
    """
    rounded = jnp.dtype(compute if weights == "auto" else weights)

    def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, rounded) if is_cast(path) else x

    return jax.tree_util.tree_map_with_path(leaf, shapes)
