"""Trackers: what each is told, that a run goes on in the same one, and that none holds a run up or ends it."""

import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from jrlhf.config import ConfigError, LogConfig
from jrlhf.runs import trackers
from jrlhf.runs.metrics import MetricsLog
from jrlhf.runs.trackers import TrackerThread, make_trackers

Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stand-ins for the three packages, with the calls that their own documentation names."""
    told: Calls = []

    class Run:
        id = name = "r1"

        def log(self, values: dict[str, float], step: int) -> None:
            told.append(("log", step, values))

        def finish(self, exit_code: int = 0) -> None:
            told.append(("finish", exit_code))

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> None:
            told.append(("experiment", name))

        def create_experiment(self, name: str) -> str:
            return "e1"

        def create_run(self, experiment: str, run_name: str) -> Any:
            told.append(("create", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def update_run(self, run: str, status: str) -> None:
            told.append(("status", run, status))

        def set_terminated(self, run: str, status: str) -> None:
            told.append(("finish", {"FINISHED": 0, "FAILED": 1}[status]))

    def log_params(params: dict[str, Any], run_id: str) -> None:
        assert len(params) <= 100
        told.append(("params", params))

    def log_metrics(values: dict[str, float], step: int, run_id: str) -> None:
        assert run_id == "r1"
        told.append(("log", step, values))

    def init(**given: Any) -> Run:
        told.append(("init", given))
        return Run()

    for name in ("wandb", "trackio"):
        module: Any = types.ModuleType(name)
        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
    module = types.ModuleType("mlflow")
    module.MlflowClient, module.log_params, module.log_metrics = MlflowClient, log_params, log_metrics
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return told


ABOUT = {"seed": 0, "ppo": {f"field{i}": i for i in range(150)}}
ROWS = [(0, "eval/nll"), (1, "loss"), (2, "loss"), (2, "eval/nll"), (3, "loss"), (4, "loss"), (4, "eval/nll")]
"""Rows of a run: in some steps two."""


def logged(folder: Path, name: Any, rows: list[tuple[int, str]], *, resume_step: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = make_trackers(LogConfig(trackers=(name,)))
    sinks = TrackerThread(made, folder, project="p", about=ABOUT, resumed=resume_step is not None)
    with MetricsLog(folder, tensorboard=False, resume_step=resume_step, trackers=sinks) as log:
        for step, metric in rows:
            log.write(step, {metric: step / 2, "bad": float("nan")})


def heard(calls: Calls) -> list[tuple[int, str]]:
    return [(call[1], *call[2]) for call in calls if call[0] == "log"]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_each_is_told_every_finite_value_and_closed(name: str, calls: Calls, tmp_path: Path) -> None:
    logged(tmp_path / "mine" / "ppo", name, ROWS)
    assert [call for call in calls if call[0] == "log"] == [("log", step, {m: step / 2}) for step, m in ROWS]
    assert calls[-1] == ("finish", 0)
    assert "mine/ppo" in str(next(call for call in calls if call[0] in ("init", "create")))
    if name == "mlflow":
        told = {field: value for call in calls if call[0] == "params" for field, value in call[1].items()}
        assert told == {"seed": 0} | {f"ppo.field{i}": i for i in range(150)}
    else:
        assert next(call[1]["config"] for call in calls if call[0] == "init") == ABOUT


@pytest.mark.parametrize(("name", "code"), [("wandb", 1), ("mlflow", 1), ("trackio", 0)])
def test_a_run_that_is_broken_off_is_called_so_where_the_tracker_can(
    name: str, code: int, calls: Calls, tmp_path: Path
) -> None:
    class BrokenRows(list):
        def __iter__(self) -> Any:
            yield ROWS[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logged(tmp_path / "ppo", name, BrokenRows())
    assert calls[-1] == ("finish", code)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
@pytest.mark.parametrize("stopped_after", range(len(ROWS) + 1))
@pytest.mark.parametrize("saved", [0, 2])
def test_a_run_goes_on_in_the_same_one_and_no_row_is_told_twice_or_missed(
    name: str, stopped_after: int, saved: int, calls: Calls, tmp_path: Path
) -> None:
    """Stopped at any row, and on from a checkpoint that may be of before it."""
    logged(tmp_path / "ppo", name, ROWS[:stopped_after])
    begun = len(calls)
    logged(tmp_path / "ppo", name, [row for row in ROWS if row[0] > min(saved, stopped_after - 1)], resume_step=saved)
    again = heard(calls)
    assert [row for row in again if row in ROWS] == again
    assert len(again) == len(set(again))
    assert set(again) >= {row for row in ROWS if row[0] > saved}
    assert not [call for call in calls[begun:] if call[0] == "create"]
    for call in calls[begun:]:
        if call[0] == "init":
            assert "r1" in (call[1].get("id"), call[1]["name"])
            assert call[1]["resume"] == "allow"


def test_what_a_killed_run_had_written_and_not_told_is_told_by_the_next(calls: Calls, tmp_path: Path) -> None:
    logged(tmp_path, "wandb", ROWS[:3])
    with MetricsLog(tmp_path, tensorboard=False, resume_step=2) as log:
        log.write(2, {"eval/nll": 1.0})
    logged(tmp_path, "wandb", ROWS[4:], resume_step=2)
    assert heard(calls) == ROWS


def test_a_run_that_starts_anew_is_a_new_one_there(calls: Calls, tmp_path: Path) -> None:
    logged(tmp_path, "wandb", ROWS)
    calls.clear()
    logged(tmp_path, "wandb", ROWS[:2])
    assert heard(calls) == ROWS[:2]
    assert next(call[1]["id"] for call in calls if call[0] == "init") is None


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"wandb": 3}', '{"wandb": {"run": "r1"}}', '{"wandb": {"run": "r1", ']
)
def test_a_damaged_file_ends_no_run(text: str, calls: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / trackers.STATE_FILE).write_text(text)
    logged(tmp_path, "wandb", ROWS, resume_step=0)
    assert heard(calls) == ROWS
    assert "trackers.json is damaged" in caplog.text


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.trackers: wandb cannot be imported .*; pip install wandb"):
        make_trackers(LogConfig(trackers=("wandb",)))


class Sink:
    """Fails at one step; waits at another until it is let go on. Step -2 is its start, -3 its end."""

    def __init__(self, fails: int = -1, hangs: int = -1, error: BaseException | None = None) -> None:
        self.fails, self.hangs, self.free, self.told = fails, hangs, threading.Event(), list[int]()
        self.error, self.closed = error or ConnectionError("the network is down"), 0

    def start(self, project: str, name: str, run: str, about: Any) -> str:
        self._at(-2)
        return "r"

    def _at(self, step: int) -> None:
        if step == self.hangs:
            self.free.wait(60)
        if step == self.fails:
            raise self.error

    def log(self, step: int, values: Any) -> None:
        self._at(step)
        self.told.append(step)

    def close(self, *, failed: bool) -> None:
        self.closed += 1
        self._at(-3)


@pytest.mark.parametrize("error", [ConnectionError("the network is down"), SystemExit(3)])
@pytest.mark.parametrize(("fails", "told"), [(-2, []), (2, [0, 1]), (-3, [0, 1, 2, 3, 4])])
def test_one_that_fails_is_closed_and_left_out_and_the_others_go_on(
    fails: int, told: list[int], error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Sink(fails=fails, error=error), Sink()
    sinks = TrackerThread({"wandb": bad, "mlflow": good}, tmp_path, project="p", about={}, resumed=False)
    for step in range(5):
        sinks.log(step, {"loss": 1.0})
    sinks.close(failed=False)
    assert (bad.told, good.told) == (told, [0, 1, 2, 3, 4])
    assert bad.closed >= 1
    assert good.closed == 1
    assert caplog.text.count(f"wandb gets no more rows: {type(error).__name__}: {error}") == 1


@pytest.mark.parametrize("hangs", [-2, 0, -3])
def test_one_that_hangs_holds_nothing_up(
    hangs: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "MAX_WAITING_ROWS", 5)
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT", 0.1)
    slow = Sink(hangs=hangs)
    sinks = TrackerThread({"wandb": slow}, tmp_path, project="p", about={}, resumed=False)
    if hangs == -3:
        sinks.close(failed=False)
    else:
        for step in range(20):
            sinks.log(step, {"loss": 1.0})
        sinks.close(failed=False)
        assert "rows were dropped" in caplog.text
    assert "trackers: not done after 0.1 s" in caplog.text
    slow.free.set()
