"""Handling of SIGINT and SIGTERM outside a stage's loop: the process ends at once with one line and no traceback.

An exception from a handler would not work: JAX swallows exceptions inside its callbacks, imports print a traceback, and
Python raises nothing while XLA compiles. Ending at once loses nothing, because commands write their files atomically.
This module imports almost nothing, because it comes before everything else.
"""

import os
import signal
import sys
from _thread import RLock, get_ident
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep

STOPPING = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"
_ONE = RLock()


class Interrupted(KeyboardInterrupt):
    """Raised when signal ``number`` has stopped a run, after it has saved its state."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class _Ending:
    """Actions of the process at the next signal."""

    def __init__(self) -> None:
        self.last_words = "interrupted"
        self.farewell: Callable[[], None] | None = None
        self.signals = 0
        """Number of signals that the main thread has received."""
        self.ender = 0
        """Id of the thread that ends the process; 0: none yet."""


_ENDING = _Ending()
"""State of this process; there is only one."""


def end_at_once() -> None:
    """Make the first signal end the process with exit code 128 + its number. An ignored signal stays ignored.

    A separate thread listens, because XLA may compile for minutes in which no Python handler runs.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    # Imported here: by now signals wait.
    from threading import Thread

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # The thread inherits the blocked signals: one that it took would be lost if the process restarts itself.
    Thread(target=_listen, args=(reading,), daemon=True).start()
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_unless_farewell)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def set_last_words(last_words: str) -> None:
    """Set the line that the process prints when a signal ends it."""
    _ENDING.last_words = last_words


def set_farewell(farewell: Callable[[], None] | None) -> None:
    """Set an action of a few seconds before a signal ends the process, such as a message to waiting processes.

    It runs in a thread of its own, at any point of the main thread. None removes it.
    """
    _ENDING.farewell = farewell


def stop_listening() -> None:
    """Let signals end the process directly, because the listening thread may be gone while the interpreter exits."""
    for number in STOPPING:
        if signal.getsignal(number) is _end_unless_farewell:
            signal.signal(number, _end)


@contextmanager
def raise_signals() -> Iterator[None]:
    """Raise signals as ``Interrupted`` within the block, for code with its own handlers and clean-up."""
    if signal.getsignal(signal.SIGINT) is not _end_unless_farewell:
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, _raise) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Make signals wait within the block. A program that replaces this process admits them by ``end_at_once``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_unless_farewell(number: int, frame: object) -> None:
    """End the process from the main thread if there is no farewell; else the listening thread ends it after that.

    A second signal does not wait for the farewell.
    """
    _ENDING.signals += 1
    if _ENDING.farewell is None or _ENDING.signals > 1:
        _end(number, frame)


def _raise(number: int, _frame: object) -> None:
    raise Interrupted("", number)


def _listen(reading: int) -> None:
    while number := os.read(reading, 1):
        if number[0] in STOPPING:
            if _ENDING.farewell is not None:
                _ENDING.farewell()
            _end(number[0], None)


def _end(number: int, _frame: object) -> None:
    """End the process from the first thread that calls this; any other thread waits here."""
    me = get_ident()
    with _ONE:
        first, _ENDING.ender = _ENDING.ender == 0, _ENDING.ender or me
    if not first:
        # A second signal during this function, or another thread, which must not start a new program.
        while _ENDING.ender != me:
            sleep(1.0)
        return
    if any(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)):
        os.write(2, SHOW_CURSOR)
    os.write(2, f"jrlhf: {_ENDING.last_words}\n".encode(errors="replace"))
    os._exit(128 + number)
