"""Topologies by name, available or not: ``v5p-128``, ``v5p:2x2x1``, ``h100x64``, ``cpu:8``; or this machine."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jrlhf.parallel.devices.peaks import CHIPS, Chip, Peaks, device_peaks, known_chip
from jrlhf.parallel.devices.shapes import slice_shape
from jrlhf.parallel.settings import simulate_cpus
from jrlhf.system.errors import UsageError

SLICE = re.compile(r"(\w+):(\d+(?:x\d+){1,2})")
"""A TPU slice by its sides in chips."""

COUNT = re.compile(r"(.+?)([-x:])(\d+)")
"""A chip's name and a number of devices or cores."""

UNRESERVED_FRACTION = 0.9
"""Fraction of a device's memory for arrays and programs where no compiler says it; the runtime takes the rest."""


class Topology(NamedTuple):
    """Devices to compile a program for, and the data sheet of the devices that they represent."""

    name: str
    size: int
    """Number of devices, as JAX counts them."""
    chip: Chip | None
    """Data sheet; None for a CPU or an unknown accelerator."""
    real: bool
    """True for this machine's own devices; False if others are represented."""
    described: tuple[Any, ...] = ()
    """Devices that a real compiler describes, which compile but run nothing; empty: simulated CPU devices stand in."""
    shape: tuple[int, ...] = ()
    """Sides of a TPU slice in chips; empty: unknown, and a chip is assumed to have all of its links."""

    def devices(self) -> Sequence[Any]:
        """Return the devices to compile for; raise UsageError if JAX has already started with fewer."""
        return self.described or (jax.devices() if self.real else simulated_devices(self.size))

    @property
    def simulated(self) -> bool:
        """Whether the CPU's compiler takes the place of that of the devices."""
        return not self.real and not self.described

    def platform(self) -> str:
        """Return JAX's name of the platform that the program will run on."""
        if self.real:
            return jax.devices()[0].platform
        return "cpu" if self.chip is None else "tpu" if self.chip.kind.startswith("TPU") else "gpu"

    def usable_memory(self) -> float | None:
        """Return the bytes of a device's memory that arrays and programs may take; None if they are unknown."""
        if self.chip is not None and self.chip.usable:
            return self.chip.usable * 2**30
        memory = self.memory()
        return None if memory is None else UNRESERVED_FRACTION * memory

    def memory(self) -> float | None:
        """Return the memory of a device in bytes; simulated devices share the machine's memory."""
        if self.chip is not None:
            return self.chip.memory * 1e9
        if self.platform() == "cpu":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / self.size
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("bytes_limit")

    def peaks(self, dtype: str) -> Peaks | None:
        """Return the peak rates of all devices together; None for an unknown accelerator."""
        if self.chip is not None:
            return Peaks(self.chip.tflops * 1e12 * self.size, self.chip.bandwidth * 1e9 * self.size)
        return device_peaks(dtype) if self.platform() == "cpu" else None

    def sent_per_second(self, mesh: Mapping[str, int], axes: Sequence[str]) -> float | None:
        """Return the bytes per second that a device sends along ``axes``; None if there is no data sheet."""
        places = np.arange(int(np.prod([*mesh.values()]))).reshape([*mesh.values()])
        return self.sent_in_group(int(places[tuple(slice(None) if name in axes else 0 for name in mesh)].max()))

    def sent_in_group(self, last: int) -> float | None:
        """Return the bytes per second that a device sends to others up to device ``last``, starting from device 0."""
        if self.chip is None:
            return None
        within = last < self.chip.linked_devices or self.chip.network is None
        link = self.chip.link_rate(self.shape)
        return 1e9 * (link if within else self.chip.network or link)


def parse_topology(text: str) -> Topology:
    """Parse ``v5p-128`` (128 cores, as Google counts them, are 64 chips), ``v5p:2x2x1`` (sides of a slice in chips),
    ``h100x64``, ``cpu:8``; empty: this machine.

    A number of chips stands for the slice of the shape that a cloud gives by default. Raises UsageError with the known
    names for any other text.
    """
    if not text:
        count, device = jax.device_count(), jax.devices()[0]
        return Topology(f"{count} x {device.device_kind}", count, known_chip(device.device_kind), real=True)
    if match := SLICE.fullmatch(text.lower()):
        return _slice(text, match[1], tuple(int(side) for side in match[2].split("x")))
    match = COUNT.fullmatch(text.lower())
    name, mark, number = match.groups() if match else ("", "", "0")
    if name == "cpu" and mark == ":" and int(number):
        return Topology(text, int(number), None, real=False)
    chip = next((chip for chip in CHIPS if chip.name == name and mark == _mark(chip)), None)
    if chip is None or not int(number):
        raise _unknown(text)
    count, rest = divmod(int(number), chip.units)
    if rest:
        raise UsageError(f"{text!r}: the number counts cores and must be a multiple of {chip.units}")
    if chip.network is None and count > chip.linked_devices:
        raise UsageError(f"{text!r}: a pod has at most {chip.linked_devices * chip.units}")
    chips, part = divmod(count, chip.per_chip)
    return Topology(text, count, chip, real=False, shape=() if part else slice_shape(chips, chip.axes))


def _slice(text: str, name: str, shape: tuple[int, ...]) -> Topology:
    chip = next((chip for chip in CHIPS if chip.name == name and chip.axes), None)
    if chip is None or not math.prod(shape):
        raise _unknown(text)
    if len(shape) != chip.axes:
        raise UsageError(f"{text!r}: a slice of {name} has {chip.axes} sides, such as {_slice_example(chip)}")
    return Topology(text, math.prod(shape) * chip.per_chip, chip, real=False, shape=shape)


def _unknown(text: str) -> UsageError:
    slices = next(_slice_example(chip) for chip in CHIPS if chip.axes == 3)
    return UsageError(f"{text!r} is not known; known are {', '.join(map(_example, CHIPS))}, {slices}, cpu:8")


def _slice_example(chip: Chip) -> str:
    return f"{chip.name}:{'x'.join(map(str, slice_shape(4, chip.axes)))}"


def _mark(chip: Chip) -> str:
    return "-" if chip.kind.startswith("TPU") else "x"


def _example(chip: Chip) -> str:
    return f"{chip.name}{_mark(chip)}8"


def simulated_devices(count: int) -> Sequence[Any]:
    """Return ``count`` CPU devices, which JAX simulates if it has not started yet."""
    simulate_cpus(count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UsageError(f"{count} devices to simulate, but JAX has started with {len(devices)}: use a new process")
    return devices[:count]
