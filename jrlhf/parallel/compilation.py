"""Counts and times of XLA compilations."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Programs that this process has compiled or fetched from the compilation cache, and the seconds it took."""

    def __init__(self) -> None:
        self.programs = 0
        self.seconds = 0.0

    def note(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Count an event of JAX's monitoring."""
        if event == COMPILE_EVENT:
            self.programs += 1
            self.seconds += duration_secs


@contextmanager
def counted_compilations() -> Iterator[Compilations]:
    """Count compilations while the block runs."""
    compilations = Compilations()
    jax.monitoring.register_event_duration_secs_listener(compilations.note)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(compilations.note)
