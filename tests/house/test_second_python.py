"""The list of what the gate tests with a second Python names files that exist, and says why."""

import pytest

from tests.support import ROOT
from tests.support.second_python import Entry, further_cases, read_list

ENTRIES = read_list()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry.path))
def test_an_entry_is_a_path_with_tests_and_a_reason(entry: Entry) -> None:
    target = ROOT / entry.path
    assert entry.reason
    assert entry.path.parts[0] == "tests"
    assert target.match("test_*.py") if target.is_file() else any(target.rglob("test_*.py"))


def test_no_entry_stands_twice_or_within_another() -> None:
    paths = sorted(entry.path for entry in ENTRIES)
    assert len(set(paths)) == len(paths)
    assert not any(path in other.parents for path in paths for other in paths)


def test_one_case_is_left_of_each_test_where_the_list_says_so() -> None:
    entries = [Entry(ENTRIES[0].path, False, "all"), Entry(ENTRIES[1].path, True, "one")]
    whole, alone = (ROOT / entry.path for entry in entries)
    tests = [(whole, "a"), (whole, "a"), (alone, "a"), (alone, "a"), (alone, "b"), (alone, "a"), (whole, "a")]
    assert further_cases(tests, entries) == [False, False, False, True, False, True, False]
    assert {entry.one_case for entry in ENTRIES} == {True, False}
