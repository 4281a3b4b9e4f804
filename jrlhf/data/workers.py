"""Encoding of rows in several threads, which works because the tokenizer's Rust code releases the GIL."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from jrlhf.data.columns import Encoded
from jrlhf.data.errors import BadRow, DataError, PlacedRow, Row

MAX_THREADS = 8
"""Maximum number of threads; about a quarter of the work on a row holds the GIL, so more do not help."""
CHUNK_ROWS = 128
"""Number of rows that a thread takes at a time."""


def encode_all(rows: Iterable[PlacedRow], encode: Callable[[Row], Encoded]) -> Iterator[tuple[str, Encoded | BadRow]]:
    """Yield every row encoded, or its error, in the order of the source; a few chunks are read ahead.

    An error of the source itself is raised after the rows before it, as if rows were read one by one.
    """

    def encode_chunk(placed: list[PlacedRow]) -> list[tuple[str, Encoded | BadRow]]:
        return [(place, _encode_row(place, row, encode)) for place, row in placed]

    threads, unread = min(os.cpu_count() or 1, MAX_THREADS), iter(rows)
    with ThreadPoolExecutor(threads) as pool:
        ahead, source_error = deque([pool.submit(encode_chunk, [])]), None
        while ahead:
            while source_error is None and len(ahead) <= 2 * threads:
                chunk, source_error = _chunk(unread)
                if not chunk:
                    break
                ahead.append(pool.submit(encode_chunk, chunk))
            yield from ahead.popleft().result()
    if source_error is not None:
        raise source_error


def _chunk(rows: Iterator[PlacedRow]) -> tuple[list[PlacedRow], DataError | None]:
    chunk: list[PlacedRow] = []
    try:
        chunk.extend(islice(rows, CHUNK_ROWS))
    except DataError as error:
        return chunk, error
    return chunk, None


def _encode_row(place: str, row: Row | BadRow, encode: Callable[[Row], Encoded]) -> Encoded | BadRow:
    try:
        return row if isinstance(row, BadRow) else encode(row)
    except BadRow as error:
        return error
    except DataError as error:  # an error of the source or tokenizer, which no skipped row can cure
        raise DataError(f"{place}: {error}") from error
