"""Paths as users write them: a leading ``~`` is a home folder, wherever a config names a path. Imports no JAX."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from jrlhf.system.errors import UsageError

PATH = "path"
"""Marks a type whose text is a path, or may be one: a source of rows, a model."""
PathText = Annotated[str, PATH]


def expanded(text: str) -> str:
    """``~/x`` and ``~name/x`` with the home folder in their place; any other text as it is.

    ValueError where that folder is not known: else a folder named ``~`` would be made.
    """
    text = spelt(text)
    if not text.startswith("~"):
        return text
    user = text[1:].partition("/")[0]
    if not user and os.environ.get("HOME") == "":
        raise UsageError(f"{text}: ~ is not known, as HOME is empty; set HOME, or write the path out")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        reason = f"there is no user {user!r} here" if user else "HOME is not set, and the user has no home folder"
        raise UsageError(f"{text}: {text.partition('/')[0]} is not known: {reason}; write the path out (./~ is a name)")
    return path


def spelt(text: str) -> str:
    """A path as the file system's encoding can have it: in a locale without UTF-8 its bytes are those of UTF-8."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    return text


def expanded_value(value: Any) -> Any:
    """``expanded`` of a text, of each text of a tuple, or of each source in a mapping of weights."""
    if isinstance(value, str):
        return expanded(value)
    if isinstance(value, dict):
        weights = {expanded(source): weight for source, weight in value.items()}
        if len(weights) < len(value):
            raise UsageError(f"{', '.join(value)}: two of them are the same source")
        return weights
    return tuple(map(expanded, value))


def is_path(hint: Any) -> bool:
    """Whether a type is one of paths: ``PathText``, ``tuple[PathText, ...]``, or another that is marked ``PATH``."""
    if get_origin(hint) is Annotated:
        return PATH in get_args(hint)[1:]
    return get_origin(hint) is tuple and is_path(get_args(hint)[0])


@cache
def path_fields(cls: type) -> tuple[str, ...]:
    """The fields of a config that hold paths."""
    return tuple(name for name, hint in get_type_hints(cls, include_extras=True).items() if is_path(hint))


@dataclass(frozen=True)
class WithPaths:
    """A config in whose paths ``~`` is expanded however it is made: from YAML, from flags, or in Python."""

    def __post_init__(self) -> None:
        for name in path_fields(type(self)):
            object.__setattr__(self, name, expanded_value(vars(self)[name]))
