"""Rows from files, folders, the hub or stdin, each with its place, for errors to name."""

import sys
import zlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from glob import glob
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from jrlhf import assets
from jrlhf.data.arrow_files import arrow_rows, dataset_rows, is_saved, parquet_rows, saved_files, saved_rows
from jrlhf.data.errors import DataError, Placed
from jrlhf.data.text_files import BOM, csv_rows, json_rows
from jrlhf.system.paths import expanded
from jrlhf.system.suggest import either

READERS = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
UNPACKED = (".parquet", ".arrow")
"""Kinds that are compressed within, if at all."""


class Source(NamedTuple):
    """Rows, to be passed over once, and the name they go by together."""

    name: str
    rows: Iterable[Placed]
    files: tuple[Path, ...] = ()
    """What they are read from, where it can be read again; nothing is read before the first row is asked for."""
    local: bool = True
    """Whether they are not a data set of the hub's."""


def open_source(source: str) -> Source:
    """Open a file, a folder of ``save_to_disk``, ``asset:NAME``, ``-`` (a prompt a line), or a hub id.

    Files are .jsonl, .ndjson, .json, .csv and .tsv (all also as .gz), .parquet and .arrow. ``*``, ``?``, ``[...]`` and
    ``**`` (folders) in a file's name stand for all files that fit, in the order of their names, unless there is a file
    of that very name. A hub id is ``name``, ``name:split`` or ``name:config:split``, a folder ``folder`` or
    ``folder:split``; the split is "train" unless given.
    """
    if source == "-":
        return Source("stdin", _stdin_rows())
    path = Path(expanded(assets.resolve(source)))
    if not path.exists() and ("*" in source or "?" in source or ("[" in source and _kind(path))):
        return _open_glob(str(path))
    folder, _, split = str(path).rpartition(":")
    if path.is_dir():
        return _open_folder(path, "")
    if folder and not path.exists() and Path(folder).is_dir():
        return _open_folder(Path(folder), split)
    if path.is_file() or _kind(path) or source[:1] in "./~" or len(path.parts) > 2:
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
    if not path.is_file():
        raise DataError(f"{path}: no such file{_near(path)}")
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; known: {', '.join(READERS)}")
    if kind in UNPACKED and path.suffix.lower() == ".gz":
        raise DataError(f"{path}: a {kind} file is not read through gzip; unpack it")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return Source(str(path), _guarded(path, READERS[kind](path)), (path,))


def _open_folder(folder: Path, split: str) -> Source:
    if not is_saved(folder):
        kind = next((kind for kind in READERS if any(folder.glob(f"*{kind}"))), ".jsonl")
        raise DataError(f"{folder}: a folder; name a file in it, or several as {folder / f'*{kind}'}")
    files = saved_files(folder, split)
    name = f"{folder}:{split}" if split else str(folder)
    return Source(name, saved_rows(name, files[1:]), files)


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


def _stdin_rows() -> Iterator[Placed]:
    """A prompt a line, which "\n" or "\r\n" ends and nothing else; UTF-8 whatever the locale."""
    # An interpreter that embeds this one may have put text in its place.
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
    if Path(name).is_dir():  # datasets would read the files in it, by way of its cache
        return _open_folder(Path(name), split)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the network's, the hub's, or the loader's own
        reason = str(error).partition("\n")[0]
        raise DataError(f"{source}: neither a file nor a data set on the hub: {reason}") from error
    return Source(
        source, dataset_rows(source, rows), tuple(Path(file["filename"]) for file in rows.cache_files), local=False
    )
