"""Mesh, sharding rules, jitted steps, several hosts: any step of the library on any number of devices."""

from jrlhf.parallel.compilation import Compilations, counted_compilations
from jrlhf.parallel.hosts import (
    AnyProcess,
    fetch,
    first_goes_ahead,
    from_first,
    is_first,
    same_everywhere,
)
from jrlhf.parallel.launch import joined
from jrlhf.parallel.mesh import AXES, BATCH_AXES, batch_sharding, make_mesh, replicated, shard_batch
from jrlhf.parallel.peaks import Peaks, device_peaks, known_peaks, measured_peaks
from jrlhf.parallel.peers import PeerLost, leave_at_once
from jrlhf.parallel.sharding import Rules, init_sharded, leaf_spec, tree_shardings
from jrlhf.parallel.step import Step, jit_step

__all__ = [
    "AXES",
    "BATCH_AXES",
    "AnyProcess",
    "Compilations",
    "Peaks",
    "PeerLost",
    "Rules",
    "Step",
    "batch_sharding",
    "counted_compilations",
    "device_peaks",
    "fetch",
    "first_goes_ahead",
    "from_first",
    "init_sharded",
    "is_first",
    "jit_step",
    "joined",
    "known_peaks",
    "leaf_spec",
    "leave_at_once",
    "make_mesh",
    "measured_peaks",
    "replicated",
    "same_everywhere",
    "shard_batch",
    "tree_shardings",
]
