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


KNOWN = (
    # A part of JAX's device kind; dense bfloat16 TFLOP/s with float32 sums and GB/s of a device, by its data sheet.
    ("GB200", 2500, 8000),
    ("B200", 2250, 8000),
    ("H200", 989, 4800),
    ("H100 PCIe", 756, 2000),
    ("H100 NVL", 835, 3938),
    ("H100", 989, 3350),
    ("A100-SXM4-80GB", 312, 2039),
    ("A100 80GB", 312, 1935),
    ("A100", 312, 1555),
    ("L40S", 362, 864),
    ("L4", 121, 300),
    ("A10G", 70, 600),
    ("RTX 4090", 165, 1008),
    ("RTX 3090", 71, 936),
    # A device of JAX is a core in v2 and v3, and half a chip in v7.
    ("TPU7", 1153, 3690),
    ("TPU v7", 1153, 3690),
    ("TPU v6", 918, 1640),
    ("TPU v5 lite", 197, 819),
    ("TPU v5e", 197, 819),
    ("TPU v5", 459, 2765),
    ("TPU v4", 275, 1228),
    ("TPU v3", 61, 450),
    ("TPU v2", 22, 350),
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


def known_peaks(kind: str, count: int) -> Peaks | None:
    """Of ``count`` accelerators of a kind, as JAX names it."""
    for name, tflops, gigabytes in KNOWN:
        if name in kind:
            return Peaks(tflops * 1e12 * count, gigabytes * 1e9 * count)
    return None


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
