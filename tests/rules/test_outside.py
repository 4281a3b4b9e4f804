"""A user's function and a server: what they are told, and what they may answer."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from jrlhf.rules import EndpointError, Episode, by_endpoint, by_function, load_function, outside

EPISODES = [
    Episode({"prompt": "p", "n": 1}, "a", 1, True),
    Episode({"prompt": [{"role": "user", "content": "ü"}]}, "bb", 2, False),
]


def test_a_function_is_told_the_texts_and_the_columns() -> None:
    told: dict[str, Any] = {}

    def reward(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        told.update(columns, prompts=prompts)
        return [len(text) for text in completions]

    assert by_function(reward, EPISODES) == [1.0, 2.0]
    assert told == {"prompts": ["p", [{"role": "user", "content": "ü"}]], "n": [1, None]}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0], "expected 2 numbers, one for each answer, got 1"),
        ([1.0, math.nan], "expected finite numbers, got nan for answer 1"),
        ([math.inf, 1.0], "got inf for answer 0"),
        ([1.0, None], "got None for answer 1"),
        ([1.0, "2"], "got '2' for answer 1"),
        ([[1.0], 1.0], r"got \[1\.0\] for answer 0"),
        ([10**400, 1.0], "expected finite numbers"),
        (None, "expected a list of 2 numbers, got NoneType"),
        (3.0, "got float"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(answer: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        by_function(lambda **columns: answer, EPISODES)


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_own_reward.py").write_text("number = 3\ndef reward(**columns): return [1.5, 2.5]\n")
    Path("my_broken_reward.py").write_text("1 / 0\n")
    assert by_function(load_function("my_own_reward:reward"), EPISODES) == [1.5, 2.5]
    for path, said in [
        ("my_own_reward:other", "the module has no function other"),
        ("my_own_reward:number", "not a function but int"),
        ("my_broken_reward:reward", "ZeroDivisionError"),
        ("my_absent_reward:reward", "No module named 'my_absent_reward'"),
    ]:
        with pytest.raises(ValueError, match=rf"{path}: .*{said}"):
            load_function(path)


@contextmanager
def server(*replies: tuple[int, bytes]) -> Iterator[tuple[str, list[Any]]]:
    """Answers each request with the next of the replies; what it was asked is kept."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = replies[len(asked) - 1]
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/score", asked
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "pause", lambda done: 0.0)


GOOD = b'{"scores": [1, 0.5]}'


def test_a_server_is_asked_again_until_it_answers() -> None:
    with server((503, b""), (429, b""), (200, b"no JSON"), (200, GOOD)) as (url, asked):
        assert by_endpoint(url, EPISODES, timeout=20.0, retries=3, deadline=math.inf) == [1.0, 0.5]
    chat = [{"role": "user", "content": "ü"}]
    body = {"prompts": ["p", chat], "completions": ["a", "bb"], "columns": {"n": [1, None]}}
    assert asked == [body] * 4


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([(500, b""), (500, b"")], "HTTP Error 500"),
        ([(404, b"")], "HTTP Error 404"),
        ([(302, b"")], "HTTP Error 302"),
        ([(200, b"[1]")] * 2, 'the reply has no "scores"'),
        ([(200, b'{"scores": [1]}')] * 2, "expected 2 numbers"),
        ([(200, b'{"scores": [1, NaN]}')] * 2, "got nan for answer 1"),
        ([(200, b"[" * 100_000)] * 2, "recursion"),
    ],
)
def test_a_server_without_scores_is_a_failure(replies: list[tuple[int, bytes]], said: str) -> None:
    with server(*replies) as (url, asked), pytest.raises(EndpointError, match=said):
        by_endpoint(url, EPISODES, timeout=20.0, retries=1, deadline=math.inf)
    assert len(asked) == len(replies)


def test_a_server_that_is_not_there_is_a_failure() -> None:
    with server() as (url, _):
        pass
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1.*refused"):
        by_endpoint(url, EPISODES, timeout=20.0, retries=1, deadline=math.inf)


def test_no_try_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try takes as long as it may: 10 s, 10 s, and the 5 s that are left of 25."""
    now, given = 100.0, []

    def slow(request: Any, timeout: float) -> Any:
        nonlocal now
        now += timeout
        given.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(outside, "_answer", slow)
    monkeypatch.setattr(outside.time, "monotonic", lambda: now)
    with pytest.raises(EndpointError, match="timed out"):
        by_endpoint("https://localhost/", EPISODES, timeout=10.0, retries=50, deadline=125.0)
    assert given == [10.0, 10.0, 5.0]
    with pytest.raises(EndpointError, match=r"no time left for a request \(ppo\.rewards\.timeout\)"):
        by_endpoint(
            "https://localhost/", EPISODES, timeout=10.0, retries=50, deadline=125.0, limit="ppo.rewards.timeout"
        )
    assert len(given) == 3
