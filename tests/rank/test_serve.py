"""The real process: a decision that was answered is there after a kill; what it prints; what it lacks."""

import json
import os
import re
import signal
import sys
import urllib.request
from urllib.parse import urlsplit

import pytest

from jrlhf.cli import main
from jrlhf.rank import read_tasks
from jrlhf.rank.store import Store
from tests.support.rank import Server, write_tasks


def post(connection, cookie, path, body):
    headers = {"cookie": cookie, "origin": f"http://{connection.host}:{connection.port}"}
    connection.request("POST", path, json.dumps(body), headers | {"content-type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    return json.loads(reply.read())


@pytest.fixture
def served():
    for name in ("starlette", "uvicorn", "markdown_it"):
        pytest.importorskip(name)


@pytest.mark.usefixtures("served")
def test_a_kill_at_any_time_loses_no_decision_that_was_answered(tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl", 40)
    answered = []
    for round_ in range(3):
        with Server(path) as server:
            connection, cookie = server.connect()
            state = post(connection, cookie, "/api/next", {"rater": "ann"})
            assert state["done"] == len(answered)  # all that were answered before the last kill, and no other
            for _ in range(5 + round_):
                key = state["task"]["key"]
                asked = {"rater": "ann", "task": key, "ranks": [2, 1, 0], "seconds": 1}
                state = post(connection, cookie, "/api/decide", asked)
                answered.append(key)
            os.kill(server.process.pid, signal.SIGKILL)
            assert server.process.wait(timeout=30) == -signal.SIGKILL
    store = Store(tmp_path / "tasks.sqlite")
    assert [decision.task for decision in store.standing("ann")] == answered
    assert [task.key for task in read_tasks(path).tasks][: len(answered)] == answered
    store.close()


@pytest.mark.usefixtures("served")
def test_a_kill_in_the_middle_of_a_request_leaves_all_of_it_or_nothing(tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl", 3)
    with Server(path) as server:
        connection, cookie = server.connect()
        key = post(connection, cookie, "/api/next", {"rater": "ann"})["task"]["key"]
        body = json.dumps({"rater": "ann", "task": key, "ranks": [0, 1, 2], "seconds": 1})
        headers = {"cookie": cookie, "origin": f"http://{server.host}", "content-type": "application/json"}
        connection.request("POST", "/api/decide", body, headers)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(timeout=30)
    with Server(path) as server:
        connection, cookie = server.connect()
        assert post(connection, cookie, "/api/next", {"rater": "ann"})["done"] in (0, 1)


@pytest.mark.usefixtures("served")
def test_ctrl_c_ends_it_and_the_address_names_the_rater(tmp_path):
    with Server(
        write_tasks(tmp_path / "tasks.jsonl", 2), "--rater", "Ann B", "--state", str(tmp_path / "s.db")
    ) as server:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}&rater=Ann%20B", server.address)
        with urllib.request.urlopen(server.address, timeout=30) as reply:
            assert b"Rank answers" in reply.read()
        server.process.send_signal(signal.SIGINT)
        _, err = server.process.communicate(timeout=30)
        assert server.process.returncode == 130
        assert err == "jrlhf: rank interrupted\n"
    assert (tmp_path / "s.db").exists()


@pytest.mark.usefixtures("served")
def test_another_host_than_this_machine_is_warned_of_and_its_printed_name_lets_in(tmp_path):
    with Server(write_tasks(tmp_path / "tasks.jsonl", 2), "--host", "0.0.0.0") as server:
        printed, port = server.host, urlsplit(server.address).port
        server.host = f"127.0.0.1:{port}"
        connection, _ = server.connect()
        for name, status in ((printed, 200), (f"127.0.0.1:{port}", 200), ("evil.example", 400)):
            connection.request("GET", f"/?token={server.token}", headers={"host": name})
            reply = connection.getresponse()
            reply.read()
            assert reply.status == status
        connection.close()
        server.process.send_signal(signal.SIGINT)
        _, err = server.process.communicate(timeout=30)
    assert "other machines can reach the page" in err


def test_without_its_packages_it_says_which_extra_has_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["rank", "--tasks", str(write_tasks(tmp_path / "tasks.jsonl", 2))]) == 2
    assert capsys.readouterr().err == 'jrlhf: rank: uvicorn is missing; pip install "jrlhf[rank]"\n'


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rater", "a\tb"], "rater: must be a name of at most 64 printable characters, got 'a\\tb'"),
        (["--host", "no.such.host.invalid"], "host: cannot listen at no.such.host.invalid:0"),
    ],
)
def test_what_cannot_be_served_is_a_usage_error(flags, message, tmp_path, capsys):
    assert main(["rank", "--tasks", str(write_tasks(tmp_path / "tasks.jsonl", 2)), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_state_that_is_none_is_named(tmp_path, capsys):
    path = write_tasks(tmp_path / "tasks.jsonl", 2)
    (tmp_path / "tasks.sqlite").write_text("not a data base, but long enough to be looked at as one" * 20)
    assert main(["rank", "--tasks", str(path)]) == 2
    assert "tasks.sqlite: cannot be used as a file of decisions" in capsys.readouterr().err
    assert main(["rank", "--tasks", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl: No such file" in capsys.readouterr().err
