"""Task files, and a client that speaks to the page's server without a socket."""

from pathlib import Path

import pytest

from jrlhf.rank import read_tasks
from jrlhf.rank.store import Store
from tests.support.rank import TOKEN, Client, write_tasks


@pytest.fixture
def client(tmp_path: Path):
    pytest.importorskip("starlette")
    from jrlhf.rank.app import make_app

    tasks = read_tasks(write_tasks(tmp_path / "tasks.jsonl", 3)).tasks
    store = Store(tmp_path / "tasks.sqlite")
    yield Client(make_app(tasks, store, token=TOKEN, host="127.0.0.1"))
    store.close()
