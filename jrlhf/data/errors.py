"""What is wrong with a row, and where it stands."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from jrlhf.system.errors import UsageError

log = logging.getLogger("jrlhf.data")

REASONS_SHOWN = 20
NAMES_SHOWN, NAMES_COUNTED = 20, 1000
OTHERS = "others"
"""Stands for all names beyond those that are counted: rows may have keys of their own, millions of them."""
NAME_SHOWN = 60
"""Characters of a name: somebody's text may stand where a name should."""


class DataError(UsageError):
    """Data that cannot be trained on. The message names file, row and column."""


class BadRow(ValueError):
    """One row that cannot be used: the column to blame (None: the whole row), and why. It ends the run or is skipped.

    Skips are counted by column and reason; ``detail`` is what differs from row to row.
    """

    def __init__(self, column: str | None, reason: str, detail: str = "") -> None:
        self.reason = reason if column is None else f"{column}: {reason}"
        super().__init__(self.reason + detail)


def absent(row: Mapping[str, Any], *columns: str, rest: str) -> BadRow:
    """That a row has no value in any of these columns: a null cell is said to be one, not a column that is missing.

    ``rest`` says what follows from it, such as "; the row has prompt".
    """
    empty = [column for column, value in row.items() if value is None and column in columns]
    if not empty:
        return BadRow(columns[0], f"no such column{rest}")
    others = f", and so {'is' if len(empty) == 2 else 'are'} {', '.join(empty[1:])}" if empty[1:] else ""
    return BadRow(empty[0], f"is empty (null){others}{rest if len(columns) == 1 else ''}")


class LeftOut(BadRow):
    """A good row that is not for the stage at hand, such as an answer labelled bad in SFT: counted, never an error."""


class Notes:
    """Counts of rows that stay but are noted, such as those cut to max_length; said once a source, with the share."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.first: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def add(self, note: str, place: str) -> None:
        """Count a row; ``note`` goes on after "3 of 10 rows (30 %): ", such as "cut to max_length"."""
        self.first.setdefault(note, place)
        self.counts[note] = self.counts.get(note, 0) + 1

    def say(self, rows: int) -> None:
        """Warn of each note with its share of all rows, in the order of their counts."""
        for note in sorted(self.counts, key=self.counts.__getitem__, reverse=True):
            count = self.counts[note]
            share = f"{count:,} of {rows:,} rows ({100 * count / max(rows, 1):.3g} %)"
            log.warning("%s: %s: %s (first: %s)", self._name, share, note, self.first[note])


Row = dict[str, Any]
Placed = tuple[str, Row | BadRow]
"""Where a row stands, and the row, or why it is none."""


class Skips:
    """The rule for what is not used of a source, so that nothing is passed over in silence.

    Bad rows end the run, or are counted and left out; columns that nothing reads are counted.
    """

    def __init__(self, name: str, *, skip: bool) -> None:
        self._name = name
        self._skip = skip
        self.first: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.notes = Notes(name)
        self.unread: dict[str, int] = {}
        """Rows that have a column, or a message field, that nothing reads; by its name."""

    def add(self, error: BadRow, place: str) -> None:
        """Raise ``DataError`` with the row's place, or count it."""
        if not self._skip and not isinstance(error, LeftOut):
            raise DataError(f"{place}: {error}") from None
        self.first.setdefault(error.reason, place)
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1

    def add_unread(self, names: Iterable[str]) -> None:
        """Count a row's columns and message fields that nothing reads."""
        for name in names:
            name = name if name in self.unread or len(self.unread) < NAMES_COUNTED else OTHERS
            self.unread[name] = self.unread.get(name, 0) + 1

    def close(self, kept: int) -> dict[str, int]:
        """Say what was left out, and where first, and the notes; an error where nothing remains."""
        reasons = sorted(self.counts, key=self.counts.__getitem__, reverse=True)
        for reason in reasons[:REASONS_SHOWN]:
            rows = self.counts[reason]
            log.warning("%s: skipped %d rows: %s (first: %s)", self._name, rows, reason, self.first[reason])
        if others := reasons[REASONS_SHOWN:]:
            rows = sum(self.counts[reason] for reason in others)
            log.warning("%s: skipped %d rows for %d other reasons", self._name, rows, len(others))
        if kept == 0:
            worst = f"; all {sum(self.counts.values())} were skipped, most for: {reasons[0]}" if reasons else ""
            raise DataError(f"{self._name}: no rows{worst}")
        self.notes.say(kept)
        if self.unread:
            log.warning("%s: columns that nothing reads: %s", self._name, names_with_rows(self.unread))
        return self.counts


def names_with_rows(rows: Mapping[str, int]) -> str:
    """``id (1,000 rows), source (1 row)``; the most frequent first, and no more than a line holds."""
    names = sorted(rows, key=lambda name: -rows[name])
    shown = [f"{_short(name)} ({rows[name]:,} row{'s' * (rows[name] != 1)})" for name in names[:NAMES_SHOWN]]
    others = len(names) - len(shown)
    return ", ".join(shown) + (f" and {others:,} others" if others else "")


def _short(name: str) -> str:
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= NAME_SHOWN else name[:NAME_SHOWN] + "…"
