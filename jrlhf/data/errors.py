"""Errors of rows and sources, and counts of the rows that are skipped or noted."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from jrlhf.system.errors import UsageError

log = logging.getLogger("jrlhf.data")


MAX_REASONS = 20
MAX_NAMES, MAX_COUNTED_NAMES = 20, 1000
OTHER_NAMES = "others"
"""Name under which all further names are counted, since rows may have millions of different keys."""
MAX_NAME_CHARACTERS = 60
"""Characters of a name that a message shows, since a user's text may stand where a name should."""


class DataError(UsageError):
    """Data that training cannot use. The message names file, row and column."""


class BadRow(ValueError):
    """A row that training cannot use; it ends the run or is skipped.

    ``column`` is the faulty column (None: the whole row). Skipped rows are counted by column and reason; ``detail``
    holds the part of the message that differs from row to row.
    """

    def __init__(self, column: str | None, reason: str, detail: str = "") -> None:
        self.reason = reason if column is None else f"{column}: {reason}"
        super().__init__(self.reason + detail)


def bad_row_error(problem: str) -> DataError:
    """Return the error that ends a run on a bad row; ``problem`` is the row's place and what is wrong with it."""
    return DataError(f"{problem}; with on_bad_row: skip training leaves such rows out")


def missing_value(row: Mapping[str, Any], *columns: str, rest: str) -> BadRow:
    """Build the error of a row that has no value in any of these columns; it tells null cells from missing columns.

    ``rest`` continues the message, for example with "; the row has prompt".
    """
    empty = [column for column, value in row.items() if value is None and column in columns]
    if not empty:
        return BadRow(columns[0], f"no such column{rest}")
    others = f", and so {'is' if len(empty) == 2 else 'are'} {', '.join(empty[1:])}" if empty[1:] else ""
    return BadRow(empty[0], f"is empty (null){others}{rest if len(columns) == 1 else ''}")


class ExcludedRow(BadRow):
    """A good row that is not for the stage, such as an answer labelled bad in SFT; it is counted, never an error."""


class Notes:
    """Counts of rows that are used but worth a note, such as rows cut to max_length; logged once per source."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.first: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def add(self, note: str, place: str) -> None:
        """Count a row; ``note`` completes "3 of 10 rows (30 %): ", for example with "cut to max_length"."""
        self.first.setdefault(note, place)
        self.counts[note] = self.counts.get(note, 0) + 1

    def log(self, rows: int) -> None:
        """Log each note with its share of all rows, the most frequent first."""
        for note in sorted(self.counts, key=self.counts.__getitem__, reverse=True):
            count = self.counts[note]
            share = f"{count:,} of {rows:,} rows ({100 * count / max(rows, 1):.3g} %)"
            log.warning("%s: %s: %s (first: %s)", self._name, share, note, self.first[note])


Row = dict[str, Any]
PlacedRow = tuple[str, Row | BadRow]
"""The place of a row for messages, and the row or its error."""


class Skips:
    """Account of what a source holds that training does not use, so that nothing is ignored silently.

    A bad row ends the run or, with ``skip``, is counted. Columns that nothing reads are counted too.
    """

    def __init__(self, name: str, *, skip: bool) -> None:
        self._name = name
        self._skip = skip
        self.first: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.notes = Notes(name)
        self.unread: dict[str, int] = {}
        """Number of rows per column or message field that nothing reads."""

    def add(self, error: BadRow, place: str) -> None:
        """Count the row, or raise ``DataError`` with its place if bad rows end the run."""
        if not self._skip and not isinstance(error, ExcludedRow):
            raise bad_row_error(f"{place}: {error}") from None
        self.first.setdefault(error.reason, place)
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1

    def add_unread(self, names: Iterable[str]) -> None:
        """Count the names of a row's columns and message fields that nothing reads."""
        for name in names:
            name = name if name in self.unread or len(self.unread) < MAX_COUNTED_NAMES else OTHER_NAMES
            self.unread[name] = self.unread.get(name, 0) + 1

    def close(self, row_count: int) -> dict[str, int]:
        """Log skipped rows with the place of the first, and the notes; raise ``DataError`` if no rows remain."""
        reasons = sorted(self.counts, key=self.counts.__getitem__, reverse=True)
        for reason in reasons[:MAX_REASONS]:
            rows = self.counts[reason]
            log.warning("%s: skipped %d rows: %s (first: %s)", self._name, rows, reason, self.first[reason])
        if others := reasons[MAX_REASONS:]:
            rows = sum(self.counts[reason] for reason in others)
            log.warning("%s: skipped %d rows for %d other reasons", self._name, rows, len(others))
        if row_count == 0:
            worst = f"; all {sum(self.counts.values())} were skipped, most for: {reasons[0]}" if reasons else ""
            raise DataError(f"{self._name}: no rows{worst}")
        self.notes.log(row_count)
        if self.unread:
            log.warning("%s: columns that nothing reads: %s", self._name, names_with_rows(self.unread))
        return self.counts


def names_with_rows(rows: Mapping[str, int]) -> str:
    """List names as ``id (1,000 rows), source (1 row)``, the most frequent first and at most ``MAX_NAMES``."""
    names = sorted(rows, key=lambda name: -rows[name])
    shown = [f"{_short(name)} ({rows[name]:,} row{'s' * (rows[name] != 1)})" for name in names[:MAX_NAMES]]
    others = len(names) - len(shown)
    return ", ".join(shown) + (f" and {others:,} others" if others else "")


def _short(name: str) -> str:
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= MAX_NAME_CHARACTERS else name[:MAX_NAME_CHARACTERS] + "…"
