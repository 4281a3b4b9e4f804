"""What a run came to: a table in the terminal, and one page that needs nothing but itself."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jrlhf.metrics import read_metrics
from jrlhf.stages.chart import line_chart

Scalar = float | int | str
Sample = Mapping[str, str]
"""``prompt``, ``before`` and ``after``."""

STAGES = {"sft": "SFT", "reward": "Reward model", "ppo": "PPO", "seconds": "Seconds"}

PAIRS = {"base_nll": ("nll", 0), "heldout_nll": ("nll", 1)}
"""Before (0) and after (1) of one figure, where the names do not say so themselves."""

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
"""Figures with a true zero, whose change is also told in per cent."""

CHARTS = {
    "sft": {"Loss, nats per token": ("loss", "eval/nll"), "Learning rate": ("lr",)},
    "reward": {
        "Ranking loss": ("loss", "eval/loss"),
        "Pair accuracy": ("accuracy", "eval/accuracy"),
        "Calibration error": ("eval/ece",),
    },
    "ppo": {
        "Reward": ("reward/score_mean", "eval/score_mean"),
        "KL, nats per sequence": ("kl", "eval/kl"),
        "Entropy, nats per token": ("entropy", "eval/entropy"),
        "KL coefficient": ("kl_coef",),
        "Answer length, tokens": ("length/mean", "eval/length"),
        "Distinct-2": ("eval/distinct2",),
    },
}


class Figure(NamedTuple):
    """A row of the table; ``before`` is None where a figure exists only once."""

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


def figures(summary: Mapping[str, Any]) -> list[Figure]:
    """Every scalar of the stages, in the summary's order.

    ``x_before`` and ``x_after``, or ``before/x`` and ``after/x``, are one figure.
    """
    found: dict[tuple[str, str], list[Scalar | None]] = {}
    for stage in STAGES:
        for path, value in _scalars(summary.get(stage, {})):
            if path == "seconds" and "seconds" in summary:
                continue
            name, side = _pair(path)
            found.setdefault((stage, name), [None, None])[side] = value
    rows = [Figure(stage, name, before, after) for (stage, name), (before, after) in found.items()]
    return [row for row in rows if row.before is not None or row.after is not None]


def _scalars(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, Scalar):
            yield prefix + name, value


def _pair(path: str) -> tuple[str, int]:
    """The figure that a path belongs to, and whether it is its value before (0) or after (1)."""
    if path in PAIRS:
        return PAIRS[path]
    for side, word in enumerate(("before", "after")):
        if path.endswith(f"_{word}"):
            return path.removesuffix(f"_{word}"), side
        if path.startswith(f"{word}/"):
            return path.removeprefix(f"{word}/"), side
    return path, 1


def show(value: Scalar | None) -> str:
    """Four significant digits; whole numbers whole."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def print_summary(console: Console, summary: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Each stage's figures before and after, and samples side by side."""
    table = Table(title="Before and after", title_justify="left")
    for title in ("stage", "figure"):
        table.add_column(title)
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right")
    last = ""
    for row in figures(summary):
        if last and row.stage != last:
            table.add_section()
        stage = "" if row.stage == last else STAGES[row.stage]
        # Text, not str: what a model wrote, or a path, is no markup.
        table.add_row(*(Text(cell) for cell in (stage, row.label, show(row.before), show(row.after), row.change)))
        last = row.stage
    console.print(table)
    if samples:
        answers = Table(title="The same prompts, the same seed", title_justify="left", show_lines=True)
        for title in ("prompt", "before PPO", "after PPO"):
            answers.add_column(title, overflow="fold", ratio=1 if title == "prompt" else 2)
        for sample in samples:
            answers.add_row(*(Text(sample[key].strip()) for key in ("prompt", "before", "after")))
        console.print(answers)


