"""Rows encoded by several threads come as if one had done them."""

import itertools
import random
import threading
import time
from typing import Any

import pytest

from jrlhf.data import BadRow, DataError, workers
from jrlhf.data.columns import Encoded
from jrlhf.data.workers import encode_all


def encode(row: dict[str, Any]) -> Encoded:
    """Takes its time, a different one each."""
    if row["n"] % 7 == 3:
        raise BadRow("n", "of the wrong kind")
    time.sleep(random.random() / 5000)
    return Encoded({"tokens": [[row["n"]]]}, {})


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize("count", [0, 1, 5, 500])
def test_rows_come_in_their_order_with_what_is_wrong_with_them(count, chunk, monkeypatch):
    monkeypatch.setattr(workers, "CHUNK_ROWS", chunk)
    rows = [(f"row {n}", BadRow(None, "no row") if n % 11 == 5 else {"n": n}) for n in range(count)]
    found = list(encode_all(iter(rows), encode))
    assert [place for place, _ in found] == [place for place, _ in rows]
    for (_, given), (_, result) in zip(rows, found, strict=True):
        if isinstance(given, BadRow):
            assert result is given
        elif given["n"] % 7 == 3:
            assert str(result) == "n: of the wrong kind"
        else:
            assert result == Encoded({"tokens": [[given["n"]]]}, {})


def test_a_source_is_read_ahead_by_a_few_chunks_only():
    read = itertools.count()
    rows = ((str(n), {"n": 0}) for n in read)
    found = encode_all(rows, encode)
    for taken in range(1, 2000):
        next(found)
        if taken % 500 == 0:
            ahead = next(read) - taken
            assert 0 <= ahead <= (2 * workers.MAX_THREADS + 2) * workers.CHUNK_ROWS
    found.close()


def test_an_error_of_the_source_comes_after_the_rows_before_it(monkeypatch):
    monkeypatch.setattr(workers, "CHUNK_ROWS", 4)

    def rows():
        for n in range(10):
            yield f"row {n}", {"n": 0}
        raise DataError("cut off")

    found, seen = encode_all(rows(), encode), []
    with pytest.raises(DataError, match="cut off"):
        seen.extend(place for place, _ in found)
    assert seen == [f"row {n}" for n in range(10)]


def test_no_thread_is_left_when_rows_are_no_longer_wanted():
    before = threading.active_count()
    found = encode_all(((str(n), {"n": 0}) for n in itertools.count()), encode)
    next(found)
    found.close()
    assert threading.active_count() == before
