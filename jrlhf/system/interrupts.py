"""SIGINT and SIGTERM outside a stage's loop: the process ends at once, with a line and without a traceback.

An exception raised by a handler would not do: JAX swallows one that is raised inside its callbacks, imports print its
traceback, and nothing of Python's is raised while XLA compiles. Nothing is lost at such an end: what a command writes
is there as a whole or not at all. Imports next to nothing, as it comes before everything else.
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
    """The run was asked to stop by signal ``number``, and has saved its state."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class _Ending:
    """What the next signal makes the process say and do."""

    def __init__(self) -> None:
        self.last_words = "interrupted"
        self.farewell: Callable[[], None] | None = None
        self.signals = 0
        """So many the main thread has seen."""
        self.ender = 0
        """The thread that ends the process; 0: none yet."""


_ENDING = _Ending()
"""There is one process, and so one of these."""


def end_at_once() -> None:
    """From now on the first signal ends the process with 128 + its number. A signal that is ignored stays ignored.

    XLA may compile for minutes, in which no handler of Python's runs, so a thread of its own listens.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    # Not at the top: by now signals wait.
    from threading import Thread

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # It inherits that signals are blocked: one that it took would be lost where this program makes room for another.
    Thread(target=_listen, args=(reading,), daemon=True).start()
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_unless_farewell)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def say_at_the_end(last_words: str) -> None:
    """What a signal makes the process say from now on, in one line."""
    _ENDING.last_words = last_words


def bid_farewell(farewell: Callable[[], None] | None) -> None:
    """What the process does before a signal ends it, within a few seconds: tell those that wait for it. None: nothing.

    It runs in a thread, whatever the main thread is at.
    """
    _ENDING.farewell = farewell


def no_longer() -> None:
    """The command is done: while the interpreter ends there may be no thread to listen."""
    for number in STOPPING:
        if signal.getsignal(number) is _end_unless_farewell:
            signal.signal(number, _end)


@contextmanager
def raised() -> Iterator[None]:
    """While the block runs signals are raised as ``Interrupted``, for one that has handlers and an end of its own."""
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
def held() -> Iterator[None]:
    """While the block runs signals wait. A program that takes this one's place lets them in by ``end_at_once``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_unless_farewell(number: int, frame: object) -> None:
    """The main thread ends the process where it can; what takes time is the listener's, which Python has woken.

    A second signal does not wait for that.
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
    """End the process: the thread that comes first does, and any other goes no further."""
    me = get_ident()
    with _ONE:
        first, _ENDING.ender = _ENDING.ender == 0, _ENDING.ender or me
    if not first:
        # A second signal in the midst of this very function, or another thread that must not start a new program.
        while _ENDING.ender != me:
            sleep(1.0)
        return
    if any(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)):
        os.write(2, SHOW_CURSOR)
    os.write(2, f"jrlhf: {_ENDING.last_words}\n".encode(errors="replace"))
    os._exit(128 + number)