def write_report(run_folder: Path, summary: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """``<run>/report.html`` from the summary and each stage's metrics.jsonl and config.yaml; it fetches nothing."""
    title = f"jrlhf: {run_folder.resolve().name}"
    versions = ", ".join(f"{name} {number}" for name, number in summary.get("versions", {}).items())
    seed = f"seed {summary['seed']}" if "seed" in summary else ""
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(', '.join(filter(None, (seed, versions))))}</p>"]
    parts += ["<h2>Before and after</h2>", _figure_table(figures(summary)), _sample_table(samples)]
    parts += [_stage_charts(run_folder, stage) for stage in CHARTS]
    parts.append(_configs(run_folder))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>{chr(10).join(parts)}\n</body></html>\n"
    )
    (run_folder / "report.html").write_text(page, encoding="utf-8")


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure_table(rows: Sequence[Figure]) -> str:
    lines = [_row((STAGES[r.stage], r.label, show(r.before), show(r.after), r.change)) for r in rows]
    head = _row(("stage", "figure", "before", "after", "change"), "th")
    return f'<div class="wide"><table class="figures">{head}{"".join(lines)}</table></div>'


def _sample_table(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    lines = [_row([sample[key].strip() for key in ("prompt", "before", "after")]) for sample in samples]
    head = _row(("prompt", "before PPO", "after PPO"), "th")
    return f"<h2>The same prompts, the same seed</h2><table>{head}{''.join(lines)}</table>"


def _stage_charts(run_folder: Path, stage: str) -> str:
    """The charts that matter first, every other metric of the stage folded below them."""
    rows = read_metrics(run_folder / stage / "metrics.jsonl")
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "time"))
    series = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}

    def chart(title: str, wanted: Sequence[str]) -> str:
        return line_chart(title, {name: series[name] for name in wanted if name in series})

    main = "".join(chart(title, wanted) for title, wanted in CHARTS[stage].items())
    drawn = {name for wanted in CHARTS[stage].values() for name in wanted}
    others = "".join(chart(name, (name,)) for name in sorted(series.keys() - drawn))
    folded = f'<details><summary>All other metrics</summary><div class="charts">{others}</div></details>'
    if not main + others:
        return ""
    return f'<h2>{STAGES[stage]}</h2><div class="charts">{main}</div>{folded if others else ""}'


def _configs(run_folder: Path) -> str:
    """Each stage's config.yaml; stages that ran with the same one share it."""
    stages_of: dict[str, list[str]] = {}
    for stage in CHARTS:
        path = run_folder / stage / "config.yaml"
        if path.exists():
            stages_of.setdefault(path.read_text(encoding="utf-8"), []).append(stage)
    blocks = (
        f"<details><summary>{escape(', '.join(stages))}: config.yaml</summary><pre>{escape(text)}</pre></details>"
        for text, stages in stages_of.items()
    )
    return "<h2>Configuration</h2>" + "".join(blocks) if stages_of else ""


STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2129; --soft: #68707d; --rule: #dde1e7; --paper: #fff; --a: #2563b0; --b: #c2571a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6eb; --soft: #98a1ae; --rule: #363c46; --paper: #16191e; --a: #78aef0; --b: #f0965a }
}
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
h1 + p, figcaption span { color: var(--soft); font-size: 13px }
table { border-collapse: collapse } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--rule);
  white-space: pre-wrap; overflow-wrap: anywhere }
th { font-weight: 600; color: var(--soft) }
.figures th:nth-child(n+3), .figures td:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem 1.5rem }
figure { margin: 0 } figcaption { font-weight: 600 } figcaption span { font-weight: 400; margin-right: .8rem }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: var(--soft) } .grid { stroke: var(--rule) }
polyline { fill: none; stroke-width: 1.6 } .line0 { stroke: var(--a) } .line1 { stroke: var(--b) }
.dot0 { fill: var(--a) } .dot1 { fill: var(--b) } .key0 b { color: var(--a) } .key1 b { color: var(--b) }
details { margin: 1rem 0 } summary { cursor: pointer; color: var(--soft) } pre { overflow-x: auto; font-size: 13px }
"""
