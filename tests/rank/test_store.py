"""The file of decisions: appended to, synced, shared, and never half written."""

import sqlite3
import subprocess
import sys

import pytest

from jrlhf.rank import Task, TaskError
from jrlhf.rank.store import Decision, Store, next_task


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "d.sqlite"


@pytest.fixture
def store(path):
    store = Store(path)
    yield store
    store.close()


def rows(path):
    db = sqlite3.connect(path)
    found = db.execute("SELECT rater, task, kind FROM decisions ORDER BY number").fetchall()
    db.close()
    return found


def test_every_commit_is_synced(store):
    """A kill of the process is tested elsewhere; that of the machine rests on these two."""
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_decision_comes_back_as_it_was(store, path):
    made = [
        Decision("ann", "t", "rank", (1, 0, 1), 1 / 3, "näh\n\u2028'; DROP TABLE decisions; --", 1.25),
        Decision("bob", "t", "skip"),
    ]
    store.add(*made)
    assert store.standing() == made
    assert store.standing("bob") == made[1:]
    assert store.raters() == ["ann", "bob"]
    again = Store(path)
    assert again.standing() == made
    again.close()


def test_the_newest_stands_what_is_taken_back_does_not_and_all_is_kept(store, path):
    one, other, redone = (Decision("ann", t, "rank", r) for t, r in (("t", (0, 1)), ("u", (0, 1)), ("t", (1, 0))))
    store.add(one)
    store.add(other)
    store.add(redone)
    assert store.standing() == [other, redone]
    assert store.undo("ann", ["t", "u"]) == redone
    assert store.standing() == [other]
    assert store.undo("ann", ["t"]) is None  # u is not among the tasks asked for
    assert store.undo("bob", ["t", "u"]) is None
    assert [kind for _, _, kind in rows(path)] == ["rank", "rank", "rank", "undo"]


def test_several_are_added_all_or_none(store, path):
    nameless = Decision("ann", "u", "skip")
    object.__setattr__(nameless, "rater", None)
    with pytest.raises(sqlite3.IntegrityError):
        store.add(Decision("ann", "t", "rank", (0, 1)), nameless)
    assert rows(path) == []
    store.add(Decision("ann", "t", "skip"))
    assert rows(path) == [("ann", "t", "skip")]


def test_two_processes_write_at_once(store, path):
    code = (
        "import sys, pathlib; from jrlhf.rank.store import Decision, Store; s = Store(pathlib.Path(sys.argv[1]))\n"
        "for i in range(40): s.add(Decision(sys.argv[2], str(i), 'rank', (0, 1)))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(store.standing()) == 80
    assert [d.task for d in store.standing("a")] == [str(i) for i in range(40)]


def test_another_layout_is_refused_and_left_alone(path):
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(TaskError, match=r"written by another version of jrlhf \(layout 9, here 1\)"):
        Store(path)


def test_tasks_are_taken_in_the_order_of_the_file():
    tasks = [Task(key, key, None, ("a", "b")) for key in "xyz"]
    done = [Decision("ann", key, "skip") for key in ("y", "x", "gone")]
    assert next_task(tasks, done) == tasks[2]
    assert next_task(tasks, done[:1]) == tasks[0]
    assert next_task(tasks[:2], done) is None
