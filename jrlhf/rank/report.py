"""How far raters agree, how often they are right where that is known, and how fast they are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np
from scipy.stats import rankdata

from jrlhf.rank.store import Decision
from jrlhf.rank.tasks import Task


@dataclass(frozen=True)
class RaterFigures:
    """What one rater did. None where there is nothing to count."""

    name: str
    ranked: int
    skipped: int
    ties: float | None
    """Share of pairs of answers that were given one place."""
    gold: float | None
    """Share of the pairs whose order is known that were put in that order; a tie is not."""
    seconds: float | None
    """Median a task."""


@dataclass(frozen=True)
class Figures:
    """What all raters did together."""

    tasks: int
    decided: int
    """Tasks that anyone has ranked."""
    shared: int
    """Tasks that two or more have ranked."""
    alpha: float | None
    agreement: float | None
    """Share of pairs of answers that two raters of a task see in one way: better, worse, or tied."""
    raters: tuple[RaterFigures, ...]
    elsewhere: int
    """Decisions on tasks that the file does not hold, or no longer so."""


def figures(tasks: Sequence[Task], decisions: Iterable[Decision]) -> Figures:
    by_key = {task.key: task for task in tasks}
    all_decisions = list(decisions)
    known = [decision for decision in all_decisions if decision.task in by_key]
    rankings: dict[str, dict[str, tuple[int, ...]]] = {}
    for decision in known:
        if decision.kind == "rank":
            rankings.setdefault(decision.task, {})[decision.rater] = decision.ranks
    names = sorted({decision.rater for decision in known})
    return Figures(
        tasks=len(tasks),
        decided=len(rankings),
        shared=sum(len(of) > 1 for of in rankings.values()),
        alpha=alpha(_reliability(rankings, names)),
        agreement=_agreement(rankings),
        raters=tuple(_rater(name, [d for d in known if d.rater == name], by_key) for name in names),
        elsewhere=len(all_decisions) - len(known),
    )


def _reliability(rankings: dict[str, dict[str, tuple[int, ...]]], names: Sequence[str]) -> np.ndarray:
    """``[raters, answers]``: each answer's place in its task; NaN where a rater did not rank it.

    Answers that are tied share the mean of their places (1, 2.5, 2.5, 4), so that a tie moves no one else's.
    """
    columns = []
    for of in rankings.values():
        unseen = np.full(len(next(iter(of.values()))), np.nan)
        columns.append(np.stack([rankdata(of[name]) if name in of else unseen for name in names]))
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(names), 0))


def alpha(values: np.ndarray) -> float | None:
    """Krippendorff's alpha of ordinal values ``[raters, units]``: 1 is full agreement, 0 is chance.

    α = 1 - observed / expected disagreement (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability). None where
    no two raters share a unit, or all values are one.
    """
    import krippendorff

    pairable = values[:, (~np.isnan(values)).sum(axis=0) >= 2]
    if len(np.unique(pairable[~np.isnan(pairable)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=pairable, level_of_measurement="ordinal"))


def _agreement(rankings: dict[str, dict[str, tuple[int, ...]]]) -> float | None:
    pairs = [
        np.sign(one[i] - one[j]) == np.sign(other[i] - other[j])
        for of in rankings.values()
        for one, other in combinations(of.values(), 2)
        for i, j in combinations(range(len(one)), 2)
    ]
    return float(np.mean(pairs)) if pairs else None


def _rater(name: str, decisions: Sequence[Decision], by_key: dict[str, Task]) -> RaterFigures:
    ranked = [decision for decision in decisions if decision.kind == "rank"]
    tied = [a == b for decision in ranked for a, b in combinations(decision.ranks, 2)]
    right = [
        decision.ranks[i] < decision.ranks[j]
        for decision in ranked
        if (gold := by_key[decision.task].gold) is not None
        for i in range(len(gold))
        for j in range(len(gold))
        if gold[i] < gold[j]
    ]
    times = [decision.seconds for decision in ranked if decision.seconds is not None]
    return RaterFigures(
        name=name,
        ranked=len(ranked),
        skipped=len(decisions) - len(ranked),
        ties=float(np.mean(tied)) if tied else None,
        gold=float(np.mean(right)) if right else None,
        seconds=median(times) if times else None,
    )


def as_text(found: Figures) -> str:
    """What `jrlhf rank --report` prints."""
    lines = [
        f"tasks                              {found.tasks}",
        f"ranked by anyone                   {found.decided}",
        f"ranked by two or more              {found.shared}",
        f"Krippendorff's alpha (ordinal)     {_figure(found.alpha)}",
        f"pairs of answers seen in one way   {_figure(found.agreement)}",
    ]
    if found.elsewhere:
        lines.append(f"decisions on tasks not in the file {found.elsewhere}")
    width = max([len("rater"), *(len(rater.name) for rater in found.raters)])
    lines += ["", f"{'rater':<{width}}  ranked  skipped   ties  gold right  seconds a task"]
    for r in found.raters:
        seconds = "-" if r.seconds is None else f"{r.seconds:.1f}"
        cells = f"{r.ranked:>6}  {r.skipped:>7}  {_figure(r.ties):>5}  {_figure(r.gold):>10}  {seconds:>14}"
        lines.append(f"{r.name:<{width}}  {cells}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
