"""Paths in configs: a leading ``~`` stands for a home folder. Imports no JAX."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from jrlhf.system.errors import UsageError

PATH = "path"
"""Mark of a type whose text is, or may be, a path: a source of rows, or a model."""
PathText = Annotated[str, PATH]


def expanded(text: str) -> str:
    """Replace ``~`` in ``~/x`` and ``~name/x`` by the home folder; any other text stays.

    ValueError if that folder is not known, because otherwise a folder named ``~`` would be created.
    """
    text = encodable(text)
    if not text.startswith("~"):
        return text
    user = text[1:].partition("/")[0]
    if not user and os.environ.get("HOME") == "":
        raise UsageError(f"{text}: ~ is not known, because HOME is empty; set HOME, or write the full path")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        reason = f"there is no user {user!r} here" if user else "HOME is not set, and the user has no home folder"
        raise UsageError(f"{text}: {text.partition('/')[0]} is not known: {reason}; write the full path (or ./~)")
    return path


def encodable(text: str) -> str:
    """Make a path encodable for the file system: in a locale without UTF-8 its bytes are those of UTF-8."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    return text


def expanded_value(value: Any) -> Any:
    """Apply ``expanded`` to a text, to each text of a tuple, or to each source of a mapping with weights."""
    if isinstance(value, str):
        return expanded(value)
    if isinstance(value, dict):
        weights = {expanded(source): weight for source, weight in value.items()}
        if len(weights) < len(value):
            raise UsageError(f"{', '.join(value)}: two of these are the same source")
        return weights
    return tuple(map(expanded, value))


def is_path(hint: Any) -> bool:
    """Whether a type holds paths: ``PathText``, ``tuple[PathText, ...]``, or another type with the mark ``PATH``."""
    if get_origin(hint) is Annotated:
        return PATH in get_args(hint)[1:]
    return get_origin(hint) is tuple and is_path(get_args(hint)[0])


@cache
def path_fields(cls: type) -> tuple[str, ...]:
    """Return the names of the fields of a config that hold paths."""
    return tuple(name for name, hint in get_type_hints(cls, include_extras=True).items() if is_path(hint))


@dataclass(frozen=True)
class WithPaths:
    """Base of configs that expand ``~`` in their paths, whether made from YAML, from flags or in Python."""

    def __post_init__(self) -> None:
        for name in path_fields(type(self)):
            object.__setattr__(self, name, expanded_value(vars(self)[name]))
