"""MaxText's training step, compiled for an absent TPU the way its own train_compile does it. See aot.py.

python -m peers.maxtext_aot SETTINGS HLO      (in benchmarks/; aot.py starts it)
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from peers.compiled import say

# Its own advice, read when libtpu starts.
os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"

import jax
import maxtext
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train, train_compile
from maxtext.utils import maxtext_utils, sharding

FOLDER = Path(maxtext.__file__).parent
COMMON = {
    "run_name": "aot",
    "model_name": "default",
    "decoder_block": "llama2",
    "vocab_size": 128256,
    "normalization_layer_epsilon": 1e-5,
    "rope_max_timescale": 500000,
    "enable_dropout": False,
    "gradient_clipping_threshold": 1.0,
    "use_iota_embed": True,
    "attention": "flash",
    "compile_topology_num_slices": 1,
    "enable_checkpointing": False,
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "base_output_directory": "unused",
    "tokenizer_path": FOLDER / "assets" / "tokenizers" / "tokenizer.llama2",
}
"""Llama 3 as MaxText's recipes train it; aot.py sets sizes, slice and remat."""


def main() -> None:
    settings, hlo = json.loads(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    flags = [f"{key}={value}" for key, value in (COMMON | settings).items()]
    config = pyconfig.initialize(["", str(FOLDER / "configs" / "base.yml"), *flags])
    train_compile.validate_config(config)
    mesh = train_compile.get_topology_mesh(config)
    start = time.perf_counter()
    compiled = compiled_step(config, mesh)
    say(compiled, hlo, devices=mesh.size, seconds=time.perf_counter() - start, package="libtpu")


def compiled_step(config: Any, mesh: jax.sharding.Mesh) -> Any:
    args, kwargs, state_shardings, _, model = train_compile.get_shaped_inputs(mesh, config)
    params_shardings, state_shardings = sharding.maybe_update_params_sharding_with_opt(config, state_shardings)
    step, inputs, outputs, static, donated = maxtext_utils.get_functional_train_with_signature(
        train.train_step,
        sharding.get_input_data_sharding(config, mesh),
        sharding.build_zero1_input_state_mesh_shardings(config, state_shardings, params_shardings),
        model,
        config,
        params_shardings,
    )
    rules = logical_axis_rules(config.logical_axis_rules)
    return train_compile.jit_and_compile(step, args, kwargs, mesh, inputs, outputs, static, donated, config, rules)


if __name__ == "__main__":
    main()
