"""A rater's ranking on its way between files: which answers stand where, and what was said besides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jrlhf.rank.store import Decision
from jrlhf.rank.tasks import LONGEST_NAME, Content, Task, is_name, is_rank, turn_text
from jrlhf.system.errors import UsageError


@dataclass(frozen=True)
class Placed:
    """One ranking, apart from its task."""

    rater: str
    ranks: tuple[int, ...]
    margin: float | None = None
    note: str = ""
    seconds: float | None = None

    @classmethod
    def of(cls, decision: Decision) -> "Placed":
        return cls(decision.rater, decision.ranks, decision.margin, decision.note, decision.seconds)

    @classmethod
    def read(cls, rater: str, ranks: Sequence[int], about: Mapping[str, Any]) -> "Placed":
        """With whatever a file says of margin, note and seconds."""
        note = about.get("note")
        if not is_name(rater):
            raise UsageError(f"rater: not a name of at most {LONGEST_NAME} printable characters: {rater!r}")
        return cls(
            rater,
            dense(ranks),
            _number(about.get("margin")),
            note if isinstance(note, str) else "",
            _number(about.get("seconds")),
        )

    def order(self) -> list[int]:
        """The answers, best first; those that are tied in the order of the task file."""
        return sorted(range(len(self.ranks)), key=lambda answer: self.ranks[answer])

    def about(self) -> dict[str, Any]:
        """What a list of answers cannot say: ties above all."""
        return {
            "rater": self.rater,
            "ranks": list(self.ranks),
            "margin": self.margin,
            "note": self.note,
            "seconds": self.seconds,
        }


def read_order(order: Sequence[int], rater: str, about: Mapping[str, Any]) -> Placed:
    """A list of answers, best first, with the ties of ``about`` where these still fit the list."""
    if sorted(order) != list(range(len(order))):
        raise UsageError(f"not an order of answers: {list(order)}")
    ranks = [order.index(answer) for answer in range(len(order))]
    said = about.get("ranks")
    if is_ranking(said, len(ranks)):
        assert isinstance(said, list)
        in_order = [said[answer] for answer in order]
        ranks = said if in_order == sorted(in_order) else ranks
    return Placed.read(rater, ranks, about)


def decided(made: Placed, task: Task) -> Decision:
    return Decision(made.rater, task.key, "rank", made.ranks, made.margin, made.note, made.seconds)


def is_ranking(ranks: Any, count: int) -> bool:
    """Whether it is a list of as many ranks."""
    return isinstance(ranks, list | tuple) and len(ranks) == count and all(map(is_rank, ranks))


def dense(ranks: Sequence[int]) -> tuple[int, ...]:
    """``[3, 1, 3] -> (1, 0, 1)``."""
    places = sorted(set(ranks))
    return tuple(places.index(rank) for rank in ranks)


def as_text(content: Content | None) -> str:
    """Chat messages as one text, for tools that show no chats."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(f"{message['role']}: {turn_text(message)}" for message in content)


def _number(value: Any) -> float | None:
    """A finite one, or none."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31
    return float(value) if fits else None
