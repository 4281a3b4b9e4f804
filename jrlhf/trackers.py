"""Experiment trackers as sinks of a run's metrics: Weights & Biases, MLflow, trackio. None may hold up or end a run."""

import importlib
import json
import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jrlhf.config import LogConfig
from jrlhf.config_check import ConfigError

logger = logging.getLogger(__name__)

KEPT = "trackers.json"
"""In a stage's folder: each tracker's own name of the run, and the last step it was told."""
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

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases: https://docs.wandb.ai/ref/python/init"""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        made = importlib.import_module("wandb").init
        self._run = made(project=project, name=name, id=run or None, resume="allow", config=dict(about))
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html"""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        # The client, not `mlflow.start_run`: that keeps its run to the thread that began it.
        self._client = importlib.import_module("mlflow").MlflowClient()
        if not run:
            known = self._client.get_experiment_by_name(project)
            experiment = self._client.create_experiment(project) if known is None else known.experiment_id
            run = self._client.create_run(experiment, run_name=name).info.run_id
            self._client.log_dict(run, dict(about), "run.json")
        self._id = run
        return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """trackio: https://github.com/gradio-app/trackio"""

    def start(self, project: str, name: str, run: str, about: Mapping[str, Any]) -> str:
        self._run = importlib.import_module("trackio").init(
            project=project, name=run or None, config=dict(about), resume="allow" if run else "never"
        )
        return self._run.name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


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


class TrackerThread:
    """Trackers told from a thread of their own. One that raises is left out, with a warning; the run goes on.

    ``resumed``: the run in ``folder`` goes on; steps that a tracker was told before are not told again. They would be
    the same to the bit.
    """

    def __init__(
        self, trackers: Mapping[str, Tracker], folder: Path, *, project: str, about: Mapping[str, Any], resumed: bool
    ) -> None:
        self._trackers, self._file = dict(trackers), folder / KEPT
        self._project, self._name, self._about = project, f"{folder.parent.name}/{folder.name}", about
        if not resumed:
            self._file.unlink(missing_ok=True)
        self._kept: dict[str, dict[str, Any]] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._told = {name: int(kept["step"]) for name, kept in self._kept.items()}
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        if self._trackers:
            self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Returns at once."""
        if not self._trackers:
            return
        try:
            self._rows.put_nowait((step, dict(values)))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait until all is told, but not for ever."""
        if not self._thread.is_alive():
            return
        try:
            self._rows.put(None, timeout=PATIENCE)
        except queue.Full:
            self._dropped += self._rows.qsize()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning("trackers: not done after %g s; what they have not been told is in metrics.jsonl", PATIENCE)
        if self._dropped:
            logger.warning("trackers: too slow, %d rows were left out; all are in metrics.jsonl", self._dropped)

    def _work(self) -> None:
        self._each(list(self._trackers), self._start)
        while (row := self._rows.get()) is not None:
            step, values = row
            self._each(list(self._trackers), lambda name, step=step, values=values: self._tell(name, step, values))
        self._each(list(self._trackers), lambda name: self._trackers[name].close())

    def _each(self, names: Sequence[str], do: Any) -> None:
        for name in names:
            try:
                do(name)
            except Exception as error:
                del self._trackers[name]
                logger.warning("%s is left out from here on: %s: %s", name, type(error).__name__, error)

    def _start(self, name: str) -> None:
        before = self._kept.get(name, {"run": "", "step": -1})
        run = self._trackers[name].start(self._project, self._name, before["run"], self._about)
        self._keep(name, {"run": run, "step": before["step"]})

    def _tell(self, name: str, step: int, values: Mapping[str, float]) -> None:
        if step > self._told.get(name, -1):
            self._trackers[name].log(step, values)
            self._keep(name, self._kept[name] | {"step": step})

    def _keep(self, name: str, kept: dict[str, Any]) -> None:
        self._kept[name] = kept
        partial = self._file.with_suffix(".json.partial")
        partial.write_text(json.dumps(self._kept))
        partial.replace(self._file)
