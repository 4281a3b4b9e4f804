"""Tokenised rows on disk: made once, found again by all that decided them, mapped into memory.

A folder of the cache is whole or not there: it is written under another name and renamed when all of it is on disk.
"""

import fcntl
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from uuid import uuid4

import numpy as np

from jrlhf.data.columns import Schema, Table, Writer, mapped
from jrlhf.data.errors import DataError, Skips
from jrlhf.data.protocol import Tokenizer
from jrlhf.parallel.hosts import first_goes_ahead
from jrlhf.parallel.peers import current
from jrlhf.system.environment import cache_home, usable_cache
from jrlhf.system.paths import expanded

log = logging.getLogger("jrlhf.data")

FORMAT = 1
"""Of the files in a folder of the cache; another one is another key."""

META = "rows.json"
AUTO = "auto"
SMALL = 4 * 2**20
"""Bytes of source below which ``AUTO`` keeps rows in memory: they are tokenised in about a second."""

Key = Mapping[str, Any]
"""All that decides the rows, as JSON."""


def cache_folder(setting: str, files: Sequence[Path]) -> Path | None:
    """Where rows made of ``files`` are kept, None for nowhere; see ``DataConfig.cache``."""
    if not (setting and files):
        return None
    if setting != AUTO:
        return Path(expanded(setting))
    if sum(path.stat().st_size for path in files) < SMALL:
        return None
    folder, trouble = usable_cache()
    if folder is None and current() is None:
        log.warning("tokenised rows are kept in memory: %s", trouble)
        return None
    # Several processes must do the same: there an error says what is to be set.
    return folder or cache_home()


def cache_key(kind: str, name: str, files: Sequence[Path], tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Key:
    """A file is known by path, size and time of change, as make knows it.

    To read gigabytes and compare them would take longer than a start may; and the rows that were left out are reported
    by the file's name, so a copy needs a folder of its own.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "files": file_stamps(files),
        "settings": dict(settings),
        "tokenizer": tokenizer_digest(tokenizer),
        "code": _code_digest(),
        "versions": {package: version(package) for package in ("tokenizers", "transformers", "jinja2")},
    }


def file_stamps(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """``(path, bytes, nanoseconds of the last change of its content, of its inode)`` of each file.

    Whoever copies or unpacks a file may set the time of its content back to another file's (``cp -p``, ``tar``,
    ``rsync -t``); nobody can set the inode's. That changes too where a file was only renamed or linked: rows are then
    made anew for nothing, which costs time and changes no result.
    """
    stats = [(path.resolve(), path.stat()) for path in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of all files it would be saved as: vocabulary, rules, special tokens, chat templates."""
    digest = sha256()
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    """Of the code that makes the rows: nobody has to remember to change a number when it changes."""
    return sha256(b"\0".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def cached(root: Path, key: Key, schema: Schema, fill: Callable[[Writer], Skips]) -> Table:
    """The rows of ``key``: those in the cache, else those that ``fill`` adds, which are there from then on.

    What was left out is said again each time. Any number of processes may ask for one key at once: where they see each
    other's locks one makes the rows and the others wait; else each makes them, and what is done first is kept.
    """
    name = f"{key['kind']}-{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}"
    folder = root / name
    # In a run over several hosts the first process makes them, and the others find them where they share the folder.
    with first_goes_ahead(f"tokenise {key['name']}"):
        if not folder.exists():
            with _disk_errors(root):
                root.mkdir(parents=True, exist_ok=True)
            with _lock(root / f"{name}.lock", key["name"]) as locked:
                if not folder.exists():
                    _make(folder, key, schema, fill, locked=locked)
    return _opened(folder, schema, key["name"])


def _make(folder: Path, key: Key, schema: Schema, fill: Callable[[Writer], Skips], *, locked: bool) -> None:
    root = folder.parent
    if locked:
        _clear(root, folder.name)
    partial = root / f"{folder.name}.{platform.node()}.{uuid4().hex}.partial"
    try:
        with ExitStack() as stack:
            with _disk_errors(root):
                partial.mkdir()
                files = {file: stack.enter_context((partial / file).open("wb", buffering=0)) for file in schema.files()}

            def write(name: str, values: np.ndarray) -> None:
                with _disk_errors(root):
                    rest = memoryview(values.tobytes())
                    while rest:
                        rest = rest[files[name].write(rest) :]

            writer = Writer(schema, write)
            skips = fill(writer)
            writer.flush()
            if writer.rows == 0:
                skips.close(0)
            if file_stamps([Path(path) for path, *_ in key["files"]]) != key["files"]:
                raise DataError(f"{key['name']}: changed while it was read")
            with _disk_errors(root):
                _complete(partial, folder, files.values(), key, writer, skips)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear(root: Path, mine: str) -> None:
    """Remove what killed processes of this machine left: their locks are free. Another machine's we may not see."""
    for left_over in list(root.glob("*.partial")):
        name, _, rest = left_over.name.partition(".")
        if rest.startswith(f"{platform.node()}.") and (name == mine or _is_free(root / f"{name}.lock")):
            shutil.rmtree(left_over, ignore_errors=True)


def _is_free(lock: Path) -> bool:
    with lock.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _complete(partial: Path, folder: Path, files: Iterable[FileIO], key: Key, writer: Writer, skips: Skips) -> None:
    """Say what is there, get it on disk, and only then give it its name."""
    meta = {
        "key": key,
        "rows": writer.rows,
        "digest": writer.digest(),
        "bytes": {Path(file.name).name: file.tell() for file in files},
        "skipped": {reason: [count, skips.first[reason]] for reason, count in skips.counts.items()},
        "notes": {note: [count, skips.notes.first[note]] for note, count in skips.notes.counts.items()},
        "unread": skips.unread,
    }
    for file in files:
        os.fsync(file.fileno())
    with (partial / META).open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _opened(folder: Path, schema: Schema, name: str) -> Table:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        for file, size in meta["bytes"].items():
            if (found := (folder / file).stat().st_size) != size:
                raise DataError(f"{folder / file}: {found} bytes of {size}; remove the folder, and it is made anew")
        skips = Skips(name, skip=True)
        for reason, (count, first) in meta["skipped"].items():
            skips.counts[reason], skips.first[reason] = count, first
        for note, (count, first) in meta["notes"].items():
            skips.notes.counts[note], skips.notes.first[note] = count, first
        skips.unread = meta["unread"]
        return mapped(schema, folder, meta["rows"], skips)._replace(digest=meta["digest"])
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise DataError(f"{folder}: {error!r}; remove the folder, and it is made anew") from error


@contextmanager
def _lock(path: Path, name: str) -> Iterator[bool]:
    """Hold the file for this process; False where the file system knows no locks. The kernel lets go when it ends."""
    with _disk_errors(path.parent):
        file = path.open("a", encoding="utf-8")
    with file:
        yield _held(file, name)


def _held(file: IO[str], name: str) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("%s: another process tokenises it; waiting for that", name)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        wayout = "make room, or name another folder with the data's `cache` (empty: none, all in memory)"
        raise DataError(f"{root}: tokenised rows cannot be kept here: {error.strerror}; {wayout}") from error
