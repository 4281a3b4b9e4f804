"""Peak rates of devices, from a table of data sheets or, for a CPU, from a measurement."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Peaks(NamedTuple):
    """Peak rates of all devices together: FLOP/s of matrix products and bytes/s of memory."""

    flops: float
    bytes: float


class Chip(NamedTuple):
    """Data sheet of a device, as JAX counts devices."""

    kind: str
    """Part of JAX's device kind."""
    name: str
    """Name in a topology."""
    units: int
    """Units per device in a topology's number, such as the cores of a TPU v4 or v5p chip."""
    tflops: float
    """Dense TFLOP/s in bfloat16 with float32 sums."""
    bandwidth: float
    """Memory bandwidth in GB/s."""
    memory: float
    """Memory in GB."""
    link: float
    """GB/s to linked devices in one direction, which is half of the usual figure."""
    linked_devices: int
    """Number of devices that are linked by NVLink or in a TPU pod."""
    network: float | None
    """GB/s to other devices over the network; None: there are no others."""
    clock: float = 0.0
    """Clock of a TPU in GHz; 0: unknown."""
    axes: int = 0
    """Dimensions of a TPU's torus; 0: there is none."""
    ring: int = 1
    """Sides of a slice that are multiples of this are rings, with two links to each chip instead of one."""
    usable: float = 0.0
    """GiB of a TPU's memory that its compiler gives to programs; 0: unknown."""
    per_chip: int = 1
    """Devices per chip of a TPU's slice."""

    def link_rate(self, shape: Sequence[int]) -> float:
        """Return the GB/s of the links that a chip has in a slice of this shape; all of its links if it is empty.

        In a v5p slice of 2 x 2 x 1 chips a chip has two of its six links, and in one of 4 x 4 x 4 it has all.
        """
        if not shape or not self.axes:
            return float(self.link)
        links = sum(2 if side % self.ring == 0 else 1 for side in shape if side > 1)
        return self.link * links / (2 * self.axes)


CHIPS = (
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
    # JAX's device is a core in v2 and v3, and half a chip in v7. The usable memory is what libtpu 0.0.52 says.
    Chip("TPU7", "tpu7x", 1, 1153, 3690, 96, 300, 18432, None, 2.2, 3, 4, 94.74, 2),
    Chip("TPU v7", "v7", 1, 1153, 3690, 96, 300, 18432, None, 2.2, 3, 4, 94.74, 2),
    Chip("TPU v6", "v6e", 1, 918, 1640, 32, 400, 256, None, 1.75, 2, 16, 31.24),
    Chip("TPU v5 lite", "v5litepod", 1, 197, 819, 16, 200, 256, None, 1.5, 2, 16, 15.75),
    Chip("TPU v5e", "v5e", 1, 197, 819, 16, 200, 256, None, 1.5, 2, 16, 15.75),
    Chip("TPU v5", "v5p", 2, 459, 2765, 95, 600, 8960, None, 1.75, 3, 4, 95.73),
    Chip("TPU v4", "v4", 2, 275, 1228, 32, 300, 4096, None, 1.05, 3, 4, 30.75),
    Chip("TPU v3", "v3", 1, 61, 450, 16, 164, 2048, None, 0.94, 2, 4, 15.48, 2),
    Chip("TPU v2", "v2", 1, 22, 350, 8, 124, 512, None, 0.7, 2, 4, 0.0, 2),
)


def device_peaks(dtype: str) -> Peaks | None:
    """Return the peak rates of all devices of the run; None for an accelerator that is not in the table.

    A CPU is measured in ``dtype`` once per process, for a fraction of a second. An accelerator's FLOP/s are those of
    bfloat16 for every ``dtype``.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        # Simulated devices share the machine; each process is assumed to have a machine of its own.
        one, count = _cpu_peaks(dtype), jax.process_count()
        return Peaks(one.flops * count, one.bytes * count)
    return known_peaks(device.device_kind, jax.device_count())


def known_chip(kind: str) -> Chip | None:
    """Return the data sheet of an accelerator by JAX's device kind; None if it is not in the table."""
    return next((chip for chip in CHIPS if chip.kind in kind), None)


def known_peaks(kind: str, count: int) -> Peaks | None:
    """Return the peak rates of ``count`` accelerators by JAX's device kind; None if it is not in the table."""
    chip = known_chip(kind)
    return None if chip is None else Peaks(chip.tflops * 1e12 * count, chip.bandwidth * 1e9 * count)


@cache
def _cpu_peaks(dtype: str) -> Peaks:
    return measured_peaks(dtype, size=1024, megabytes=32, repeats=3)


def measured_peaks(dtype: str, *, size: int, megabytes: int, repeats: int) -> Peaks:
    """Measure one device by the median times of a matrix product in ``dtype`` and of reading and writing an array."""
    side = jnp.ones((size, size), dtype)
    array = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    return Peaks(
        2 * size**3 / _median_seconds(jax.jit(lambda a: a @ a), side, repeats),
        2 * array.nbytes / _median_seconds(jax.jit(lambda x: x + jnp.float32(1)), array, repeats),
    )


def _median_seconds(call: Callable[[Any], Any], argument: Any, repeats: int) -> float:
    """Return the median time of a call, after one call that compiles and one that warms up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(call(argument))
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
