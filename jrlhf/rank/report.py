"""Report on raters: their agreement, their accuracy on known ranks, and their pace."""

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
    """Figures of one rater. None stands for a figure without data."""

    name: str
    ranked: int
    skipped: int
    ties: float | None
    """Fraction of pairs of answers that the rater tied."""
    gold: float | None
    """Fraction of the pairs with a known order that the rater put in that order; ties do not count as right."""
    seconds: float | None
    """Median seconds per task."""


@dataclass(frozen=True)
class Figures:
    """Figures of all raters together."""

    tasks: int
    decided: int
    """Number of tasks with a ranking."""
    shared: int
    """Number of tasks with rankings by two or more raters."""
    alpha: float | None
    agreement: float | None
    """Fraction of pairs of answers that two raters of a task order alike: better, worse, or tied."""
    raters: tuple[RaterFigures, ...]
    elsewhere: int
    """Number of decisions on tasks that the file does not have, or no longer has in that form."""


def figures(tasks: Sequence[Task], decisions: Iterable[Decision]) -> Figures:
    """Compute the figures of the decisions on the tasks of a file."""
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
        shared=sum(len(orders) > 1 for orders in rankings.values()),
        alpha=alpha(_reliability(rankings, names)),
        agreement=_agreement(rankings),
        raters=tuple(_rater(name, [d for d in known if d.rater == name], by_key) for name in names),
        elsewhere=len(all_decisions) - len(known),
    )


def _reliability(rankings: dict[str, dict[str, tuple[int, ...]]], names: Sequence[str]) -> np.ndarray:
    """Return an array ``[raters, answers]`` of each answer's place in its task, NaN for answers without a place.

    Tied answers share the mean of their places (1, 2.5, 2.5, 4), so that a tie does not move the other answers.
    """
    columns = []
    for orders in rankings.values():
        missing = np.full(len(next(iter(orders.values()))), np.nan)
        columns.append(np.stack([rankdata(orders[name]) if name in orders else missing for name in names]))
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(names), 0))


def alpha(values: np.ndarray) -> float | None:
    """Return Krippendorff's alpha of ordinal values ``[raters, units]``: 1 is full agreement, 0 is chance.

    α = 1 - observed / expected disagreement (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability). None if
    no two raters share a unit, or if all values are equal.
    """
    import krippendorff

    pairable = values[:, (~np.isnan(values)).sum(axis=0) >= 2]
    if len(np.unique(pairable[~np.isnan(pairable)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=pairable, level_of_measurement="ordinal"))


def _agreement(rankings: dict[str, dict[str, tuple[int, ...]]]) -> float | None:
    pairs = [
        np.sign(one[i] - one[j]) == np.sign(other[i] - other[j])
        for orders in rankings.values()
        for one, other in combinations(orders.values(), 2)
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


def as_text(result: Figures) -> str:
    """Return the text of `jrlhf rank --report`."""
    lines = [
        f"tasks                              {result.tasks}",
        f"ranked by anyone                   {result.decided}",
        f"ranked by two or more              {result.shared}",
        f"Krippendorff's alpha (ordinal)     {_figure(result.alpha)}",
        f"pairs of answers seen in one way   {_figure(result.agreement)}",
    ]
    if result.elsewhere:
        lines.append(f"decisions on tasks not in the file {result.elsewhere}")
    width = max([len("rater"), *(len(rater.name) for rater in result.raters)])
    lines += ["", f"{'rater':<{width}}  ranked  skipped   ties  gold right  seconds a task"]
    for r in result.raters:
        seconds = "-" if r.seconds is None else f"{r.seconds:.1f}"
        cells = f"{r.ranked:>6}  {r.skipped:>7}  {_figure(r.ties):>5}  {_figure(r.gold):>10}  {seconds:>14}"
        lines.append(f"{r.name:<{width}}  {cells}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
