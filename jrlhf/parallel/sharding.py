"""Which device holds which part of a tree: path-regex rules, and a fallback for any user's own tree."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ShardingRules = tuple[tuple[str, PartitionSpec], ...]
"""``(regex, spec)`` pairs. The regex is searched for in a leaf's path, such as ``"decoder/layers/attn/q/kernel"``."""


def tree_shardings(tree: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """A ``NamedSharding`` for every leaf of a tree of arrays or shapes.

    The first rule found in a leaf's path decides, without the axes whose size does not divide the dimension they name.
    A leaf that no rule knows, or whose rank is under the rule's, is split over ``fsdp`` along its largest divisible
    dimension. Scalars are replicated.

    A ``TrainState`` may be given whole: an optimizer's moments carry their parameter's path as a suffix of their own
    (``opt_state/0/mu/decoder/embed``), so the parameter's rule finds them. Rules must not be anchored with ``^``.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, leaf_spec(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def leaf_spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: ShardingRules) -> PartitionSpec:
    """The spec of one leaf; see ``tree_shardings``."""
    for pattern, spec in rules:
        # A factored optimizer keeps row and column sums under the parameter's path: the rule does not fit their rank.
        if re.search(pattern, path) and len(spec) <= len(shape):
            return PartitionSpec(*(_dividing(entry, size, mesh) for entry, size in zip(spec, shape, strict=False)))
    return _largest_dimension(shape, mesh)


def _dividing(entry: str | tuple[str, ...] | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """``entry`` without the mesh axes that do not divide what the axes before them left of ``size``."""
    kept: list[str] = []
    for axis in (entry,) if isinstance(entry, str) else entry or ():
        if axis not in mesh.shape:
            raise ValueError(f"sharding rule names the mesh axis {axis!r}; the mesh has {tuple(mesh.shape)}")
        if size % mesh.shape[axis] == 0:
            kept.append(axis)
            size //= mesh.shape[axis]
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def _largest_dimension(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    parts = mesh.shape["fsdp"]
    divisible = [size if size % parts == 0 else 0 for size in shape]
    if parts == 1 or not any(divisible):
        return PartitionSpec()
    return PartitionSpec(*[None] * divisible.index(max(divisible)), "fsdp")


def init_sharded(init_fn: Callable[..., Any], *args: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """``init_fn(*args)`` born sharded: shapes by ``eval_shape``, shardings by the rules, values by a jitted init.

    No device ever holds more than its own part of the result.
    """
    shardings = tree_shardings(jax.eval_shape(init_fn, *args), mesh, rules)
    return jax.jit(init_fn, out_shardings=shardings)(*args)
