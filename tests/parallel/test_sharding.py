"""Meshes, sharding rules, and trees that are born sharded."""

import logging
import math
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jrlhf.parallel import batch_sharding, init_sharded, make_mesh, shard_batch, tree_shardings
from jrlhf.parallel.compilation import counted_compilations
from jrlhf.parallel.mesh import device_array, replicate, spread_over
from jrlhf.system.errors import UsageError
from jrlhf.types import SFTBatch, TrainState


def specs(tree: Any, mesh: Mesh, rules: tuple[tuple[str, P], ...]) -> Any:
    return jax.tree.map(lambda s: s.spec, tree_shardings(tree, mesh, rules))


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(data=2, fsdp=2, tensor=2)


def test_what_every_process_has_comes_to_all_devices_by_one_program(mesh: Mesh) -> None:
    keys, five = [jax.random.key(seed) for seed in range(3)], jnp.int32(5)
    with counted_compilations() as compiled:
        on_all = [replicate((key, five), mesh) for key in keys]
    assert compiled.programs == 1
    for key, (found, number) in zip(keys, on_all, strict=True):
        assert found.sharding.is_fully_replicated
        assert found.sharding.device_set == set(mesh.devices.flat)
        assert np.array_equal(jax.random.key_data(found), jax.random.key_data(key))
        assert number == 5


def test_the_mesh_has_three_auto_axes_and_data_fills_it() -> None:
    mesh = make_mesh(data=-1, fsdp=2, tensor=1)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.devices()[:3]).size == 3


@pytest.mark.parametrize("axes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (4, 4, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_use_all_devices_is_refused(axes: tuple[int, int, int]) -> None:
    data, fsdp, tensor = axes
    with pytest.raises(ValueError, match=f"data={data}, fsdp={fsdp}, tensor={tensor} does not use exactly 8 devices"):
        make_mesh(data=data, fsdp=fsdp, tensor=tensor)


@pytest.mark.parametrize("axes", [(0, 1, 1), (-2, 1, 1), (8, -1, 1), (8, 1, 0)])
def test_axes_below_one_are_refused(axes: tuple[int, int, int]) -> None:
    data, fsdp, tensor = axes
    with pytest.raises(ValueError, match="at least 1"):
        make_mesh(data=data, fsdp=fsdp, tensor=tensor)


def gpus(*hosts: int) -> list[Any]:
    """Stand-ins for the GPUs of hosts; JAX counts a host's GPUs, or those with NVLink between them, as a slice."""
    of = [host for host, count in enumerate(hosts) for _ in range(count)]
    return [SimpleNamespace(platform="gpu", device_kind="H100", id=i, slice_index=host) for i, host in enumerate(of)]


def test_only_the_first_axes_leave_a_host(caplog: pytest.LogCaptureFixture) -> None:
    def hosts(*sizes: int) -> list[Any]:
        grid = np.vectorize(lambda device: device.slice_index)(device_array(sizes, gpus(4, 4)))
        return grid.reshape(sizes).tolist()

    assert hosts(4, 2, 1) == [[[0], [0]], [[0], [0]], [[1], [1]], [[1], [1]]]
    assert hosts(2, 2, 2) == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    assert hosts(1, 8, 1) == [[[0], [0], [0], [0], [1], [1], [1], [1]]]
    assert hosts(1, 2, 4) == [[[0, 0, 0, 0], [1, 1, 1, 1]]]
    with caplog.at_level(logging.WARNING, "jrlhf"):
        assert not caplog.records
        assert hosts(1, 1, 8) == [[[0, 0, 0, 0, 1, 1, 1, 1]]]
    assert "splits tensor over several slices" in caplog.text
    with pytest.raises(UsageError, match="2 slices of 2 to 4 devices"):
        device_array((6, 1, 1), gpus(4, 2))


def test_any_number_of_slices_is_spread() -> None:
    for *sizes, each in product(range(1, 7), repeat=4):
        total = math.prod(sizes)
        if total % each == 0:
            outer = spread_over(each, sizes)
            assert math.prod(outer) == each
            assert all(size % parts == 0 for size, parts in zip(sizes, outer, strict=True))


@pytest.mark.skipif(find_spec("libtpu") is None, reason='needs the TPU\'s compiler: pip install -e ".[tpu-compiler]"')
def test_an_axis_of_a_torus_may_be_split() -> None:
    """Two chips a tensor group on 4 x 4 and on 4 x 4 x 4, which have no axis of two."""
    code = """
        from jrlhf.parallel import make_mesh
        from jrlhf.parallel.devices.compilers import described_topology
        from jrlhf.parallel.devices.topology import parse_topology
        for name, fsdp in (("v6e-16", 8), ("v5p:4x4x4", 32)):
            devices = described_topology(parse_topology(name)).devices()
            mesh = make_mesh(data=-1, fsdp=fsdp, tensor=2, devices=devices)
            for one, other in mesh.devices.reshape(-1, 2):
                steps = [min((a - b) % 4, (b - a) % 4) for a, b in zip(one.coords, other.coords)]
                assert sum(steps) == 1, (one, other)
    """
    code = "\n".join(line.removeprefix("        ") for line in code.splitlines())
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_the_first_rule_found_in_the_path_decides(mesh: Mesh) -> None:
    tree = {"layers": {"q": {"kernel": shape(4, 8)}, "o": {"kernel": shape(4, 8)}}}
    rules = (("q/kernel$", P("fsdp", "tensor")), ("kernel", P("tensor", "fsdp")), ("q", P()))
    assert specs(tree, mesh, rules) == {
        "layers": {"q": {"kernel": P("fsdp", "tensor")}, "o": {"kernel": P("tensor", "fsdp")}}
    }


def test_axes_that_do_not_divide_are_dropped(mesh: Mesh) -> None:
    rules = (("w", P("fsdp", ("data", "tensor"))),)
    assert specs({"w": shape(3, 4)}, mesh, rules)["w"] == P(None, ("data", "tensor"))
    assert specs({"w": shape(4, 6)}, mesh, rules)["w"] == P("fsdp", "data")
    assert specs({"w": shape(4, 5)}, mesh, rules)["w"] == P("fsdp", None)


def test_without_a_rule_the_largest_divisible_dimension_is_split(mesh: Mesh) -> None:
    tree = {"a": shape(4, 6), "b": shape(7, 4, 2), "c": shape(3, 5), "scalar": shape(), "square": shape(4, 4)}
    assert specs(tree, mesh, ()) == {
        "a": P(None, "fsdp"), "b": P(None, "fsdp"), "c": P(), "scalar": P(), "square": P("fsdp")
    }  # fmt: skip
    one = make_mesh(data=8, fsdp=1, tensor=1)
    assert specs(tree, one, ())["a"] == P()


def test_optimizer_moments_are_laid_out_as_their_parameters(mesh: Mesh) -> None:
    params = {"embed": jnp.zeros((8, 4)), "norm": jnp.zeros((6,))}
    rules = (("embed$", P("tensor", "fsdp")), ("norm$", P()))
    for tx in (optax.adam(1e-3), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))):
        state = jax.eval_shape(lambda tx=tx: TrainState(params, tx.init(params), jnp.int32(0)))
        laid_out = specs(state, mesh, rules)
        leaves = jax.tree_util.tree_leaves_with_path(laid_out, is_leaf=lambda x: isinstance(x, P))
        embeds = [spec for path, spec in leaves if "embed" in str(path)]
        norms = [spec for path, spec in leaves if "norm" in str(path)]
        assert embeds == [P("tensor", "fsdp")] * 3
        assert norms == [P()] * 3
        assert laid_out.step == P()


