"""Bytes that a compiled program sends between devices, read from its HLO with loops multiplied by their trips."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

SentBytes = dict[tuple[str, ...], float]
"""Bytes that each device sends, by mesh axes."""

COLLECTIVE_KINDS = (
    "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
)
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"= (.*?) ({COLLECTIVE_KINDS})(-start)?\(")
WHILE = re.compile(r"= .*? while\(")
CONDITIONAL = re.compile(r"= .*? conditional\(")
CALLED_NAME = re.compile(r"(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c\d+)\[([\d,]*)\]")


class Instruction(NamedTuple):
    text: str

    def called_computations(self) -> dict[str, str]:
        return dict(CALLED_NAME.findall(self.text))

    def branches(self) -> list[str]:
        """Return the branches of a conditional, of which one runs."""
        listed = BRANCHES.search(self.text)
        if listed:
            return [name.strip().removeprefix("%") for name in listed[1].split(",")]
        return [name for place, name in self.called_computations().items() if place.endswith("_computation")]


def bytes_sent(hlo: str, mesh: Mapping[str, int], *, trips: int) -> SentBytes:
    """Return the bytes that a program sends, from its HLO text; ``mesh`` has axis sizes in the order of the devices.

    Collectives count as rings: for an array of S bytes on n devices an all-gather sends S · (n - 1) / n and a sum twice
    that. ``trips`` is the number of trips of a loop whose end depends on data. Of a conditional the branch that sends
    most counts. XLA for CPU sums 2-byte floats in 4 bytes, which count as 2.
    """
    entry, computations = _computations(hlo)
    totals: dict[str, SentBytes] = {}

    def bytes_of(name: str) -> SentBytes:
        if name not in totals:
            totals[name] = _sum(*(bytes_of_instruction(line) for line in computations.get(name, ())))
        return totals[name]

    def bytes_of_instruction(line: Instruction) -> SentBytes:
        if collective := COLLECTIVE.search(line.text):
            return _collective(line.text, collective, mesh)
        if CONDITIONAL.search(line.text):
            return max((bytes_of(name) for name in line.branches()), key=lambda sent: sum(sent.values()), default={})
        inside = _sum(*(bytes_of(name) for name in line.called_computations().values()))
        if WHILE.search(line.text):
            count = TRIP_COUNT.search(line.text)
            return {axes: size * (int(count[1]) if count else trips) for axes, size in inside.items()}
        return inside

    return bytes_of(entry)


def _computations(hlo: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Return the entry's name and, for each computation, the instructions that send or call."""
    entry, name, match = "", "", {}
    for line in hlo.split("\n"):
        if head := COMPUTATION.match(line):
            name = head[2]
            match[name] = []
            entry = name if head[1] else entry
        elif name and (CALLED_NAME.search(line) or BRANCHES.search(line) or COLLECTIVE.search(line)):
            match[name].append(Instruction(line))
    return entry, match


def _sum(*parts: SentBytes) -> SentBytes:
    total: SentBytes = {}
    for part in parts:
        for axes, size in part.items():
            total[axes] = total.get(axes, 0.0) + size
    return total


def _collective(text: str, match: re.Match[str], mesh: Mapping[str, int]) -> SentBytes:
    shape, kind, start = match.groups()
    sizes = array_bytes(shape)
    # The start of an asynchronous collective returns its operand too.
    size = float(sizes[1] if start and kind in ("all-gather", "collective-permute") else sum(sizes))
    if re.search(r"to_apply=\S*promoted", text):
        size /= 2
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", text)
        moves = [[int(x) for x in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])] if pairs else []
        axes = {axis for pair in moves for axis in _axes(pair, mesh)}
        return {tuple(axis for axis in mesh if axis in axes): size} if axes else {}
    group = replica_group(text, math.prod(mesh.values()))
    count, axes = len(group), _axes(group, mesh)
    if count < 2:
        return {}
    match kind:
        case "reduce-scatter":
            return {axes: size * (count - 1)}
        case "all-reduce":
            return {axes: 2 * size * (count - 1) / count}
        case "collective-broadcast":
            return {axes: size}
        case _:
            return {axes: size * (count - 1) / count}


def array_bytes(shape: str) -> list[int]:
    """Return the number of bytes of each array in an HLO type."""

    def one(dtype: str, dims: str) -> int:
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        return math.prod(int(dim) for dim in dims.split(",") if dim) * max(bits, 8) // 8

    return [one(*match) for match in ARRAY.findall(shape)]


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
