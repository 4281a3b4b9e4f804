"""Task files, and a client that speaks to the page's server without a socket."""

import asyncio
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jrlhf.rank import read_tasks
from jrlhf.rank.store import Store

TOKEN = "the-token"


def write_tasks(path: Path, count: int, answers: int = 3) -> Path:
    rows = [
        {
            "prompt": f"Question {n}?",
            "completions": [f"Answer {n}.{i}" for i in range(answers)],
            "model": "runs/secret-model",
        }
        for n in range(count)
    ]
    rows[0]["gold"] = list(range(answers))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Sends what a browser would; every header can be another one, or left out (None)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(
        self, method: str, path: str, body: Any = None, *, token: str = "", chunks: list[bytes] | None = None, **changed
    ) -> Reply:
        headers = {"host": "127.0.0.1:8000", "cookie": f"{self.app.cookie}={TOKEN}"}
        if body is not None or chunks is not None:
            headers |= {"origin": "http://127.0.0.1:8000", "content-type": "application/json"}
        parts = [json.dumps(body).encode() if body is not None else b""] if chunks is None else chunks
        if chunks is None:
            headers["content-length"] = str(len(parts[0]))
        headers |= {name.replace("_", "-"): value for name, value in changed.items()}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": f"token={token}".encode() if token else b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items() if value is not None],
        }
        incoming = [
            {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)
        ]
        sent: list[dict] = []

        async def receive() -> dict:
            return incoming.pop(0)

        async def send(message: dict) -> None:
            sent.append(message)

        asyncio.run(self.app(scope, receive, send))
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Reply(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


@pytest.fixture
def client(tmp_path: Path):
    pytest.importorskip("starlette")
    from jrlhf.rank.app import make_app

    tasks = read_tasks(write_tasks(tmp_path / "tasks.jsonl", 3)).tasks
    store = Store(tmp_path / "tasks.sqlite")
    yield Client(make_app(tasks, store, token=TOKEN, host="127.0.0.1"))
    store.close()
