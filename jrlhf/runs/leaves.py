"""Conversion of a state to named leaves, which a checkpoint stores and its errors name."""

from typing import Any

import jax
import jax.numpy as jnp


def by_path(tree: Any, kind: Any) -> dict[str, Any]:
    """Return leaves by path (``"params/policy/embed"``); raise TypeError for a leaf that is not of ``kind``."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, kind):
            raise TypeError(f"state leaf {name} is a {type(leaf).__name__}, not a JAX array (plain values: metadata)")
        if name in leaves:
            raise ValueError(f"two leaves of the state have the path {name}")
        leaves[name] = leaf
    return leaves


def to_storable(state: Any) -> dict[str, jax.Array]:
    """Return the state's leaves by path, with typed PRNG keys as their integer data."""
    leaves = by_path(state, jax.Array)
    return {path: jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves.items()}


def stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of a leaf on disk, with the sharding for reading it."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not _is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def from_stored(leaf: jax.Array, like: Any) -> jax.Array:
    """Convert a leaf read from disk to the kind of ``like``, the inverse of ``to_storable``."""
    return jax.random.wrap_key_data(leaf, impl=_key_impl(like)) if _is_key(like) else leaf


def differences(stored: dict[str, Any], expected: dict[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Describe each leaf in which a stored state differs from the expected one, in a line per leaf."""
    problems = [f"{path} is not in the checkpoint" for path in sorted(expected.keys() - stored.keys())]
    problems += [f"{path} is in the checkpoint only" for path in sorted(stored.keys() - expected.keys())]
    for path in sorted(expected.keys() & stored.keys()):
        entry, target = stored[path], expected[path]
        if tuple(entry.shape) != target.shape or entry.dtype != target.dtype:
            problems.append(
                f"{path} is {entry.dtype}{list(entry.shape)} there and {target.dtype}{list(target.shape)} here"
            )
    return problems


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(like: Any) -> Any:
    """Return the generator of a typed key or of its shape; JAX reveals it for traced keys."""
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(like.shape, like.dtype))
    return kinds[0]
