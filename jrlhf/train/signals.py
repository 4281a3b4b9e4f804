"""SIGINT and SIGTERM: the first one asks a run to stop, the second one ends the process."""

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
    """Whether to stop; ``number`` is the signal that asked for it, 0 where none did."""

    number = 0

    def __bool__(self) -> bool:
        return self.number != 0


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes the first signal for the loop to see when its step is whole.

    At the second one the process ends, with 128 + its number, whatever it is doing: XLA may compile for minutes, in
    which no handler of Python's runs, so a thread of its own listens. A save that is cut short costs no older step.
    """
    request = StopRequest()

    def note(number: int, _frame: Any) -> None:
        request.number = request.number or number

    try:
        before = {number: signal.signal(number, note) for number in STOPPING}
    except ValueError:  # not the main thread: signals are somebody else's business
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
    """Python writes the number of each signal to the pipe, whichever thread is busy."""
    asked = False
    while number := os.read(reading, 1):
        if number[0] not in STOPPING:
            continue
        if asked:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR)
            os.write(2, b"jrlhf: ended at once; the same command goes on from the newest checkpoint\n")
            os._exit(128 + number[0])
        asked = True
        os.write(2, b"jrlhf: stopping when this step is done and saved; once more ends it at once\n")
    os.close(reading)
