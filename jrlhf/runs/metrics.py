"""Output of a running stage: metrics.jsonl, TensorBoard, and a progress bar."""

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
from jrlhf.system.lines import complete_lines, json_line, read_complete_json_lines, write_bytes

LINES_WITHOUT_TERMINAL = 20
SECONDS_WITHOUT_TERMINAL = 10.0
"""Least number of seconds between two lines of a long loop."""

PROXY_AND_GOLD = ("eval/score_mean", "eval/judge_mean", "eval/gold")
"""Scores of held-out answers: by the reward model that PPO optimises, by a second one, and by the quick start's word
lists."""


class RowLog:
    """An append-only file with one JSON object per line.

    ``resume_step`` is the step that a run resumes from; later rows are dropped, because they will be written again.
    None means that the run starts over, which drops all rows. Without ``enabled`` nothing is written.
    """

    def __init__(self, path: Path, *, resume_step: int | None, enabled: bool = True) -> None:
        self._file: int | None = None
        if not enabled:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_after(path, -1 if resume_step is None else resume_step)
        # With O_APPEND and one write per line, lines are never interleaved, even if the run is killed.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Append ``{"step": .., "time": .., **row}`` and hand it to the operating system."""
        if self._file is None:
            return
        line = {"step": step, "time": round(time.time(), 3), **row}
        os.write(self._file, json_line(line).encode())

    def sync(self) -> None:
        """Wait until all rows are on disk."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; no row may be written after this."""
        if self._file is not None:
            os.close(self._file)


class MetricsLog:
    """Log of metrics in ``folder/metrics.jsonl``, with lines ``{"step": .., "time": .., name: value, ...}``.

    ``time`` is in seconds since 1970. JSON has no NaN or infinity, so they are the strings ``"nan"``, ``"inf"`` and
    ``"-inf"``, which ``float()`` and ``read_metrics`` read back. Events that are not numbers go to
    ``folder/events.jsonl``. Finite values also go to TensorBoard and to ``trackers``, which are closed at the end.
    ``RowLog`` explains ``resume_step`` and ``enabled``; TensorBoard's files are rewritten from the remaining rows.
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
                self._log_to_trackers(
                    int(row.pop("step")), {name: value for name, value in row.items() if name != "time"}
                )
        self._board = None
        if tensorboard and enabled:
            self._board = _open_tensorboard(folder / "tensorboard", read_metrics(self.path))

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Log values at a step and hand the line to the operating system."""
        values = {name: float(value) for name, value in metrics.items()}
        self._rows.write(step, {name: _json_value(value) for name, value in values.items()})
        if self._board is not None:
            _add_scalars(self._board, step, values)
        self._log_to_trackers(step, values)

    def _log_to_trackers(self, step: int, values: Mapping[str, float]) -> None:
        if self._trackers is not None:
            self._trackers.log(step, {name: value for name, value in values.items() if math.isfinite(value)})

    def event(self, step: int, kind: str, **details: str | int | float) -> None:
        """Log an event at a step with its details."""
        self._events.write(step, {"event": kind} | {name: _json_value(value) for name, value in details.items()})

    def sync(self) -> None:
        """Wait until both files are on disk, so that no checkpoint is ahead of them."""
        self._rows.sync()
        self._events.sync()

    def close(self, *, failed: bool = False) -> None:
        """Close the files; nothing may be written after this. ``failed`` is the run's status for trackers."""
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
    """Read the rows of a ``metrics.jsonl`` with all values as floats; an incomplete last line is ignored."""
    return [{name: float(value) for name, value in row.items()} for row in read_complete_json_lines(path)]


def _json_value(value: str | int | float) -> str | int | float:
    return value if isinstance(value, str) or math.isfinite(value) else str(value)


def drop_after(path: Path, step: int) -> None:
    """Rewrite the file without the rows after ``step`` and without an incomplete last line."""
    rows = zip(complete_lines(path), read_complete_json_lines(path), strict=True)
    content = b"".join(line for line, row in rows if row["step"] <= step)
    if path.exists() and path.read_bytes() != content:
        write_bytes(path, content)


