"""Devices by name, there or not: ``v5p-128``, ``h100x64``, ``cpu:8``, or those of this machine."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jrlhf.parallel.devices.peaks import KNOWN, Chip, Peaks, device_peaks, known_chip
from jrlhf.parallel.settings import simulate_cpus
from jrlhf.system.errors import UsageError


class Topology(NamedTuple):
    """Devices that a program is compiled for, and what is known of those that they stand for."""

    name: str
    size: int
    """Devices, as JAX counts them."""
    chip: Chip | None
    """None: a CPU, or an accelerator that the table does not know."""
    real: bool
    """The devices are this machine's own; else the CPU's simulated ones stand in for them."""

    def devices(self) -> Sequence[Any]:
        """To compile for. UsageError where JAX runs already, with fewer."""
        return jax.devices() if self.real else simulated_devices(self.size)

    def platform(self) -> str:
        """JAX's name of what the program will run on."""
        if self.real:
            return jax.devices()[0].platform
        return "cpu" if self.chip is None else "tpu" if self.chip.kind.startswith("TPU") else "gpu"

    def memory(self) -> float | None:
        """Bytes of a device: simulated ones share the machine's."""
        if self.chip is not None:
            return self.chip.memory * 1e9
        if self.platform() == "cpu":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / self.size
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("bytes_limit")

    def peaks(self, dtype: str) -> Peaks | None:
        """FLOP/s and bytes/s of all devices together."""
        if self.chip is not None:
            return Peaks(self.chip.tflops * 1e12 * self.size, self.chip.bandwidth * 1e9 * self.size)
        return device_peaks(dtype) if self.platform() == "cpu" else None

    def sent_per_second(self, mesh: Mapping[str, int], axes: Sequence[str]) -> float | None:
        """Bytes that a device sends in a second along ``axes``; of a CPU nothing is known."""
        if self.chip is None:
            return None
        chip, places = self.chip, np.arange(int(np.prod([*mesh.values()]))).reshape([*mesh.values()])
        group = places[tuple(slice(None) if name in axes else 0 for name in mesh)]
        within = int(group.max()) < chip.joined or chip.beyond is None
        return 1e9 * (chip.link if within else chip.beyond or chip.link)


def parse_topology(text: str) -> Topology:
    """``v5p-128`` (cores, as Google counts them: 64 chips), ``h100x64``, ``cpu:8``; empty: this machine.

    UsageError for any other, with the names there are.
    """
    if not text:
        count, device = jax.device_count(), jax.devices()[0]
        return Topology(f"{count} x {device.device_kind}", count, known_chip(device.device_kind), real=True)
    found = re.fullmatch(r"(.+?)([-x:])(\d+)", text.lower())
    name, mark, number = found.groups() if found else ("", "", "0")
    if name == "cpu" and mark == ":" and int(number):
        return Topology(text, int(number), None, real=False)
    chip = next((chip for chip in KNOWN if chip.name == name and mark == _mark(chip)), None)
    if chip is None or not int(number):
        raise UsageError(f"{text!r} is not known; there are {', '.join(_example(chip) for chip in KNOWN)}, cpu:8")
    count, rest = divmod(int(number), chip.units)
    if rest:
        raise UsageError(f"{text!r}: the number counts cores, of which a chip has {chip.units}")
    if chip.beyond is None and count > chip.joined:
        raise UsageError(f"{text!r}: a pod has {chip.joined * chip.units} at most")
    return Topology(text, count, chip, real=False)


def _mark(chip: Chip) -> str:
    return "-" if chip.kind.startswith("TPU") else "x"


def _example(chip: Chip) -> str:
    return f"{chip.name}{_mark(chip)}8"


def simulated_devices(count: int) -> Sequence[Any]:
    """``count`` of the CPU's devices; JAX is told to simulate them where it has not started yet."""
    simulate_cpus(count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UsageError(f"{count} devices to simulate, but JAX has started with {len(devices)}: use a new process")
    return devices[:count]
