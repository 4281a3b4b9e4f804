"""What the processes of the tests make once, for all of them."""

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(name: str, make: Callable[[Path], Any]) -> Any:
    """Return ``make(folder)``, which one process makes, in a folder for all; the others wait and read it."""
    folder = Path(os.environ["JRLHF_TESTS"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder.with_suffix(".pickle")
        if not made.exists():
            made.write_bytes(pickle.dumps(make(folder)))
    return pickle.loads(made.read_bytes())
