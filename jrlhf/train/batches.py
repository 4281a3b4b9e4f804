"""Batches that visit each row once, and the number of rows that a device reads at a time."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from jrlhf.config import ConfigError

CPU_TOKENS = 1024
"""Tokens that a CPU reads at a time. Their activations fit in its caches; larger slices are up to 1.4 times slower."""


def covering_batches(
    lengths: Int[np.ndarray, "N"], *, batch_size: int, limit: int
) -> Iterator[tuple[Int[np.ndarray, "B"], Bool[np.ndarray, "B"]]]:
    """Yield ``(indices, real)`` batches that visit each of the first ``limit`` rows (0: all) once, sorted by length.

    Every batch has ``batch_size`` rows: repeated rows, which ``real`` marks False, fill up the last one.
    """
    rows = len(lengths) if limit == 0 else min(limit, len(lengths))
    order = np.argsort(lengths[:rows], kind="stable")
    for start in range(0, rows, batch_size):
        rows_here = order[start : start + batch_size]
        yield np.resize(rows_here, batch_size), np.arange(batch_size) < len(rows_here)


def groups_of(mesh: jax.sharding.Mesh) -> int:
    """Return the number of devices, or groups of them, that have different rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def device_multiple(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """Round ``batch_size`` up to a multiple of the mesh's data axes."""
    parts = groups_of(mesh)
    return -(-batch_size // parts) * parts


def device_share(rows: int, mesh: jax.sharding.Mesh, *, key: str) -> int:
    """Return the number of ``rows`` per device. Raise ConfigError, which names ``key``, if they do not divide."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    share, rest = divmod(rows, devices)
    if rest:
        raise ConfigError(f"{key}: {rows} rows do not divide over {devices} devices (mesh.data times mesh.fsdp)")
    return share


def gradient_slices(share: int, *, microbatch: int) -> int:
    """Return the smallest number of equal slices of a device's share with at most ``microbatch`` rows each.

    8 rows with ``microbatch`` 3 make 4 slices of 2 rows.
    """
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= microbatch)


def usual_microbatch(share: int, *, tokens: float, platform: str) -> int:
    """Return the default number of rows that a device reads at a time, for rows of ``tokens`` tokens on average."""
    return share if platform != "cpu" else max(1, min(share, int(CPU_TOKENS // tokens)))


def reading_slices(share: int, *, microbatch: int, tokens: float, platform: str) -> int:
    """Return the number of slices of a device's share; ``microbatch`` 0 stands for the default of the platform."""
    usual = usual_microbatch(share, tokens=tokens, platform=platform)
    return gradient_slices(share, microbatch=microbatch or usual)


def tree_copy(tree: Any) -> Any:
    """Copy all arrays of a tree, so that a step that donates the copy leaves the original intact."""
    return jax.tree.map(lambda x: x.copy(), tree)
