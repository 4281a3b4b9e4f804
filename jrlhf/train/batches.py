"""Passing over rows once, in batches of one shape a bucket."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from jrlhf.config import ConfigError

CPU_TOKENS = 1024
"""What so many tokens leave for the backward pass stays in a CPU's caches; more at a time are slower, by up to 1.4."""


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


def device_share(rows: int, mesh: jax.sharding.Mesh, *, key: str) -> int:
    """How many of ``rows`` a device takes. ConfigError, which names ``key``, where they do not divide."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    share, rest = divmod(rows, devices)
    if rest:
        raise ConfigError(f"{key}: {rows} rows do not divide over {devices} devices (mesh.data times mesh.fsdp)")
    return share


def gradient_slices(share: int, *, microbatch: int) -> int:
    """In how many equal slices a device reads the rows of its share, so that it takes ``microbatch`` at most at a time.

    8 rows with ``microbatch`` 3: 4 slices of 2.
    """
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= microbatch)


def usual_microbatch(share: int, *, tokens: float, platform: str) -> int:
    """Rows of ``tokens`` tokens on average that a device takes at a time, where the config does not say how many."""
    return share if platform != "cpu" else max(1, min(share, int(CPU_TOKENS // tokens)))


def reading_slices(share: int, *, microbatch: int, tokens: float, platform: str) -> int:
    """In how many slices a device reads its share, where the config says ``microbatch`` or (0) nothing."""
    usual = usual_microbatch(share, tokens=tokens, platform=platform)
    return gradient_slices(share, microbatch=microbatch or usual)


def tree_copy(tree: Any) -> Any:
    """Buffers of its own: a donated state must not take the reference model with it."""
    return jax.tree.map(lambda x: x.copy(), tree)
