"""What programs send: programs whose bytes are known, and each of the forms in which HLO says it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jrlhf.parallel import make_mesh
from jrlhf.parallel.devices.collectives import Collective, bytes_sent, collectives_of, replica_group
from jrlhf.parallel.devices.hlo import parse_hlo

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


FUSED = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter (x: f32[64]) -> f32[8] {
  %x = f32[64]{0} parameter(0)
  %reduced = f32[64]{0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %part = f32[8]{0} dynamic-slice(%reduced, %zero), dynamic_slice_sizes={8}
}

%gather-and-multiply (w: bf16[16]) -> bf16[32] {
  %w = bf16[16]{0} parameter(0)
  %whole = bf16[32]{0} all-gather(%w), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %product = bf16[32]{0} convolution(%whole, %whole), dim_labels=bf_io->bf
}

ENTRY %main (p: f32[64], q: bf16[16]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %q = bf16[16]{0} parameter(1)
  %async-collective-start.1 = bf16[32]{0} fusion(%q), kind=kCustom, calls=%gather-and-multiply
  %fusion.2 = bf16[32]{0} fusion(%async-collective-start.1), kind=kCustom, calls=%gather-and-multiply
  %async-collective-done.1 = bf16[32]{0} fusion(%fusion.2), kind=kCustom, calls=%gather-and-multiply
  ROOT %mine = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_collectives_that_a_tpu_fuses_count_as_what_they_send() -> None:
    module = parse_hlo(FUSED)._replace(devices=8)
    collectives = {name: collectives_of(module, i) for name, i in module.computations["main"].items()}
    assert collectives["p"] is None
    assert collectives["fusion.2"] == collectives["async-collective-done.1"] == []
    assert collectives["async-collective-start.1"] == [Collective("all-gather", 64 / 2, [[0, 1]], True)]
    assert collectives["mine"] == [Collective("reduce-scatter", 256 * 7 / 8, [[*range(8)]], False)]
    assert bytes_sent(FUSED, MESH, trips=1) == {("tensor",): 32, ("data", "fsdp", "tensor"): 224}


@pytest.mark.parametrize(
    "line",
    [
        "%s = ((f32[32]{0}), f32[4]{0}) reduce-scatter-start(%p), replica_groups=[1,8]<=[8], to_apply=%sum",
        "%s = ((f32[32]{0}), f32[4]{0}) async-start(%p), calls=%inner",
    ],
)
def test_a_start_in_either_form_leaves_time_for_work(line: str) -> None:
    hlo = f"""\
%inner (x: f32[32]) -> f32[4] {{
  %x = f32[32] parameter(0)
  ROOT %r = f32[4]{{0}} reduce-scatter(%x), replica_groups=[1,8]<=[8], to_apply=%sum
}}

ENTRY %main (p: f32[32]) -> f32[4] {{
  %p = f32[32]{{0}} parameter(0)
  {line}
}}
"""
    module = parse_hlo(hlo)._replace(devices=8)
    collectives = collectives_of(module, module.computations["main"]["s"])
    assert collectives == [Collective("reduce-scatter", 16.0 * 7, [[*range(8)]], True)]
