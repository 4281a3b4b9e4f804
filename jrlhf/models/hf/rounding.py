"""Rounding of parameters to the dtypes of the folder they were read from."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jrlhf.models.arch import ArchConfig
from jrlhf.models.hf.folder import DTYPES, Stored, leaf_at, names_of
from jrlhf.models.hf.names import Entry, decoder_table, language_model_table
from jrlhf.types import Params


def round_to_stored(params: Params, arch: ArchConfig, stored: Mapping[str, Stored]) -> Params:
    """Round each parameter to the dtype that ``stored`` names for it and back; parameters in float32 are shared.

    The result equals the weights that are read back from a folder written in these dtypes. Adapters must be merged. A
    reward model's head is not rounded.
    """
    if "decoder" in params:
        return params | {"decoder": _rounded_tree(params["decoder"], decoder_table(arch), stored)}
    return _rounded_tree(params, language_model_table(arch), stored)


def _rounded_tree(params: Params, table: tuple[Entry, ...], stored: Mapping[str, Stored]) -> Params:
    for entry in table:
        dtypes = [stored[name].dtype if name in stored else "F32" for name in names_of(entry, params)]
        if set(dtypes) != {"F32"}:
            params = _with_leaf(params, entry.path, _rounded(leaf_at(params, entry.path), dtypes))
    return params


def _rounded(leaf: Any, dtypes: list[str]) -> Any:
    """Round a leaf to its dtype, or each layer to its own; two programs, since within one XLA may drop the rounding."""
    leaf = jnp.asarray(leaf)
    if len(set(dtypes)) == 1:
        return leaf.astype(DTYPES[dtypes[0]]).astype(leaf.dtype)
    for dtype in sorted(set(dtypes)):
        layers = jnp.asarray([name == dtype for name in dtypes]).reshape(-1, *[1] * (leaf.ndim - 1))
        leaf = jnp.where(layers, leaf.astype(DTYPES[dtype]).astype(leaf.dtype), leaf)
    return leaf


def _with_leaf(tree: Params, path: tuple[str, ...], leaf: Any) -> Params:
    inner = leaf if len(path) == 1 else _with_leaf(tree[path[0]], path[1:], leaf)
    return {**tree, path[0]: inner}
