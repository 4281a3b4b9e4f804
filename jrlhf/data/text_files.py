"""Readers of JSON and CSV files that go line by line and never guess types.

A loader that guesses the type of a column turns the answer "007" into 7, "NA" into null and "2020-01-01" into a date,
drops one of two equal keys, and cannot skip a bad line.
"""

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any

from jrlhf.data.errors import BadRow, DataError, PlacedRow, Row
from jrlhf.system.environment import allow_wide_cells

BOM = b"\xef\xbb\xbf"
MAX_CELL_CHARACTERS = 2**31 - 1
SEPARATORS = ",\t;"


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def json_rows(path: Path) -> Iterator[PlacedRow]:
    """Yield the rows of a JSON file: one array of objects, or one object per line, whatever the suffix."""
    with _open(path) as file:
        has_rows = False
        for number, line in enumerate(file, 1):
            text = line.removeprefix(BOM) if number == 1 else line
            if not text.strip():
                continue
            if not has_rows and text.lstrip().startswith(b"["):
                yield from _array_rows(path, b"\n" * (number - 1) + text + file.read())
                return
            has_rows = True
            try:
                yield f"{path}:{number}", _object(_parse(text.rstrip()))
            except json.JSONDecodeError as error:
                yield f"{path}:{number}", BadRow(None, "not a JSON object per line", f": {error.msg} at {error.colno}")
            except BadRow as error:
                yield f"{path}:{number}", error


def _array_rows(path: Path, text: bytes) -> Iterator[PlacedRow]:
    try:
        rows = _parse(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not a JSON array: {error.msg} at {error.colno}") from error
    except BadRow as error:
        raise DataError(f"{path}: {error}") from error
    for number, row in enumerate(rows, 1):
        try:
            yield f"{path}: row {number}", _object(row)
        except BadRow as error:
            yield f"{path}: row {number}", error


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadRow(None, "not UTF-8", f" at byte {error.start + 1}") from error
    except (json.JSONDecodeError, BadRow):
        raise
    except ValueError as error:  # Python refuses whole numbers of more than 4,300 digits
        raise BadRow(None, "a whole number has too many digits") from error
    except RecursionError as error:
        raise BadRow(None, "nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadRow(next(name for name in names if names.count(name) > 1), "given twice in one object")
    return row


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise BadRow(None, f"expected an object with one value per column, found {type(value).__name__}")
    return value


def csv_rows(path: Path) -> Iterator[PlacedRow]:
    """Yield the rows of a CSV file. Cells are unchanged text; an empty cell is an empty text, not a missing column.

    The separator is a comma (in a .tsv file a tab) if the header has it; otherwise it is whichever of comma, tab and
    semicolon the header has.
    """
    allow_wide_cells(MAX_CELL_CHARACTERS)
    with _open(path) as file:
        try:
            lines = _Lines(_text_lines(path, file), "\t" if ".tsv" in path.name.lower() else ",")
        except csv.Error as error:
            raise DataError(f"{path}:1: not CSV: {error}") from error
        reader = csv.reader(lines, delimiter=lines.separator, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) < len(header):
                raise DataError(f"{path}:1: two columns have the same name: {', '.join(header)}")
            line, lines.within_row = reader.line_num, False
            for cells in reader:
                place, line, lines.within_row = f"{path}:{line + 1}", reader.line_num, False
                if len(cells) == len(header):
                    yield place, dict(zip(header, cells, strict=True))
                elif cells:
                    yield place, BadRow(None, f"{len(cells)} cells under a header of {len(header)}")
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error


class _Lines(Iterator[str]):
    """Lines of a file for Python's CSV reader, without the spaces between a separator and a quoted cell.

    Files often have ``"a", "b"``. Python's reader can drop the spaces before all cells or before none, but before a
    cell without quotes they are text. The caller sets ``within_row`` to False after each row, because a line that the
    reader requests within a row begins inside a quoted cell.
    """

    def __init__(self, lines: Iterator[str], default: str) -> None:
        header = next(lines, "")
        self.separator = mark = _separator(header, default)
        self.within_row = False
        self._lines = chain([header], lines)
        self._spaced = re.compile(f'(?:^|{mark}) +"')
        inside = '[^"]*+(?:""[^"]*+)*+'
        self._rest = re.compile(f'{inside}"?')
        # A quoted cell must close at its end; one that does not close at all continues on the next line.
        quoted = rf'"{inside}(?:"(?=[{mark}\r\n]|\Z)|\Z)'
        self._cell = re.compile(f'({mark}) +({quoted})|{mark}(?:"{inside}"?|[^{mark}]*+)')

    def __next__(self) -> str:
        line = next(self._lines)
        within, self.within_row = self.within_row, True
        if not self._spaced.search(line):
            return line
        if within:
            end = self._rest.match(line).end()  # pyright: ignore[reportOptionalMemberAccess]
            return line[:end] + self._drop_spaces(line[end:])
        return self._drop_spaces(self.separator + line)[1:]

    def _drop_spaces(self, cells: str) -> str:
        return self._cell.sub(lambda cell: cell[1] + cell[2] if cell[1] else cell[0], cells)


def _separator(header: str, default: str) -> str:
    """Return the default separator if the header has it, otherwise the one that splits the header into most cells."""
    cells = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in (default, *SEPARATORS)}
    return default if cells[default] > 1 else max(cells, key=cells.__getitem__)


def _text_lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start + 1}") from error
