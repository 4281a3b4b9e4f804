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


class LeftOut(BadRow):
    """A good row that is not for the stage at hand, such as an answer labelled bad in SFT: counted, never an error."""


class Notes:
    """What is counted of the rows that stay, such as those cut to max_length: said once a source, with the share."""

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
            share = f"{count:,} of {rows:,} rows ({100 * count / max(rows, 1):.2g} %)"
            log.warning("%s: %s: %s (first: %s)", self._name, share, note, self.first[note])


class Skips:
    """The rule for bad rows: end the run, or count and leave out; never pass over them in silence."""

    def __init__(self, name: str, *, skip: bool) -> None:
        self._name = name
        self._skip = skip
        self.first: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.notes = Notes(name)

    def add(self, error: BadRow, place: str) -> None:
        """Raise ``DataError`` with the row's place, or count it."""
        if not self._skip and not isinstance(error, LeftOut):
            raise DataError(f"{place}: {error}") from None
        self.first.setdefault(error.reason, place)
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1

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
        return self.counts
