"""Trackers: what each is told, that a run goes on in the same one, and that none holds a run up or ends it."""

import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from jrlhf import trackers
from jrlhf.config import LogConfig
from jrlhf.config_io import ConfigError
from jrlhf.metrics import MetricsLog
from jrlhf.trackers import TrackerThread, make_trackers

Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stand-ins for the three packages, with the calls that their own documentation names."""
    told: Calls = []

    class Run:
        id = name = "r1"

        def log(self, values: dict[str, float], step: int) -> None:
            told.append(("log", step, values))

        def finish(self) -> None:
            told.append(("finish",))

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> None:
            told.append(("experiment", name))

        def create_experiment(self, name: str) -> str:
            return "e1"

        def create_run(self, experiment: str, run_name: str) -> Any:
            told.append(("create", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def log_dict(self, run: str, about: dict[str, Any], file: str) -> None:
            told.append(("about", about))

        def log_metric(self, run: str, name: str, value: float, step: int) -> None:
            told.append(("log", step, {name: value}))

        def set_terminated(self, run: str) -> None:
            told.append(("finish",))

    def init(**given: Any) -> Run:
        told.append(("init", given))
        return Run()

    for name in ("wandb", "trackio"):
        module: Any = types.ModuleType(name)
        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
    module = types.ModuleType("mlflow")
    module.MlflowClient = MlflowClient
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return told


def logged(folder: Path, name: Any, steps: range, *, resumed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = make_trackers(LogConfig(trackers=(name,)))
    sinks = TrackerThread(made, folder, project="p", about={"config": "seed: 0"}, resumed=resumed)
    with MetricsLog(folder, tensorboard=False, resume_step=0 if resumed else None, trackers=sinks) as log:
        for step in steps:
            log.write(step, {"loss": step / 2, "bad": float("nan")})


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_each_is_told_every_finite_value_and_closed(name: str, calls: Calls, tmp_path: Path) -> None:
    logged(tmp_path / "mine" / "ppo", name, range(3))
    assert [call for call in calls if call[0] == "log"] == [("log", step, {"loss": step / 2}) for step in range(3)]
    assert calls[-1] == ("finish",)
    about = next(call for call in calls if call[0] in ("init", "about"))[1]
    assert about.get("config", about) in ({"config": "seed: 0"}, "seed: 0")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_run_goes_on_in_the_same_one_with_no_step_twice(name: str, calls: Calls, tmp_path: Path) -> None:
    logged(tmp_path / "ppo", name, range(4))
    calls.clear()
    logged(tmp_path / "ppo", name, range(2, 6), resumed=True)
    assert [call[1] for call in calls if call[0] == "log"] == [4, 5]
    assert not [call for call in calls if call[0] == "create"]
    for call in calls:
        if call[0] == "init":
            assert "r1" in (call[1].get("id"), call[1]["name"])
            assert call[1]["resume"] == "allow"
    calls.clear()
    logged(tmp_path / "ppo", name, range(2))
    assert [call[1] for call in calls if call[0] == "log"] == [0, 1], "a run that starts anew is a new one there"


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.trackers: wandb cannot be imported .*; pip install wandb"):
        make_trackers(LogConfig(trackers=("wandb",)))


class Sink:
    """Fails at one step; waits at another until it is let go on."""

    def __init__(self, fails: int = -1, hangs: int = -1) -> None:
        self.fails, self.hangs, self.free, self.told = fails, hangs, threading.Event(), list[int]()

    def start(self, project: str, name: str, run: str, about: Any) -> str:
        return "r"

    def log(self, step: int, values: Any) -> None:
        if step == self.hangs:
            self.free.wait(60)
        if step == self.fails:
            raise ConnectionError("the network is down")
        self.told.append(step)

    def close(self) -> None:
        pass


def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Sink(fails=2), Sink()
    sinks = TrackerThread({"wandb": bad, "mlflow": good}, tmp_path, project="p", about={}, resumed=False)
    for step in range(5):
        sinks.log(step, {"loss": 1.0})
    sinks.close()
    assert (bad.told, good.told) == ([0, 1], [0, 1, 2, 3, 4])
    assert caplog.text.count("wandb is left out from here on: ConnectionError: the network is down") == 1


def test_one_that_hangs_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "WAITING", 5)
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    slow = Sink(hangs=0)
    sinks = TrackerThread({"wandb": slow}, tmp_path, project="p", about={}, resumed=False)
    for step in range(20):
        sinks.log(step, {"loss": 1.0})
    sinks.close()
    assert "trackers: not done after 0.1 s" in caplog.text
    assert "rows were left out" in caplog.text
    slow.free.set()
