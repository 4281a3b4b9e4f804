"""The weights of a model's folder with its adapters merged in, read leaf by leaf."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jrlhf.models.hf.folder import leaf_at, names_of
from jrlhf.models.hf.names import Entry
from jrlhf.models.hf.read import Tensors, leaf_reader
from jrlhf.models.lora import ADAPTER, merged_kernel
from jrlhf.types import Params


class Weights:
    """The leaves of a model on disk, in the dtypes and shardings of ``shapes`` and ``shardings``."""

    def __init__(
        self,
        tensors: Tensors,
        table: Sequence[Entry],
        shapes: Params,
        shardings: Params | None,
        adapters: Sequence[Params] = (),
    ) -> None:
        """``adapters`` are trees with the leaves of adapters beside those of kernels, the innermost first."""
        self._tensors, self._shapes, self._shardings, self._adapters = tensors, shapes, shardings, adapters
        self._entries = {entry.path: entry for entry in table}

    def tree(self) -> Params:
        """Read all leaves, each straight into its dtype, and only the parts of this host's devices."""
        tree: dict[str, Any] = {}
        # The largest first: a leaf is in memory twice while it is read, which costs most once all others are loaded.
        for path in sorted(self._entries, key=lambda path: -leaf_at(self._shapes, path).size):
            parent = tree
            for key in path[:-1]:
                parent = parent.setdefault(key, {})
            parent[path[-1]] = self._read(path, leaf_at(self._shapes, path).dtype)
        return tree

    def exact(self, path: tuple[str, ...], leaf: Any) -> Any:
        """Return a leaf of ``tree`` in float32, as the source has it: a leaf that was rounded is read again."""
        if leaf.dtype == jnp.float32:
            return leaf
        dtypes = {self._tensors.stored[name].dtype for name in names_of(self._entries[path], self._shapes)}
        if dtypes == {"BF16"} and leaf.dtype == jnp.bfloat16 and not self._adapters_at(path):
            return leaf.astype(jnp.float32)
        return self._read(path, jnp.float32)

    def _adapters_at(self, path: tuple[str, ...]) -> list[Params]:
        if path[-1] != "kernel":
            return []
        beside = (leaf_at(adapter, path[:-1]) for adapter in self._adapters)
        return [leaves for leaves in beside if ADAPTER[0] in leaves]

    def _read(self, path: tuple[str, ...], dtype: Any) -> jax.Array:
        shape, adapters = leaf_at(self._shapes, path).shape, self._adapters_at(path)
        read = leaf_reader(self._tensors, self._entries[path], shape, jnp.float32 if adapters else dtype)
        if self._shardings is None:
            leaf = jnp.array(read((slice(None),) * len(shape)))
        else:
            leaf = jax.make_array_from_callback(shape, leaf_at(self._shardings, path), read)  # pyright: ignore[reportArgumentType]
        for leaves in adapters:
            leaf = merged_kernel(leaf, leaves)
        return leaf if leaf.dtype == dtype else leaf.astype(dtype)
