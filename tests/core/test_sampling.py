import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jrlhf.core import sample, token_logprobs, truncate_logits
from jrlhf.core.sampling import _invert
from tests.support import oracles
from tests.support.strategies import floats, seeds

SETTINGS = [  # temperature, top_k, top_p
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.0, 3, 1.0),
    (1.0, 0, 0.6),
    (0.7, 4, 0.8),
    (2.0, 20, 0.95),
]


def draw(logits, count, temperature, top_k, top_p):
    """``count`` tokens from one row of logits, with the log-probs reported for them."""
    keys = jax.random.split(jax.random.key(42), count)
    one = lambda key: sample(logits[None], key, temperature=temperature, top_k=top_k, top_p=top_p)  # noqa: E731
    tokens, logprobs = jax.jit(jax.vmap(one))(keys)
    return np.asarray(tokens)[:, 0], np.asarray(logprobs)[:, 0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_frequencies_and_logprobs_are_those_of_the_renormalised_distribution(setting):
    logits = jnp.asarray(floats(0, 8, scale=1.5))
    expected = oracles.truncated_distribution(np.asarray(logits), *setting)
    tokens, logprobs = draw(logits, 4000, *setting)
    assert (expected[tokens] > 0.0).all()
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), rtol=1e-4, atol=1e-5)
    kept = expected > 0.0
    counts = np.bincount(tokens, minlength=8)[kept]
    # A fixed key, so this cannot flicker; a wrong temperature or truncation gives p < 1e-20.
    assert stats.chisquare(counts, 4000 * expected[kept]).pvalue > 1e-3


@given(seeds, st.sampled_from(SETTINGS[2:]))
def test_the_kept_set_equals_the_loop(seed, setting):
    temperature, top_k, top_p = setting
    logits = floats(seed, 3, 8, scale=2.0)
    kept = jnp.isfinite(truncate_logits(jnp.asarray(logits) / temperature, top_k=top_k, top_p=top_p))
    for row, mask in zip(logits, kept, strict=True):
        np.testing.assert_array_equal(mask, oracles.truncated_distribution(row, *setting) > 0.0)


def test_truncation_by_hand():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    keep = lambda **how: np.isfinite(truncate_logits(logits, **how)).tolist()  # noqa: E731
    assert keep(top_k=2, top_p=1.0) == [[False, True, True]]
    assert keep(top_k=0, top_p=0.45) == [[False, True, False]]
    assert keep(top_k=0, top_p=0.6) == [[False, True, True]]
    assert keep(top_k=0, top_p=0.9) == [[True, True, True]]
    # After top-k 2 the masses are .625 and .375, so p = 0.6 is reached by the first alone.
    assert keep(top_k=2, top_p=0.6) == [[False, True, False]]


def test_ties_go_to_the_lower_id_so_that_exactly_k_stay():
    logits = jnp.zeros((1, 5))
    assert np.isfinite(truncate_logits(logits, top_k=2, top_p=1.0)).tolist() == [[True, True, False, False, False]]
    assert np.isfinite(truncate_logits(logits, top_k=0, top_p=0.5)).tolist() == [[True, True, True, False, False]]
    # Half of the mass of four is reached by two exactly, so a third is not needed.
    assert np.isfinite(truncate_logits(jnp.zeros((1, 4)), top_k=0, top_p=0.5)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_the_likeliest_token_is_always_kept(top_p):
    tokens, logprobs = sample(jnp.array([[1.0, 3.0, 2.0]]), jax.random.key(0), temperature=1.0, top_k=0, top_p=top_p)
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(logprobs, [0.0], atol=1e-7)


def test_off_means_off():
    logits = jnp.asarray(floats(1, 2, 8))
    assert truncate_logits(logits, top_k=0, top_p=1.0) is logits
    np.testing.assert_array_equal(truncate_logits(logits, top_k=8, top_p=1.0), logits)
    np.testing.assert_array_equal(truncate_logits(logits, top_k=100, top_p=1.0), logits)


def test_greedy_takes_the_first_of_the_likeliest():
    logits = jnp.array([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]])
    tokens, logprobs = sample(logits, jax.random.key(0), temperature=0.0, top_k=0, top_p=1.0)
    assert tokens.tolist() == [1, 0]
    assert logprobs.tolist() == [0.0, 0.0]
    one, _ = sample(logits, jax.random.key(0), temperature=0.7, top_k=1, top_p=1.0)
    assert one.tolist() == tokens.tolist()


