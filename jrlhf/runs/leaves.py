"""A state as named leaves: what a checkpoint stores, and what its errors name."""

from typing import Any

import jax
import jax.numpy as jnp


def by_path(tree: Any, kind: Any) -> dict[str, Any]:
    """Leaves by path (``"params/policy/embed"``); TypeError for one that is not of ``kind``."""
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
    """The state by path, typed PRNG keys as the integers they are made of."""
    leaves = by_path(state, jax.Array)
    return {path: jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves.items()}


def stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """What ``leaf`` is on disk, and where it is to go."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not _is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def from_stored(leaf: jax.Array, like: Any) -> jax.Array:
    """``to_storable`` backwards, of a leaf that is to be as ``like``."""
    return jax.random.wrap_key_data(leaf, impl=_key_impl(like)) if _is_key(like) else leaf


def differences(stored: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> list[str]:
    """What keeps a stored state from being the wanted one, a line a leaf."""
    problems = [f"{path} is not in the checkpoint" for path in sorted(wanted.keys() - stored.keys())]
    problems += [f"{path} is in the checkpoint only" for path in sorted(stored.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & stored.keys()):
        have, want = stored[path], wanted[path]
        if tuple(have.shape) != want.shape or have.dtype != want.dtype:
            problems.append(f"{path} is {have.dtype}{list(have.shape)} there and {want.dtype}{list(want.shape)} here")
    return problems


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(like: Any) -> Any:
    """The generator of a typed key that may be a mere shape: JAX tells it of a traced key only."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(like.shape, like.dtype))
    return found[0]
