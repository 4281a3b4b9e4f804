"""Task files, and two ways to speak to the page that ranks them: without a socket, and to a process of its own."""

import asyncio
import json
import re
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

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


class Server:
    """`jrlhf rank` as its users start it."""

    def __init__(self, path, *flags):
        command = [sys.executable, "-m", "jrlhf", "rank", "--tasks", str(path), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert "open http" in line, self.process.communicate()
        self.address = re.search(r"http://\S+", line)[0]
        self.token = re.search(r"token=([\w-]+)", line)[1]
        self.host = urlsplit(self.address).netloc
        self.connections = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for connection in self.connections:
            connection.close()
        self.process.kill()
        self.process.communicate()

    def connect(self):
        connection = HTTPConnection(self.host, timeout=30)
        self.connections.append(connection)
        connection.request("GET", f"/?token={self.token}")
        reply = connection.getresponse()
        reply.read()
        return connection, reply.headers["set-cookie"].split(";")[0]
