"""Reads a run's folder for a report. An unfinished run, or one of a single stage, has less in it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jrlhf.config import ConfigError
from jrlhf.runs.metrics import read_metrics
from jrlhf.system.lines import read_complete_json_lines

STAGES = ("sft", "reward", "ppo")
Points = list[tuple[float, float]]


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
    calibration: list[dict[str, float]]
    """Calibration of the reward model at its last evaluation: ``confidence``, ``accuracy`` and ``pairs`` of each
    bin."""
    before: list[dict[str, Any]]
    """Held-out answers of the initial policy."""
    after: list[dict[str, Any]]
    """Held-out answers of the exported policy, or those of the newest evaluation."""


def read_run(folder: Path, summary: Mapping[str, Any] | None = None) -> Record:
    """Read a run. ConfigError if the folder is not a run. ``summary`` replaces the one on the disk."""
    stages = [stage for stage in STAGES if (folder / stage).is_dir()]
    if not stages:
        raise ConfigError(f"{folder}: not a run: it has none of {', '.join(STAGES)}")
    if summary is None:
        summary = _json(folder / "summary.json") or {s: _json(folder / s / "summary.json") or {} for s in stages}
    metrics = {stage: _series(folder / stage / "metrics.jsonl") for stage in stages}
    for stage, curves in summary.get("curves", {}).items():
        for name, points in curves.items():
            metrics.setdefault(stage, {})[name] = [(float(step), float(value)) for step, value in points]
    answers = folder / "ppo" / "evals"
    files = sorted(answers.glob("*.jsonl"))
    step = (_json(folder / "ppo" / "summary.json") or {}).get("exported_step", -1)
    exported = answers / f"{step:06d}.jsonl"
    after = exported if exported in files else (files[-1] if files else None)
    calibrations = sorted((folder / "reward" / "evals").glob("*.json"))
    return Record(
        folder.resolve().name,
        summary,
        metrics,
        {stage: (_json(folder / stage / "gates.json") or {}).get("gates", []) for stage in stages},
        {stage: _lines(folder / stage / "events.jsonl") for stage in stages},
        {stage: (_json(folder / stage / "origin.json") or {}).get("changed", []) for stage in stages},
        {s: (folder / s / "config.yaml").read_text("utf-8") for s in stages if (folder / s / "config.yaml").exists()},
        (_json(calibrations[-1]) or {}).get("calibration", []) if calibrations else [],
        _lines(files[0]) if files else [],
        _lines(after) if after else [],
    )


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
