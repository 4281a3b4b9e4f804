"""Frozen weights in bfloat16 against the same weights in float32, to the bit, where computation is in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.core import answer_keys, combine, partition
from jrlhf.models import add_adapters, is_trained, load_pretrained, reward_from_pretrained
from jrlhf.parallel import make_mesh, shard_batch, tree_shardings
from jrlhf.steps import make_generate, make_sft_step
from jrlhf.types import SFTBatch, TrainState
from tests.support.checkpoints import write_named

ROUNDED = ("kernel", "embed", "position_embed")
"""Names of the leaves that are rounded."""


def batch(rows=8, length=12):
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, length + 1, (rows, 1))
    return rng.integers(1, 61, (rows, length)).astype(np.int32), np.arange(length) >= length - lengths


def rounded(params):
    """The leaves in float32 with the values that bfloat16 has for them."""

    def leaf(path, x):
        return x.astype(jnp.bfloat16).astype(jnp.float32) if path[-1].key in ROUNDED else x

    return jax.tree_util.tree_map_with_path(leaf, params)


def readers(model, mesh):
    """``(weights) -> results``: all that frozen weights are read for, as one program."""
    tx = optax.trace(decay=0.9)  # its state is the gradient
    step = make_sft_step(model.logprob_fn, tx, accumulation=1)
    sample = make_generate(
        model.decode_fns, max_new_tokens=6, temperature=1.0, top_k=0, top_p=1.0, stop_tokens=(2,), pad_token=0
    )
    reward = reward_from_pretrained(model, jax.random.key(1))

    def adapted(base):
        return add_adapters(base, model.arch, jax.random.key(2), rank=4, alpha=8.0, targets=".")

    def awake(path, x):
        return x + 0.1 * jax.random.normal(jax.random.key(7), x.shape) if "lora_b" in str(path[-1]) else x

    start = jax.tree_util.tree_map_with_path(awake, adapted(model.params))
    trained, _ = partition(jax.device_put(start, tree_shardings(start, mesh, model.rules)), is_trained)
    tokens, mask = shard_batch(batch(), mesh)
    keys = answer_keys(jax.random.key(3), jnp.arange(len(tokens)), samples=1)

    @jax.jit
    def read(base, trained, head):
        _, frozen = partition(adapted(base), is_trained)
        after, metrics = step(
            TrainState(trained, tx.init(trained), jnp.int32(0), frozen=frozen),
            SFTBatch(tokens, mask, mask),
            jax.random.key(0),
        )
        decoder = {name: leaf for name, leaf in base.items() if name != "lm_head"}
        return {
            # At other temperatures LLVM may contract a product and a difference in one of two programs, by one ulp.
            "reference log-probs": model.logprob_fn(base, tokens, mask, temperature=1.0),
            "scores": reward.score({"decoder": decoder, "head": head}, tokens, mask),
            "loss": metrics["loss"],
            "gradients of the adapters": after.opt_state,
            "samples": sample(combine(trained, frozen), tokens, mask, keys),
        }

    return lambda base: jax.device_get(read(base, trained, reward.params["head"]))


@pytest.mark.parametrize(("variant", "devices"), [("gpt2", 1), ("biases", 8), ("gemma3", 8)])
def test_frozen_weights_in_bfloat16_change_no_bit(variant, devices, tmp_path):
    """Untied and tied embeddings, learnt positions, biases, scaled embeddings and norms plus one."""
    folder, each = write_named(tmp_path, variant), 1 if devices == 1 else 2
    mesh = make_mesh(data=each, fsdp=each, tensor=each, devices=jax.devices()[:devices])
    whole, halved = (load_pretrained(folder, dtype="bfloat16", mesh=mesh, weights=w) for w in ("float32", "auto"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(halved.params):
        assert leaf.dtype == (jnp.bfloat16 if path[-1].key in ROUNDED else jnp.float32), path
    assert {leaf.dtype for leaf in jax.tree.leaves(whole.params)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), halved.params, rounded(whole.params))
    read = readers(whole, mesh)
    expected = read(whole.params)
    # First the same program on rounded numbers: it rounds each of them before it uses it. Then that on bfloat16.
    for found in (read(rounded(whole.params)), read(halved.params)):
        for name in expected:
            jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=name), found[name], expected[name])
    assert float(max(np.abs(x).max() for x in jax.tree.leaves(expected["gradients of the adapters"]))) > 0


def test_bfloat16_with_float32_computes_what_rounded_weights_compute(tmp_path):
    folder = write_named(tmp_path, "llama2")
    model, exact = (load_pretrained(folder, dtype="float32", weights=w) for w in ("bfloat16", "float32"))
    tokens, mask = map(jnp.asarray, batch())
    logits, whole = model.apply_fn(model.params, tokens, mask), exact.apply_fn(exact.params, tokens, mask)
    np.testing.assert_array_equal(logits, exact.apply_fn(rounded(exact.params), tokens, mask))
    assert float(jnp.max(jnp.abs(logits - whole))) > 1e-4
