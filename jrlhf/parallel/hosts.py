"""What the processes of a run do together: agree, wait for each other, gather what is spread over them.

In a run of one process all of it is free: nothing is sent and nobody is waited for.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jrlhf.parallel.peers import PeerLost, PeerRefused, Peers, current
from jrlhf.system.errors import USAGE_ERRORS, UsageError

_numbers = count()
"""All processes meet in the same order: the n-th meeting of each is the same one."""


def is_first() -> bool:
    """Whether this is process 0, which alone writes files and talks."""
    peers = current()
    return peers is None or peers.process == 0


def mark_progress() -> None:
    """Tell the others that this process has come further: see ``distributed.stall_timeout``."""
    if (peers := current()) is not None:
        peers.mark()


def from_first(what: str, make: Callable[[], Any]) -> Any:
    """What process 0 makes (JSON), on every process; an error there is raised on all. ``what``: "read the summary"."""
    value = None
    with first_goes_ahead(what) as said:
        if is_first():
            value = make()
            said.append(value)
    return value if is_first() else said[0]


@contextmanager
def first_goes_ahead(what: str) -> Iterator[list[Any]]:
    """Process 0 runs the block alone, then all others do. An error in it on process 0 is raised on all.

    What process 0 puts in the list (at most one thing, JSON) is there on the others.
    """
    peers = current()
    if peers is None:
        yield []
        return
    key = f"jrlhf/{next(_numbers)}/{what}"
    if peers.process != 0:
        yield _received(peers, key, what)
        return
    said: list[Any] = []
    try:
        yield said
    except Exception as error:
        peers.client.key_value_set(key, json.dumps({"error": str(error), "usage": isinstance(error, USAGE_ERRORS)}))
        raise
    peers.mark()
    peers.client.key_value_set(key, json.dumps({"said": said}))


def _received(peers: Peers, key: str, what: str) -> list[Any]:
    try:
        text = peers.client.blocking_key_value_get(key, int(peers.stall * 1000))
    except Exception as error:
        waited = f"waited {peers.stall:g} s (distributed.stall_timeout) for {peers.name_of(0)} to {what}"
        raise PeerLost(f"{waited}: {error}") from error
    peers.mark()
    answer = json.loads(text)
    if "said" in answer:
        return answer["said"]
    if answer["usage"]:
        raise PeerRefused(answer["error"])
    raise PeerLost(f"{peers.name_of(0)} could not {what}: {answer['error']}")


def same_everywhere(what: str, value: Callable[[], str]) -> None:
    """UsageError on a process whose ``value`` is not process 0's: they would not do the same steps."""
    if current() is None:
        return
    here = value()
    if from_first(f"tell of {what}", lambda: here) != here:
        raise UsageError(f"{what}: not the same on process {jax.process_index()} as on process 0")


def fetch(tree: Any) -> Any:
    """A tree of arrays as NumPy, whole on every process, wherever its parts are. All of them must call it."""

    def whole(x: Any) -> Any:
        spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if spread else x

    mark_progress()
    return jax.device_get(jax.tree.map(whole, tree))


class AnyProcess:
    """``asked(yes)``: whether any process has said yes, known to all at the same call; of several, a call later.

    The answer to one call is worked out by the devices, behind what they are at, and read at the next one: they never
    wait for the host. A single process is answered at once.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        self._several = current() is not None
        if self._several:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,), devices=jax.devices())
            self._spread = NamedSharding(mesh, PartitionSpec("all"))
            self._any = jax.jit(lambda votes: votes.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, yes: bool) -> bool:
        if not self._several:
            return yes
        mark_progress()
        here = np.full((jax.device_count(),), yes, np.bool_)
        votes = jax.make_array_from_callback(here.shape, self._spread, lambda index: here[index])
        pending, self._pending = self._pending, self._any(votes)
        return pending is not None and bool(pending)
