"""Scores from outside: a user's own function, or a server."""

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
from jrlhf.system.errors import RunError, UsageError, reason_of

MAX_REPLY_BYTES = 2**24
"""Maximum size of a server's reply; a longer one is a failure."""
MAX_PAUSE_SECONDS = 8.0


def load_function(path: str) -> Callable[..., Any]:
    """Import ``my_module:reward``, also from the current folder. UsageError if that fails."""
    module, _, name = path.partition(":")
    try:
        with _current_folder_first():
            function = vars(import_module(module))[name]
    except KeyError as error:
        raise UsageError(f"{path}: the module has no function {name}") from error
    except Exception as error:
        # A user's module may raise anything when it is imported.
        raise UsageError(f"{path}: {reason_of(error)}") from error
    if not callable(function):
        raise UsageError(f"{path}: not a function but {type(function).__name__}")
    return function


def function_file(path: str) -> Path | None:
    """Return the source file of the module that ``load_function`` would import, or None if it cannot be found."""
    module, _, _ = path.partition(":")
    try:
        with _current_folder_first():
            spec = find_spec(module)
    except Exception:
        # A user's package may raise anything when it is imported; load_function reports it.
        return None
    return None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)


@contextmanager
def _current_folder_first():
    """Search the current folder for modules first, within the block."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def arguments(episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    """Return the arguments for a function or a server: prompts, completions, and the other columns, with None for a
    missing cell."""
    names = dict.fromkeys(name for episode in episodes for name in episode.row)
    columns = {name: [episode.row.get(name) for episode in episodes] for name in names if name != "prompt"}
    prompts = [episode.row.get("prompt") for episode in episodes]
    return columns | {"prompts": prompts, "completions": [episode.completion for episode in episodes]}


def check_scores(scores: Any, count: int) -> list[float]:
    """Return the scores as floats. UsageError unless they are ``count`` finite numbers."""
    if not isinstance(scores, list | tuple):
        raise UsageError(f"expected a list of {count} numbers, got {type(scores).__name__}")
    if len(scores) != count:
        raise UsageError(f"expected {count} numbers, one for each answer, got {len(scores)}")
    for place, score in enumerate(scores):
        try:
            finite = not isinstance(score, str | None) and math.isfinite(score)
        except (TypeError, OverflowError):
            finite = False
        if not finite:
            raise UsageError(f"expected finite numbers, got {score!r} for answer {place}")
    return [float(score) for score in scores]


def by_function(function: Callable[..., Any], episodes: Sequence[Episode]) -> list[float]:
    """Score answers with ``function(prompts=[...], completions=[...], **columns)``, and check the list that it
    returns."""
    return check_scores(function(**arguments(episodes)), len(episodes))


class EndpointError(RunError):
    """A server returned no scores: it was unreachable, too slow, refused, or replied with something else."""


def by_endpoint(
    url: str, episodes: Sequence[Episode], *, timeout: float, retries: int, deadline: float, limit: str = ""
) -> list[float]:
    """POST ``{"prompts", "completions", "columns"}`` for ``{"scores": [...]}``; EndpointError if all attempts fail.

    It retries temporary failures (no connection, no reply in time, 429 and 5xx) until ``deadline``, a time of
    ``time.monotonic()``; errors name the option ``limit``, which sets it.
    """
    columns = arguments(episodes)
    body = {"prompts": columns.pop("prompts"), "completions": columns.pop("completions"), "columns": columns}
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST")
    for left in range(retries, -1, -1):
        remains = deadline - time.monotonic()
        if remains <= 0:
            raise EndpointError(f"{url}: no time left for a request{f' ({limit})' if limit else ''}")
        try:
            return _scores(_answer(request, min(timeout, remains)), len(episodes))
        except (OSError, ValueError, RecursionError) as error:
            permanent = isinstance(error, HTTPError) and error.code != 429 and error.code < 500
            wait = pause(retries - left)
            if permanent or not left or time.monotonic() + wait >= deadline:
                raise EndpointError(f"{url}: {error}") from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def pause(done: int) -> float:
    """Return the seconds before the next attempt: 0.5, 1, 2, 4, 8, 8, ..."""
    return min(0.5 * 2**done, MAX_PAUSE_SECONDS)


def is_loopback(url: str) -> bool:
    """Whether the host of a URL is this machine."""
    return urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"}


class _NoRedirects(HTTPRedirectHandler):
    """Refuses redirects: a reply from elsewhere does not count."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _answer(request: Request, timeout: float) -> Any:
    direct = [ProxyHandler({})] if is_loopback(request.full_url) else []
    with build_opener(_NoRedirects(), *direct).open(request, timeout=timeout) as reply:
        text = reply.read(MAX_REPLY_BYTES + 1)
    if len(text) > MAX_REPLY_BYTES:
        raise UsageError(f"the reply has more than {MAX_REPLY_BYTES} bytes")
    return json.loads(text)


def _scores(answer: Any, count: int) -> list[float]:
    if not isinstance(answer, Mapping) or "scores" not in answer:
        raise UsageError('the reply has no "scores"')
    return check_scores(answer["scores"], count)
