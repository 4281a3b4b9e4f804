"""Files of a Hugging Face folder besides its weights: read as bytes, and written whole with the usual permissions."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jrlhf.models.hf.folder import CONFIG, GENERATION_CONFIG, read_json
from jrlhf.system.errors import UsageError


def appear(file: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file under another name, then give it its own: it is there whole or not at all.

    Its mode is that of any new file, as the umask says, though a writer such as safetensors' puts a private one there.
    """
    partial = file.parent / f".{file.name}.partial"
    partial.unlink(missing_ok=True)
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        write(partial)
        partial.chmod(mode)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read_files(folder: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    """The bytes of the files that ``patterns`` match, by their names below the folder: ``"templates/tool.jinja"``."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """``read_files`` backwards. UsageError for a name that leads out of the folder."""
    if outside := [name for name in files if not stays_inside(name)]:
        raise UsageError(f"{folder}: {outside[0]!r} is not the name of a file in a folder")
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        appear(target, lambda path, content=content: path.write_bytes(content))


def copy_files(source: Path, folder: Path) -> None:
    """Every file below ``source``, however large, to the same name below ``folder``.

    ``config.json`` comes last: a copy that is broken off cannot be loaded.
    """
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == CONFIG, path)):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        appear(target, lambda partial, path=path: shutil.copyfile(path, partial))


def stays_inside(name: str) -> bool:
    """Whether a file of this name, which may have a folder in it, is below the folder that it is written to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not {"..", "\\", ":", "\0"} & {*path.parts, *name}


def json_bytes(content: Mapping[str, Any], original: Path) -> bytes:
    """The original's own bytes while they say the same: another writer's spacing and number format are kept."""
    if original.is_file() and read_json(original) == content:
        return original.read_bytes()
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def generation_config(
    source: Path, config: Mapping[str, Any], *, stop_tokens: tuple[int, ...], pad_token: int
) -> bytes:
    """``generation_config.json`` of an export: that of ``source``, with the pad token and what ends an answer.

    Servers go by its ``eos_token_id``, one id or a list of them. Where the source has no such file it is made, with
    ``config.json``'s BOS, which counts only as long as there is none.
    """
    original = source / GENERATION_CONFIG
    if original.is_file():
        content = read_json(original)
    else:
        content = {"bos_token_id": config["bos_token_id"]} if config.get("bos_token_id") is not None else {}
    theirs = content.get("eos_token_id")
    theirs = theirs if isinstance(theirs, list) else [theirs]
    if set(theirs) != set(stop_tokens):
        ids = list(dict.fromkeys((*(token for token in theirs if token in stop_tokens), *stop_tokens)))
        content["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    content["pad_token_id"] = pad_token
    return json_bytes(content, original)
