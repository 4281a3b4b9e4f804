"""Programs of a stage, compiled without an array: what each takes of a device, sends to others and computes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jrlhf.parallel.devices.collectives import array_bytes, bytes_sent
from jrlhf.parallel.devices.topology import Topology
from jrlhf.train.programs import Program, device_bytes

ACHIEVED = 0.5
"""Of the rates on a data sheet: FLOP/s, memory's and links' bytes/s."""

FOR_CPU = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Buffers are assigned before machine code is made: nobody runs it, so it need not be fast."""

AS_WRITTEN = {"xla_disable_hlo_passes": "float-normalization-bf16"}
"""XLA for CPU holds and sends bfloat16 in 4 bytes wherever it cannot compute in it; accelerators can."""


class Figures(NamedTuple):
    """Of a program; bytes are a device's."""

    name: str
    alive: float
    temporaries: float
    """Besides results that take an argument's place: activations, gradients, the cache."""
    cache: float
    sent: dict[str, float]
    """By mesh axes, ``fsdp`` or ``data+fsdp``."""
    flops: float
    seconds: float | None
    """None: nothing is known of the devices' rates, or it is not part of a step."""

    @property
    def peak(self) -> float:
        return self.alive + self.temporaries


def compiled(program: Program, topology: Topology) -> Any:
    """The program for devices like those of its arguments."""
    lowered = program.jitted.lower(*program.args)
    if topology.real and topology.platform() != "cpu":
        return lowered.compile()
    if topology.platform() != "cpu":
        try:
            return lowered.compile(compiler_options=FOR_CPU | AS_WRITTEN)
        except jax.errors.JaxRuntimeError:
            # No product of bfloat16: on JAX 0.10 none, later ones only of a single row. Figures come out too high.
            pass
    return lowered.compile(compiler_options=FOR_CPU)


def measured(program: Program, topology: Topology, mesh: Mesh, dtype: str) -> Figures:
    """Compile a program and read its figures from what the compiler made of it."""
    done = compiled(program, topology)
    memory, hlo = done.memory_analysis(), done.as_text()
    sent = bytes_sent(hlo, mesh.shape, trips=program.trips)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Figures(
        name=program.name,
        alive=device_bytes(*program.alive),
        temporaries=float(memory.temp_size_in_bytes + results),
        cache=cache_bytes(hlo, program.cache),
        sent={"+".join(axes): size for axes, size in sent.items()},
        flops=program.flops,
        seconds=seconds(program, sent, topology, mesh.shape, dtype) if program.timed else None,
    )


def seconds(
    program: Program, sent: Mapping[tuple[str, ...], float], topology: Topology, mesh: Mapping[str, int], dtype: str
) -> float | None:
    """Arithmetic or memory, whichever takes longer, and then what is sent, all at ``ACHIEVED`` of their rates."""
    peaks = topology.peaks(dtype)
    if peaks is None:
        return None
    total = max(program.flops / peaks.flops, program.read * topology.size / peaks.bytes)
    for axes, size in sent.items():
        rate = topology.sent_per_second(mesh, axes)
        total += 0.0 if rate is None else size / rate
    return total / ACHIEVED


def cache_bytes(hlo: str, shape: tuple[int, int] | None) -> float:
    """Of the KV cache that a sampling loop carries: its arrays of four dimensions that end in ``shape``, and the scales
    of those in int8."""
    if shape is None:
        return 0.0
    slots, width = shape

    def of_cache(carry: str) -> int:
        arrays = re.findall(rf"\w+\[\d+,\d+,{slots},{width}\]", carry)
        # Weights of all layers may end in as many columns: rows and heads tell which arrays are scales.
        heads = "|".join(set(re.findall(rf"s8\[(\d+,\d+),{slots},{width}\]", carry)))
        scales = re.findall(rf"f32\[(?:{heads}),{slots}\]", carry) if heads else []
        return sum(array_bytes(" ".join(arrays + scales)))

    loops: Iterable[str] = re.findall(r"= \((.*)\) while\(", hlo)
    return float(max(map(of_cache, loops), default=0))
