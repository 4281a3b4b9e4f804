"""Weights as decoding reads them: a tree per layer, in the compute dtype, gathered over all axes but ``tensor``."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jrlhf.core import answer_keys
from jrlhf.models import decoder_fns, init_params
from jrlhf.models.decoding import decoding_weights, gathers
from jrlhf.models.hf.names import SHARDING_RULES
from jrlhf.parallel import make_mesh, shard_batch, tree_shardings
from jrlhf.steps import make_generate
from jrlhf.system.environment import TPU_COMPILER
from tests.support import ROOT


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def split(arch, mesh):
    params = init_params(arch, jax.random.key(0))
    return jax.device_put(params, tree_shardings(params, mesh, SHARDING_RULES))


def test_each_layer_is_a_tree_of_its_own_split_over_tensor_alone(arch, mesh, split):
    found = jax.jit(lambda p: decoding_weights(p, layers=arch.num_layers, dtype="bfloat16", mesh=mesh))(split)
    assert len(found["layers"]) == arch.num_layers
    for number, layer in enumerate(found["layers"]):
        for path, leaf in jax.tree_util.tree_leaves_with_path(layer):
            stacked = split["layers"]
            for part in path:
                stacked = stacked[part.key]
            np.testing.assert_array_equal(leaf, stacked[number].astype(leaf.dtype))
    for leaf in jax.tree.leaves(found):
        assert {axis for axis in leaf.sharding.spec if axis} <= {"tensor"}
    kernel = found["layers"][0]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert kernel.sharding.spec[1] == "tensor"


def test_a_mesh_samples_what_one_device_samples(arch, mesh, split):
    settings = {"max_new_tokens": 6, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "stop_tokens": (), "pad_token": 0}
    prompts = np.random.default_rng(0).integers(0, arch.vocab_size, (8, 4), np.int32), np.ones((8, 4), np.bool_)

    def sampler(mesh):
        return make_generate(decoder_fns(arch, dtype="float32", remat=False, mesh=mesh).decode_fns, **settings)

    keys, rows = answer_keys(jax.random.key(1), jnp.arange(8), samples=1), shard_batch(prompts, mesh)
    found = jax.jit(sampler(mesh))(split, *rows, keys)
    expected = jax.jit(sampler(None))(jax.device_get(split), *map(jnp.asarray, prompts), keys)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


SENT_BY_A_SAMPLER = """
import jax, jax.numpy as jnp
from jrlhf.models import decoder_fns, init_params
from jrlhf.models.hf.names import SHARDING_RULES
from jrlhf.parallel import batch_sharding, make_mesh, tree_shardings
from jrlhf.parallel.devices.collectives import bytes_sent
from jrlhf.parallel.devices.compilers import described_topology
from jrlhf.parallel.devices.topology import parse_topology
from jrlhf.steps import make_generate
from tests.support.archs import small_arch

arch = small_arch(num_layers=3)
mesh = make_mesh(data=1, fsdp=4, tensor=1, devices=described_topology(parse_topology("v5p:2x2x1")).devices())
shapes = jax.eval_shape(lambda: init_params(arch, jax.random.key(0)))
def placed(x, where): return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
params = jax.tree.map(placed, shapes, tree_shardings(shapes, mesh, SHARDING_RULES))
rows = [jax.ShapeDtypeStruct((8, 4), dtype, sharding=batch_sharding(mesh)) for dtype in (jnp.int32, jnp.bool_)]
keys = placed(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (8, 1))), batch_sharding(mesh))
fns = decoder_fns(arch, dtype="bfloat16", mesh=mesh).decode_fns
settings = dict(max_new_tokens=6, temperature=0.7, top_k=0, top_p=1.0, stop_tokens=(3,), pad_token=0)
lowered = jax.jit(make_generate(fns, **settings)).trace(params, *rows, keys).lower(lowering_platforms=("tpu",))
hlo = lowered.compile().as_text()
print(*(sum(bytes_sent(hlo, mesh.shape, trips=trips).values()) for trips in (1, 2)))
"""


@pytest.mark.skipif(find_spec("libtpu") is None, reason='needs the TPU\'s compiler: pip install -e ".[tpu-compiler]"')
def test_no_weight_is_gathered_at_a_token():
    """By the TPU's compiler: a CPU's would lift the gathers out of the loop, wherever they stand."""
    environment = os.environ | TPU_COMPILER | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", SENT_BY_A_SAMPLER], capture_output=True, text=True, timeout=600, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    once, twice = map(float, run.stdout.split())
    assert once > 10_000, "weights are gathered before the loop"
    assert twice - once < 1_000, "a token sends whether a row goes on, and no weight"


@pytest.mark.parametrize(
    ("kind", "tensor", "dtype", "expected"),
    [
        ("TPU v5", 1, "bfloat16", True),
        ("TPU v5 lite", 1, "bfloat16", False),
        ("TPU v5 lite", 4, "bfloat16", True),
        ("TPU v6 lite", 2, "float32", False),
        ("cpu", 1, "float32", True),
    ],
)
def test_weights_of_more_than_two_fifths_of_a_device_stay_split(kind, tensor, dtype, expected):
    """Eight billion parameters: 16 GB in bfloat16, 32 GB in float32."""
    devices = np.array([SimpleNamespace(device_kind=kind)], dtype=object)
    mesh = Mock(spec=Mesh, devices=devices, shape={"tensor": tensor})
    params = {"kernel": jax.ShapeDtypeStruct((8, 1_000_000_000), jnp.float32)}
    assert gathers(params, dtype, mesh) == expected
