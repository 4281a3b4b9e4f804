"""A cache whose rows are filled again and whose columns are a ring gives the answers of one that is neither."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import answer_keys
from jrlhf.models import decoder_fns, init_params, int8_cache
from jrlhf.parallel import make_mesh, shard_batch
from jrlhf.parallel.devices.executions import scope_of
from jrlhf.parallel.devices.hlo import parse_hlo
from jrlhf.steps import make_generate
from tests.support.archs import small_arch

WIDTH, NEW, PROMPTS = 5, 6, 16
WINDOWS = {"window": 3, "local_layers": (True, False), "attention_softcap": 2.0, "final_softcap": 8.0}
LEARNED = {"rope": None, "norm": "layer", "gated_mlp": False}
SETTINGS = {"max_new_tokens": NEW, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "pad_token": 0, "drop_ended": True}
STOPS = tuple(range(12))


def questions():
    rng = np.random.default_rng(0)
    mask = np.arange(WIDTH)[None] >= WIDTH - rng.integers(1, WIDTH + 1, (PROMPTS, 1))
    return np.where(mask, rng.integers(0, 61, mask.shape), 0).astype(np.int32), mask


@pytest.mark.parametrize(
    ("changes", "kv_cache", "apart"),
    [(WINDOWS, "compute", 1e-5), (LEARNED, "compute", 1e-5), (WINDOWS, "int8", 0.05)],
    ids=["windows and soft caps", "learned positions", "int8"],
)
def test_the_sampler_s_logprobs_are_the_trainer_s_when_the_ring_has_come_round(spread, changes, kv_cache, apart):
    arch = small_arch(**changes)
    params, fns = spread(init_params(arch, jax.random.key(0))), decoder_fns(arch, dtype="float32", remat=False)
    decode_fns = int8_cache(fns.decode_fns) if kv_cache == "int8" else fns.decode_fns
    tokens, mask = map(jnp.asarray, questions())
    keys = answer_keys(jax.random.key(1), jnp.arange(PROMPTS), samples=2)
    refilled, together = (
        jax.jit(make_generate(decode_fns, **SETTINGS, stop_tokens=STOPS, slots=slots))(params, tokens, mask, keys)
        for slots in (3, 0)
    )
    for name in ("tokens", "mask", "response_mask", "stopped"):
        np.testing.assert_array_equal(getattr(refilled, name), getattr(together, name))
    np.testing.assert_allclose(refilled.logprobs, together.logprobs, atol=apart)
    assert int(refilled.steps_before.max()) > 2 * (WIDTH + NEW), "the ring has come round twice"
    logprobs, _ = fns.logprob_fn(params, refilled.tokens, refilled.mask, temperature=0.7)
    difference = jnp.where(refilled.response_mask, logprobs - refilled.logprobs, 0.0)
    assert float(jnp.max(jnp.abs(difference))) < apart
    assert len(set(np.asarray(refilled.response_mask).sum(axis=-1).tolist())) >= 4


def test_on_a_mesh_the_same_tokens_are_sampled_and_no_row_of_the_cache_moves(spread):
    arch = small_arch()
    params, keys = (
        spread(init_params(arch, jax.random.key(0))),
        answer_keys(jax.random.key(1), jnp.arange(PROMPTS), samples=4),
    )

    def answers(mesh, shards):
        fns = decoder_fns(arch, dtype="float32", remat=False, mesh=mesh).decode_fns
        return jax.jit(make_generate(fns, **SETTINGS, stop_tokens=STOPS, slots=32 // shards, shards=shards))

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    given = params, *shard_batch(questions(), mesh), keys
    compiled = answers(mesh, 4).lower(*given).compile()
    found, expected = compiled(*given), answers(None, 1)(params, *map(jnp.asarray, questions()), keys)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.response_mask, expected.response_mask)
    instructions = [i for part in parse_hlo(compiled.as_text()).computations.values() for i in part.values()]
    collectives = [i for i in instructions if i.opcode.startswith(("all-", "collective-", "reduce-scatter"))]
    assert collectives, "the devices split each layer"
    assert not [i for i in collectives for array in i.arrays if len(array.dims) >= 4], "that is a cache"
    assert {scope_of(i) for i in instructions if i.opcode == "while"} >= {"refill", "decode", "tail"}
