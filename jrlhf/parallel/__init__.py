"""Mesh, shardings and jitted steps: any step of the library on any number of devices, of one host or several.

What ``__all__`` lists is public: its names and signatures stay. The modules below are internal and may change with any
release. No step needs this package: ``jrlhf.steps`` runs under a ``jit`` and a mesh of your own.
"""

from jrlhf.parallel.hosts import fetch, is_first
from jrlhf.parallel.launch import process_group
from jrlhf.parallel.mesh import batch_sharding, make_mesh, replicated, shard_batch
from jrlhf.parallel.sharding import ShardingRules, init_sharded, tree_shardings
from jrlhf.parallel.step import Step, jit_step

__all__ = [
    "ShardingRules",
    "Step",
    "batch_sharding",
    "fetch",
    "init_sharded",
    "is_first",
    "jit_step",
    "make_mesh",
    "process_group",
    "replicated",
    "shard_batch",
    "tree_shardings",
]
