"""What programs send: programs whose bytes are known, and each of the forms in which HLO says it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jrlhf.parallel import make_mesh
from jrlhf.parallel.devices.collectives import array_bytes, bytes_sent, replica_group

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def sent_by(body, spec: PartitionSpec, out: PartitionSpec, *, trips: int = 1) -> dict:
    """What a shard_map of ``body`` over a float32 array [8, 128] sends."""
    mesh = make_mesh(**MESH)
    fn = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, spec))
    return bytes_sent(jax.jit(fn).lower(x).compile().as_text(), mesh.shape, trips=trips)


ROW = PartitionSpec("fsdp")
SHARD = 4 * 128 * 4
"""Bytes of a device's part of the array, split over an axis of two."""


def test_each_collective_sends_what_a_ring_sends() -> None:
    gather = lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)  # noqa: E731
    assert sent_by(gather, ROW, PartitionSpec()) == {("fsdp",): SHARD}
    assert sent_by(lambda x: jax.lax.psum(x, "data"), ROW, ROW) == {("data",): SHARD}
    assert sent_by(lambda x: jax.lax.psum(x, ("data", "tensor")), ROW, ROW) == {("data", "tensor"): 2 * SHARD * 3 / 4}
    swap = lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])  # noqa: E731
    assert sent_by(swap, ROW, ROW) == {("tensor",): SHARD}
    exchange = lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True)  # noqa: E731
    assert sent_by(exchange, ROW, PartitionSpec(None, "fsdp")) == {("fsdp",): SHARD / 2}
    scatter = lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True)  # noqa: E731
    assert sent_by(scatter, ROW, PartitionSpec(("fsdp", "tensor"))) == {("tensor",): SHARD / 2}


def test_a_loop_sends_as_often_as_it_runs() -> None:
    def scanned(x):
        return jax.lax.scan(lambda carry, _: (jax.lax.psum(jnp.sin(carry), "data"), None), x, None, length=5)[0]

    def until(x):
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 9.0, lambda c: jax.lax.psum(jnp.sin(c), "data"), x)

    assert sent_by(scanned, ROW, ROW) == {("data",): 5 * SHARD}
    assert sent_by(until, ROW, ROW, trips=7) == {("data",): 7 * SHARD}


def test_of_branches_the_one_that_sends_most_counts() -> None:
    def either(x):
        twice = lambda x: jax.lax.psum(jnp.sin(jax.lax.psum(x, "data")), "data")  # noqa: E731
        return jax.lax.cond(jnp.sum(x) > 0, twice, lambda x: jax.lax.psum(x, "data"), x)

    assert sent_by(either, ROW, ROW) == {("data",): 2 * SHARD}


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups={}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", [0, 4]),
    ],
)
def test_groups_are_read_in_every_form(written: str, group: list[int]) -> None:
    assert replica_group(f"%x = f32[2] all-gather(%y), {written}, dimensions={{0}}", 8) == group


def test_groups_of_an_unknown_form_are_an_error() -> None:
    with pytest.raises(ValueError, match="unknown form"):
        replica_group("replica_groups=something else", 8)


def test_a_sum_that_xla_for_cpu_widened_counts_in_two_bytes() -> None:
    line = "  ROOT %r = (f32[4]{0}, f32[4]{0}) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add.promoted"
    hlo = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{line}\n}}\n"
    assert bytes_sent(hlo, MESH, trips=1) == {("data", "fsdp", "tensor"): 2 * 16 * 7 / 8}
    assert bytes_sent(hlo.replace(".promoted", ""), MESH, trips=1) == {("data", "fsdp", "tensor"): 2 * 32 * 7 / 8}


def test_the_start_of_a_gather_counts_its_result_alone() -> None:
    line = "  %g = (f32[4]{0}, f32[8]{0}) all-gather-start(%a), replica_groups=[4,2]<=[8], dimensions={0}"
    hlo = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{line}\n}}\n"
    assert bytes_sent(hlo, MESH, trips=1) == {("tensor",): 16}


def test_arrays_have_the_bytes_of_their_types() -> None:
    assert array_bytes("(pred[3], bf16[2,4]{1,0}, f8e4m3fn[5], s64[], /*index=4*/u32[2])") == [3, 16, 5, 8, 8]
