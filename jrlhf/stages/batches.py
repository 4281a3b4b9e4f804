"""Passing over rows once, in batches of one shape a bucket."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from jrlhf.config_io import ConfigError


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


def gradient_slices(rows: int, mesh: jax.sharding.Mesh, *, microbatch: int, key: str) -> int:
    """In how many equal slices an update reads its rows, so that a device takes ``microbatch`` at most (0: any number).

    8 rows with ``microbatch`` 3: on one device 4 slices of 2, on four devices 1 slice of 2 each.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    share, rest = divmod(rows, devices)
    if rest:
        raise ConfigError(f"{key}: {rows} rows do not divide over {devices} devices (mesh.data times mesh.fsdp)")
    return 1 if not microbatch else next(n for n in range(1, share + 1) if share % n == 0 and share // n <= microbatch)


def tree_copy(tree: Any) -> Any:
    """Buffers of its own: a donated state must not take the reference model with it."""
    return jax.tree.map(lambda x: x.copy(), tree)
