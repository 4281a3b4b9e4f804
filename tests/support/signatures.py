"""beartype's check of a signature, made once; jaxtyping asks for it each time that a nested function is defined."""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_made: dict[tuple[Any, ...], Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The check of a function that has a signature and nothing else, which is all that jaxtyping passes on.

    Functions of one place in a module whose annotations read alike share one. Making it takes milliseconds, and a model
    defines a hundred of them with each trace.
    """
    place = function.__module__, function.__qualname__, function.__code__, repr(function.__annotations__)
    if place not in _made:
        _made[place] = beartype(function)
    return _made[place]
