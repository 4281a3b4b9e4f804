"""Files of a Hugging Face folder other than weights, read as bytes and written atomically."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jrlhf.models.hf.folder import CONFIG, GENERATION_CONFIG, read_json
from jrlhf.system.errors import UsageError


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name with ``write`` and rename it, so that the file is never incomplete.

    Its mode follows the umask like that of any new file, although safetensors writes private files.
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
    """Return the bytes of all files that match ``patterns``, by names in the folder (``templates/tool.jinja``)."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their names in the folder; raise UsageError for a name that leads out of it."""
    if outside := [name for name in files if not is_inside(name)]:
        raise UsageError(f"{folder}: {outside[0]!r} is not the name of a file in a folder")
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda path, content=content: path.write_bytes(content))


def copy_files(source: Path, folder: Path) -> None:
    """Copy every file below ``source`` to the same name below ``folder``.

    ``config.json`` comes last, so that an interrupted copy cannot be loaded.
    """
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == CONFIG, path)):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda partial, path=path: shutil.copyfile(path, partial))


def is_inside(name: str) -> bool:
    """Tell whether a file name, which may include folders, stays inside the folder it is joined to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not {"..", "\\", ":", "\0"} & {*path.parts, *name}


def json_bytes(content: Mapping[str, Any], original: Path) -> bytes:
    """Encode as JSON, or return the original file's bytes if its content is equal, to preserve its formatting."""
    if original.is_file() and read_json(original) == content:
        return original.read_bytes()
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def generation_config(
    source: Path, config: Mapping[str, Any], *, stop_tokens: tuple[int, ...], pad_token: int
) -> bytes:
    """Return an export's ``generation_config.json``: that of ``source`` with these stop tokens and this pad token.

    Servers stop at its ``eos_token_id``, which is one id or a list. Without such a file in the source, the new one also
    gets the BOS of ``config.json``, which transformers would otherwise ignore.
    """
    original = source / GENERATION_CONFIG
    if original.is_file():
        content = read_json(original)
    else:
        content = {"bos_token_id": config["bos_token_id"]} if config.get("bos_token_id") is not None else {}
    source_eos = content.get("eos_token_id")
    source_eos = source_eos if isinstance(source_eos, list) else [source_eos]
    if set(source_eos) != set(stop_tokens):
        ids = list(dict.fromkeys((*(token for token in source_eos if token in stop_tokens), *stop_tokens)))
        content["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    content["pad_token_id"] = pad_token
    return json_bytes(content, original)
