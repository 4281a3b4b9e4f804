"""What a stage tells while it runs: metrics.jsonl, TensorBoard, and a progress bar."""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, SupportsFloat

from jrlhf.runs.trackers import TrackerThread
from jrlhf.system.lines import json_line, read_whole_json_lines, whole_lines, write_bytes

LINES_WITHOUT_TERMINAL = 20


class RowLog:
    """A file of JSON objects, a line each, that is only ever added to.

    ``resume_step``: the step a run goes on from; rows after it are dropped, as they will come again. None: the run
    starts from the beginning, and nothing of an earlier one is kept. Not ``enabled``: nothing is written.
    """

    def __init__(self, path: Path, *, resume_step: int | None, enabled: bool = True) -> None:
        self._file: int | None = None
        if not enabled:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_after(path, -1 if resume_step is None else resume_step)
        # O_APPEND and one write a line: a reader, or a run that is killed, never sees lines mixed up.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Add ``{"step": .., "time": .., **row}``; it is with the operating system when this returns."""
        if self._file is None:
            return
        line = {"step": step, "time": round(time.time(), 3), **row}
        os.write(self._file, json_line(line).encode())

    def sync(self) -> None:
        """Return when all rows are on the disk."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Nothing may be written after it."""
        if self._file is not None:
            os.close(self._file)


