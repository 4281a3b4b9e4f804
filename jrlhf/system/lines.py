"""Text files of the project: UTF-8 whatever the locale, ended by "\\n" alone, and there as a whole or not at all.

``str.splitlines`` and ``open()`` in text mode end lines at characters that a prompt or an answer may hold (U+2028,
U+2029, U+0085, a lone "\\r"), so no file is read by them.
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
"""Separators of lines to other readers, and halves of surrogate pairs, which no encoding takes."""
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON in its own letters, but for characters that other readers may take for the end of a line."""
    return _ESCAPED.sub(_escape, json.dumps(value, indent=indent, ensure_ascii=False))


def json_line(row: Any) -> str:
    """One line of a JSONL file, with its end."""
    return json_text(row) + "\n"


def ascii_json(text: str) -> str:
    """The same JSON in ASCII: what any terminal, pipe and reader takes, whatever encoding it expects."""
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank with its number from 1, without a byte order mark."""
    for number, line in enumerate(path.read_bytes().removeprefix(BOM).split(b"\n"), 1):
        if line.strip():
            yield number, line


def read_json_lines(path: Path) -> list[Any]:
    """The rows of a JSONL file; ValueError that names file and line for one that is no JSON."""
    return [_parsed(path, number, line) for number, line in numbered_lines(path)]


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is added to, ends included; a last one that was cut short is left out.

    A file that is not there has none.
    """
    if not path.exists():
        return []
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]


def read_whole_json_lines(path: Path) -> list[Any]:
    """The rows of a JSONL file that is added to, without a last line that was cut short."""
    return [_parsed(path, number, line) for number, line in enumerate(whole_lines(path), 1)]


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}:{number}: not JSON: {error}") from error


def write_output(path: str, text: str) -> None:
    """Write JSON to the file that a user named, or to stdout for ``-``; there in ASCII where stdout is not UTF-8."""
    if path != "-":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), text)
        return
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text if codecs.lookup(encoding).name == "utf-8" else ascii_json(text))
    sys.stdout.flush()


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all: beside it first, then renamed over it.

    A link's target is replaced, not the link; what is no plain file (``/dev/stdout``, a pipe) is written to as it is.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """``write_text`` of what is encoded already."""
    target = path.resolve() if path.is_symlink() else path
    if target.exists() and not target.is_file():
        target.write_bytes(content)
        return
    partial = target.with_name(target.name + ".partial")
    # A link that stands there is not followed.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content)
    partial.replace(target)
