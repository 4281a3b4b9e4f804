"""Compiles the programs of a stage from shapes alone and reads their memory, traffic, FLOPs and time."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jrlhf.parallel.devices.collectives import bytes_sent
from jrlhf.parallel.devices.estimate import estimate
from jrlhf.parallel.devices.hlo import arrays_of, total_bytes
from jrlhf.parallel.devices.topology import Topology
from jrlhf.train.programs import Program, device_bytes

ACHIEVED_FRACTION = 0.5
"""Assumed fraction of the data sheet's FLOP/s and of its bytes/s of memory and links."""

CPU_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options for fast compilation: nobody runs the code, and XLA assigns buffers before it makes machine code."""

OUT_OF_MEMORY = re.compile(
    r"\(([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", flags=re.IGNORECASE
)
"""Refusals of the TPU's compiler for want of memory, with the memory that the program needs."""

UNITS = {unit: 1024.0**power for power, unit in enumerate("KMGT", start=1)}

BFLOAT16_OPTIONS = {"xla_disable_hlo_passes": "float-normalization-bf16"}
"""Compiler options that keep bfloat16 at 2 bytes, as on accelerators; XLA for CPU widens it to 4 bytes."""


class Figures(NamedTuple):
    """Memory, traffic, FLOPs and time of a program; bytes are per device."""

    name: str
    alive: float
    temporaries: float
    """Activations, gradients, KV cache, and results that do not reuse the memory of an argument."""
    cache: float
    sent: dict[str, float]
    """Bytes by mesh axes, such as ``fsdp`` or ``data+fsdp``."""
    flops: float
    seconds: float | None
    """From FLOPs and bytes alone; None if the rates of the devices are unknown or the program is no part of a step."""
    estimate: float | None = None
    """Seconds from the compiled program, see ``parallel.devices.estimate``; None without the devices' own compiler."""

    @property
    def peak(self) -> float:
        """Peak memory while the program runs."""
        return self.alive + self.temporaries


def compile_program(program: Program, topology: Topology) -> Any:
    """Compile the program for the devices of its arguments."""
    lowered = program.jitted.lower(*program.args)
    if not topology.simulated and topology.platform() != "cpu":
        return lowered.compile()
    if topology.platform() != "cpu":
        try:
            return lowered.compile(compiler_options=CPU_OPTIONS | BFLOAT16_OPTIONS)
        except jax.errors.JaxRuntimeError:
            # XLA for CPU lacks some bfloat16 products (JAX 0.10: all, later: of a single row); figures are too high.
            pass
    return lowered.compile(compiler_options=CPU_OPTIONS)


def program_figures(program: Program, topology: Topology, mesh: Mesh, dtype: str) -> Figures:
    """Compile a program and read its figures from the compiler's memory analysis and HLO.

    Of a program that its compiler refuses for want of memory, only the memory that it needs is known.
    """
    try:
        executable = compile_program(program, topology)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        temporaries = needed - device_bytes(program.args)
        return Figures(program.name, device_bytes(*program.alive), temporaries, 0.0, {}, program.flops, None)
    memory, hlo = executable.memory_analysis(), executable.as_text()
    sent = bytes_sent(hlo, mesh.shape, trips=program.trips, loops=program.loops)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    asked = program.timed and not topology.simulated and topology.chip is not None
    return Figures(
        name=program.name,
        alive=device_bytes(*program.alive),
        temporaries=float(memory.temp_size_in_bytes + results),
        cache=cache_bytes(hlo, program.cache),
        sent={"+".join(axes): size for axes, size in sent.items()},
        flops=program.flops,
        seconds=seconds(program, sent, topology, mesh.shape, dtype) if program.timed else None,
        estimate=estimate(hlo, topology, trips=program.trips, loops=program.loops).seconds if asked else None,
    )


def needed_bytes(refusal: str) -> float | None:
    """Return the memory of a device that a program needs, from its compiler's refusal; None of another refusal."""
    match = OUT_OF_MEMORY.search(refusal)
    if match is None:
        return None
    size, unit = (part for part in match.groups() if part)
    return float(size) * UNITS[unit.upper()]


def seconds(
    program: Program, sent: Mapping[tuple[str, ...], float], topology: Topology, mesh: Mapping[str, int], dtype: str
) -> float | None:
    """Estimate max(FLOPs, bytes read) + bytes sent, in seconds, at ``ACHIEVED_FRACTION`` of the peak rates."""
    peaks = topology.peaks(dtype)
    if peaks is None:
        return None
    total = max(program.flops / peaks.flops, program.read * topology.size / peaks.bytes)
    for axes, size in sent.items():
        rate = topology.sent_per_second(mesh, axes)
        total += 0.0 if rate is None else size / rate
    return total / ACHIEVED_FRACTION


def cache_bytes(hlo: str, shape: tuple[int, int] | None) -> float:
    """Return the bytes of the KV cache that a sampling loop carries.

    They are those of its 4-D arrays whose last dimensions are ``shape``, and of the scales of int8 arrays.
    """
    if shape is None:
        return 0.0
    slots, width = shape

    def of_cache(carry: str) -> int:
        arrays = re.findall(rf"\w+\[\d+,\d+,{slots},{width}\]", carry)
        # Stacked weights may have as many columns; the numbers of rows and heads tell which arrays are scales.
        heads = "|".join(set(re.findall(rf"s8\[(\d+,\d+),{slots},{width}\]", carry)))
        scales = re.findall(rf"f32\[(?:{heads}),{slots}\]", carry) if heads else []
        return total_bytes(arrays_of(" ".join(arrays + scales)))

    loops: Iterable[str] = re.findall(r"= \((.*)\) while\(", hlo)
    return float(max(map(of_cache, loops), default=0))
