"""Experiment trackers as sinks of a run's metrics: Weights & Biases, MLflow, trackio. None may hold up or end a run."""

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

KEPT = "trackers.json"
"""In a stage's folder: each tracker's own name of the run, and the last row it was told."""
WAITING = 1000
"""Rows that may wait for a slow tracker; more are dropped and counted."""
PATIENCE = 30.0
"""Seconds that the end of a run waits for trackers."""


@runtime_checkable
class Tracker(Protocol):
    """What is asked of a tracker. A new one needs these three methods and its name in ``log.trackers``."""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        """Begin, or go on with ``run`` ("": a new one); the run's name at the tracker."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, *, failed: bool) -> None:
        """``failed``: the run did not come to its end, be it broken off or gone wrong. It may go on later."""
        ...


class Wandb:
    """Weights & Biases: https://docs.wandb.ai/ref/python/init"""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        made = importlib.import_module("wandb").init
        self._run = made(project=project, name=name, id=run or None, resume="allow", config=dict(about))
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """MLflow: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.html

    Each call names its run: an active one would be this thread's alone.
    """

    MOST_PARAMS = 100
    """In one request, which is what its server takes."""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        self._mlflow = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        if run:
            self._client.update_run(run, status="RUNNING")
        else:
            known = self._client.get_experiment_by_name(project)
            experiment = self._client.create_experiment(project) if known is None else known.experiment_id
            run = self._client.create_run(experiment, run_name=name).info.run_id
            params = list(_flat(about))
            for at in range(0, len(params), self.MOST_PARAMS):
                self._mlflow.log_params(dict(params[at : at + self.MOST_PARAMS]), run_id=run)
        self._id = run
        return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step, run_id=self._id)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class Trackio:
    """trackio: https://github.com/gradio-app/trackio"""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        # A run is found again by its name, so that no two may have the same.
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
        del failed  # It knows no such thing.
        self._run.finish()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``{"ppo": {"clip": 0.2}}`` -> ``ppo.clip``, 0.2."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def make_trackers(log: LogConfig) -> dict[str, Tracker]:
    """Those that a config asks for; ConfigError for one whose package is not there."""
    made: dict[str, Tracker] = {}
    for name in log.trackers:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"log.trackers: {name} cannot be imported ({error}); pip install {name}") from error
        match name:
            case "wandb":
                made[name] = Wandb()
            case "mlflow":
                made[name] = Mlflow()
            case "trackio":
                made[name] = Trackio()
    return made


class Told(NamedTuple):
    """How far a tracker has been told: up to the row that is number ``row``, from 1, of those of ``step``."""

    step: int
    row: int


NOTHING = Told(-1, 0)


class TrackerThread:
    """Trackers told from a thread of their own. One that raises is left out, with a warning; the run goes on.

    ``resumed``: the run in ``folder`` goes on. Rows are then told from the first one on, in their order, and each
    tracker hears those that it has not heard.
    """

    def __init__(
        self, trackers: Mapping[str, Tracker], folder: Path, *, project: str, about: Mapping[str, Any], resumed: bool
    ) -> None:
        self._trackers, self._file = dict(trackers), folder / KEPT
        self._project, self._name, self._about = project, f"{folder.parent.name}/{folder.name}", about
        if not resumed:
            self._file.unlink(missing_ok=True)
        self._runs, self._told = _kept(self._file)
        self._all_heard = min((self._told.get(name, NOTHING) for name in self._trackers), default=NOTHING)
        """Nothing up to here is news to any of them."""
        self._last = NOTHING
        self._rows: queue.Queue[tuple[Told, dict[str, float]] | None] = queue.Queue(WAITING)
        self._dropped, self._failed = 0, False
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Returns at once."""
        self._last = Told(step, self._last.row + 1 if step == self._last.step else 1)
        if self._last <= self._all_heard:
            return
        try:
            self._rows.put_nowait((self._last, dict(values)))
        except queue.Full:
            self._dropped += 1

    def close(self, *, failed: bool) -> None:
        """Wait until all is told, but ``PATIENCE`` at most. ``failed``: see ``Tracker.close``."""
        self._failed = failed
        end = time.monotonic() + PATIENCE
        # Full until then: the thread is stuck, which is told below.
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=PATIENCE)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("trackers: not done after %g s; what they have not been told is in metrics.jsonl", PATIENCE)
        if self._dropped:
            logger.warning("trackers: too slow, %d rows were left out; all are in metrics.jsonl", self._dropped)

    def _work(self) -> None:
        self._each(self._start)
        while (row := self._rows.get()) is not None:
            at, values = row
            self._each(lambda name, at=at, values=values: self._tell(name, at, values))
        self._each(lambda name: self._trackers[name].close(failed=self._failed))

    def _each(self, do: Callable[[str], None]) -> None:
        for name in list(self._trackers):
            try:
                do(name)
            # A package that calls sys.exit must not take the others with it.
            except BaseException as error:
                logger.warning("%s is left out from here on: %s: %s", name, type(error).__name__, error)
                tracker = self._trackers.pop(name)
                with contextlib.suppress(BaseException):
                    tracker.close(failed=False)

    def _start(self, name: str) -> None:
        self._runs[name] = self._trackers[name].start(self._project, self._name, self._runs.get(name, ""), self._about)
        self._keep(name, self._told.get(name, NOTHING))

    def _tell(self, name: str, at: Told, values: Mapping[str, float]) -> None:
        if at > self._told[name]:
            self._trackers[name].log(at.step, values)
            self._keep(name, at)

    def _keep(self, name: str, told: Told) -> None:
        self._told[name] = told
        kept = {name: {"run": run, **self._told[name]._asdict()} for name, run in self._runs.items()}
        write_text(self._file, json.dumps(kept))


def _kept(path: Path) -> tuple[dict[str, str], dict[str, Told]]:
    """Each tracker's run and how far it was told; nothing, with a warning, where the file is not as it was written."""
    if not path.exists():
        return {}, {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        runs = {name: str(one["run"]) for name, one in kept.items()}
        return runs, {name: Told(int(one["step"]), int(one["row"])) for name, one in kept.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s): the trackers begin a new run", path, error)
        return {}, {}
