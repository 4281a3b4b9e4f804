"""Sources of rows: files, folders, the hub and stdin. Each row comes with its place, which errors name."""

import sys
import zlib
from collections.abc import Iterable, Iterator
from glob import glob
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from jrlhf import assets
from jrlhf.data.arrow_files import arrow_rows, dataset_rows, is_saved, parquet_rows, saved_files, saved_rows
from jrlhf.data.errors import DataError, PlacedRow
from jrlhf.data.text_files import BOM, csv_rows, json_rows
from jrlhf.system.paths import expanded
from jrlhf.system.suggest import near_file

READERS = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
COLUMNAR = (".parquet", ".arrow")
"""File types with compression of their own, which are never read through gzip."""


class Source(NamedTuple):
    """Rows that can be iterated once, and the name of their source."""

    name: str
    rows: Iterable[PlacedRow]
    files: tuple[Path, ...] = ()
    """Files of the rows; empty where the source cannot be read twice. Reading starts with the first row."""
    local: bool = True
    """False for a data set on the hub."""


def open_source(source: str) -> Source:
    """Open a file, a folder of ``save_to_disk``, ``asset:NAME``, ``-`` (stdin, one prompt per line), or a hub id.

    Files are .jsonl, .ndjson, .json, .csv and .tsv (each also as .gz), .parquet and .arrow. A file name with ``*``,
    ``?``, ``[...]`` or ``**`` (folders) opens all matching files in the order of their names, unless a file has exactly
    this name. A hub id is ``name``, ``name:split`` or ``name:config:split``; a folder is ``folder`` or
    ``folder:split``. The default split is "train".
    """
    if source == "-":
        return Source("stdin", _stdin_rows())
    path = Path(expanded(assets.resolve(source)))
    if not path.exists() and ("*" in source or "?" in source or ("[" in source and _file_suffix(path))):
        return _open_glob(str(path))
    folder, _, split = str(path).rpartition(":")
    if path.is_dir():
        return _open_folder(path, "")
    if folder and not path.exists() and Path(folder).is_dir():
        return _open_folder(Path(folder), split)
    if path.is_file() or _file_suffix(path) or source[:1] in "./~" or len(path.parts) > 2:
        return _open_file(path)
    return _open_hub(source)


def _file_suffix(path: Path) -> str | None:
    """Return the suffix in ``READERS`` that decides how a file is read, ignoring ``.gz``; None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def _open_glob(pattern: str) -> Source:
    paths = [path for path in map(Path, sorted(glob(pattern, recursive=True))) if path.is_file()]
    if not paths:
        raise DataError(f"{pattern}: no file matches")
    sources = [_open_file(path) for path in paths]
    return Source(pattern, chain.from_iterable(source.rows for source in sources), tuple(paths))


def _open_file(path: Path) -> Source:
    if not path.is_file():
        raise DataError(f"{path}: no such file{near_file(path)}")
    kind = _file_suffix(path)
    if kind is None:
        raise DataError(f"{path}: unknown file type; known: {', '.join(READERS)}")
    if kind in COLUMNAR and path.suffix.lower() == ".gz":
        raise DataError(f"{path}: a {kind} file cannot be read through gzip; unpack it")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return Source(str(path), _with_read_errors(path, READERS[kind](path)), (path,))


def _open_folder(folder: Path, split: str) -> Source:
    if not is_saved(folder):
        kind = next((kind for kind in READERS if any(folder.glob(f"*{kind}"))), ".jsonl")
        raise DataError(f"{folder}: is a folder; name a file in it, or several with {folder / f'*{kind}'}")
    files = saved_files(folder, split)
    name = f"{folder}:{split}" if split else str(folder)
    return Source(name, saved_rows(name, files[1:]), files)


def _with_read_errors(path: Path, rows: Iterator[PlacedRow]) -> Iterator[PlacedRow]:
    try:
        yield from rows
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _stdin_rows() -> Iterator[PlacedRow]:
    r"""Yield one prompt per line, ended by "\n" or "\r\n" alone; the input is UTF-8 in every locale."""
    # A host program that embeds Python may have replaced stdin with a text stream.
    lines = sys.stdin.buffer if isinstance(sys.stdin, TextIOWrapper) else map(str.encode, sys.stdin)
    for number, line in enumerate(lines, 1):
        text = line.removeprefix(BOM) if number == 1 else line
        try:
            prompt = text.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"stdin: not UTF-8: line {number}, byte {error.start + 1}: {error.reason}") from error
        yield f"stdin:{number}", {"prompt": prompt}


def _open_hub(source: str) -> Source:
    import datasets

    parts = source.split(":")
    if len(parts) > 3 or not all(parts):
        raise DataError(f"{source!r}: a hub id is name, name:split or name:config:split")
    name, split = parts[0], parts[-1] if len(parts) > 1 else "train"
    config = parts[1] if len(parts) == 3 else None
    if Path(name).is_dir():  # datasets would read the files in it through its cache
        return _open_folder(Path(name), split)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # from the network, the hub or the loader
        reason = str(error).partition("\n")[0]
        raise DataError(f"{source}: neither a file nor a data set on the hub: {reason}") from error
    return Source(
        source, dataset_rows(source, rows), tuple(Path(file["filename"]) for file in rows.cache_files), local=False
    )
