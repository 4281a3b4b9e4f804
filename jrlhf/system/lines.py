"""Reads and writes text files in UTF-8, whatever the locale, with "\\n" as the only line end, and atomically.

``str.splitlines`` and ``open()`` in text mode also break lines at characters that a prompt or an answer may contain
(U+2028, U+2029, U+0085, a lone "\\r"), so nothing here uses them.
"""

import codecs
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jrlhf.system.errors import UsageError

BOM = b"\xef\xbb\xbf"
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
"""Characters that other readers take for line ends, and halves of surrogate pairs, which no encoding accepts."""
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Write JSON without ASCII escapes, except for characters that other readers may take for a line end."""
    return _ESCAPED.sub(_escape, json.dumps(value, indent=indent, ensure_ascii=False))


def json_line(row: Any) -> str:
    """Write one line of a JSONL file, with its line end."""
    return json_text(row) + "\n"


def ascii_json(text: str) -> str:
    """Write JSON in ASCII, which every terminal, pipe and reader accepts in any encoding."""
    return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line that is not blank with its number from 1, without a byte order mark."""
    for number, line in enumerate(path.read_bytes().removeprefix(BOM).split(b"\n"), 1):
        if line.strip():
            yield number, line


def read_json_lines(path: Path) -> list[Any]:
    """Read the rows of a JSONL file. ValueError names the file and line that is not JSON."""
    return [_parsed(path, number, line) for number, line in numbered_lines(path)]


def complete_lines(path: Path) -> list[bytes]:
    """Read the lines of a file that a run appends to, with their ends, without an incomplete last line.

    A missing file has no lines.
    """
    if not path.exists():
        return []
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]


def read_complete_json_lines(path: Path) -> list[Any]:
    """Read the rows of a JSONL file that a run appends to, without an incomplete last line."""
    return [_parsed(path, number, line) for number, line in enumerate(complete_lines(path), 1)]


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}:{number}: not JSON: {error}") from error


def write_output(path: str, text: str) -> None:
    """Write JSON to a file that the user names, or to stdout for ``-``: in ASCII if stdout is not UTF-8."""
    if path != "-":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), text)
        return
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text if codecs.lookup(encoding).name == "utf-8" else ascii_json(text))
    sys.stdout.flush()


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 atomically: first beside it, then with a rename.

    For a link it replaces the target, not the link. It writes to a device or a pipe (``/dev/stdout``) directly.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to a file as ``write_text`` does."""
    target = path.resolve() if path.is_symlink() else path
    if target.exists() and not target.is_file():
        target.write_bytes(content)
        return
    partial = target.with_name(target.name + ".partial")
    # Unlinking avoids following a link of that name.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content)
    partial.replace(target)
