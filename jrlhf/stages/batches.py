"""Passing over rows once, in batches of one shape a bucket."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int


def covering_batches(
    lengths: Int[np.ndarray, "N"], *, batch_size: int, limit: int
) -> Iterator[tuple[Int[np.ndarray, "B"], Bool[np.ndarray, "B"]]]:
    """``(indices, real)`` batches that visit each of the first ``limit`` rows (0: all) once, like lengths together.

    The last batch is filled up with repeats that ``real`` marks False: every batch has ``batch_size`` rows.
    """
    rows = len(lengths) if limit == 0 else min(limit, len(lengths))
    order = np.argsort(lengths[:rows], kind="stable")
    for start in range(0, rows, batch_size):
        chosen = order[start : start + batch_size]
        filled = np.resize(chosen, batch_size)
        yield filled, np.arange(batch_size) < len(chosen)


def device_multiple(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """``batch_size`` rounded up so that the mesh's data axes divide it."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // parts) * parts


def require_divisible(rows: int, mesh: jax.sharding.Mesh, *, slices: int, key: str) -> None:
    """Every slice of a batch must spread evenly over the devices that split it."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * slices
    if rows % parts:
        raise ValueError(f"{key}: {rows} rows do not divide over {parts} (devices on data and fsdp, times slices)")


def tree_copy(tree: Any) -> Any:
    """Buffers of its own: a donated state must not take the reference model with it."""
    return jax.tree.map(lambda x: x.copy(), tree)
