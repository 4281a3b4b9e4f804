"""The list of what the gate tests with its second Python."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

ONE_CASE = "one case"


class Entry(NamedTuple):
    """A file or a folder of tests, and what could differ there."""

    path: Path
    """From the root of the repository."""
    one_case: bool
    """Whether one case is enough of a test that has several parameters' values."""
    reason: str


def read_list() -> list[Entry]:
    """Each line of tests/second_python.txt but for comments: ``path  # [one case: ]reason``."""
    lines = (ROOT / "tests" / "second_python.txt").read_text(encoding="utf-8").splitlines()
    entries = []
    for line in lines:
        path, _, reason = line.partition("#")
        if path:
            cases, _, rest = reason.strip().partition(": ")
            one_case = cases == ONE_CASE
            entries.append(Entry(Path(path.strip()), one_case, rest if one_case else reason.strip()))
    return entries


def further_cases(tests: Iterable[tuple[Path, str]], entries: Iterable[Entry]) -> list[bool]:
    """Of each test, given as its file and its name without parameters, whether another case of it is enough."""
    alone = [ROOT / entry.path for entry in entries if entry.one_case]
    seen, further = set[tuple[Path, str]](), []
    for test in tests:
        further.append(test in seen and any(test[0].is_relative_to(path) for path in alone))
        seen.add(test)
    return further
