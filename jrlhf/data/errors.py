"""What is wrong with a row, and where it stands."""

import logging
from collections import Counter
from collections.abc import Callable

log = logging.getLogger("jrlhf.data")


class DataError(ValueError):
    """Data that cannot be trained on. The message names file, row and column."""


class BadRow(ValueError):
    """One row that cannot be used: the column to blame, and why. Becomes a ``DataError`` or a counted skip."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"{column}: {reason}")


class Skips:
    """The rule for bad rows: end the run, or count and leave out; never pass over them in silence."""

    def __init__(self, name: str, *, skip: bool) -> None:
        self._name = name
        self._skip = skip
        self.counts: Counter[str] = Counter()

    def add(self, error: BadRow, where: Callable[[], str]) -> None:
        """Raise ``DataError`` with the row's place, or count it."""
        if not self._skip:
            raise DataError(f"{where()}: {error}") from None
        self.counts[str(error)] += 1

    def close(self, kept: int) -> dict[str, int]:
        """Say what was left out; an error where nothing remains."""
        for reason, count in self.counts.most_common():
            log.warning("%s: %d rows skipped: %s", self._name, count, reason)
        if kept == 0:
            raise DataError(f"{self._name}: no rows" + (" left after skips" if self.counts else ""))
        return dict(self.counts)
