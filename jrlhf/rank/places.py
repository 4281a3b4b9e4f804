"""A rater's ranking, in the form that files exchange."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jrlhf.rank.store import Decision
from jrlhf.rank.tasks import MAX_NAME_LENGTH, Content, Task, is_name, is_rank, turn_text
from jrlhf.system.errors import UsageError


@dataclass(frozen=True)
class Ranking:
    """One ranking without its task."""

    rater: str
    ranks: tuple[int, ...]
    margin: float | None = None
    note: str = ""
    seconds: float | None = None

    @classmethod
    def of(cls, decision: Decision) -> "Ranking":
        return cls(decision.rater, decision.ranks, decision.margin, decision.note, decision.seconds)

    @classmethod
    def read(cls, rater: str, ranks: Sequence[int], about: Mapping[str, Any]) -> "Ranking":
        """Build a ranking from a file, with its margin, note and seconds if they are valid."""
        note = about.get("note")
        if not is_name(rater):
            raise UsageError(f"rater: not a name of at most {MAX_NAME_LENGTH} printable characters: {rater!r}")
        return cls(
            rater,
            dense(ranks),
            _number(about.get("margin")),
            note if isinstance(note, str) else "",
            _number(about.get("seconds")),
        )

    def order(self) -> list[int]:
        """Return the answers, best first; tied answers keep the order of the task file."""
        return sorted(range(len(self.ranks)), key=lambda answer: self.ranks[answer])

    def about(self) -> dict[str, Any]:
        """Return the properties for which a list of answers has no place, above all ties."""
        return {
            "rater": self.rater,
            "ranks": list(self.ranks),
            "margin": self.margin,
            "note": self.note,
            "seconds": self.seconds,
        }


def read_order(order: Sequence[int], rater: str, about: Mapping[str, Any]) -> Ranking:
    """Read a list of answers, best first, with the ties of ``about`` if they fit the list."""
    if sorted(order) != list(range(len(order))):
        raise UsageError(f"not an order of answers: {list(order)}")
    ranks = [order.index(answer) for answer in range(len(order))]
    tied = about.get("ranks")
    if is_ranking(tied, len(ranks)):
        assert isinstance(tied, list)
        in_order = [tied[answer] for answer in order]
        ranks = tied if in_order == sorted(in_order) else ranks
    return Ranking.read(rater, ranks, about)


def as_decision(ranking: Ranking, task: Task) -> Decision:
    """Return the ranking as a decision on a task."""
    return Decision(ranking.rater, task.key, "rank", ranking.ranks, ranking.margin, ranking.note, ranking.seconds)


def is_ranking(ranks: Any, count: int) -> bool:
    """Whether ``ranks`` is a list of ``count`` ranks."""
    return isinstance(ranks, list | tuple) and len(ranks) == count and all(map(is_rank, ranks))


def dense(ranks: Sequence[int]) -> tuple[int, ...]:
    """Close gaps between ranks: ``[3, 1, 3] -> (1, 0, 1)``."""
    places = sorted(set(ranks))
    return tuple(places.index(rank) for rank in ranks)


def as_text(content: Content | None) -> str:
    """Join chat messages into one text, for tools without chats."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(f"{message['role']}: {turn_text(message)}" for message in content)


def _number(value: Any) -> float | None:
    """Return a finite number, else None."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31
    return float(value) if fits else None
