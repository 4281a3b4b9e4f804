"""The list of what the gate tests with a second Python names files that exist, and says why."""

from pathlib import Path

import pytest

from tests.support import ROOT

LINES = (ROOT / "tests" / "second_python.txt").read_text(encoding="utf-8").splitlines()
ENTRIES = [line for line in LINES if not line.startswith("#")]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_is_a_path_with_tests_and_a_reason(entry: str) -> None:
    path, _, reason = entry.partition("#")
    target = ROOT / path.strip()
    assert reason.strip()
    assert path.startswith("tests/")
    assert target.match("test_*.py") if target.is_file() else any(target.glob("test_*.py"))


def test_no_entry_stands_twice_or_within_another() -> None:
    paths = sorted(Path(entry.partition("#")[0].strip()) for entry in ENTRIES)
    assert len(set(paths)) == len(paths)
    assert not any(path in other.parents for path in paths for other in paths)
