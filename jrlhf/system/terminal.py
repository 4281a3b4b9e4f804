"""What is said on a terminal, whatever characters it can show."""

import sys
from io import TextIOWrapper


def show_all_characters() -> None:
    """Print a character that stdout or stderr cannot encode as ``\\u2028``, instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def complain(message: str) -> None:
    """Say something on stderr, each line under the program's name."""
    for line in message.split("\n"):
        print(f"jrlhf: {line}", file=sys.stderr)
