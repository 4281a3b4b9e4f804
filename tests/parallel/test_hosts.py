"""Several processes: how they find each other, what each reads, and how they end when one is gone."""

import json
import signal
import time

import numpy as np
import pytest

from jrlhf.data import Order
from jrlhf.data.order import Part
from jrlhf.parallel.launch import Launch, find_launch
from jrlhf.parallel.peers import Peers, Row, find_failed, find_silent, find_stalled, update_status
from tests.support.processes import WORKER, by_open_mpi, by_slurm, by_variables, running
from tests.support.worker import BATCH, ROWS, STEPS

NOTHING = {"coordinator": "", "processes": 0, "process": -1, "tpu": False}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("variables", "given", "expected"),
    [
        ({}, {}, None),
        ({}, {"processes": 1}, None),
        (by_slurm(62000, 2, 1), {}, Launch("Slurm")),
        (by_slurm(62000, 1, 0), {}, None),
        # A shell in an allocation of four tasks: srun --pty, and a batch script outside srun.
        (by_slurm(62000, 4, 0) | {"SLURM_STEP_NUM_TASKS": "1"}, {}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {}, None),
        (by_slurm(62000, 4, 0), {"processes": 1}, None),
        (by_open_mpi(62000, 2, 1), {}, Launch("Open MPI")),
        (by_open_mpi(62000, 1, 0), {}, None),
        ({}, {"tpu": True}, Launch("Cloud TPU")),
        (by_variables(62000, 2, 1), {}, Launch("flags", "127.0.0.1:62000", 2, 1)),
        (by_variables(62000, 2, 0) | KUBERNETES, {}, Launch("flags", "127.0.0.1:62000", 2, 0)),
        (by_variables(62000, 1, 0) | KUBERNETES, {}, None),
        # A pod that is none of an indexed Job's: a notebook.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, None),
        (by_slurm(62000, 2, 1), {"coordinator": "a:1"}, Launch("Slurm", "a:1")),
        (by_variables(62000, 2, 1), {"process": 0}, Launch("flags", "127.0.0.1:62000", 2, 0)),
        ({}, {"coordinator": "a:1", "processes": 3, "process": 2}, Launch("flags", "a:1", 3, 2)),
    ],
)
def test_a_process_is_one_of_several_only_where_an_engine_or_a_flag_says_so(variables, given, expected):
    assert find_launch(variables, **(NOTHING | given)) == expected


