"""What was found in a case, and the figures that are made of it."""

from statistics import median
from typing import Any, NamedTuple

from peers.cases import Case, decode_bytes, flops, units


class Range(NamedTuple):
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Range":
        return cls(median(values), min(values), max(values))


class Peaks(NamedTuple):
    """The best that anybody reached in a round."""

    flops: float
    bytes: float

    @classmethod
    def best(cls, lines: list[dict[str, Any]], dtype: str) -> "Peaks":
        return cls(max(line["flops"][dtype] for line in lines), max(line["bytes"] for line in lines))


class SideResult(NamedTuple):
    facts: dict[str, Any]
    variables: str
    lines: list[dict[str, Any]]
    """One a round."""

    def rounds(self) -> list[float]:
        """Seconds a call, each round's median."""
        return [median(line["seconds"]) for line in self.lines]

    def seconds(self) -> Range:
        """Of all calls."""
        return Range.of([second for line in self.lines for second in line["seconds"]])

    def peak_mb(self) -> int:
        return self.lines[-1]["peak_mb"]

    def phases(self) -> dict[str, float]:
        """Seconds of a PPO iteration's parts, from the side that says them."""
        told = [line["phases"] for line in self.lines if "phases" in line]
        return {name: median(phases[name] for phases in told) for name in told[0]} if told else {}


class Result(NamedTuple):
    case: Case
    sides: dict[str, SideResult]
    failed: dict[str, str]
    """Sides that gave no figure, and why."""
    peaks: list[Peaks]
    """One a round."""

    def figure(self, side: str) -> float:
        """Units a second."""
        return units(self.case) / self.sides[side].seconds().median

    def ratio(self, side: str, base: str = "jrlhf") -> Range:
        """How many times as fast as ``side`` the ``base`` is, within each round."""
        pairs = zip(self.sides[side].rounds(), self.sides[base].rounds(), strict=True)
        return Range.of([theirs / ours for theirs, ours in pairs])

    def share_of_matmul(self, side: str) -> float:
        return flops(self.case) / self.sides[side].seconds().median / median(peak.flops for peak in self.peaks)

    def share_of_copy(self, side: str) -> float:
        return decode_bytes(self.case) / self.sides[side].seconds().median / median(peak.bytes for peak in self.peaks)

    def parameter_difference(self, side: str, base: str = "jrlhf") -> tuple[int, int]:
        """Parameters of all models, and those that are trained, more or less than ``base`` has."""
        theirs, ours = self.sides[side].facts, self.sides[base].facts
        return theirs["parameters"] - ours["parameters"], theirs["trained"] - ours["trained"]
