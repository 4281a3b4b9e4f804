"""The real compilers of TPUs and GPUs, which compile programs on a machine that has no such device."""

import math
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
    """Return devices that compile but run nothing, for a name that ``absent_topology`` knows.

    Unless JAX has started, it starts on the CPU, so that no device is searched for. Raises UsageError for an unknown
    name, and where the compiler is not installed.
    """
    topology = absent_topology(name)
    devices = _tpu_devices(name) if topology.shape else _gpu_devices(topology)
    return topology._replace(size=len(devices), described=devices)


def absent_topology(name: str) -> Topology:
    """Return a TPU slice by its sides in chips, such as ``v5p:2x2x1``, or GPUs, such as ``h100x8``, without devices.

    Raises UsageError for an unknown name.
    """
    if match := TPU_NAME.fullmatch(name):
        shape = tuple(int(side) for side in match[2].split("x"))
        return Topology(name, math.prod(shape), _chip(name, match[1]), real=False, shape=shape)
    if (match := GPU_NAME.fullmatch(name)) and match[1] in GPU_TARGETS:
        return Topology(name, int(match[2]), _chip(name, match[1]), real=False)
    raise UsageError(f"{name!r} is no TPU slice, such as v5p:2x2x1 or v5e:4x4, and no {GPU_TARGETS[0]}x8")


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


def _gpu_devices(gpus: Topology) -> tuple[Any, ...]:
    if find_spec("jax_cuda13_plugin") is None:
        raise UsageError(f'{gpus.name!r} needs XLA\'s CUDA compiler: pip install "jax[cuda13]"')
    simulate_cpus(1)
    chip = gpus.name.partition("x")[0]
    target = files("jrlhf.parallel.devices").joinpath("targets", f"{chip}.txtpb").read_text(encoding="utf-8")
    described = topologies.get_topology_desc(chip, "cuda", target_config=target, topology=f"1x1x{gpus.size}")
    return tuple(described.devices)
