"""What is wrong with a row, and where it stands."""

import logging

log = logging.getLogger("jrlhf.data")

REASONS_SHOWN = 20


class DataError(ValueError):
    """Data that cannot be trained on. The message names file, row and column."""


class BadRow(ValueError):
    """One row that cannot be used: the column to blame (None: the whole row), and why. It ends the run or is skipped.

    Skips are counted by column and reason; ``detail`` is what differs from row to row.
    """

    def __init__(self, column: str | None, reason: str, detail: str = "") -> None:
        self.reason = reason if column is None else f"{column}: {reason}"
        super().__init__(self.reason + detail)


class Skips:
    """The rule for bad rows: end the run, or count and leave out; never pass over them in silence."""

    def __init__(self, name: str, *, skip: bool) -> None:
        self._name = name
        self._skip = skip
        self.first: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def add(self, error: BadRow, place: str) -> None:
        """Raise ``DataError`` with the row's place, or count it."""
        if not self._skip:
            raise DataError(f"{place}: {error}") from None
        self.first.setdefault(error.reason, place)
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1

    def close(self, kept: int) -> dict[str, int]:
        """Say what was left out, and where first; an error where nothing remains."""
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
        return self.counts
