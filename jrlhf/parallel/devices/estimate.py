"""Estimated time of a compiled program, from its optimised HLO, by the compiler's own figures where it gives them."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from jrlhf.parallel.devices.collectives import Collective, collectives_of
from jrlhf.parallel.devices.executions import ALL_ALIKE, Amounts, sum_over_executions
from jrlhf.parallel.devices.gpu_work import gpu_work
from jrlhf.parallel.devices.hlo import Computation, Instruction, parse_hlo
from jrlhf.parallel.devices.peaks import Chip
from jrlhf.parallel.devices.topology import Topology
from jrlhf.parallel.devices.tpu_work import tpu_work
from jrlhf.parallel.devices.traffic import memory_bytes

LINK_SHARE = {"tpu": 0.9, "gpu": 0.8}
"""Share of the links' data sheet rate that a collective reaches."""

MEMORY_SHARE = 0.85
"""Share of a TPU's memory bandwidth that a loop reaches."""

TRANSFORMATIONS = re.compile(r"jit\([^()]*\)/|eval_jaxpr/|checkpoint/|while/body/|cond/branch_\d+_fun/|\d+")
"""Parts of an operation's name that are left out of its place; without numbers, all layers are one place."""

PLACE_LENGTH = 88
"""Characters of a place, from its end."""

COMMUNICATION, OVERLAPPED, MEMORY_WAIT = "communication", "overlapped communication", "memory wait"
CONTROL = frozenset({"while", "conditional", "call", "call-start", "async-start"})


class Place(NamedTuple):
    """Seconds that a program spends on one kind of work at one place of the source."""

    seconds: float
    kind: str
    place: str


class Estimate(NamedTuple):
    """Estimated time of one execution of a program on a device."""

    seconds: float
    work: float
    """Seconds of all that is not communication."""
    exposed: float
    """Seconds of communication beside which no work is done."""
    sent: dict[str, float]
    """Bytes that a device sends, by kind of collective."""
    kinds: dict[str, float]
    """Seconds by kind of work, highest first; overlapped communication counts in full."""
    places: list[Place]
    """Seconds by kind of work and place, highest first."""


class Work(NamedTuple):
    """Key of the seconds that one kind of work takes at one place of the source."""

    kind: str
    place: str


class Sent(NamedTuple):
    """Key of the bytes that one kind of collective sends."""

    kind: str


MEMORY = "memory"
"""Key of the bytes to and from main memory."""


def estimate(hlo: str, topology: Topology, *, trips: int, loops: Mapping[str, float] = ALL_ALIKE) -> Estimate:
    """Estimate the time of a program from its optimised HLO.

    ``trips`` is the number of trips of a loop whose end depends on data, ``loops`` that of such loops by name.

    These are estimates by a compiler and a data sheet, not measurements: trust ratios of similar programs, and seconds
    to a third.

    TPU: the sum of the compiler's ``estimated_cycles`` over the clock. Attention kernels, for which it has none, take
    their FLOPs at half of the peak rate or their bytes at 80 % of the memory bandwidth. A loop takes at least as long
    as its bytes to and from main memory at 85 % of the bandwidth, since the compiler assumes that copies are hidden.
    GPU: each kernel takes the longer of its FLOPs at 75 % of the peak and its bytes at 80 % of the bandwidth; launches
    are free.
    Both: loops count as often as they run, and of the branches of a conditional the slowest. A collective takes its
    ring bytes over the links of the chip, at 90 % (TPU) or 80 % (GPU) of the data sheet. It is exposed in full if the
    program waits for it at once; the others are exposed where together they take longer than all work.
    """
    chip = topology.chip
    if chip is None:
        raise ValueError(f"{topology.name}: no data sheet to estimate from")
    module, platform = parse_hlo(hlo), topology.platform()
    work_of = tpu_work if platform == "tpu" else gpu_work

    def of_instruction(computation: Computation, instruction: Instruction) -> Amounts | None:
        collectives = collectives_of(module, instruction)
        if collectives is None and instruction.opcode in CONTROL:
            return None
        place, fused = place_of(instruction), collectives is not None and instruction.opcode == "fusion"
        amounts = _communication(collectives or [], place, topology)
        if collectives is None or (fused and all(collective.overlapped for collective in collectives)):
            kind, seconds = work_of(module, computation, instruction, chip)
            amounts[Work(kind, place)] = seconds
        if not fused:
            # Buffers only pass through a fused collective.
            amounts[MEMORY] = float(memory_bytes(module, computation, instruction))
        return amounts

    def of_body(loop: Instruction, body: Amounts) -> Amounts:
        return body if platform == "gpu" else _with_memory_wait(loop, body, chip)

    at = {"trips": trips, "loops": loops, "of_body": of_body}
    return _summary(sum_over_executions(module, of_instruction, weight=_seconds, **at))


def place_of(instruction: Instruction) -> str:
    """Return the end of the instruction's place in the source: scopes and operation, without transformations."""
    name = TRANSFORMATIONS.sub("", instruction.quoted("op_name"))
    return name[-PLACE_LENGTH:] or instruction.opcode


def _communication(collectives: list[Collective], place: str, topology: Topology) -> Amounts:
    """Return the bytes and the seconds of the collectives of an instruction."""
    amounts: Amounts = {}
    for collective in collectives:
        devices = len(collective.groups[0]) if collective.groups else 0
        rate = topology.sent_in_group(max(map(max, collective.groups), default=0))
        kind = OVERLAPPED if collective.overlapped else COMMUNICATION
        work, sent = Work(kind, f"{collective.kind} [{devices}] {place}"), Sent(collective.kind)
        amounts[sent] = amounts.get(sent, 0.0) + collective.bytes
        seconds = 0.0 if rate is None else collective.bytes / (LINK_SHARE[topology.platform()] * rate)
        amounts[work] = amounts.get(work, 0.0) + seconds
    return amounts


def _seconds(amounts: Amounts) -> float:
    return math.fsum(seconds for key, seconds in amounts.items() if isinstance(key, Work))


def _with_memory_wait(loop: Instruction, body: Amounts, chip: Chip) -> Amounts:
    """Add what an iteration waits for main memory: its bytes take longer than its work."""
    away = COMMUNICATION, OVERLAPPED
    work = math.fsum(v for key, v in body.items() if isinstance(key, Work) and key.kind not in away)
    wait = body.get(MEMORY, 0.0) / (MEMORY_SHARE * chip.bandwidth * 1e9) - work
    return body | {Work(MEMORY_WAIT, f"loop {place_of(loop)}"): wait} if wait > 0 else body


def _summary(amounts: Amounts) -> Estimate:
    places = sorted((Place(v, *key) for key, v in amounts.items() if isinstance(key, Work) and v), reverse=True)
    kinds: dict[str, float] = {}
    for place in places:
        kinds[place.kind] = kinds.get(place.kind, 0.0) + place.seconds
    waited, beside = kinds.get(COMMUNICATION, 0.0), kinds.get(OVERLAPPED, 0.0)
    work = math.fsum(kinds.values()) - waited - beside
    exposed = waited + max(0.0, beside - work)
    sent = {key.kind: size for key, size in amounts.items() if isinstance(key, Sent)}
    kinds = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    return Estimate(work + exposed, work, exposed, sent, kinds, places)
