"""Checksums of a folder's files: written when all else is, and looked at before anything is read."""

import json
import os
from pathlib import Path

import xxhash

NAME = "manifest.json"
_AT_ONCE = 2**20
_SEAL = 32  # hex digits


class UnknownFormat(ValueError):
    """A manifest that is whole, but of a format that this version does not know."""


def write_manifest(folder: Path, *, form: int) -> None:
    """Note the size and checksum of every file below ``folder``; all of it is on the disk when this returns.

    ``form``: the number of the folder's format, for ``damage`` to compare.
    """
    files = {path.relative_to(folder).as_posix(): _stamp(path, sync=True) for path in _files(folder)}
    body = f"\n{json.dumps({'format': form, 'checksum': 'xxh3_128', 'files': files})}\n".encode()
    with (folder / NAME).open("wb") as out:
        # The first line vouches for the rest.
        out.write(xxhash.xxh3_128_hexdigest(body).encode() + body)
        out.flush()
        os.fsync(out.fileno())


def damage(folder: Path, *, form: int) -> list[str]:
    """What is wrong with the files below ``folder``, one line each; empty where they are as they were written.

    A file that the manifest does not know is nobody's business. UnknownFormat where the folder's is not ``form``.
    """
    try:
        content = (folder / NAME).read_bytes()
    except OSError as error:
        return [f"{NAME}: {error.strerror}"]
    seal, body = content[:_SEAL], content[_SEAL:]
    if xxhash.xxh3_128_hexdigest(body).encode() != seal:
        return [f"{NAME}: other bytes than were written"]
    noted = json.loads(body)
    if noted["format"] != form:
        raise UnknownFormat(f"{folder} has format {noted['format']}, this version of jrlhf reads format {form}")
    return [wrong for name, stamp in noted["files"].items() if (wrong := _compared(folder, name, stamp))]


def _compared(folder: Path, name: str, stamp: list[int | str]) -> str:
    try:
        found = _stamp(folder / name, sync=False)
    except OSError as error:
        return f"{name}: {error.strerror}"
    if found[0] != stamp[0]:
        return f"{name}: {found[0]} bytes in place of {stamp[0]}"
    return "" if found == stamp else f"{name}: other bytes than were written"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)


def _stamp(path: Path, *, sync: bool) -> list[int | str]:
    """Size and checksum, and where asked for the file made to last."""
    checksum, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while part := file.read(_AT_ONCE):
            checksum.update(part)
            size += len(part)
        if sync:
            os.fsync(file.fileno())
    return [size, checksum.hexdigest()]
