"""What a compiled program sends between devices: read from its HLO, loops counted as often as they run."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Sent = dict[tuple[str, ...], float]
"""Bytes that each device sends, by the mesh axes they go along."""

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(-start)?\(")
WHILE = re.compile(r"= .*? while\(")
CONDITIONAL = re.compile(r"= .*? conditional\(")
CALLED = re.compile(r"(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c\d+)\[([\d,]*)\]")


class Instruction(NamedTuple):
    text: str

    def called(self) -> dict[str, str]:
        return dict(CALLED.findall(self.text))

    def branches(self) -> list[str]:
        """Of a conditional, of which one is taken."""
        listed = BRANCHES.search(self.text)
        if listed:
            return [name.strip().removeprefix("%") for name in listed[1].split(",")]
        return [name for place, name in self.called().items() if place.endswith("_computation")]


def bytes_sent(hlo: str, mesh: Mapping[str, int], *, trips: int) -> Sent:
    """Of a program's HLO text. ``mesh``: its axes and their sizes, in the order of the devices.

    By rings: of an array of S bytes on n devices an all-gather sends S · (n - 1) / n, a sum twice that. ``trips``: how
    often a loop runs that only the data ends. Of a conditional's branches the one that sends most is counted. XLA for
    CPU adds 2-byte floats up in 4 bytes; that is counted as 2.
    """
    entry, computations = _computations(hlo)
    known: dict[str, Sent] = {}

    def of(name: str) -> Sent:
        if name not in known:
            known[name] = _added(*(of_instruction(line) for line in computations.get(name, ())))
        return known[name]

    def of_instruction(line: Instruction) -> Sent:
        if collective := COLLECTIVE.search(line.text):
            return _collective(line.text, collective, mesh)
        if CONDITIONAL.search(line.text):
            return max((of(name) for name in line.branches()), key=lambda sent: sum(sent.values()), default={})
        inside = _added(*(of(name) for name in line.called().values()))
        if WHILE.search(line.text):
            count = TRIPS.search(line.text)
            return {axes: size * (int(count[1]) if count else trips) for axes, size in inside.items()}
        return inside

    return of(entry)


def _computations(hlo: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry's name, and for each computation the instructions that send or call."""
    entry, name, found = "", "", {}
    for line in hlo.split("\n"):
        if head := COMPUTATION.match(line):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif name and (CALLED.search(line) or BRANCHES.search(line) or COLLECTIVE.search(line)):
            found[name].append(Instruction(line))
    return entry, found


def _added(*parts: Sent) -> Sent:
    total: Sent = {}
    for part in parts:
        for axes, size in part.items():
            total[axes] = total.get(axes, 0.0) + size
    return total


def _collective(text: str, found: re.Match[str], mesh: Mapping[str, int]) -> Sent:
    shape, kind, start = found.groups()
    sizes = array_bytes(shape)
    # The start of an asynchronous one returns its operand too.
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
    """Of each array in an HLO type."""

    def one(dtype: str, dims: str) -> int:
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        return math.prod(int(dim) for dim in dims.split(",") if dim) * max(bits, 8) // 8

    return [one(*found) for found in ARRAY.findall(shape)]


MESH = re.compile(
    r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{((?:'\w+',? ?)*)\}"
)


def replica_group(text: str, devices: int) -> list[int]:
    """The first group of devices that a collective joins, in any of the ways HLO writes them.

    ``{{0,1},{2,3}}``; ``[2,4]<=[4,2]T(1,0)``: the numbers up to 8, as [4, 2], transposed, in rows of 4;
    ``mesh['a'=4,'b'=2] {'b'}``: along axis b; with ``, device_ids=([2,4]T(1,0))`` before the axes, of the numbers so
    laid out. ValueError for another.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(x) for x in found[1].split(",")]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        rows, dims, order = ([int(x) for x in part.split(",")] if part else None for part in found.groups())
        ids = np.arange(devices).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(rows)[0].tolist()
    if found := MESH.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        along = re.findall(r"'(\w+)'", found[4])
        ids = np.arange(devices)
        if found[2]:
            ids = ids.reshape(_ints(found[2])).transpose(_ints(found[3]))
        ids = ids.reshape([*sizes.values()])
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].reshape(-1).tolist()
    if "replica_groups={}" in text or "replica_groups" not in text:
        return list(range(devices))
    raise ValueError(f"replica groups of an unknown form: {text[text.index('replica_groups') :][:80]}")


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    places = np.unravel_index(group, [*mesh.values()])
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if np.ptp(place))