def _open_tensorboard(folder: Path, rows: list[dict[str, float]]) -> Any:
    """Start a new TensorBoard file with ``rows``; that of a killed run may have too many rows or too few."""
    # Imported here because it takes half a second and most commands log nothing.
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    board = SummaryWriter(str(folder), flush_secs=10)
    for row in rows:
        values = {name: value for name, value in row.items() if name not in ("step", "time")}
        _add_scalars(board, int(row["step"]), values, when=row["time"])
    return board


def _add_scalars(board: Any, step: int, values: Mapping[str, float], *, when: float | None = None) -> None:
    for name, value in values.items():
        # TensorBoard cannot plot a NaN, and its writer prints a warning for each.
        if math.isfinite(value):
            board.add_scalar(name, value, step, walltime=when)


class ProgressReport(Protocol):
    """Display of a loop's progress."""

    def update(self, step: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        """Show that ``step`` steps are done, with a few ``metrics`` (None: those of the last update)."""


@contextmanager
def progress(
    total: int,
    description: str,
    *,
    start: int,
    enabled: bool,
    unit: str = "steps",
    to_stderr: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[ProgressReport]:
    """Show a progress bar from step ``start`` to ``total`` with key metrics, steps/s and the remaining time.

    steps/s excludes the time up to the first update, which compiles. If standard output (with ``to_stderr``, standard
    error) is not a terminal, plain lines are printed instead: one at the first update, one at the end, and at most 20
    between them, no two within ten seconds of ``clock``. Without ``enabled`` nothing is shown. The terminal is restored
    at the end of the block, also after an error.
    """
    speed = Speed(unit, clock)
    if not enabled:
        yield _Silent()
    elif not (sys.stderr if to_stderr else sys.stdout).isatty():
        yield _Lines(total, description, start, speed, to_stderr)
    else:
        with _Bar(total, description, start, speed, to_stderr) as bar:
            yield bar


class Speed:
    """Measures steps per second since the first update."""

    def __init__(self, unit: str = "steps", clock: Callable[[], float] = time.perf_counter) -> None:
        self._unit, self._clock = unit, clock
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)

    def update(self, step: int) -> float:
        """Record that ``step`` steps are done; return the time in seconds."""
        self._last = (step, self._clock())
        self._first = self._first or self._last
        return self._last[1]

    def describe(self, total: int) -> str:
        """Return a text such as ``"3.2 steps/s, 0:01:05 left"``; it is empty before the second update."""
        if self._first is None or self._last[0] <= self._first[0]:
            return ""
        rate = (self._last[0] - self._first[0]) / max(self._last[1] - self._first[1], 1e-9)
        seconds = round(max(total - self._last[0], 0) / rate)
        return f"{rate:.3g} {self._unit}/s, {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def format_metrics(metrics: Mapping[str, SupportsFloat]) -> str:
    """Format metrics in one line: ``{"loss": 1.23456, "kl": 0.5} -> "loss 1.235  kl 0.5"``."""
    return "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())


class _Silent:
    def update(self, step: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        del step, metrics


class _Lines:
    """Prints a line at the first and the last step, and after a twentieth of all steps if ten seconds have passed."""

    def __init__(self, total: int, description: str, start: int, speed: Speed, to_stderr: bool) -> None:
        self._total, self._description, self._speed, self._to_stderr = total, description, speed, to_stderr
        self._metrics, self._printed, self._printed_at = "", self._twentieths(start), -math.inf

    def update(self, step: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        now = self._speed.update(step)
        self._metrics = self._metrics if metrics is None else format_metrics(metrics)
        twentieths, ends = self._twentieths(step), step >= self._total or self._printed_at == -math.inf
        if ends or (twentieths > self._printed and now - self._printed_at >= SECONDS_WITHOUT_TERMINAL):
            self._printed, self._printed_at = twentieths, now
            parts = (f"{self._description} {step}/{self._total}", self._metrics, self._speed.describe(self._total))
            out = sys.stderr if self._to_stderr else sys.stdout
            print("  ".join(part for part in parts if part), file=out, flush=True)

    def _twentieths(self, step: int) -> int:
        return step * LINES_WITHOUT_TERMINAL // max(self._total, 1)


class _Bar:
    """Shows a progress bar in the terminal."""

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
