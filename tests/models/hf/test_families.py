"""Every family against golden logits, and its cache against its own full forward; torch is not needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import positions_from_mask
from jrlhf.models import load_pretrained, load_reward_model, save_pretrained
from jrlhf.parallel import make_mesh, shard_batch
from tests.support.checkpoints import CONFIGS, VARIANTS, write_checkpoint, write_named


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(variant, tmp_path_factory):
    return load_pretrained(write_named(tmp_path_factory.mktemp(variant), variant), dtype="float32")


def test_logits_are_those_of_transformers(variant, model, padded, golden):
    assert np.std(golden[variant]) > 0.3
    for tokens, mask in padded.values():
        logits = model.apply_fn(model.params, jnp.asarray(tokens), jnp.asarray(mask))
        np.testing.assert_allclose(np.asarray(logits[0])[mask[0]], golden[variant], atol=1e-4, rtol=0)


def test_cached_decode_equals_the_full_forward(variant, model, padded):
    """Left-padded prompts, prefilled in one go, then token by token past every window."""
    tokens, mask = map(jnp.asarray, padded["left"])
    if variant == "dynamic_rope":
        with pytest.raises(ValueError, match=r"9 tokens, but 'dynamic' rotary positions .* up to the 6"):
            model.decode_fns.init_cache(3, 9)
        tokens, mask = tokens[1:, -6:], mask[1:, -6:]
    full = model.apply_fn(model.params, tokens, mask)
    positions, width = positions_from_mask(mask), tokens.shape[1]
    cache = model.decode_fns.init_cache(tokens.shape[0], width)
    decode = jax.jit(model.decode_fns.decode)
    # A few units in the last place of the largest logit, as sums are in another order.
    bound = 1e-5 * max(1.0, float(jnp.max(jnp.abs(full))))
    logits, cache = decode(model.params, tokens[:, :4], positions[:, :4], cache)
    for column in range(4, width + 1):
        real = mask[:, column - 1]
        np.testing.assert_allclose(logits[real], full[:, column - 1][real], atol=bound)
        if column < width:
            logits, cache = decode(model.params, tokens[:, column, None], positions[:, column, None], cache)


@pytest.mark.parametrize("variant", ["smollm2", "gpt2"])
def test_a_reward_score_is_that_of_the_last_real_token_alone_or_in_a_batch(variant, tmp_path):
    """With and without an EOS at the end, and in a row that fills the whole width; padded left, right or not at all."""
    config = CONFIGS[variant]
    classes = {"llama": "Llama", "gpt2": "GPT2"}
    kind = f"{classes[config['model_type']]}ForSequenceClassification"
    model = load_reward_model(
        write_checkpoint(tmp_path, config | {"architectures": [kind], "num_labels": 1}), dtype="float32"
    )
    eos, width = 2, 9
    rows = [[5, 7, 11, eos], [5, 7, 11], [3, 4, 5, 6, 7, 8, 9, 10, eos], [3, 4, 5, 6, 7, 8, 9, 10, 12]]
    score = jax.jit(model.score)
    alone = [float(score(model.params, jnp.array([row], jnp.int32), jnp.ones((1, len(row)), bool))[0]) for row in rows]
    assert np.std(alone) > 1e-2
    for fill in (0, eos):
        for left in (True, False):
            tokens, mask = np.full((len(rows), width), fill, np.int32), np.zeros((len(rows), width), bool)
            for place, row in enumerate(rows):
                where = slice(width - len(row), width) if left else slice(0, len(row))
                tokens[place, where], mask[place, where] = row, True
            np.testing.assert_allclose(score(model.params, jnp.asarray(tokens), jnp.asarray(mask)), alone, atol=1e-5)
    every = model.score_fn(model.params, jnp.array(rows[2:], jnp.int32), jnp.ones((2, width), bool))
    np.testing.assert_allclose(every[:, -1], alone[2:], atol=1e-5)


def test_a_loaded_model_is_written_byte_for_byte(model, tmp_path):
    save_pretrained(model, tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (model.source / name).read_bytes()


@pytest.mark.parametrize("variant", ["gemma3", "gpt2", "gpt_neox"])
def test_born_sharded_on_eight_devices_with_equal_logits(variant, tmp_path, padded):
    """Those with leaves that Llama lacks: norms beside the usual, learned positions, fused tensors."""
    model = load_pretrained(write_named(tmp_path, variant), dtype="float32")
    sharded = load_pretrained(model.source, dtype="float32", mesh=make_mesh(data=2, fsdp=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, sharded.params, model.params)
    batch = tuple(np.repeat(x, 4, axis=0) for x in padded["none"])
    logits = jax.jit(sharded.apply_fn)(sharded.params, *shard_batch(batch, make_mesh(data=2, fsdp=2, tensor=2)))
    expected = model.apply_fn(model.params, *map(jnp.asarray, batch))
    np.testing.assert_allclose(logits, expected, atol=2e-5)
