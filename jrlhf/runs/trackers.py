"""Experiment trackers that receive a run's metrics: Weights & Biases, MLflow, trackio. None may delay or end a run."""

import contextlib
import importlib
import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jrlhf.config import ConfigError, LogConfig
from jrlhf.system.lines import write_text

logger = logging.getLogger(__name__)

STATE_FILE = "trackers.json"
"""File in a stage's folder with each tracker's id of the run and the last row it received."""
MAX_WAITING_ROWS = 1000
"""Maximum number of rows that wait for a slow tracker; further rows are dropped and counted."""
CLOSE_TIMEOUT = 30.0
"""Seconds that a run waits for trackers at its end."""


@runtime_checkable
class Tracker(Protocol):
    """The interface of a tracker. A new one needs these three methods and its name in ``log.trackers``."""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        """Start a run or, with a non-empty ``run``, resume it; return the tracker's id of the run."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite values at a step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Close the run; ``failed`` means that it was interrupted or had an error. It may resume later."""
        ...


class Wandb:
    """Tracker for Weights & Biases: https://docs.wandb.ai/ref/python/init"""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        trackers_by_name = importlib.import_module("wandb").init
        self._run = trackers_by_name(project=project, name=name, id=run or None, resume="allow", config=dict(about))
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """Tracker for MLflow: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.html

    Each call names its run, because MLflow's active run is local to a thread.
    """

    MAX_PARAMS = 100
    """Maximum number of parameters that MLflow's server accepts in one request."""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        self._mlflow = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        if run:
            self._client.update_run(run, status="RUNNING")
        else:
            existing = self._client.get_experiment_by_name(project)
            experiment = self._client.create_experiment(project) if existing is None else existing.experiment_id
            run = self._client.create_run(experiment, run_name=name).info.run_id
            params = list(_flatten(about))
            for start in range(0, len(params), self.MAX_PARAMS):
                self._mlflow.log_params(dict(params[start : start + self.MAX_PARAMS]), run_id=run)
        self._id = run
        return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step, run_id=self._id)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class Trackio:
    """Tracker for trackio: https://github.com/gradio-app/trackio"""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        # trackio identifies a run by its name, so names must be unique.
        self._run = importlib.import_module("trackio").init(
            project=project,
            name=run or f"{name}-{uuid.uuid4().hex[:6]}",
            config=dict(about),
            resume="allow" if run else "never",
        )
        return self._run.name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        del failed  # trackio has no status of a run
        self._run.finish()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values by dotted names: ``{"ppo": {"clip": 0.2}}`` -> ``ppo.clip``, 0.2."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def make_trackers(log: LogConfig) -> dict[str, Tracker]:
    """Create the trackers of a config; raise ConfigError if a package is missing."""
    trackers_by_name: dict[str, Tracker] = {}
    for name in log.trackers:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"log.trackers: {name} cannot be imported ({error}); pip install {name}") from error
        match name:
            case "wandb":
                trackers_by_name[name] = Wandb()
            case "mlflow":
                trackers_by_name[name] = Mlflow()
            case "trackio":
                trackers_by_name[name] = Trackio()
    return trackers_by_name


class Position(NamedTuple):
    """The last row that a tracker has received: number ``row``, counted from 1, of those at ``step``."""

    step: int
    row: int


START = Position(-1, 0)


class TrackerThread:
    """A thread that sends rows to trackers. A tracker that raises is dropped with a warning, and the run continues.

    With ``resumed`` the run in ``folder`` continues: the caller logs all rows again from the first one, in order, and
    each tracker gets only those that it has not received.
    """

    def __init__(
        self, trackers: Mapping[str, Tracker], folder: Path, *, project: str, about: Mapping[str, Any], resumed: bool
    ) -> None:
        self._trackers, self._file = dict(trackers), folder / STATE_FILE
        self._project, self._name, self._about = project, f"{folder.parent.name}/{folder.name}", about
        if not resumed:
            self._file.unlink(missing_ok=True)
        self._runs, self._positions = _read_state(self._file)
        self._common_position = min((self._positions.get(name, START) for name in self._trackers), default=START)
        """Position up to which every tracker has received all rows."""
        self._last = START
        self._rows: queue.Queue[tuple[Position, dict[str, float]] | None] = queue.Queue(MAX_WAITING_ROWS)
        self._dropped, self._failed = 0, False
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue values for the trackers without waiting."""
        self._last = Position(step, self._last.row + 1 if step == self._last.step else 1)
        if self._last <= self._common_position:
            return
        try:
            self._rows.put_nowait((self._last, dict(values)))
        except queue.Full:
            self._dropped += 1

    def close(self, *, failed: bool) -> None:
        """Wait until all rows are sent, at most ``CLOSE_TIMEOUT`` seconds. ``Tracker.close`` explains ``failed``."""
        self._failed = failed
        end = time.monotonic() + CLOSE_TIMEOUT
        # If the queue stays full, the thread is stuck, which is logged below.
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=CLOSE_TIMEOUT)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            logger.warning(
                "trackers: not done after %g s; rows that they did not get are in metrics.jsonl", CLOSE_TIMEOUT
            )
        if self._dropped:
            logger.warning("trackers: too slow, %d rows were dropped; all are in metrics.jsonl", self._dropped)

    def _work(self) -> None:
        self._for_each(self._start)
        while (row := self._rows.get()) is not None:
            position, values = row
            self._for_each(lambda name, position=position, values=values: self._tell(name, position, values))
        self._for_each(lambda name: self._trackers[name].close(failed=self._failed))

    def _for_each(self, do: Callable[[str], None]) -> None:
        for name in list(self._trackers):
            try:
                do(name)
            # A package that calls sys.exit must not take the others with it.
            except BaseException as error:
                logger.warning("%s gets no more rows: %s: %s", name, type(error).__name__, error)
                tracker = self._trackers.pop(name)
                with contextlib.suppress(BaseException):
                    tracker.close(failed=False)

    def _start(self, name: str) -> None:
        self._runs[name] = self._trackers[name].start(self._project, self._name, self._runs.get(name, ""), self._about)
        self._save_position(name, self._positions.get(name, START))

    def _tell(self, name: str, position: Position, values: Mapping[str, float]) -> None:
        if position > self._positions[name]:
            self._trackers[name].log(position.step, values)
            self._save_position(name, position)

    def _save_position(self, name: str, position: Position) -> None:
        self._positions[name] = position
        state = {name: {"run": run, **self._positions[name]._asdict()} for name, run in self._runs.items()}
        write_text(self._file, json.dumps(state))


def _read_state(path: Path) -> tuple[dict[str, str], dict[str, Position]]:
    """Read each tracker's run and position; return nothing, with a warning, if the file is damaged."""
    if not path.exists():
        return {}, {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        runs = {name: str(one["run"]) for name, one in state.items()}
        return runs, {name: Position(int(one["step"]), int(one["row"])) for name, one in state.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s), so the trackers start a new run", path, error)
        return {}, {}
