"""SIGINT and SIGTERM: the first signal asks a run to stop, the second one ends the process."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jrlhf.system.interrupts import SHOW_CURSOR, STOPPING, Interrupted

__all__ = ["STOPPING", "Interrupted", "StopRequest", "stop_request"]


class StopRequest:
    """A flag that is true after a signal; ``number`` is the number of the first signal, or 0."""

    number = 0

    def __bool__(self) -> bool:
        return self.number != 0


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Record the first signal, so that the loop can stop after its current step.

    The second signal ends the process at once with status 128 + its number. XLA may compile for minutes, during which
    no Python signal handler runs, so a separate thread listens. An interrupted save damages no older checkpoint.
    """
    request = StopRequest()

    def note(number: int, _frame: Any) -> None:
        request.number = request.number or number

    try:
        before = {number: signal.signal(number, note) for number in STOPPING}
    except ValueError:  # Only the main thread can handle signals.
        yield request
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading,), daemon=True).start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)


def _listen(reading: int) -> None:
    """Read signal numbers from the pipe, where Python writes them even while the main thread is busy."""
    stop_pending = False
    while number := os.read(reading, 1):
        if number[0] not in STOPPING:
            continue
        if stop_pending:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR)
            os.write(2, b"jrlhf: ended at once; the same command resumes from the newest checkpoint\n")
            os._exit(128 + number[0])
        stop_pending = True
        os.write(2, b"jrlhf: stopping when this step is done and saved; a second signal ends it at once\n")
    os.close(reading)
