import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jrlhf.core import align_to_tokens, from_logits, logprobs_and_entropy, predictable, token_logprobs
from tests.support import oracles
from tests.support.strategies import floats, masks

ROWS, LENGTH, VOCABULARY = 3, 5, 11


def batch(scale=3.0):
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, VOCABULARY)
    return jnp.asarray(floats(0, ROWS, LENGTH, VOCABULARY, scale=scale)), tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_and_entropy_equal_the_loop(temperature):
    logits, tokens = batch()
    logprobs, entropy = oracles.token_logprobs(np.asarray(logits), np.asarray(tokens), temperature)
    for variant in (lambda f: f, jax.jit):
        got = variant(lambda x, t: logprobs_and_entropy(x, t, temperature=temperature))(logits, tokens)
        np.testing.assert_allclose(got[0], logprobs, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1], entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(token_logprobs(logits, tokens, temperature=temperature), got[0], rtol=1e-6)


def test_vmap_over_a_batch_of_batches():
    logits, tokens = batch()
    stacked = jax.vmap(lambda x, t: token_logprobs(x, t, temperature=1.0))(
        jnp.stack([logits, -logits]), jnp.stack([tokens, tokens])
    )
    for x, got in zip((logits, -logits), stacked, strict=True):
        np.testing.assert_allclose(got, token_logprobs(x, tokens, temperature=1.0), rtol=1e-6)


def test_by_hand():
    # Index 1 is scored by the logits of index 0: p = [1/4, 3/4]. Divided by T = 0.5, the odds 1:3 become 1:9.
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0]]]))
    tokens = jnp.array([[0, 1]])
    np.testing.assert_allclose(token_logprobs(logits, tokens, temperature=1.0), [[0.0, np.log(0.75)]], rtol=1e-6)
    logprobs, entropy = logprobs_and_entropy(logits, tokens, temperature=0.5)
    np.testing.assert_allclose(logprobs, [[0.0, np.log(0.9)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[0.0, 0.325083]], rtol=1e-5)


def test_the_shift():
    x = jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(align_to_tokens(x), [[0, 1, 2]])
    np.testing.assert_array_equal(predictable(jnp.array([[False, True, True, False]])), [[False, False, True, False]])
    np.testing.assert_array_equal(predictable(jnp.array([[True, False, True, True]])), [[False, False, False, True]])


def test_probabilities_of_all_tokens_sum_to_one():
    logits, _ = batch()
    every = jnp.stack([token_logprobs(logits, jnp.full((ROWS, LENGTH), v), temperature=0.7) for v in range(VOCABULARY)])
    np.testing.assert_allclose(jnp.exp(every).sum(0)[:, 1:], 1.0, rtol=1e-5)


def test_half_precision_logits_are_read_in_float32():
    logits, tokens = batch()
    half = logits.astype(jnp.bfloat16)
    got = token_logprobs(half, tokens, temperature=1.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, token_logprobs(half.astype(jnp.float32), tokens, temperature=1.0), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
def test_huge_logits_stay_finite_and_entropy_never_negative(scale):
    logits, tokens = batch(scale)
    offset = logits + scale  # a large common offset must not cancel into noise

    def total(x):
        logprobs, entropy = logprobs_and_entropy(x, tokens, temperature=0.7)
        return jnp.sum(logprobs + entropy), (logprobs, entropy)

    for x in (logits, offset):
        gradient, (logprobs, entropy) = jax.grad(total, has_aux=True)(x)
        assert jnp.isfinite(gradient).all()
        assert jnp.isfinite(logprobs).all()
        assert (entropy >= 0.0).all()
        assert (logprobs <= 0.0).all()


def test_entropy_near_zero_and_near_its_maximum_under_an_offset():
    tokens = jnp.zeros((1, 2), jnp.int32)
    flat = jnp.full((1, 2, 8), 1e4)
    np.testing.assert_allclose(logprobs_and_entropy(flat, tokens, temperature=1.0)[1][0, 1], np.log(8), rtol=1e-6)
    peaked = flat.at[:, :, 3].add(40.0)
    assert 0.0 <= logprobs_and_entropy(peaked, tokens, temperature=1.0)[1][0, 1] < 1e-6


def test_forbidden_tokens_have_no_entropy_and_no_gradient():
    logits = jnp.array([[[0.0, 1.0, -jnp.inf], [0.0, 0.0, 0.0]]])
    tokens = jnp.array([[0, 1]])

    def total(x):
        logprobs, entropy = logprobs_and_entropy(x, tokens, temperature=1.0)
        return jnp.sum(logprobs + entropy)

    logprobs, entropy = oracles.token_logprobs(np.asarray(logits), np.asarray(tokens), 1.0)
    np.testing.assert_allclose(total(logits), logprobs.sum() + entropy.sum(), rtol=1e-6)
    gradient = jax.grad(total)(logits)
    assert jnp.isfinite(gradient).all()
    assert gradient[0, 0, 2] == 0.0


def test_gradient_equals_onehot_minus_softmax():
    logits, tokens = batch()
    gradient = jax.grad(lambda x: jnp.sum(token_logprobs(x, tokens, temperature=2.0)))(logits)
    expected = np.zeros(logits.shape)
    for b in range(ROWS):
        for t in range(1, LENGTH):
            expected[b, t - 1] = -np.exp(oracles.log_softmax(np.asarray(logits)[b, t - 1] / 2.0)) / 2.0
            expected[b, t - 1, tokens[b, t]] += 0.5
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@jax.jit
def bias_gradient(bias, logits, tokens, mask):
    """A model whose hidden states at padding are NaN, as attention over nothing leaves them."""

    def apply_fn(bias, tokens, mask):
        return jnp.where(mask[:, :, None], logits, jnp.nan) + bias[None, None]

    def loss(bias):
        logprobs, entropy = from_logits(apply_fn)(bias, tokens, mask, temperature=1.0)
        return jnp.sum(jnp.where(predictable(mask), logprobs + entropy, 0.0))

    return jax.value_and_grad(loss)(bias)


@given(masks(ROWS, LENGTH))
def test_nan_at_padding_reaches_neither_loss_nor_gradient(mask):
    logits, tokens = batch()
    value, gradient = bias_gradient(jnp.zeros(VOCABULARY), logits, tokens, mask)
    logprobs, entropy = oracles.token_logprobs(np.asarray(logits), np.asarray(tokens), 1.0)
    counted = np.zeros_like(mask)
    counted[:, 1:] = mask[:, 1:] & mask[:, :-1]
    np.testing.assert_allclose(value, (logprobs + entropy)[counted].sum(), rtol=1e-4, atol=1e-4)
    assert jnp.isfinite(gradient).all()