def test_a_factored_moment_of_lower_rank_does_not_break_its_parameters_rule(mesh: Mesh) -> None:
    params = {"w": jnp.zeros((256, 128))}
    tx = optax.adafactor(1e-3)
    state = jax.eval_shape(lambda: TrainState(params, tx.init(params), jnp.int32(0)))
    laid_out = tree_shardings(state, mesh, (("w$", P("fsdp", "tensor")),))
    assert laid_out.params["w"].spec == P("fsdp", "tensor")
    assert jax.tree.structure(laid_out) == jax.tree.structure(state)


def test_an_unknown_axis_in_a_rule_is_named(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match=r"'model'.*'data', 'fsdp', 'tensor'"):
        tree_shardings({"w": shape(4, 4)}, mesh, (("w", P("model")),))


def test_a_batch_is_split_by_rows(mesh: Mesh) -> None:
    tokens = np.arange(24, dtype=np.int32).reshape(8, 3)
    batch = SFTBatch(tokens, np.ones((8, 3), np.bool_), np.ones((8, 3), np.bool_))
    placed = shard_batch(batch, mesh)
    assert isinstance(placed, SFTBatch)
    assert placed.tokens.sharding == batch_sharding(mesh)
    assert {s.data.shape for s in placed.tokens.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed.tokens, tokens)
    assert placed.mask.dtype == jnp.bool_


def test_rows_that_do_not_divide_are_refused(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match=r"6 rows do not divide over 4 devices \(data=2 x fsdp=2\)"):
        shard_batch({"x": np.zeros((6, 2), np.float32)}, mesh)


def test_parameters_are_born_sharded_and_equal_to_those_of_one_device(mesh: Mesh) -> None:
    rules = (("w$", P("fsdp", "tensor")),)
    tx = optax.adam(1e-3)

    def init(key: jax.Array) -> TrainState:
        params = {"w": jax.random.normal(key, (8, 16)), "bias": jnp.ones((6,))}
        return TrainState(params, tx.init(params), jnp.int32(0))

    state = init_sharded(init, jax.random.key(0), mesh=mesh, rules=rules)
    # Each device holds a quarter of w and of its moments, half of the bias, and nothing whole but the counters.
    for w in (state.params["w"], state.opt_state[0].mu["w"], state.opt_state[0].nu["w"]):
        assert w.sharding.spec == P("fsdp", "tensor")
        assert {s.data.shape for s in w.addressable_shards} == {(4, 8)}
    assert {s.data.shape for s in state.params["bias"].addressable_shards} == {(3,)}
    assert state.step.sharding.is_fully_replicated
    # The compiled init itself returns parts: no whole copy stands behind them.
    shardings = tree_shardings(jax.eval_shape(init, jax.random.key(0)), mesh, rules)
    memory = jax.jit(init, out_shardings=shardings).lower(jax.random.key(0)).compile().memory_analysis()
    assert memory.output_size_in_bytes < sum(x.nbytes for x in jax.tree.leaves(state)) / 2
    whole = init(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
