"""Mesh, sharding rules and jitted steps: any step of the library on any number of devices."""

from jrlhf.parallel.mesh import AXES, BATCH_AXES, batch_sharding, make_mesh, replicated, shard_batch
from jrlhf.parallel.sharding import Rules, init_sharded, leaf_spec, tree_shardings
from jrlhf.parallel.step import Step, jit_step

__all__ = [
    "AXES",
    "BATCH_AXES",
    "Rules",
    "Step",
    "batch_sharding",
    "init_sharded",
    "jit_step",
    "leaf_spec",
    "make_mesh",
    "replicated",
    "shard_batch",
    "tree_shardings",
]
