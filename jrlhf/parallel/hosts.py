"""Operations across the processes of a run: agreeing, waiting for each other, and gathering arrays.

In a run of one process they cost nothing, because nothing is sent or awaited.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jrlhf.parallel.peers import PeerLost, PeerRefused, Peers, current
from jrlhf.system.errors import USAGE_ERRORS, UsageError

_numbers = count()
"""Number of the next meeting. All processes meet in the same order, so equal numbers are the same meeting."""


def is_first() -> bool:
    """Tell whether this is process 0, the only one that writes files and prints."""
    peers = current()
    return peers is None or peers.process == 0


def mark_progress() -> None:
    """Tell the other processes that this one has made progress; see ``distributed.stall_timeout``."""
    if (peers := current()) is not None:
        peers.mark()


def from_first(what: str, make: Callable[[], Any]) -> Any:
    """Return on every process the JSON value that ``make`` returns on process 0; an error there is raised on all.

    ``what`` describes the work for errors, such as "read the summary".
    """
    value = None
    with first_goes_ahead(what) as message:
        if is_first():
            value = make()
            message.append(value)
    return value if is_first() else message[0]


@contextmanager
def first_goes_ahead(what: str) -> Iterator[list[Any]]:
    """Run the block on process 0 first and then on all others; an error on process 0 is raised on all.

    The block gets a list. Process 0 may append one JSON value, which is then in the list of every other process.
    """
    peers = current()
    if peers is None:
        yield []
        return
    key = f"jrlhf/{next(_numbers)}/{what}"
    if peers.process != 0:
        yield _received(peers, key, what)
        return
    message: list[Any] = []
    try:
        yield message
    except Exception as error:
        peers.client.key_value_set(key, json.dumps({"error": str(error), "usage": isinstance(error, USAGE_ERRORS)}))
        raise
    peers.mark()
    peers.client.key_value_set(key, json.dumps({"said": message}))


def _received(peers: Peers, key: str, what: str) -> list[Any]:
    try:
        text = peers.client.blocking_key_value_get(key, int(peers.stall * 1000))
    except Exception as error:
        reason = f"waited {peers.stall:g} s (distributed.stall_timeout) for {peers.name_of(0)} to {what}"
        raise PeerLost(f"{reason}: {error}") from error
    peers.mark()
    reply = json.loads(text)
    if "said" in reply:
        return reply["said"]
    if reply["usage"]:
        raise PeerRefused(reply["error"])
    raise PeerLost(f"{peers.name_of(0)} could not {what}: {reply['error']}")


def same_everywhere(what: str, value: Callable[[], str]) -> None:
    """Raise ValueError on a process whose ``value`` differs from that of process 0, since their steps would differ."""
    if current() is None:
        return
    here = value()
    if from_first(f"tell of {what}", lambda: here) != here:
        raise UsageError(f"{what}: not the same on process {jax.process_index()} as on process 0")


def fetch(tree: Any) -> Any:
    """Return a tree of sharded arrays as complete NumPy arrays on every process; all processes must call it."""

    def gather(x: Any) -> Any:
        spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if spread else x

    mark_progress()
    return jax.device_get(jax.tree.map(gather, tree))


class AnyProcess:
    """A callable vote: ``any_process(vote)`` tells whether any process has voted True, equally on all processes.

    With several processes the result comes one call later: the devices compute it behind their other work, and it is
    read at the next call, so that they never wait for the host. With one process it comes at once.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        self._several = current() is not None
        if self._several:
            mesh = Mesh(np.asarray(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
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
