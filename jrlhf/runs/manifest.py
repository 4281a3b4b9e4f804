"""Checksums of a folder's files, written after all other files and verified before any is read."""

import json
import os
from pathlib import Path

import xxhash

MANIFEST_FILE = "manifest.json"
_READ_BYTES = 2**20
_DIGEST_LENGTH = 32  # hex digits


class UnknownFormat(ValueError):
    """The manifest is intact but has a format that this version does not know."""


def write_manifest(folder: Path, *, form: int) -> None:
    """Write the size and checksum of every file below ``folder`` and sync all files to disk.

    ``form`` is the version of the folder's format, which ``damage`` compares.
    """
    files = {path.relative_to(folder).as_posix(): _stamp(path, sync=True) for path in _files(folder)}
    body = f"\n{json.dumps({'format': form, 'checksum': 'xxh3_128', 'files': files})}\n".encode()
    with (folder / MANIFEST_FILE).open("wb") as out:
        # The first line is the checksum of the rest.
        out.write(xxhash.xxh3_128_hexdigest(body).encode() + body)
        out.flush()
        os.fsync(out.fileno())


def damage(folder: Path, *, form: int) -> list[str]:
    """Describe each file below ``folder`` that differs from the manifest, in a line per file; empty if all match.

    Files that are not in the manifest are ignored. Raises UnknownFormat if the folder's format is not ``form``.
    """
    try:
        content = (folder / MANIFEST_FILE).read_bytes()
    except OSError as error:
        return [f"{MANIFEST_FILE}: {error.strerror}"]
    body_digest, body = content[:_DIGEST_LENGTH], content[_DIGEST_LENGTH:]
    if xxhash.xxh3_128_hexdigest(body).encode() != body_digest:
        return [f"{MANIFEST_FILE}: content has changed"]
    manifest = json.loads(body)
    if manifest["format"] != form:
        raise UnknownFormat(f"{folder} has format {manifest['format']}, this version of jrlhf reads format {form}")
    return [problem for name, stamp in manifest["files"].items() if (problem := _mismatch(folder, name, stamp))]


def _mismatch(folder: Path, name: str, stamp: list[int | str]) -> str:
    try:
        actual = _stamp(folder / name, sync=False)
    except OSError as error:
        return f"{name}: {error.strerror}"
    if actual[0] != stamp[0]:
        return f"{name}: {actual[0]} bytes instead of {stamp[0]}"
    return "" if actual == stamp else f"{name}: content has changed"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)


def _stamp(path: Path, *, sync: bool) -> list[int | str]:
    """Return a file's size and checksum; with ``sync`` also sync it to disk."""
    checksum, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            checksum.update(part)
            size += len(part)
        if sync:
            os.fsync(file.fileno())
    return [size, checksum.hexdigest()]