@pytest.mark.parametrize(
    ("variables", "given", "message"),
    [
        ({}, {"processes": 2}, "distributed.coordinator: is not set"),
        ({}, {"coordinator": "a:1"}, "distributed.processes: is not set"),
        ({}, {"coordinator": "a:1", "processes": 2}, "distributed.process: is not set"),
        ({}, {"coordinator": "a", "processes": 2, "process": 0}, "distributed.coordinator: must be host:port, got 'a'"),
        ({}, {"coordinator": "a:1", "processes": 2, "process": 2}, "distributed.process: must be below"),
        ({"JAX_PROCESS_ID": "one"}, {}, "JAX_PROCESS_ID: must be a whole number, got 'one'"),
        (KUBERNETES, {}, "a pod of an indexed Job; set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_what_is_missing_is_named(variables, given, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        find_launch(variables, **(NOTHING | given))


def row(beat=0, marks=0, ended=None, name="host, pid 1"):
    return Row(name, beat, marks, ended)


def test_ages_run_from_the_last_change():
    peer = update_status(None, row(beat=1), 10.0)
    peer = update_status(peer, row(beat=2), 12.0)
    peer = update_status(peer, row(beat=2, marks=1), 15.0)
    assert (peer.beat_at, peer.marks_at, peer.ended_at) == (12.0, 15.0, 10.0)
    assert update_status(peer, row(beat=2, marks=1, ended=""), 16.0).ended_at == 16.0


def test_silence_is_a_fault_of_others_that_have_not_ended():
    table = {
        0: update_status(None, row(), 0.0),
        1: update_status(None, row(name="b, pid 2"), 0.0),
        2: update_status(None, row(ended=""), 0.0),
    }
    assert find_silent(table, process=0, now=7.9, heartbeat=8.0) == ""
    said = find_silent(table, process=0, now=8.0, heartbeat=8.0)
    assert "process 1 (b, pid 2) is dead or stopped: not heard of for 8 s (distributed.heartbeat_timeout)" in said
    assert find_silent({0: table[0], 2: table[2]}, process=0, now=100.0, heartbeat=8.0) == ""


def test_the_first_failure_counts_and_neither_a_later_nor_the_same_one():
    table = {
        n: update_status(update_status(None, row(), 0.0), row(ended=why), at)
        for n, why, at in ((0, "x", 9.0), (1, "y", 5.0))
    }
    assert find_failed(table, process=2, before=10.0, own=None) == "process 1 (host, pid 1) failed: y"
    assert find_failed(table, process=2, before=4.0, own=None) == ""
    assert find_failed(table, process=2, before=10.0, own="y") == "process 0 (host, pid 1) failed: x"
    assert find_failed(table, process=0, before=10.0, own="x") == "process 1 (host, pid 1) failed: y"


def test_standing_still_names_who_is_behind():
    table = {0: update_status(None, row(marks=5), 0.0), 1: update_status(None, row(marks=4, name="b, pid 2"), 1.0)}
    assert find_stalled(table, now=10.5, stall=10.0) == ""
    assert "10 s (distributed.stall_timeout); process 1 (b, pid 2) is behind" in find_stalled(
        table, now=11.0, stall=10.0
    )
    assert "all are as far" in find_stalled({0: table[0]}, now=11.0, stall=10.0)


class Table:
    """The coordinator's, in this process."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        assert allow_overwrite
        self.rows[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        assert all(name.startswith(key) for name in self.rows)
        return list(self.rows.items())


def test_who_leaves_with_an_error_hears_of_all_that_are_alive_first():
    alone = Peers(Table(), process=0, processes=1, heartbeat=5.0, stall=100.0)
    alone.start()
    assert alone.leave("broken") == ""
    alone.stop()

    table = Table()
    several = [Peers(table, process=number, processes=3, heartbeat=1.0, stall=100.0) for number in range(3)]
    for peers in several[:2]:
        peers.start()
    # The third was never heard of: it takes until its time is over to know whose fault an error is.
    assert "process 2 (nothing heard of it yet) is dead or stopped" in several[1].leave("broken")
    for peers in several[:2]:
        peers.stop()


@pytest.mark.parametrize(
    ("processes", "devices", "tensor", "engine"),
    [
        pytest.param(1, 4, 1, lambda port, processes, process: {}, id="1 process"),
        pytest.param(2, 4, 2, by_slurm, id="2 processes, split by tensor too"),
        pytest.param(4, 1, 1, by_open_mpi, id="4 processes"),
    ],
)
def test_the_processes_together_read_each_row_of_a_batch_once(tmp_path, processes, devices, tensor, engine):
    command = [*WORKER, "rows", str(tmp_path), str(tensor)]
    with running(command, processes=processes, devices=devices, engine=engine, folder=tmp_path) as started:
        started.succeed(within=100)
    read = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(processes)]
    order = Order(5, batch_size=BATCH, lengths=np.arange(ROWS), parts=[Part(ROWS, 1.0)])
    for step in range(STEPS):
        assert [row for rows in read for row in rows[step]] == order[step].tolist()
        assert {len(rows[step]) for rows in read} == {BATCH // processes}
    # Over an epoch each row of the data is read once.
    epoch = [row for step in range(order.steps_per_epoch) for rows in read for row in rows[step]]
    assert sorted(epoch) == list(range(ROWS))


def test_processes_agree_wait_and_refuse_together(tmp_path):
    command = [*WORKER, "agree", str(tmp_path)]
    with running(command, processes=2, devices=1, engine=by_variables, folder=tmp_path) as started:
        assert [started.code(process, within=60) for process in (0, 1)] == [2, 2]
        assert "the first one refuses" in started.output(1)
    found = [json.loads((tmp_path / f"agreed-{process}.json").read_text()) for process in (0, 1)]
    assert [one.pop("first") for one in found] == [True, False]
    assert found[0] == found[1] == {
        "told": {"process": 0}, "read": "whole", "asked": [False, False, False, True, False, False],
    }  # fmt: skip


HEARTBEAT = 5.0


@pytest.mark.parametrize(
    ("fault", "victim", "codes", "message"),
    [
        pytest.param(signal.SIGKILL, 1, {0: 1}, "is dead or stopped", id="killed"),
        pytest.param(signal.SIGSTOP, 1, {0: 1}, "5 s (distributed.heartbeat_timeout)", id="stopped"),
        pytest.param(
            signal.SIGSTOP,
            0,
            {1: 1},
            "no answer for 5 s (distributed.heartbeat_timeout)",
            id="stopped 0",
            marks=pytest.mark.slow,
        ),
        pytest.param("raise", 1, {0: 1, 1: 1}, "failed: KeyError: 'broken'", id="failed", marks=pytest.mark.slow),
        pytest.param(
            "differ", 1, {0: 1, 1: 2}, "rows: not the same on process 1", id="differs", marks=pytest.mark.slow
        ),
        pytest.param(
            "hang",
            1,
            {0: 1, 1: 1},
            "any further for 10 s (distributed.stall_timeout)",
            id="hung",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_peer_that_is_gone_ends_the_others_and_is_named(tmp_path, fault, victim, codes, message):
    arguments = [fault] if isinstance(fault, str) else []
    command = [*WORKER, "train", str(tmp_path), *arguments]
    with running(command, processes=2, devices=1, engine=by_variables, folder=tmp_path) as started:
        if not arguments:
            started.wait_for(lambda: all((tmp_path / f"up-{n}").exists() for n in (0, 1)), within=60)
            started.send(victim, fault)
            start = time.monotonic()
        for process, code in codes.items():
            assert started.code(process, within=60 if arguments else HEARTBEAT + 10) == code
            said = started.output(process)
            assert process == victim or f"process {victim} (" in said
            assert process == victim or message in said
            assert str(started.started[victim].pid) in said or process == victim
        if not arguments:
            assert time.monotonic() - start < HEARTBEAT + 10


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_coordinator_that_is_killed_is_named_by_the_others(tmp_path, processes):
    command = [*WORKER, "train", str(tmp_path)]
    with running(command, processes=processes, devices=1, engine=by_variables, folder=tmp_path) as started:
        started.wait_for(lambda: all((tmp_path / f"up-{n}").exists() for n in range(processes)), within=100)
        started.send(0, signal.SIGKILL)
        for process in range(1, processes):
            assert started.code(process, within=HEARTBEAT + 10) == 1
            said = started.output(process)
            assert "process 0 (" in said
            assert "is dead: its connection broke" in said
            assert "stack trace" not in said


def test_a_coordinator_that_is_killed_while_others_start_is_named(tmp_path):
    """Of three processes the third never comes: the second one waits for it when the first one dies."""
    command = [*WORKER, "train", str(tmp_path)]

    def engine(port, processes, process):
        return by_variables(port, 3, process)

    with running(command, processes=2, devices=1, engine=engine, folder=tmp_path) as started:
        # Long enough for the second to have found the first; where it has not, it says so at its start's timeout.
        time.sleep(12.0)
        started.send(0, signal.SIGKILL)
        code, said = started.code(1, within=80), started.output(1)
    assert "stack trace" not in said
    assert (code == 1 and "its connection broke while all were starting" in said) or (
        code == 2 and "distributed.start_timeout: waited 60 s for process 0" in said
    )


def test_an_interrupted_process_says_so_to_the_others(tmp_path):
    """Where no loop is there to save anything."""
    command = [*WORKER, "train", str(tmp_path), "answer signals"]
    with running(command, processes=2, devices=1, engine=by_variables, folder=tmp_path) as started:
        started.wait_for(lambda: all((tmp_path / f"up-{n}").exists() for n in (0, 1)), within=100)
        started.send(1, signal.SIGTERM)
        assert started.code(1, within=20) == 143
        assert started.code(0, within=HEARTBEAT + 10) == 1
        assert "failed: interrupted" in started.output(0)
