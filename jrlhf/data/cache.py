"""Disk cache of tokenised rows, keyed by everything that decides them and mapped into memory.

Each table is one folder. It is written under a temporary name and renamed once all of it is on disk, so a folder of
the cache is always complete.
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

from jrlhf.data.columns import Schema, Table, Writer, mapped_table
from jrlhf.data.errors import DataError, Skips
from jrlhf.data.protocol import Tokenizer
from jrlhf.parallel.hosts import first_goes_ahead
from jrlhf.parallel.peers import current
from jrlhf.system.environment import cache_home, usable_cache
from jrlhf.system.errors import reason_of
from jrlhf.system.paths import expanded

log = logging.getLogger("jrlhf.data")

FORMAT_VERSION = 1
"""Version of the file format of a cache folder. It is part of the key."""

META_FILE = "rows.json"
AUTO = "auto"
MIN_CACHED_BYTES = 4 * 2**20
"""Size of a source in bytes from which ``AUTO`` writes a cache; smaller sources tokenise in about a second."""

Key = Mapping[str, Any]
"""JSON object with everything that decides the rows."""


def cache_folder(setting: str, files: Sequence[Path]) -> Path | None:
    """Return the cache folder for rows of ``files``, or None to keep them in memory; see ``DataConfig.cache``."""
    if not (setting and files):
        return None
    if setting != AUTO:
        return Path(expanded(setting))
    if sum(path.stat().st_size for path in files) < MIN_CACHED_BYTES:
        return None
    folder, trouble = usable_cache()
    if folder is None and current() is None:
        log.warning("tokenised rows are kept in memory: %s", trouble)
        return None
    # Several processes must all do the same, so there an unusable folder is an error that names the setting.
    return folder or cache_home()


def cache_key(kind: str, name: str, files: Sequence[Path], tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Key:
    """Return the key of a source's rows, in which a file is identified by path, size and times of change, as in make.

    Hashing gigabytes would delay every start. The path is part of the key because messages about skipped rows name it.
    """
    return {
        "format": FORMAT_VERSION,
        "kind": kind,
        "name": name,
        "files": file_stamps(files),
        "settings": dict(settings),
        "tokenizer": tokenizer_digest(tokenizer),
        "code": _code_digest(),
        "versions": {package: version(package) for package in ("tokenizers", "transformers", "jinja2")},
    }


def file_stamps(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Return ``(path, bytes, content time, inode time)`` for each file, the times in nanoseconds.

    Copying or unpacking can set the content time back (``cp -p``, ``tar``, ``rsync -t``), but nothing can set the
    inode time. Renaming or linking a file changes it too; the rows are then tokenised again, which only costs time.
    """
    stats = [(path.resolve(), path.stat()) for path in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the digest of all files that the tokenizer saves: vocabulary, rules, special tokens, chat templates."""
    digest = sha256()
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    """Return the digest of this package's source, so that a change of code changes the key without a version number."""
    return sha256(b"\0".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def cached_table(root: Path, key: Key, schema: Schema, fill: Callable[[Writer], Skips]) -> Table:
    """Return the cached rows of ``key``, after writing the rows that ``fill`` adds if they are not there.

    Skipped rows are reported each time. Several processes may call this with the same key at once: where file locks
    work, one process writes and the others wait; elsewhere each one writes and the first to finish wins.
    """
    name = f"{key['kind']}-{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}"
    folder = root / name
    # With several hosts the first process writes the rows, and the others read them if they share the folder.
    with first_goes_ahead(f"tokenise {key['name']}"):
        if not folder.exists():
            with _disk_errors(root):
                root.mkdir(parents=True, exist_ok=True)
            with _lock(root / f"{name}.lock", key["name"]) as locked:  # False: the file system has no locks
                if not folder.exists():
                    _write_table(folder, key, schema, fill, locked=locked)
    return _open_table(folder, schema, key["name"])


def _write_table(folder: Path, key: Key, schema: Schema, fill: Callable[[Writer], Skips], *, locked: bool) -> None:
    root = folder.parent
    if locked:
        _remove_stale(root, folder.name)
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
                raise DataError(f"{key['name']}: changed while it was read; start again")
            with _disk_errors(root):
                _publish(partial, folder, files.values(), key, writer, skips)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(root: Path, mine: str) -> None:
    """Remove partial folders of killed processes, whose locks are free; locks of other machines may be invisible."""
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


def _publish(partial: Path, folder: Path, files: Iterable[FileIO], key: Key, writer: Writer, skips: Skips) -> None:
    """Write the meta file, sync all files to disk, and only then rename the folder to its final name."""
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
    with (partial / META_FILE).open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _open_table(folder: Path, schema: Schema, name: str) -> Table:
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        for file, size in meta["bytes"].items():
            if (actual := (folder / file).stat().st_size) != size:
                raise DataError(f"{folder / file}: {actual} bytes of {size}; remove the folder to tokenise again")
        skips = Skips(name, skip=True)
        for reason, (count, first) in meta["skipped"].items():
            skips.counts[reason], skips.first[reason] = count, first
        for note, (count, first) in meta["notes"].items():
            skips.notes.counts[note], skips.notes.first[note] = count, first
        skips.unread = meta["unread"]
        return mapped_table(schema, folder, meta["rows"], skips)._replace(digest=meta["digest"])
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise DataError(f"{folder}: {reason_of(error)}; remove the folder to tokenise again") from error


@contextmanager
def _lock(path: Path, name: str) -> Iterator[bool]:
    """Lock the file for this process; yield False where the file system has no locks.

    The kernel releases the lock when the process ends.
    """
    with _disk_errors(path.parent):
        file = path.open("a", encoding="utf-8")
    with file:
        yield _acquired(file, name)


def _acquired(file: IO[str], name: str) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("%s: waiting for another process that is tokenising it", name)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "make room, or set the data's `cache` to another folder (empty: keep rows in memory)"
        raise DataError(f"{root}: cannot write tokenised rows here: {error.strerror}; {remedy}") from error
