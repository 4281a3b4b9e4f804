"""The real compilers of TPUs and GPUs, which compile programs on a machine that has no such device."""

from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from jax.experimental import topologies

from jrlhf.parallel.devices.topology import Topology
from jrlhf.parallel.settings import simulate_cpus
from jrlhf.system.environment import allow_tpu_compiler
from jrlhf.system.errors import UsageError

TPU_NAMES = {"v5litepod": "v5e", "v7": "tpu7x"}
"""Names that the TPU's compiler has for chips, where they differ from ours."""

GPU_TARGETS = ("h100",)
"""GPUs that a file in ``targets/`` describes to XLA's CUDA compiler."""

PACKAGES = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}
"""Packages that hold the compilers, by platform."""


def described_topology(topology: Topology) -> Topology:
    """Return the topology with devices that compile but run nothing, in the place of simulated ones.

    Unless JAX has started, it starts on the CPU, so that no device is searched for. Raises UsageError where the
    compiler is not installed or does not know the devices.
    """
    devices = _tpu_devices(topology) if topology.platform() == "tpu" else _gpu_devices(topology)
    return topology._replace(size=len(devices), described=devices)


def compiler_of(topology: Topology) -> str:
    """Return the name and version of what compiles for a topology."""
    package = PACKAGES.get(topology.platform(), "jaxlib") if topology.described else "jaxlib"
    name = f"{package} {version(package)}"
    return f"{name} for simulated devices of the CPU" if topology.simulated else name


def _tpu_devices(tpus: Topology) -> tuple[Any, ...]:
    if not tpus.shape or tpus.chip is None:
        raise UsageError(f"{tpus.name}: no slice has this number of chips; a slice can also be named as v5p:2x2x4")
    if find_spec("libtpu") is None:
        raise UsageError(f'{tpus.name} needs the TPU\'s compiler: pip install "jrlhf[tpu-compiler]"')
    allow_tpu_compiler()
    simulate_cpus(1)
    name = TPU_NAMES.get(tpus.chip.name, tpus.chip.name)
    # A v4 has two cores that JAX shows as one device.
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    try:
        described = topologies.get_topology_desc(f"{name}:{'x'.join(map(str, tpus.shape))}", "tpu", **options)
    except Exception as error:  # JAX's errors have no common class here
        raise UsageError(f"{tpus.name}: the TPU's compiler does not know this slice: {error}") from error
    return tuple(described.devices)


def _gpu_devices(gpus: Topology) -> tuple[Any, ...]:
    chip = gpus.chip.name if gpus.chip else ""
    if chip not in GPU_TARGETS:
        raise UsageError(f"{gpus.name}: programs can be compiled without a device only for {', '.join(GPU_TARGETS)}")
    if find_spec("jax_cuda13_plugin") is None:
        raise UsageError(f'{gpus.name} needs XLA\'s CUDA compiler: pip install "jax[cuda13]"')
    simulate_cpus(1)
    target = files("jrlhf.parallel.devices").joinpath("targets", f"{chip}.txtpb").read_text(encoding="utf-8")
    described = topologies.get_topology_desc(chip, "cuda", target_config=target, topology=f"1x1x{gpus.size}")
    return tuple(described.devices)
