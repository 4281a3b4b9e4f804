"""The real compilers of TPUs and GPUs, which compile programs on a machine that has no such device."""

import re
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from jax.experimental import topologies

from jrlhf.parallel.devices.peaks import CHIPS, Chip
from jrlhf.parallel.devices.topology import Topology
from jrlhf.parallel.settings import simulate_cpus
from jrlhf.system.environment import allow_tpu_compiler
from jrlhf.system.errors import UsageError

TPU_NAME = re.compile(r"(\w+):(\d+x\d+(?:x\d+)?)")
GPU_NAME = re.compile(r"(\w+)x(\d+)")
GPU_TARGETS = ("h100",)
"""GPUs that a file in ``targets/`` describes to XLA's CUDA compiler."""


def described_topology(name: str) -> Topology:
    """Return devices that compile but run nothing: ``v5p:2x2x1``, a TPU slice by its sides in chips, or ``h100x8``.

    Unless JAX has started, it starts on the CPU, so that no device is searched for. Raises UsageError for an unknown
    name, and where the compiler is not installed.
    """
    if match := TPU_NAME.fullmatch(name):
        shape = tuple(int(side) for side in match[2].split("x"))
        return _described(name, _chip(name, match[1]), _tpu_devices(name), shape)
    if (match := GPU_NAME.fullmatch(name)) and match[1] in GPU_TARGETS:
        return _described(name, _chip(name, match[1]), _gpu_devices(match[1], int(match[2])), ())
    raise UsageError(f"{name!r} is no TPU slice, such as v5p:2x2x1 or v5e:4x4, and no {GPU_TARGETS[0]}x8")


def _described(name: str, chip: Chip, devices: tuple[Any, ...], shape: tuple[int, ...]) -> Topology:
    return Topology(name, len(devices), chip, real=False, described=devices, shape=shape)


def _chip(name: str, chip: str) -> Chip:
    match = next((one for one in CHIPS if one.name == chip), None)
    if match is None:
        raise UsageError(f"{name!r}: {chip} is not known; known are {', '.join(one.name for one in CHIPS)}")
    return match


def _tpu_devices(name: str) -> tuple[Any, ...]:
    if find_spec("libtpu") is None:
        raise UsageError(f'{name!r} needs the TPU\'s compiler: pip install "jrlhf[tpu-compiler]"')
    allow_tpu_compiler()
    simulate_cpus(1)
    # A v4 has two cores that JAX shows as one device.
    options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
    try:
        return tuple(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:  # JAX's errors have no common class here
        raise UsageError(f"{name!r}: the TPU's compiler does not know this slice: {error}") from error


def _gpu_devices(chip: str, count: int) -> tuple[Any, ...]:
    if find_spec("jax_cuda13_plugin") is None:
        raise UsageError(f'{chip}x{count} needs XLA\'s CUDA compiler: pip install "jax[cuda13]"')
    simulate_cpus(1)
    target = files("jrlhf.parallel.devices").joinpath("targets", f"{chip}.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(chip, "cuda", target_config=target, topology=f"1x1x{count}")
    return tuple(topology.devices)
