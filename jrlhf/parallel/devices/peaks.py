"""What the devices do at best: from a table, or measured where there is none."""

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Peaks(NamedTuple):
    """Of all devices together: FLOP/s of matrix products, bytes/s of memory."""

    flops: float
    bytes: float


class Chip(NamedTuple):
    """A device as JAX counts them, by its data sheet."""

    kind: str
    """A part of JAX's device kind."""
    name: str
    """In the name of a topology."""
    units: int
    """What the number in a topology's name counts to one device: cores of a TPU v4 or v5p chip."""
    tflops: float
    """Dense, of bfloat16 with float32 sums."""
    bandwidth: float
    """GB/s of its memory."""
    memory: float
    """GB."""
    link: float
    """GB/s that it sends to the devices it is joined with: half of what is told for both directions."""
    joined: int
    """Devices that are, by NVLink or in a TPU's pod."""
    beyond: float | None
    """GB/s that it sends to others; None: there are none."""


KNOWN = (
    Chip("GB200", "gb200", 1, 2500, 8000, 186, 900, 72, 50),
    Chip("B200", "b200", 1, 2250, 8000, 180, 900, 8, 50),
    Chip("H200", "h200", 1, 989, 4800, 141, 450, 8, 50),
    Chip("H100 PCIe", "h100-pcie", 1, 756, 2000, 80, 300, 2, 64),
    Chip("H100 NVL", "h100-nvl", 1, 835, 3938, 94, 300, 2, 64),
    Chip("H100", "h100", 1, 989, 3350, 80, 450, 8, 50),
    Chip("A100-SXM4-80GB", "a100", 1, 312, 2039, 80, 300, 8, 25),
    Chip("A100 80GB", "a100-pcie", 1, 312, 1935, 80, 300, 2, 32),
    Chip("A100", "a100-40gb", 1, 312, 1555, 40, 300, 8, 25),
    Chip("L40S", "l40s", 1, 362, 864, 48, 32, 1, 32),
    Chip("L4", "l4", 1, 121, 300, 24, 32, 1, 32),
    Chip("A10G", "a10g", 1, 70, 600, 24, 32, 1, 32),
    Chip("RTX 4090", "rtx4090", 1, 165, 1008, 24, 32, 1, 32),
    Chip("RTX 3090", "rtx3090", 1, 71, 936, 24, 56, 2, 32),
    # A device of JAX is a core in v2 and v3, and half a chip in v7.
    Chip("TPU7", "tpu7x", 1, 1153, 3690, 96, 300, 18432, None),
    Chip("TPU v7", "v7", 1, 1153, 3690, 96, 300, 18432, None),
    Chip("TPU v6", "v6e", 1, 918, 1640, 32, 400, 256, None),
    Chip("TPU v5 lite", "v5litepod", 1, 197, 819, 16, 200, 256, None),
    Chip("TPU v5e", "v5e", 1, 197, 819, 16, 200, 256, None),
    Chip("TPU v5", "v5p", 2, 459, 2765, 95, 600, 8960, None),
    Chip("TPU v4", "v4", 2, 275, 1228, 32, 300, 4096, None),
    Chip("TPU v3", "v3", 1, 61, 450, 16, 164, 2048, None),
    Chip("TPU v2", "v2", 1, 22, 350, 8, 124, 512, None),
)


def device_peaks(dtype: str) -> Peaks | None:
    """Of all devices of the run; None for an accelerator that the table does not know.

    A CPU is measured, in ``dtype``, for a fraction of a second: once a process. An accelerator's FLOP/s are those of
    bfloat16 whatever ``dtype`` is.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        # Simulated devices share the machine; processes are taken to have one each.
        one, count = _cpu_peaks(dtype), jax.process_count()
        return Peaks(one.flops * count, one.bytes * count)
    return known_peaks(device.device_kind, jax.device_count())


def known_chip(kind: str) -> Chip | None:
    """The row of an accelerator that JAX calls ``kind``."""
    return next((chip for chip in KNOWN if chip.kind in kind), None)


def known_peaks(kind: str, count: int) -> Peaks | None:
    """Of ``count`` accelerators of a kind, as JAX names it."""
    chip = known_chip(kind)
    return None if chip is None else Peaks(chip.tflops * 1e12 * count, chip.bandwidth * 1e9 * count)


@cache
def _cpu_peaks(dtype: str) -> Peaks:
    return measured_peaks(dtype, size=1024, megabytes=32, repeats=3)


def measured_peaks(dtype: str, *, size: int, megabytes: int, repeats: int) -> Peaks:
    """Of one device: a product of square matrices in ``dtype``, and reading and writing an array; medians."""
    side = jnp.ones((size, size), dtype)
    array = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    return Peaks(
        2 * size**3 / _median_seconds(jax.jit(lambda a: a @ a), side, repeats),
        2 * array.nbytes / _median_seconds(jax.jit(lambda x: x + jnp.float32(1)), array, repeats),
    )


def _median_seconds(call: Callable[[Any], Any], argument: Any, repeats: int) -> float:
    """After one call that compiles and one that warms up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(call(argument))
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
