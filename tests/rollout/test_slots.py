"""How many answers a device decodes at once, and how much of that work draws tokens."""

from types import SimpleNamespace
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jrlhf.config import SamplingConfig
from jrlhf.models import decoder_fns
from jrlhf.rollout.planning import sampler_trips
from jrlhf.rollout.slots import occupancy, slots_of
from jrlhf.types import Generation
from tests.support.archs import small_arch


@pytest.mark.parametrize(
    ("kind", "platform", "slots", "rows", "tensor", "expected"),
    [
        ("cpu", "cpu", 0, 48, 1, 48),
        ("cpu", "cpu", 0, 512, 1, 64),
        ("cpu", "cpu", 7, 512, 1, 7),
        ("cpu", "cpu", 100, 16, 1, 16),
        ("TPU v5", "tpu", 0, 512, 1, 256),
        ("TPU v5", "tpu", 0, 512, 4, 256),
    ],
)
def test_a_device_decodes_as_many_answers_at_once_as_keep_it_busy(kind, platform, slots, rows, tensor, expected):
    devices = np.array([SimpleNamespace(device_kind=kind, platform=platform)], dtype=object)
    mesh = Mock(spec=Mesh, devices=devices, shape={"tensor": tensor})
    fns = decoder_fns(small_arch(), dtype="bfloat16").decode_fns
    config = SamplingConfig(max_new_tokens=8, slots=slots)
    assert slots_of(config, fns, mesh, rows=rows, prompt=8) == expected


@pytest.mark.parametrize(("kv_cache", "tensor", "expected"), [("compute", 1, 13), ("compute", 2, 27), ("int8", 1, 26)])
def test_a_cache_of_more_than_its_share_of_the_memory_has_fewer_rows(kv_cache, tensor, expected):
    """Llama-3-8B with 16,384 tokens a row on a TPU v5p of 95 GB: 2.1 GB a row, of which 28.5 GB hold 13."""
    arch = small_arch(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, max_positions=16384)
    devices = np.array([SimpleNamespace(device_kind="TPU v5", platform="tpu")], dtype=object)
    mesh = Mock(spec=Mesh, devices=devices, shape={"tensor": tensor})
    fns = decoder_fns(arch, dtype="bfloat16").decode_fns
    config = SamplingConfig(max_new_tokens=8192, kv_cache=kv_cache)
    assert abs(slots_of(config, fns, mesh, rows=64, prompt=8192) - expected) <= 1


def test_occupancy_is_that_of_a_loop_over_slots_and_steps():
    """Two slots: answers of 5 and 3 tokens, and one of 4 that begins when the second has ended, after two steps."""
    lengths, before = np.array([5, 3, 4]), np.array([0, 0, 2])
    response = np.arange(8)[None] >= 8 - lengths[:, None]
    drawn, steps = sum(lengths - 1), max(before + lengths - 1)
    logprobs, stopped = jnp.zeros(response.shape), jnp.ones(3, bool)
    arrays = (jnp.asarray(x) for x in (response.astype(np.int32), response, response))
    generation = Generation(*arrays, logprobs, stopped, jnp.asarray(before, jnp.int32))
    assert float(occupancy(generation, parts=1, slots=2)) == pytest.approx(drawn / (2 * steps))


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize(("rows", "slots"), [(64, 64), (512, 64), (100, 16)])
def test_the_loops_of_a_plan_make_as_many_steps_as_full_answers_take(rows, slots, shards):
    steps = 127 * -(-rows // slots)
    trips = sampler_trips(rows, slots, steps=steps, shards=shards)
    assert trips["tail"] == 0.0
    made = trips["decode"] * trips.get("refill", 1.0) * (4 if shards > 1 else 1)
    assert steps <= made < steps + 4