def test_sampler_and_trainer_have_one_probability():
    logits = jnp.asarray(floats(3, 4, 16, scale=2.0))
    tokens, logprobs = sample(logits, jax.random.key(5), temperature=0.7, top_k=0, top_p=1.0)
    two = jnp.stack([logits, logits], axis=1)
    trainer = token_logprobs(two, jnp.stack([tokens, tokens], axis=1), temperature=0.7)[:, 1]
    np.testing.assert_allclose(logprobs, trainer, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_huge_and_forbidden_logits(setting):
    temperature, top_k, top_p = setting
    logits = jnp.array([[1e4, -1e4, 0.0, 1e4], [-jnp.inf, 0.0, -jnp.inf, -1e4]])
    tokens, logprobs = sample(logits, jax.random.key(0), temperature=temperature, top_k=top_k, top_p=top_p)
    assert tokens[0] in (0, 3)
    assert tokens[1] == 1
    assert jnp.isfinite(logprobs).all()


def test_same_key_twice_is_the_same_draw_and_half_precision_is_read_in_float32():
    logits = jnp.asarray(floats(4, 64, 32))
    args = {"temperature": 0.9, "top_k": 10, "top_p": 0.9}
    first, second = (sample(logits, jax.random.key(7), **args) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (sample(logits, jax.random.key(8), **args)[0] != first[0]).any()
    tokens, logprobs = sample(logits.astype(jnp.bfloat16), jax.random.key(7), **args)
    assert (tokens.dtype, logprobs.dtype) == (jnp.int32, jnp.float32)


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 50, 300])
def test_every_token_is_drawn_in_proportion(vocabulary):
    """Across groups of tokens and within them, the last one, which padding follows, included."""
    logits = jnp.asarray(floats(7, vocabulary, scale=1.0)).at[-1].set(2.0)
    expected = np.asarray(jax.nn.softmax(logits), np.float64)
    tokens, logprobs = draw(logits, 20000, 1.0, 0, 1.0)
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), rtol=1e-4, atol=1e-5)
    counts = np.bincount(tokens, minlength=vocabulary)
    assert len(counts) == vocabulary
    if vocabulary > 1:
        assert stats.chisquare(counts, 20000 * expected / expected.sum()).pvalue > 1e-3


def test_a_rare_token_is_drawn_and_a_forbidden_one_never():
    """Beside one that holds nearly all of the mass: 1e-6 for every other token, and nothing for those between."""
    count = 4096
    logits = jnp.full((1, count), jnp.log(1e-6)).at[0, 1::2].set(-jnp.inf).at[0, 0].set(0.0)
    tokens, _ = jax.jit(lambda keys: sample(jnp.tile(logits, (2**16, 1)), keys, temperature=1.0, top_k=0, top_p=1.0))(
        jax.random.key(0)
    )
    rare = np.asarray(tokens)[np.asarray(tokens) > 0]
    assert not np.any(rare % 2)
    mass = (count / 2 - 1) * 1e-6
    assert abs(len(rare) - 2**16 * mass / (1 + mass)) < 5 * np.sqrt(2**16 * mass)
    # Not a few of them again and again.
    assert len(set(rare.tolist())) > 0.9 * len(rare)


def test_inversion_by_hand():
    mass = jnp.array([[1.0, 0.0, 3.0]] * 4)
    assert _invert(mass, jnp.array([0.0, 0.2499, 0.25, 0.999999])).tolist() == [0, 0, 2, 2]
