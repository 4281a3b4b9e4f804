"""Collectives of a compiled program: the bytes that they send between devices, counted as rings."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jrlhf.parallel.devices.executions import ALL_ALIKE, sum_over_executions
from jrlhf.parallel.devices.hlo import Computation, Instruction, Module, parse_hlo, total_bytes

SentBytes = dict[tuple[str, ...], float]
"""Bytes that each device sends, by mesh axes."""

KINDS = frozenset(
    {
        "all-gather",
        "all-reduce",
        "reduce-scatter",
        "all-to-all",
        "ragged-all-to-all",
        "collective-permute",
        "collective-broadcast",
    }
)
OPCODES = KINDS | {f"{kind}-start" for kind in KINDS}
PRODUCTS = frozenset({"convolution", "dot"})


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    bytes: float
    """Bytes that a device sends: S · (n - 1) / n to gather an array of S bytes on n devices, twice that to sum it."""
    groups: list[list[int]]
    """The first group of devices; of a permutation, the pairs that send to each other."""
    overlapped: bool
    """Whether the program goes on with other work until a later instruction needs the result."""

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Return the mesh axes along which the devices of a group differ."""
        different = {axis for group in self.groups for axis in _axes(group, mesh)}
        return tuple(axis for axis in mesh if axis in different)


def bytes_sent(hlo: str, mesh: Mapping[str, int], *, trips: int, loops: Mapping[str, float] = ALL_ALIKE) -> SentBytes:
    """Return the bytes that a program sends, from its HLO text; ``mesh`` has axis sizes in the order of the devices.

    ``trips`` is the number of trips of a loop whose end depends on data, ``loops`` that of such loops by name. Of a
    conditional the branch that sends most
    counts.
    """
    module = parse_hlo(hlo)._replace(devices=math.prod(mesh.values()))

    def of_instruction(computation: Computation, instruction: Instruction) -> SentBytes | None:
        collectives = collectives_of(module, instruction)
        if collectives is None:
            return None
        sent: SentBytes = {}
        for collective in collectives:
            if axes := collective.axes(mesh):
                sent[axes] = sent.get(axes, 0.0) + collective.bytes
        return sent

    return sum_over_executions(module, of_instruction, weight=lambda sent: sum(sent.values()), trips=trips, loops=loops)


def collectives_of(module: Module, instruction: Instruction) -> list[Collective] | None:
    """Return the collectives of an instruction, one or those fused into it; None if it is about something else.

    A TPU's compiler fuses a sum with the slice that a device needs, which makes it a reduce-scatter. It also fuses
    products into the start, the middle and the end of one and the same collective, which then counts at its start.
    """
    if instruction.opcode in OPCODES:
        return [_collective(instruction, module.devices)]
    inside = module.computations.get(instruction.called.get("calls", ""), {})
    collectives = [_collective(i, module.devices) for i in inside.values() if i.opcode in OPCODES]
    if instruction.opcode == "async-start" and collectives:
        return [collective._replace(overlapped=True) for collective in collectives]
    if instruction.opcode != "fusion" or not collectives:
        return None
    opcodes = {i.opcode for i in inside.values()}
    if instruction.name.startswith("async-collective") or opcodes & PRODUCTS:
        first = instruction.name.startswith("async-collective-start")
        return [collective._replace(overlapped=True) for collective in collectives] if first else []
    sliced = "dynamic-slice" in opcodes
    return [_scattered(c) if sliced and c.kind == "all-reduce" else c for c in collectives]


def _scattered(collective: Collective) -> Collective:
    return collective._replace(kind="reduce-scatter", bytes=collective.bytes / 2)


def _collective(instruction: Instruction, devices: int) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    overlapped, arrays = instruction.opcode != kind, instruction.arrays
    operands = len(instruction.operands)
    if overlapped and kind != "all-reduce" and len(arrays) > operands:
        # The start of an asynchronous collective returns its operands first, then its results.
        arrays = arrays[operands : 2 * operands]
    size = float(total_bytes(arrays))
    if re.search(r"to_apply=\S*promoted", instruction.attributes):
        # XLA for CPU sums 2-byte floats in 4 bytes.
        size /= 2
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", instruction.attributes)
        moves = [_ints(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])] if pairs else []
        return Collective(kind, size, moves, overlapped)
    group = replica_group(instruction.attributes, devices)
    return Collective(kind, size * _ring_share(kind, len(group)), [group], overlapped)


def _ring_share(kind: str, devices: int) -> float:
    """Return the bytes that a device sends for each byte of the result."""
    match kind:
        case "reduce-scatter":
            return float(devices - 1)
        case "all-reduce":
            return 2 * (devices - 1) / devices
        case "collective-broadcast":
            return float(devices > 1)
        case _:
            return (devices - 1) / devices


MESH = re.compile(
    r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{((?:'\w+',? ?)*)\}"
)


def replica_group(text: str, devices: int) -> list[int]:
    """Return the first group of devices of a collective, from any of HLO's notations.

    ``{{0,1},{2,3}}`` lists groups. ``[2,4]<=[4,2]T(1,0)`` is the numbers up to 8 as [4, 2], transposed, in rows of 4.
    ``mesh['a'=4,'b'=2] {'b'}`` groups along axis b; ``, device_ids=([2,4]T(1,0))`` before the axes reorders numbers.
    Raises ValueError for another notation.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(x) for x in match[1].split(",")]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        rows, dims, order = ([int(x) for x in part.split(",")] if part else None for part in match.groups())
        ids = np.arange(devices).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(rows)[0].tolist()
    if match := MESH.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        along = re.findall(r"'(\w+)'", match[4])
        ids = np.arange(devices)
        if match[2]:
            ids = ids.reshape(_ints(match[2])).transpose(_ints(match[3]))
        ids = ids.reshape([*sizes.values()])
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].reshape(-1).tolist()
    if "replica_groups={}" in text or "replica_groups" not in text:
        return list(range(devices))
    raise ValueError(f"replica groups of an unknown form: {text[text.index('replica_groups') :][:80]}")


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the axes along which the devices of a group differ."""
    places = np.unravel_index(group, [*mesh.values()])
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if np.ptp(place))
