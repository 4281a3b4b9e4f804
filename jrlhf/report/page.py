"""``report.html``: one file that opens from a disk, on a phone and on paper. What a model wrote is text there, only."""

import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bokeh.document import Document
from bokeh.embed import components
from bokeh.resources import Resources

from jrlhf.config import ConfigError, load_config
from jrlhf.config.files import diff_configs
from jrlhf.config.tools import ReportConfig
from jrlhf.report.charts import (
    CHARTS,
    calibration_chart,
    overoptimisation_chart,
    score_histogram,
    stage_charts,
)
from jrlhf.report.record import Record, read_run
from jrlhf.report.style import STYLE
from jrlhf.report.table import STAGES, figures, show
from jrlhf.system.lines import write_text

SAMPLES = 20
TEXTS = ("prompt", "completion")


def run_report(args: ReportConfig) -> Path:
    """The report of a run, or of two side by side; returns where it is."""
    folder = Path(args.run)
    if not args.other:
        return write_report(folder, None)
    out = folder / "comparison.html"
    first, second = read_run(folder), read_run(Path(args.other))
    write_text(out, _page([first, second], _differences(folder, Path(args.other))))
    return out


def write_report(folder: Path, summary: Mapping[str, Any] | None) -> Path:
    """``<run>/report.html`` from what the run's folder holds. ``summary``: None for the one on the disk."""
    out = folder / "report.html"
    write_text(out, _page([read_run(folder, summary)], []))
    return out


def _page(runs: Sequence[Record], differences: Sequence[str]) -> str:
    run = runs[0]
    title = "jrlhf: " + " and ".join(f"{r.name}{mark}" for r, mark in zip(runs, _marks(runs), strict=True))
    charts: list[Any] = []
    body = "\n".join(_body(runs, differences, charts))
    document = Document()
    # All at once: a document that grows by one chart reads all of them again (90 charts: 7 of the page's 9 seconds).
    with document.models.freeze():
        for chart in charts:
            document.add_root(chart)
    script, places = components(charts) if charts else ("", ())
    for number, place in enumerate(places):
        body = body.replace(_hole(number), place)
    library = Resources(mode="inline", components=["bokeh"]).render() if charts else ""
    told = ", ".join(f"{name} {value}" for name, value in _about(run.summary))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{library}</head>\n"
        f"<body><h1>{escape(title)}</h1><p>{escape(told)}</p>\n{body}\n{script}</body></html>\n"
    )


def _hole(number: int) -> str:
    """Where a chart goes. A comment: no text of a run can stand for one, as all of it is escaped."""
    return f"<!--chart {number}-->"


def _marks(runs: Sequence[Record]) -> list[str]:
    return [""] if len(runs) == 1 else [" (1)", " (2)"]


