"""Mesh, sharding rules, jitted steps, several hosts: any step of the library on any number of devices."""

from jrlhf.parallel.compilation import Compilations, counted_compilations
from jrlhf.parallel.devices.collectives import array_bytes, bytes_sent
from jrlhf.parallel.devices.peaks import Peaks, device_peaks, known_peaks, measured_peaks
from jrlhf.parallel.devices.topology import Topology, parse_topology
from jrlhf.parallel.hosts import (
    AnyProcess,
    fetch,
    first_goes_ahead,
    from_first,
    is_first,
    same_everywhere,
)
from jrlhf.parallel.launch import process_group
from jrlhf.parallel.mesh import AXES, BATCH_AXES, batch_sharding, make_mesh, replicated, shard_batch, spread_rows
from jrlhf.parallel.peers import PeerLost, leave_at_once
from jrlhf.parallel.sharding import ShardingRules, init_sharded, leaf_spec, tree_shardings
from jrlhf.parallel.step import Step, jit_moving, jit_step

__all__ = [
    "AXES",
    "BATCH_AXES",
    "AnyProcess",
    "Compilations",
    "Peaks",
    "PeerLost",
    "ShardingRules",
    "Step",
    "Topology",
    "array_bytes",
    "batch_sharding",
    "bytes_sent",
    "counted_compilations",
    "device_peaks",
    "fetch",
    "first_goes_ahead",
    "from_first",
    "init_sharded",
    "is_first",
    "jit_moving",
    "jit_step",
    "known_peaks",
    "leaf_spec",
    "leave_at_once",
    "make_mesh",
    "measured_peaks",
    "parse_topology",
    "process_group",
    "replicated",
    "same_everywhere",
    "shard_batch",
    "spread_rows",
    "tree_shardings",
]