class MetricsLog:
    """``{"step": .., "time": .., name: value, ...}``, a line each, in ``folder/metrics.jsonl``; and TensorBoard.

    ``time`` is in seconds since 1970. JSON has no NaN and no infinity: they are written as the strings ``"nan"``,
    ``"inf"`` and ``"-inf"``, which ``float()`` and ``read_metrics`` read back. ``folder/events.jsonl`` has what is no
    number. ``trackers`` are told the finite values too, and closed at the end. ``resume_step`` and ``enabled`` as in
    ``RowLog``; TensorBoard's files are written anew from the rows kept.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        resume_step: int | None,
        enabled: bool = True,
        trackers: TrackerThread | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._trackers = trackers
        self._rows = RowLog(self.path, resume_step=resume_step, enabled=enabled)
        self._events = RowLog(folder / "events.jsonl", resume_step=resume_step, enabled=enabled)
        if trackers is not None:
            for row in read_metrics(self.path):
                self._tell(int(row.pop("step")), {name: value for name, value in row.items() if name != "time"})
        self._board = None
        if tensorboard and enabled:
            self._board = _open_tensorboard(folder / "tensorboard", read_metrics(self.path))

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Log values at a step; the line is on its way to the disk when this returns."""
        values = {name: float(value) for name, value in metrics.items()}
        self._rows.write(step, {name: _jsonable(value) for name, value in values.items()})
        if self._board is not None:
            _add_scalars(self._board, step, values)
        self._tell(step, values)

    def _tell(self, step: int, values: Mapping[str, float]) -> None:
        if self._trackers is not None:
            self._trackers.log(step, {name: value for name, value in values.items() if math.isfinite(value)})

    def event(self, step: int, kind: str, **told: str | int | float) -> None:
        """Note what happened at a step."""
        self._events.write(step, {"event": kind} | {name: _jsonable(value) for name, value in told.items()})

    def sync(self) -> None:
        """Return when all of both files is on the disk: a checkpoint must not know more than they."""
        self._rows.sync()
        self._events.sync()

    def close(self, *, failed: bool = False) -> None:
        """Close the files; nothing may be written after it. ``failed``: what trackers call the run."""
        self._rows.close()
        self._events.close()
        if self._board is not None:
            self._board.close()
        if self._trackers is not None:
            self._trackers.close(failed=failed)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(failed=error is not None)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a ``metrics.jsonl``, numbers as numbers; a last line that was cut short is left out."""
    return [{name: float(value) for name, value in row.items()} for row in read_whole_json_lines(path)]


def _jsonable(value: str | int | float) -> str | int | float:
    return value if isinstance(value, str) or math.isfinite(value) else str(value)


def drop_after(path: Path, step: int) -> None:
    """Rewrite the file without the rows after ``step``, and without a last line that a killed run left unfinished."""
    rows = zip(whole_lines(path), read_whole_json_lines(path), strict=True)
    kept = b"".join(line for line, row in rows if row["step"] <= step)
    if path.exists() and path.read_bytes() != kept:
        write_bytes(path, kept)


def _open_tensorboard(folder: Path, rows: list[dict[str, float]]) -> Any:
    """A new file with ``rows``: what a killed run left has rows too many, and lacks those it had not written yet."""
    # Imported here: it takes half a second, and most commands log nothing.
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    board = SummaryWriter(str(folder), flush_secs=10)
    for row in rows:
        values = {name: value for name, value in row.items() if name not in ("step", "time")}
        _add_scalars(board, int(row["step"]), values, when=row["time"])
    return board


def _add_scalars(board: Any, step: int, values: Mapping[str, float], *, when: float | None = None) -> None:
    for name, value in values.items():
        # TensorBoard's curves have no use for a NaN, and its writer prints a warning for each.
        if math.isfinite(value):
            board.add_scalar(name, value, step, walltime=when)


class ProgressReport(Protocol):
    """How far a loop has come."""

    def update(self, step: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        """``step`` steps are done. ``metrics``: the few to show; None leaves the last ones."""


@contextmanager
def progress(
    total: int, description: str, *, start: int, enabled: bool, unit: str = "steps", to_stderr: bool = False
) -> Iterator[ProgressReport]:
    """A bar with key metrics, steps/s and the time left, from step ``start`` to ``total``; silent if not ``enabled``.

    steps/s leaves out everything up to the first update, which compiles. Where standard output (``to_stderr``: standard
    error) is not a terminal, a plain line is printed now and then, 20 at most. The terminal is put right however the
    block is left.
    """
    speed = Speed(unit)
    if not enabled:
        yield _Silent()
    elif not (sys.stderr if to_stderr else sys.stdout).isatty():
        yield _Lines(total, description, start, speed, to_stderr)
    else:
        with _Bar(total, description, start, speed, to_stderr) as bar:
            yield bar


class Speed:
    """Steps per second since the first update."""

    def __init__(self, unit: str = "steps", clock: Callable[[], float] = time.perf_counter) -> None:
        self._unit, self._clock = unit, clock
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)

    def update(self, step: int) -> None:
        """``step`` steps are done now."""
        self._last = (step, self._clock())
        self._first = self._first or self._last

    def describe(self, total: int) -> str:
        """``"3.2 steps/s, 0:01:05 left"``; empty before the second update."""
        if self._first is None or self._last[0] <= self._first[0]:
            return ""
        rate = (self._last[0] - self._first[0]) / max(self._last[1] - self._first[1], 1e-9)
        left = round(max(total - self._last[0], 0) / rate)
        return f"{rate:.3g} {self._unit}/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def format_metrics(metrics: Mapping[str, SupportsFloat]) -> str:
    """``{"loss": 1.23456, "kl": 0.5} -> "loss 1.235  kl 0.5"``."""
    return "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())


class _Silent:
    def update(self, step: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        del step, metrics


class _Lines:
    """A line whenever another twentieth of all steps is done."""

    def __init__(self, total: int, description: str, start: int, speed: Speed, to_stderr: bool) -> None:
        self._total, self._description, self._speed, self._to_stderr = total, description, speed, to_stderr
        self._metrics, self._printed = "", self._twentieths(start)

    def update(self, step: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        self._speed.update(step)
        self._metrics = self._metrics if metrics is None else format_metrics(metrics)
        done = self._twentieths(step)
        if done > self._printed:
            self._printed = done
            parts = (f"{self._description} {step}/{self._total}", self._metrics, self._speed.describe(self._total))
            out = sys.stderr if self._to_stderr else sys.stdout
            print("  ".join(part for part in parts if part), file=out, flush=True)

    def _twentieths(self, step: int) -> int:
        return step * LINES_WITHOUT_TERMINAL // max(self._total, 1)


class _Bar:
    """A rich progress bar."""

    def __init__(self, total: int, description: str, start: int, speed: Speed, to_stderr: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._total, self._speed, self._metrics = total, speed, ""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            TextColumn("{task.fields[speed]}", style="dim", markup=False),
            console=Console(stderr=to_stderr),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(description, total=total, completed=start, metrics="", speed="")

    def update(self, step: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        self._speed.update(step)
        self._metrics = self._metrics if metrics is None else format_metrics(metrics)
        speed = self._speed.describe(self._total)
        self._progress.update(self._task, completed=step, metrics=self._metrics, speed=speed)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()
