"""Table of a run's figures before and after, and its output in the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jrlhf.report.record import StageView, summary_labels

Scalar = float | int | str
Sample = Mapping[str, str]
"""Answers to compare, under the keys ``prompt``, ``before`` and ``after``."""

PAIRS = {"base_nll": ("nll", 0), "heldout_nll": ("nll", 1)}
"""Figures whose names do not say before (0) or after (1), with the name of the pair."""

LABELS = {
    "nll": "held-out loss, nats per token",
    "heldout_accuracy": "accuracy on held-out human rankings",
    "bag_of_words_accuracy": "the same pairs: logistic model on words",
    "longer_wins_accuracy": "the same pairs: the longer one wins",
    "ece": "expected calibration error",
    "reward": "reward",
    "gold": "gold, the lexicon judge: positive - negative words",
    "gold_stderr": "gold: standard error of the change",
    "kl": "KL to the SFT policy, nats per sequence",
    "entropy": "entropy, nats per token",
    "distinct2": "distinct-2: different word pairs / all",
    "max_abs_logprob_diff": "sampler against trainer: max |Δ log-prob|",
    "first_minibatch_max_abs_log_ratio": "first minibatch: max |log ratio|",
}
RELATIVE = frozenset({"nll", "entropy", "distinct2"})
"""Figures with a true zero, whose change is also shown in per cent."""


class Figure(NamedTuple):
    """Row of the table; ``before`` is None if the figure has one value only."""

    stage: str
    name: str
    before: Scalar | None
    after: Scalar | None

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name)

    @property
    def change(self) -> str:
        if not isinstance(self.before, float | int) or not isinstance(self.after, float | int):
            return ""
        change = f"{self.after - self.before:+.3g}"
        relative = self.name in RELATIVE and self.before > 0
        return f"{change} ({self.after / self.before - 1.0:+.0%})" if relative else change


def figures(summary: Mapping[str, Any], labels: Mapping[str, str]) -> list[Figure]:
    """Return all scalars of the stages that are not empty, in the summary's order.

    ``x_before`` and ``x_after``, or ``before/x`` and ``after/x``, form one figure.
    """
    pairs: dict[tuple[str, str], list[Scalar | None]] = {}
    for stage in labels:
        for path, value in _scalars(summary.get(stage, {})):
            if value == "" or (path == "seconds" and "seconds" in summary):
                continue
            name, side = _pair(path)
            pairs.setdefault((stage, name), [None, None])[side] = value
    rows = [Figure(stage, name, before, after) for (stage, name), (before, after) in pairs.items()]
    return [row for row in rows if row.before is not None or row.after is not None]


def _scalars(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, Scalar):
            yield prefix + name, value


def _pair(path: str) -> tuple[str, int]:
    """Return the figure that a path belongs to, and whether it is the value before (0) or after (1)."""
    if path in PAIRS:
        return PAIRS[path]
    for side, word in enumerate(("before", "after")):
        if path.endswith(f"_{word}"):
            return path.removesuffix(f"_{word}"), side
        if path.startswith(f"{word}/"):
            return path.removeprefix(f"{word}/"), side
    return path, 1


def show(value: Scalar | None) -> str:
    """Format a value with four significant digits, and whole numbers in full."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def print_summary(
    console: Console, summary: Mapping[str, Any], samples: Sequence[Sample], stages: Sequence[StageView]
) -> None:
    """Print each stage's figures before and after, and samples side by side."""
    labels = summary_labels(stages)
    table = Table(title="Before and after", title_justify="left")
    for title in ("stage", "figure"):
        table.add_column(title)
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right")
    last = ""
    for row in figures(summary, labels):
        if last and row.stage != last:
            table.add_section()
        stage = "" if row.stage == last else labels[row.stage]
        # Text, not str: an answer or a path must not act as markup.
        table.add_row(*(Text(cell) for cell in (stage, row.label, show(row.before), show(row.after), row.change)))
        last = row.stage
    console.print(table)
    if samples:
        answers = Table(title="The same prompts, the same seed", title_justify="left", show_lines=True)
        for title in ("prompt", "before", "after"):
            answers.add_column(title, overflow="fold", ratio=1 if title == "prompt" else 2)
        for sample in samples:
            answers.add_row(*(Text(sample[key].strip()) for key in ("prompt", "before", "after")))
        console.print(answers)
