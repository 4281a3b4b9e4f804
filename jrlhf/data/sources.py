"""Rows from a file, the hub or stdin, each with a place that an error can name."""

import gzip
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jrlhf import assets
from jrlhf.data.errors import DataError
from jrlhf.suggest import did_you_mean

Row = dict[str, Any]
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Source(NamedTuple):
    """Rows, the name they go by, and where row i stands."""

    name: str
    rows: Iterable[Row]
    where: Callable[[int], str]


def open_source(source: str) -> Source:
    """Open ``FILE.jsonl|.jsonl.gz|.json|.csv|.parquet``, ``asset:NAME``, ``-`` (a prompt a line on stdin), or a hub id.

    A hub id is ``name``, ``name:split`` or ``name:config:split``; the split is "train" unless given.
    """
    if source == "-":
        prompts = [{"prompt": line.rstrip("\r\n")} for line in sys.stdin]
        return Source("stdin", prompts, lambda i: f"stdin:{i + 1}")
    path = Path(assets.resolve(source))
    if path.is_file() or _reader(path) or len(path.parts) > 2:
        return _open_file(path)
    return _open_hub(source)


def _reader(path: Path) -> str | None:
    """Which loader reads a file of this name; ``.gz`` is looked through."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def _open_file(path: Path) -> Source:
    import datasets

    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{did_you_mean(path.name, siblings)}")
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; known: {', '.join(READERS)}, and each with .gz")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(reader, data_files=str(path), split="train")
    except Exception as error:
        if reader == "json":
            _blame_line(path)
        raise DataError(f"{path}: cannot be read: {_root(error)}") from error
    return Source(str(path), rows, lambda i: _place(path, i))


def _open_hub(source: str) -> Source:
    import datasets

    name, config, split = source, None, "train"
    match source.split(":"):
        case [name, split]:
            pass
        case [name, config, split]:
            pass
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise DataError(f"{source}: neither a file nor a data set on the hub: {_root(error)}") from error
    return Source(source, rows, lambda i: f"{source}: row {i + 1}")


def _root(error: BaseException) -> str:
    """The first line of the error at the bottom of the chain: the loaders wrap it in their own."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _lines(path: Path) -> Sequence[bytes]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        return file.read().split(b"\n")


def _is_lines(path: Path) -> bool:
    return ".jsonl" in (suffix.lower() for suffix in path.suffixes)


def _blame_line(path: Path) -> None:
    """The loader says that something is wrong, not where: read line by line until it shows."""
    if not _is_lines(path):
        return
    columns: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected an object, found {type(row).__name__}")
        for column, value in row.items():
            kind, first = columns.setdefault(column, (type(value).__name__, number))
            if value is not None and type(value).__name__ != kind:
                found = f"{type(value).__name__} here, {kind} on line {first}"
                raise DataError(f"{path}:{number}: {column}: {found}")


def _place(path: Path, row: int) -> str:
    """``file:line`` for JSON lines, blank lines counted; ``file: row n`` otherwise."""
    if not _is_lines(path):
        return f"{path}: row {row + 1}"
    numbers = [number for number, line in enumerate(_lines(path), 1) if line.strip()]
    return f"{path}:{numbers[row]}" if row < len(numbers) else f"{path}: row {row + 1}"
