"""Shardings of parameter trees by rules on paths, with a fallback for trees without rules."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ShardingRules = tuple[tuple[str, PartitionSpec], ...]
"""``(regex, spec)`` pairs; the regex is searched in a leaf's path, such as ``"decoder/layers/attn/q/kernel"``."""


def tree_shardings(tree: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Return a ``NamedSharding`` for every leaf of a tree of arrays or shapes.

    The first rule that matches a leaf's path applies, without the axes whose size does not divide their dimension. A
    leaf that no rule matches, or whose rank is below the rule's, is split over ``fsdp`` along its largest divisible
    dimension. Scalars are replicated.

    The tree may be a ``TrainState``: the path of an optimizer's moments ends with their parameter's path
    (``opt_state/0/mu/decoder/embed``), so the parameter's rule matches. Rules must not be anchored with ``^``.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, leaf_spec(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def leaf_spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: ShardingRules) -> PartitionSpec:
    """Return the spec of one leaf; see ``tree_shardings``."""
    for pattern, spec in rules:
        # A factored optimizer has row and column sums under the parameter's path, whose rank is too low for the rule.
        if re.search(pattern, path) and len(spec) <= len(shape):
            return PartitionSpec(*(_dividing(entry, size, mesh) for entry, size in zip(spec, shape, strict=False)))
    return _largest_dimension(shape, mesh)


def _dividing(entry: str | tuple[str, ...] | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """Return ``entry`` without the mesh axes that do not divide what the axes before them leave of ``size``."""
    axes: list[str] = []
    for axis in (entry,) if isinstance(entry, str) else entry or ():
        if axis not in mesh.shape:
            raise ValueError(f"a sharding rule names the mesh axis {axis!r}; the mesh has {tuple(mesh.shape)}")
        if size % mesh.shape[axis] == 0:
            axes.append(axis)
            size //= mesh.shape[axis]
    return tuple(axes) if len(axes) > 1 else axes[0] if axes else None


def _largest_dimension(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    parts = mesh.shape["fsdp"]
    divisible = [size if size % parts == 0 else 0 for size in shape]
    if parts == 1 or not any(divisible):
        return PartitionSpec()
    return PartitionSpec(*[None] * divisible.index(max(divisible)), "fsdp")


def init_sharded(init_fn: Callable[..., Any], *args: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Compute ``init_fn(*args)`` directly in the shardings of ``rules``; no device holds more than its own part."""
    shardings = tree_shardings(jax.eval_shape(init_fn, *args), mesh, rules)
    return jax.jit(init_fn, out_shardings=shardings)(*args)
