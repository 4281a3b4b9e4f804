"""What a run's folder holds, read for a report; a run that is not done, or has only some stages, has less of it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jrlhf.config import ConfigError
from jrlhf.runs.metrics import read_metrics
from jrlhf.system.lines import read_whole_json_lines

STAGES = ("sft", "reward", "ppo")
Points = list[tuple[float, float]]


class Record(NamedTuple):
    """One run, by stage."""

    name: str
    summary: Mapping[str, Any]
    metrics: dict[str, dict[str, Points]]
    """Stage, metric, and its value by step: as logged, and what the summary has under ``curves``."""
    gates: dict[str, list[dict[str, Any]]]
    events: dict[str, list[dict[str, Any]]]
    changed: dict[str, list[str]]
    """What each stage went on with, or was kept with, that was not what it began with."""
    configs: dict[str, str]
    """Each stage's config.yaml."""
    calibration: list[dict[str, float]]
    """Of the reward model at its last evaluation: ``confidence``, ``accuracy`` and ``pairs`` of each bin."""
    before: list[dict[str, Any]]
    """PPO's held-out answers at the start."""
    after: list[dict[str, Any]]
    """And of the model that was exported, or of the newest evaluation."""


def read_run(folder: Path, summary: Mapping[str, Any] | None = None) -> Record:
    """ConfigError for a folder that is no run. ``summary``: where it is not on the disk yet."""
    stages = [stage for stage in STAGES if (folder / stage).is_dir()]
    if not stages:
        raise ConfigError(f"{folder}: no run; it has none of {', '.join(STAGES)}")
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
def _whole(path: Path) -> Iterator[None]:
    """ConfigError for a file that is not as a run writes it: cut, or changed by hand."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: damaged ({error}); mend it or move it away") from error


def _json(path: Path) -> dict[str, Any] | None:
    with _whole(path):
        return json.loads(path.read_text("utf-8")) if path.exists() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """A last line that was cut short is left out."""
    with _whole(path):
        return read_whole_json_lines(path)


def _series(path: Path) -> dict[str, Points]:
    found: dict[str, Points] = {}
    with _whole(path):
        for row in read_metrics(path):
            for name, value in row.items():
                if name not in ("step", "time"):
                    found.setdefault(name, []).append((row["step"], value))
    return found
