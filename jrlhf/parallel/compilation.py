"""What XLA compiles: how often and for how long."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Programs that this process has compiled, or fetched from the compilation cache, and the seconds it took."""

    def __init__(self) -> None:
        self.programs = 0
        self.seconds = 0.0

    def note(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Listens to JAX's monitoring."""
        if event == COMPILED:
            self.programs += 1
            self.seconds += duration_secs


@contextmanager
def counted_compilations() -> Iterator[Compilations]:
    """Counts while the block runs."""
    counted = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counted.note)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(counted.note)
