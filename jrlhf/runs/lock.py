"""A lock that allows one live process per folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jrlhf.system.errors import UsageError


class RunLocked(UsageError):
    """Another live process is using the run folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for this process; raise RunLocked with the pid of a process that holds it.

    The kernel releases the lock when the process ends for any reason, so no stale lock remains. In a run over several
    hosts only the first one takes the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunLocked(f"{folder} is in use by process {file.read().strip() or 'unknown'}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
