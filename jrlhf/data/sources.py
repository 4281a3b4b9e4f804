"""Rows from files, the hub or stdin, each with its place, for errors to name.

JSON and CSV are read here, a line at a time: a loader that guesses the type of a whole column turns the answer "007"
into 7, "NA" into nothing and "2020-01-01" into a date, keeps one of two equal keys, and cannot leave out a bad line.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from glob import escape, glob
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jrlhf import assets
from jrlhf.data.errors import BadRow, DataError
from jrlhf.suggest import either

Row = dict[str, Any]
Placed = tuple[str, Row | BadRow]
"""Where a row stands, and the row, or why it is none."""

BOM = b"\xef\xbb\xbf"
WIDEST_CELL = 2**31 - 1


class Source(NamedTuple):
    """Rows, to be passed over once, and the name they go by together."""

    name: str
    rows: Iterable[Placed]
    files: tuple[Path, ...] = ()
    """What they are read from, where it can be read again; nothing is read before the first row is asked for."""
    local: bool = True
    """Whether they are not a data set of the hub's."""


def open_source(source: str) -> Source:
    """Open ``FILE.jsonl|.json|.csv|.parquet`` (text also as .gz), ``asset:NAME``, ``-`` (a prompt a line), or a hub id.

    ``*``, ``?``, ``[...]`` and ``**`` (folders) in a file's name stand for all files that fit, in the order of their
    names, unless there is a file of that very name. A hub id is ``name``, ``name:split`` or ``name:config:split``; the
    split is "train" unless given.
    """
    if source == "-":
        return Source("stdin", _stdin_rows())
    path = Path(assets.resolve(source)).expanduser()
    if not path.exists() and ("*" in source or "?" in source or ("[" in source and _kind(path))):
        return _open_glob(str(path))
    if path.is_file() or path.is_dir() or _kind(path) or source[:1] in "./~" or len(path.parts) > 2:
        return _open_file(path)
    return _open_hub(source)


def _kind(path: Path) -> str | None:
    """The suffix that says how a file of this name is read; ``.gz`` is looked through."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def _open_glob(pattern: str) -> Source:
    paths = [path for path in map(Path, sorted(glob(pattern, recursive=True))) if path.is_file()]
    if not paths:
        raise DataError(f"{pattern}: no file fits")
    opened = [_open_file(path) for path in paths]
    return Source(pattern, chain.from_iterable(source.rows for source in opened), tuple(paths))


def _open_file(path: Path) -> Source:
    if path.is_dir():
        raise DataError(f"{path}: a folder; name a file in it, or several as {path / '*.jsonl'}")
    if not path.is_file():
        raise DataError(f"{path}: no such file{_near(path)}")
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; known: {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return Source(str(path), _guarded(path, READERS[kind](path)), (path,))


def _near(path: Path) -> str:
    """What the missing file may have been meant to be."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_file()], 3)
    return f"; did you mean {either(near)}?" if near else ""


def _guarded(path: Path, rows: Iterator[Placed]) -> Iterator[Placed]:
    try:
        yield from rows
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _json_rows(path: Path) -> Iterator[Placed]:
    """An array of objects, or an object a line: whichever the file holds, as people give both either suffix."""
    with _opened(path) as file:
        begun = False
        for number, line in enumerate(file, 1):
            text = line.removeprefix(BOM) if number == 1 else line
            if not text.strip():
                continue
            if not begun and text.lstrip().startswith(b"["):
                yield from _array_rows(path, b"\n" * (number - 1) + text + file.read())
                return
            begun = True
            try:
                yield f"{path}:{number}", _object(_parsed(text.rstrip()))
            except json.JSONDecodeError as error:
                yield f"{path}:{number}", BadRow(None, "not a JSON object a line", f": {error.msg} at {error.colno}")
            except BadRow as error:
                yield f"{path}:{number}", error


def _array_rows(path: Path, text: bytes) -> Iterator[Placed]:
    try:
        rows = _parsed(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not a JSON array: {error.msg} at {error.colno}") from error
    except BadRow as error:
        raise DataError(f"{path}: {error}") from error
    for number, row in enumerate(rows, 1):
        try:
            yield f"{path}: row {number}", _object(row)
        except BadRow as error:
            yield f"{path}: row {number}", error


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadRow(None, "not UTF-8", f" at byte {error.start + 1}") from error
    except (json.JSONDecodeError, BadRow):
        raise
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
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
        raise BadRow(None, f"expected an object with a value a column, found {type(value).__name__}")
    return value


def _csv_rows(path: Path) -> Iterator[Placed]:
    """Cells are text as they stand; an empty one is an empty text, not a missing column."""
    csv.field_size_limit(WIDEST_CELL)
    with _opened(path) as file:
        reader = csv.reader(_text_lines(path, file), strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) < len(header):
                raise DataError(f"{path}:1: two columns of one name: {', '.join(header)}")
            line = reader.line_num
            for cells in reader:
                place, line = f"{path}:{line + 1}", reader.line_num
                if len(cells) == len(header):
                    yield place, dict(zip(header, cells, strict=True))
                elif cells:
                    yield place, BadRow(None, f"{len(cells)} cells under a header of {len(header)}")
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _text_lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start + 1}") from error


def _parquet_rows(path: Path) -> Iterator[Placed]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset("parquet", data_files=escape(str(path)), split="train")
    except Exception as error:  # whatever the reader raises, wrapped in the loader's own
        raise DataError(f"{path}: cannot be read: {_root(error)}") from error
    yield from ((f"{path}: row {i}", dict(row)) for i, row in enumerate(rows, 1))


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _stdin_rows() -> Iterator[Placed]:
    try:
        for number, line in enumerate(sys.stdin, 1):
            yield f"stdin:{number}", {"prompt": line.rstrip("\r\n")}
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: not UTF-8: {error.reason}") from error


def _open_hub(source: str) -> Source:
    import datasets

    parts = source.split(":")
    if len(parts) > 3 or not all(parts):
        raise DataError(f"{source!r}: a hub id is name, name:split or name:config:split")
    name, split = parts[0], parts[-1] if len(parts) > 1 else "train"
    config = parts[1] if len(parts) == 3 else None
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the network's, the hub's, or the loader's own
        reason = str(error).partition("\n")[0]
        raise DataError(f"{source}: neither a file nor a data set on the hub: {reason}") from error
    placed = ((f"{source}: row {i}", dict(row)) for i, row in enumerate(rows, 1))
    return Source(source, placed, tuple(Path(file["filename"]) for file in rows.cache_files), local=False)


def _root(error: BaseException) -> str:
    """The first line of the error at the bottom of the chain."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return f"{type(error).__name__}: {error}".partition("\n")[0]
