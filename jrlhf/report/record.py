"""Reads a run's folder for a report. An unfinished run, or one of a single stage, has less in it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jrlhf.config import ConfigError
from jrlhf.runs.metrics import read_metrics
from jrlhf.system.lines import read_complete_json_lines

Points = list[tuple[float, float]]


@runtime_checkable
class StageView(Protocol):
    """The part of a stage's record that a report shows."""

    @property
    def name(self) -> str:
        """Folder of the stage in the run."""
        ...

    @property
    def label(self) -> str:
        """Name of the stage in the report."""
        ...

    @property
    def charts(self) -> Mapping[str, tuple[str, ...]]:
        """Title of each chart, and the metrics that share its axes."""
        ...


class Record(NamedTuple):
    """Contents of one run, by stage."""

    name: str
    summary: Mapping[str, Any]
    metrics: dict[str, dict[str, Points]]
    """Values of each stage's metrics by step: those in the log, and ``curves`` of the summary."""
    gates: dict[str, list[dict[str, Any]]]
    events: dict[str, list[dict[str, Any]]]
    changed: dict[str, list[str]]
    """Changes of each stage's inputs that its user accepted."""
    configs: dict[str, str]
    """Text of each stage's config.yaml."""
    calibration: dict[str, list[dict[str, float]]]
    """Calibration of each stage that measures it, at its last evaluation: ``confidence``, ``accuracy`` and ``pairs`` of
    each bin."""
    before: dict[str, list[dict[str, Any]]]
    """Held-out answers of the initial policy, of each stage that writes them."""
    after: dict[str, list[dict[str, Any]]]
    """Held-out answers of the exported policy, or those of the newest evaluation."""
    best_of_n: dict[str, list[dict[str, float]]]
    """``n``, ``kl``, ``score`` and perhaps ``judge`` of best of n, of each stage that draws it."""
    labels: dict[str, str]
    """Label of each part of the summary, in the order of the page."""


def read_run(folder: Path, summary: Mapping[str, Any] | None, stages: Sequence[StageView]) -> Record:
    """Read a run. ConfigError if the folder is not a run. ``summary`` replaces the one on the disk; None keeps it."""
    present = [stage.name for stage in stages if (folder / stage.name).is_dir()]
    if not present:
        raise ConfigError(f"{folder}: not a run: it has none of {', '.join(stage.name for stage in stages)}")
    if summary is None:
        summary = _json(folder / "summary.json") or {s: _json(folder / s / "summary.json") or {} for s in present}
    metrics = {stage: _series(folder / stage / "metrics.jsonl") for stage in present}
    for stage, curves in summary.get("curves", {}).items():
        for name, points in curves.items():
            metrics.setdefault(stage, {})[name] = [(float(step), float(value)) for step, value in points]
    answers = {stage: _answers(folder / stage) for stage in present}
    bins = {stage: _calibration(folder / stage) for stage in present}
    return Record(
        folder.resolve().name,
        summary,
        metrics,
        {stage: (_json(folder / stage / "gates.json") or {}).get("gates", []) for stage in present},
        {stage: _lines(folder / stage / "events.jsonl") for stage in present},
        {stage: (_json(folder / stage / "origin.json") or {}).get("changed", []) for stage in present},
        {s: (folder / s / "config.yaml").read_text("utf-8") for s in present if (folder / s / "config.yaml").exists()},
        {stage: of_stage for stage, of_stage in bins.items() if of_stage},
        {stage: before for stage, (before, _) in answers.items() if before},
        {stage: after for stage, (_, after) in answers.items() if after},
        {stage: (_json(folder / stage / "best_of_n.json") or {}).get("curve", []) for stage in present},
        summary_labels(stages),
    )


def summary_labels(stages: Sequence[StageView]) -> dict[str, str]:
    """Return the label of each part of a run's summary, in order."""
    return {stage.name: stage.label for stage in stages} | {"seconds": "Seconds"}


def _answers(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a stage's held-out answers before training, and those of the exported model or the newest evaluation."""
    files = sorted((folder / "evals").glob("*.jsonl"))
    if not files:
        return [], []
    step = (_json(folder / "summary.json") or {}).get("exported_step", -1)
    exported = folder / "evals" / f"{step:06d}.jsonl"
    return _lines(files[0]), _lines(exported if exported in files else files[-1])


def _calibration(folder: Path) -> list[dict[str, float]]:
    """Return the bins of a stage's last evaluation."""
    files = sorted((folder / "evals").glob("*.json"))
    return (_json(files[-1]) or {}).get("calibration", []) if files else []


@contextmanager
def _report_damage(path: Path) -> Iterator[None]:
    """Raise ConfigError for a file with other contents than a run writes: truncated, or edited by hand."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: damaged ({error}); repair it or move it away") from error


def _json(path: Path) -> dict[str, Any] | None:
    with _report_damage(path):
        return json.loads(path.read_text("utf-8")) if path.exists() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file without an incomplete last line."""
    with _report_damage(path):
        return read_complete_json_lines(path)


def _series(path: Path) -> dict[str, Points]:
    series: dict[str, Points] = {}
    with _report_damage(path):
        for row in read_metrics(path):
            for name, value in row.items():
                if name not in ("step", "time"):
                    series.setdefault(name, []).append((row["step"], value))
    return series
