"""Scores that others give: a user's own function, or a server."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from jrlhf.rules.episode import Episode
from jrlhf.system.errors import UsageError

LARGEST_REPLY = 2**24
"""Bytes of a server's answer that are read; a longer one is a failure."""
LONGEST_PAUSE = 8.0


def load_function(path: str) -> Callable[..., Any]:
    """``my_module:reward``, also of a module in the current folder. UsageError where it cannot be had."""
    module, _, name = path.partition(":")
    try:
        with _current_folder_first():
            function = vars(import_module(module))[name]
    except KeyError as error:
        raise UsageError(f"{path}: the module has no {name}") from error
    except Exception as error:
        # Whatever a user's module does wrong when it is imported.
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UsageError(f"{path}: is no function but {type(function).__name__}")
    return function


def function_file(path: str) -> Path | None:
    """The source file of the module that ``load_function`` would import; None for one that cannot be found."""
    module, _, _ = path.partition(":")
    try:
        with _current_folder_first():
            spec = find_spec(module)
    except Exception:
        # Whatever a user's package does wrong when it is imported: load_function says it.
        return None
    return None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)


@contextmanager
def _current_folder_first():
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def arguments(episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    """What an outsider is told: prompts, completions, and each other column of the rows, None where a row lacks it."""
    names = dict.fromkeys(name for episode in episodes for name in episode.row)
    columns = {name: [episode.row.get(name) for episode in episodes] for name in names if name != "prompt"}
    prompts = [episode.row.get("prompt") for episode in episodes]
    return columns | {"prompts": prompts, "completions": [episode.completion for episode in episodes]}


def checked(scores: Any, count: int) -> list[float]:
    """ValueError for anything but ``count`` finite numbers."""
    found = scores if isinstance(scores, list | tuple) else None
    if found is None:
        raise ValueError(f"expected a list of {count} numbers, got {type(scores).__name__}")
    if len(found) != count:
        raise ValueError(f"expected {count} numbers, one an answer, got {len(found)}")
    for place, score in enumerate(found):
        try:
            finite = not isinstance(score, str | None) and math.isfinite(score)
        except (TypeError, OverflowError):
            finite = False
        if not finite:
            raise ValueError(f"expected finite numbers, got {score!r} for answer {place}")
    return [float(score) for score in found]


def by_function(function: Callable[..., Any], episodes: Sequence[Episode]) -> list[float]:
    """``function(prompts=[...], completions=[...], **columns)``, its list of floats checked."""
    return checked(function(**arguments(episodes)), len(episodes))


class EndpointError(Exception):
    """A server gave no scores: it was not reached, was too slow, refused, or answered something else."""


def by_endpoint(
    url: str, episodes: Sequence[Episode], *, timeout: float, retries: int, deadline: float, limit: str = ""
) -> list[float]:
    """POST ``{"prompts", "completions", "columns"}`` for ``{"scores": [...]}``; EndpointError where all tries fail.

    What may pass is tried again: no connection, no answer in time, 429 and 5xx; but not after ``deadline``, of
    ``time.monotonic()``, which errors say that the option ``limit`` sets.
    """
    told = arguments(episodes)
    body = {"prompts": told.pop("prompts"), "completions": told.pop("completions"), "columns": told}
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST")
    for left in range(retries, -1, -1):
        remains = deadline - time.monotonic()
        if remains <= 0:
            raise EndpointError(f"{url}: no time is left for a request{f' ({limit})' if limit else ''}")
        try:
            return _scores(_answer(request, min(timeout, remains)), len(episodes))
        except (OSError, ValueError, RecursionError) as error:
            lasting = isinstance(error, HTTPError) and error.code != 429 and error.code < 500
            wait = pause(retries - left)
            if lasting or not left or time.monotonic() + wait >= deadline:
                raise EndpointError(f"{url}: {error}") from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def pause(done: int) -> float:
    """Seconds before the next try: 0.5, 1, 2, 4, 8, 8, ..."""
    return min(0.5 * 2**done, LONGEST_PAUSE)


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine."""
    return urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"}


class _NoRedirects(HTTPRedirectHandler):
    """An answer from elsewhere is none."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _answer(request: Request, timeout: float) -> Any:
    direct = [ProxyHandler({})] if is_loopback(request.full_url) else []
    with build_opener(_NoRedirects(), *direct).open(request, timeout=timeout) as reply:
        text = reply.read(LARGEST_REPLY + 1)
    if len(text) > LARGEST_REPLY:
        raise ValueError(f"answered more than {LARGEST_REPLY} bytes")
    return json.loads(text)


def _scores(answer: Any, count: int) -> list[float]:
    if not isinstance(answer, Mapping) or "scores" not in answer:
        raise ValueError('answered without "scores"')
    return checked(answer["scores"], count)
