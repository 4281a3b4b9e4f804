"""Stores decisions in SQLite: it only appends, and writes to the disk before the next task appears."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jrlhf.rank.tasks import Task, TaskError

Kind = Literal["rank", "skip", "undo"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS decisions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    rater TEXT NOT NULL,
    task TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('rank', 'skip', 'undo')),
    ranks TEXT NOT NULL,
    margin REAL,
    note TEXT NOT NULL,
    seconds REAL,
    made REAL NOT NULL
)
"""
VERSION = 1


@dataclass(frozen=True)
class Decision:
    """Decision of a rater on a task."""

    rater: str
    task: str
    kind: Kind
    ranks: tuple[int, ...] = ()
    """Rank of each answer, in the order of the task file: 0 is best, equal ranks are ties. Empty for a skipped task."""
    margin: float | None = None
    note: str = ""
    seconds: float | None = None
    """Seconds from the display of the task to the decision; None if unknown."""


class Store:
    """File of decisions, for several threads and processes at once."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30.0)
        except sqlite3.OperationalError as error:
            raise TaskError(f"{path}: cannot be opened: {error}") from error
        try:
            self._prepare(path)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, path: Path) -> None:
        try:
            # A write-ahead log, so that reports read while people rank; synced at every commit.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            [(version,)] = self._db.execute("PRAGMA user_version").fetchall()
            if version not in (0, VERSION):
                raise TaskError(f"{path}: written by another version of jrlhf (layout {version}, here {VERSION})")
            self._db.execute(SCHEMA)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as error:
            raise TaskError(f"{path}: cannot be used as a file of decisions: {error}") from error

    def close(self) -> None:
        """Close the file, and merge its write-ahead log into it."""
        self._db.close()

    def add(self, *decisions: Decision) -> None:
        """Append all decisions or none; they are on the disk when this returns."""
        rows = [
            (d.rater, d.task, d.kind, json.dumps(d.ranks), d.margin, d.note, d.seconds, time.time()) for d in decisions
        ]
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany(
                    "INSERT INTO decisions (rater, task, kind, ranks, margin, note, seconds, made)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    rows,
                )
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def undo(self, rater: str, tasks: Iterable[str]) -> Decision | None:
        """Undo the rater's newest decision on any of ``tasks``, and return it."""
        keys = set(tasks)
        standing = [decision for decision in self.standing(rater) if decision.task in keys]
        if not standing:
            return None
        self.add(Decision(rater, standing[-1].task, "undo"))
        return standing[-1]

    def standing(self, rater: str | None = None) -> list[Decision]:
        """Return the newest decision of each rater on each task, except undone ones, oldest first."""
        query = "SELECT rater, task, kind, ranks, margin, note, seconds FROM decisions WHERE ? IS NULL OR rater = ?"
        with self._lock:
            rows: Sequence[tuple] = self._db.execute(f"{query} ORDER BY number", (rater, rater)).fetchall()
        newest: dict[tuple[str, str], Decision] = {}
        for who, task, kind, ranks, margin, note, seconds in rows:
            newest.pop((who, task), None)
            if kind != "undo":
                newest[who, task] = Decision(who, task, kind, tuple(json.loads(ranks)), margin, note, seconds)
        return list(newest.values())

    def raters(self) -> list[str]:
        """Return the names of all raters, sorted."""
        with self._lock:
            return [name for (name,) in self._db.execute("SELECT DISTINCT rater FROM decisions ORDER BY rater")]


def next_task(tasks: Sequence[Task], decisions: Iterable[Decision]) -> Task | None:
    """Return the first undecided task. All raters take the tasks in the same order, so that they share many of them."""
    done = {decision.task for decision in decisions}
    return next((task for task in tasks if task.key not in done), None)