def _about(summary: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if "seed" in summary:
        yield "seed", summary["seed"]
    yield from summary.get("hardware", {}).items()
    yield from summary.get("versions", {}).items()


def _body(runs: Sequence[Record], differences: Sequence[str], charts: list[Any]) -> Iterator[str]:
    """The page's parts from top to bottom; charts are collected, and a hole is left for each."""

    def grid(plots: Sequence[Any]) -> str:
        holes = []
        for plot in plots:
            holes.append(f"<figure>{_hole(len(charts))}</figure>")
            charts.append(plot)
        return f'<div class="charts">{"".join(holes)}</div>' if holes else ""

    marked = list(zip(runs, _marks(runs), strict=True))
    yield "<h2>Before and after</h2>" + "".join(_figures(run, mark) for run, mark in marked)
    if differences:
        yield "<h2>What differs in the configs</h2>" + _table(("field: (1) -> (2)",), [(line,) for line in differences])
    for run, mark in marked:
        yield _changed(run, mark)
        yield _gates(run, mark)
        yield _events(run, mark)
    for stage in CHARTS:
        main, others = stage_charts(stage, runs)
        more = [_extra_charts(stage, run, mark) for run, mark in marked]
        extra = [chart for found, _ in more for chart in found]
        if main or others or extra:
            yield f"<h2>{STAGES[stage]}</h2>{grid([*main, *extra])}{''.join(told for _, told in more)}"
        if others:
            yield f"<details><summary>All other metrics</summary>{grid(others)}</details>"
    for run, mark in marked:
        yield _samples(run, mark)
    for run, mark in marked:
        yield _configs(run, mark)


def _extra_charts(stage: str, run: Record, mark: str) -> tuple[list[Any], str]:
    """What is no curve over steps, and a line under it."""
    if stage == "reward":
        return [chart for chart in [calibration_chart(run, mark)] if chart is not None], ""
    if stage != "ppo":
        return [], ""
    chart, fit = overoptimisation_chart(run, mark)
    told = f"<p>Fitted{mark} d·(α - β·log d), d = √KL (Gao et al. 2022): {escape(fit)}.</p>" if fit else ""
    return [found for found in (chart, score_histogram(run, mark)) if found is not None], told


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table class="{kind}">{row(head, "th")}{lines}</table></div>'


def _figures(run: Record, mark: str) -> str:
    rows = [(STAGES[r.stage], r.label, show(r.before), show(r.after), r.change) for r in figures(run.summary)]
    name = f"<h3>{escape(run.name + mark)}</h3>" if mark else ""
    return name + _table(("stage", "figure", "before", "after", "change"), rows, "figures") if rows else name


def _changed(run: Record, mark: str) -> str:
    rows = [(STAGES[stage], line) for stage, lines in run.changed.items() for line in lines]
    return f"<h2>Made from changed inputs{mark}</h2>" + _table(("stage", "accepted"), rows) if rows else ""


def _gates(run: Record, mark: str) -> str:
    rows = [
        (STAGES[stage], g["gate"], show(g["value"]), "passed" if g["passed"] else f"failed by {show(g['missed_by'])}")
        for stage, gates in run.gates.items()
        for g in gates
    ]
    return f"<h2>Gates{mark}</h2>" + _table(("stage", "gate", "value", "verdict"), rows) if rows else ""


def _events(run: Record, mark: str) -> str:
    rows = []
    for stage, events in run.events.items():
        for event in events:
            told = {name: value for name, value in event.items() if name not in ("step", "time", "event")}
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"])) if "time" in event else ""
            details = ", ".join(f"{name} {show(value)}" for name, value in told.items())
            rows.append((STAGES[stage], str(event["step"]), when, str(event["event"]), details))
    head = ("stage", "step", "time, UTC", "event", "")
    return f"<h2>Guards, rollbacks and skipped steps{mark}</h2>" + _table(head, rows) if rows else ""


def _samples(run: Record, mark: str) -> str:
    pairs = list(zip(run.before, run.after, strict=False))[:SAMPLES]
    if not pairs:
        return ""

    def answer(row: Mapping[str, Any]) -> str:
        shown = {name: value for name, value in row.items() if name not in TEXTS and isinstance(value, int | float)}
        return f"{str(row.get('completion', '')).strip()}\n\n" + ", ".join(
            f"{name} {show(value)}" for name, value in shown.items()
        )

    rows = [(str(before.get("prompt", "")), answer(before), answer(after)) for before, after in pairs]
    head = ("prompt", "before PPO", "after PPO")
    return f"<h2>The same prompts, the same seed{mark}</h2>" + _table(head, rows, "samples")


def _configs(run: Record, mark: str) -> str:
    """Each stage's config.yaml; stages that ran with the same one share it."""
    stages_of: dict[str, list[str]] = {}
    for stage, text in run.configs.items():
        stages_of.setdefault(text, []).append(stage)
    blocks = (
        f"<details><summary>{escape(', '.join(stages))}: config.yaml</summary><pre>{escape(text)}</pre></details>"
        for text, stages in stages_of.items()
    )
    return f"<h2>Configuration{mark}</h2>" + "".join(blocks) if stages_of else ""


def _differences(first: Path, second: Path) -> list[str]:
    """Of the stages that both have."""
    found: dict[str, None] = {}
    for stage in CHARTS:
        paths = [folder / stage / "config.yaml" for folder in (first, second)]
        if all(path.exists() for path in paths):
            try:
                found |= dict.fromkeys(diff_configs(*map(load_config, paths)))
            # A run of another version may have fields that this one lacks: its curves are shown all the same.
            except ConfigError as error:
                found[f"{stage}: cannot be compared: {error}"] = None
    return list(found)
