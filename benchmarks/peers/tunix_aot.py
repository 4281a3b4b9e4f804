"""Tunix's SFT step and its sampler's decoding step, compiled for an absent TPU. See aot.py.

python -m peers.tunix_aot SETTINGS HLO      (in benchmarks/; aot.py starts it)
"""

import json
import sys
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from peers.compiled import say
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer
from tunix.sft import utils as sft_utils

CLIP, LR, B1, B2 = 1.0, 1e-5, 0.9, 0.95


class Shapes:
    """Shapes on the mesh of a slice, rows and weights over ``fsdp``."""

    def __init__(self, topology: str) -> None:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        self.devices = len(devices)
        self.mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))

    def array(self, shape: tuple[int, ...], dtype: Any, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def rows(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return self.array(shape, dtype, PartitionSpec("fsdp"))


def main() -> None:
    settings, hlo = json.loads(sys.argv[1]), sys.argv[2]
    shapes = Shapes(settings["topology"])

    def shard(x: jax.Array, spec: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(shapes.mesh, PartitionSpec(*spec)))

    # Its own asks the process's devices for the platform, which are a CPU here.
    llama3.shard = shard
    graph, state, config = abstract_model(settings, shapes)
    rows = settings["rows"] * shapes.devices
    program = update if settings["program"] == "update" else decode
    start = time.perf_counter()
    with shapes.mesh:
        compiled = program(graph, state, config, rows, settings["length"], shapes).compile()
    say(compiled, hlo, devices=shapes.devices, seconds=time.perf_counter() - start, package="libtpu")


def abstract_model(settings: dict[str, Any], shapes: Shapes) -> tuple[Any, Any, Any]:
    """Return the graph, the weights as shapes, and the config of Llama-3.2-1B."""
    config = replace(llama3.ModelConfig.llama3p2_1b(), remat_config=llama3.RematConfig[settings["remat"]])
    if settings["program"] == "decode":
        sampling = llama3.ShardingConfig.get_default_sharding(is_sampling=True)
        config = replace(config, shd_config=sampling)
    graph, state = nnx.split(nnx.eval_shape(lambda: llama3.Llama3(config, rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(state)
    specs = jax.tree.leaves(nnx.get_partition_spec(state), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    assert len(leaves) == len(specs)
    wanted = jnp.dtype(settings["dtype"])

    def placed(leaf: Any, spec: Any) -> jax.ShapeDtypeStruct:
        dtype = wanted if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return shapes.array(leaf.shape, dtype, spec if isinstance(spec, PartitionSpec) else PartitionSpec())

    return graph, tree.unflatten([placed(*pair) for pair in zip(leaves, specs, strict=True)]), config


def model_input(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    mask = batch["input_tokens"] != 0
    return {
        "input_tokens": batch["input_tokens"],
        "input_mask": batch["input_mask"],
        "positions": sft_utils.build_positions_from_mask(mask),
        "attention_mask": sft_utils.make_causal_attn_mask(mask),
    }


def bare_trainer() -> Any:
    """Return its trainer with what a step reads of it; its start would put arrays on devices."""
    trainer = peft_trainer.PeftTrainer.__new__(peft_trainer.PeftTrainer)
    trainer.loss_fn, trainer.gen_model_input_fn = peft_trainer._default_loss_fn, model_input
    trainer._lora_enabled = trainer._has_aux = False
    return trainer


def update(graph: Any, state: Any, config: Any, rows: int, length: int, shapes: Shapes) -> Any:
    """Lower the step of its trainer; the optimizer's state lies like the weights of the same shapes."""
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LR, b1=B1, b2=B2))
    trainer, graphs = bare_trainer(), []

    def optimizer_state(weights: Any) -> Any:
        optimizer_graph, slots = nnx.split(nnx.Optimizer(nnx.merge(graph, weights), tx, wrt=nnx.Param))
        graphs.append(optimizer_graph)
        return slots

    shardings = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state)}
    optimizer = jax.tree.map(
        lambda leaf: shapes.array(leaf.shape, leaf.dtype, shardings.get(leaf.shape, PartitionSpec())),
        jax.eval_shape(optimizer_state, state),
    )

    def step(optimizer_in: Any, weights: Any, batch: Any) -> Any:
        model, learner = nnx.merge(graph, weights), nnx.merge(graphs[-1], optimizer_in)
        out = trainer._train_step(model, learner, batch)
        return nnx.state(learner), nnx.state(model), out[0], out[2]

    batch = {"input_tokens": shapes.rows((rows, length)), "input_mask": shapes.rows((rows, length), jnp.bool_)}
    results = (*(jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (optimizer, state)), None, None)
    return jax.jit(step, donate_argnums=0, out_shardings=results).lower(optimizer, state, batch)


def decode(graph: Any, state: Any, config: Any, rows: int, slots: int, shapes: Shapes) -> Any:
    """Lower one token of its sampler's model."""
    dtype = jax.tree.leaves(state)[0].dtype

    def of_layer() -> dict[str, Any]:
        keys, values = (shapes.rows((rows, slots, config.num_kv_heads, config.head_dim), dtype) for _ in range(2))
        return {"k": keys, "v": values, "end_index": shapes.rows((rows,))}

    def step(weights: Any, tokens: Any, positions: Any, cache: Any, mask: Any) -> Any:
        logits, cache = nnx.merge(graph, weights)(tokens, positions, cache, mask)
        return logits[:, -1], cache

    cache = {f"layer_{layer}": of_layer() for layer in range(config.num_layers)}
    token, mask = shapes.rows((rows, 1)), shapes.rows((rows, 1, slots), jnp.bool_)
    return jax.jit(step, donate_argnums=3).lower(state, token, token, cache, mask)


if __name__ == "__main__":
    main()
