"""Weights in the form that decoding reads at every token."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jrlhf.models.frozen import is_cast
from jrlhf.models.hf.names import SHARDING_RULES
from jrlhf.parallel.devices.peaks import known_chip
from jrlhf.parallel.sharding import leaf_spec
from jrlhf.types import Params

log = logging.getLogger(__name__)

MAX_GATHERED_FRACTION = 0.4
"""Maximum fraction of a device's memory for weights that are gathered over ``fsdp``; a run needs the rest."""


def decoding_weights(params: Params, *, layers: int, dtype: Any, mesh: Mesh | None) -> Params:
    """Return a decoder's weights in the compute dtype, with a tree per layer, split over ``tensor`` alone.

    Done once before the first token, this is no part of the loop over tokens. XLA for TPUs and GPUs would gather
    weights that are split over ``fsdp`` at every token, and XLA for GPUs would copy each layer out of the stack.
    Weights that are too large to be gathered, see ``gathers``, stay split, and decoding is slow.
    """
    gathered = mesh is not None and gathers(params, dtype, mesh)
    if mesh is not None and mesh.shape["fsdp"] > 1 and not gathered:
        log.warning("weights stay split over fsdp while answers are sampled, which is slow: split them over tensor too")

    def place(path: tuple[Any, ...], leaf: Array, layer: int | None) -> Array:
        spec = _spec(path, leaf.shape, mesh, gathered) if mesh is not None else PartitionSpec()
        if layer is not None:
            leaf, spec = leaf[layer], PartitionSpec(*spec[1:])
        leaf = leaf.astype(dtype) if is_cast(path) else leaf
        return leaf if mesh is None or mesh.size == 1 else lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    def tree(part: Params, layer: int | None) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: place(path, leaf, layer), part)

    stacked = {"layers": params["layers"]}
    others = {name: leaf for name, leaf in params.items() if name != "layers"}
    return tree(others, None) | {"layers": tuple(tree(stacked, layer)["layers"] for layer in range(layers))}


def layer_weights(layers: Any, layer: int) -> Params:
    """Return the weights of one layer, from ``decoding_weights`` or from a stack."""
    return layers[layer] if isinstance(layers, tuple) else jax.tree.map(lambda leaf: leaf[layer], layers)


def gathers(params: Params, dtype: Any, mesh: Mesh) -> bool:
    """Tell whether a device has room for weights in the compute dtype that are split over ``tensor`` alone."""
    chip = known_chip(mesh.devices.flat[0].device_kind)
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) * jnp.dtype(dtype).itemsize / mesh.shape["tensor"]
    return chip is None or size <= MAX_GATHERED_FRACTION * chip.memory * 1e9


def _spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh, gathered: bool) -> PartitionSpec:
    """Return the sharding rule's spec of a leaf; of ``gathered`` weights without every axis but ``tensor``."""
    spec = leaf_spec(jax.tree_util.keystr(path, simple=True, separator="/"), shape, mesh, SHARDING_RULES)
    return PartitionSpec(*("tensor" if entry == "tensor" else None for entry in spec)) if gathered else spec
