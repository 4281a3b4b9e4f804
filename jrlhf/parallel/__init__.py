"""Mesh, sharding rules and jitted steps: any step of the library on any number of devices."""

from jrlhf.parallel.collectives import array_bytes, bytes_sent
from jrlhf.parallel.compilation import Compilations, counted_compilations
from jrlhf.parallel.mesh import AXES, BATCH_AXES, batch_sharding, make_mesh, replicated, shard_batch, spread_rows
from jrlhf.parallel.peaks import Peaks, device_peaks, known_peaks, measured_peaks
from jrlhf.parallel.sharding import Rules, init_sharded, leaf_spec, tree_shardings
from jrlhf.parallel.step import Step, jit_moving, jit_step
from jrlhf.parallel.topology import Topology, parse_topology

__all__ = [
    "AXES",
    "BATCH_AXES",
    "Compilations",
    "Peaks",
    "Rules",
    "Step",
    "Topology",
    "array_bytes",
    "batch_sharding",
    "bytes_sent",
    "counted_compilations",
    "device_peaks",
    "init_sharded",
    "jit_moving",
    "jit_step",
    "known_peaks",
    "leaf_spec",
    "make_mesh",
    "measured_peaks",
    "parse_topology",
    "replicated",
    "shard_batch",
    "spread_rows",
    "tree_shardings",
]
