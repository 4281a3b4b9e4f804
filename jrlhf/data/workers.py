"""Rows encoded by several threads: the tokenizer's own code lets go of the interpreter while it works."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from jrlhf.data.columns import Encoded
from jrlhf.data.errors import BadRow, DataError, Placed, Row

THREADS = 8
"""At most; the rest of a row's work, about a quarter, is done by one at a time."""
CHUNK = 128
"""Rows a thread takes at a time."""


def encode_all(rows: Iterable[Placed], encode: Callable[[Row], Encoded]) -> Iterator[tuple[str, Encoded | BadRow]]:
    """Every row, or what is wrong with it, in the order in which they stand; a few chunks are read ahead.

    An error of the source itself comes after the rows before it, as if they were read one by one.
    """

    def encoded(placed: list[Placed]) -> list[tuple[str, Encoded | BadRow]]:
        return [(place, _tried(place, row, encode)) for place, row in placed]

    threads, unread = min(os.cpu_count() or 1, THREADS), iter(rows)
    with ThreadPoolExecutor(threads) as pool:
        ahead, broken = deque([pool.submit(encoded, [])]), None
        while ahead:
            while broken is None and len(ahead) <= 2 * threads:
                chunk, broken = _chunk(unread)
                if not chunk:
                    break
                ahead.append(pool.submit(encoded, chunk))
            yield from ahead.popleft().result()
    if broken is not None:
        raise broken


def _chunk(rows: Iterator[Placed]) -> tuple[list[Placed], DataError | None]:
    chunk: list[Placed] = []
    try:
        chunk.extend(islice(rows, CHUNK))
    except DataError as error:
        return chunk, error
    return chunk, None


def _tried(place: str, row: Row | BadRow, encode: Callable[[Row], Encoded]) -> Encoded | BadRow:
    try:
        return row if isinstance(row, BadRow) else encode(row)
    except BadRow as error:
        return error
    except DataError as error:  # not the row's fault, and no row is skipped for it: but this one shows it
        raise DataError(f"{place}: {error}") from error
