"""Slots that are filled again: the same answers as from a loop that draws each of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jrlhf.core import answer_keys, sample_at, uniforms
from jrlhf.steps import make_generate
from jrlhf.types import DecodeFns, unchanged
from tests.support.batches import jit
from tests.support.tiny_models import VOCABULARY, plain_decode, plain_init_cache, plain_insert

KEY, NEW, STOP, WIDTH, PROMPTS = jax.random.key(3), 8, 2, 4, 24
PLAIN = DecodeFns(plain_init_cache, plain_decode, unchanged, plain_insert)
SETTINGS = {"max_new_tokens": NEW, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "pad_token": 0}


def questions(count=PROMPTS):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, WIDTH + 1, count)
    mask = np.arange(WIDTH)[None] >= WIDTH - lengths[:, None]
    return jnp.asarray(np.where(mask, rng.integers(0, VOCABULARY, mask.shape), 0), jnp.int32), jnp.asarray(mask)


@pytest.fixture(scope="module")
def alone(plain):
    """A function ``(prompt, sample) -> (tokens, log-probs)`` that draws one answer, without cache and padding."""
    last = jit(lambda tokens, mask: plain.apply_fn(plain.params, tokens, mask))
    draw = jit(
        lambda logits, key, n: sample_at(logits, uniforms(key[None], n[None]), temperature=0.7, top_k=0, top_p=1.0)
    )
    tokens, mask = map(np.asarray, questions())
    answers = {}

    def answer(prompt, sample):
        if (prompt, sample) not in answers:
            key = jax.random.fold_in(jax.random.fold_in(KEY, prompt), sample)
            row, drawn, logprobs = tokens[prompt][mask[prompt]].tolist(), [], []
            while len(drawn) < NEW and drawn[-1:] != [STOP]:
                text = jnp.asarray([(row + drawn + [0] * WIDTH * NEW)[: WIDTH + NEW]], jnp.int32)
                length = len(row) + len(drawn)
                logits = last(text, jnp.arange(WIDTH + NEW)[None] < length)[:, length - 1]
                token, logprob = draw(logits, key, jnp.int32(len(drawn)))
                drawn.append(int(token[0]))
                logprobs.append(float(logprob[0]))
            answers[prompt, sample] = drawn, logprobs
        return answers[prompt, sample]

    return answer


def check(generation, alone, numbers, samples):
    tokens, mask = questions()
    expected = [alone(int(prompt), sample) for prompt in numbers for sample in range(samples)]
    rows = np.repeat(np.asarray(numbers), samples)
    np.testing.assert_array_equal(generation.tokens[:, :WIDTH], tokens[rows])
    np.testing.assert_array_equal(generation.mask[:, :WIDTH], mask[rows])
    lengths = np.array([len(drawn) for drawn, _ in expected])
    real = np.arange(NEW)[None] < lengths[:, None]
    np.testing.assert_array_equal(generation.mask[:, WIDTH:], real)
    np.testing.assert_array_equal(generation.response_mask, np.pad(real, ((0, 0), (WIDTH, 0))))
    np.testing.assert_array_equal(generation.stopped, [drawn[-1] == STOP for drawn, _ in expected])
    for row, (drawn, logprobs) in enumerate(expected):
        np.testing.assert_array_equal(generation.tokens[row, WIDTH:], drawn + [0] * (NEW - len(drawn)))
        np.testing.assert_allclose(generation.logprobs[row, WIDTH : WIDTH + len(drawn)], logprobs, atol=1e-5)
    assert not np.any(np.where(generation.response_mask, 0.0, generation.logprobs))
    return lengths


@pytest.mark.parametrize(("slots", "samples"), [(0, 3), (4, 1), (4, 3), (7, 1), (64, 3)])
def test_any_number_of_slots_gives_the_answers_of_a_loop(plain, alone, slots, samples):
    generate = jit(make_generate(PLAIN, **SETTINGS, stop_tokens=(STOP,), slots=slots, drop_ended=slots != 7))
    generation = generate(plain.params, *questions(), answer_keys(KEY, jnp.arange(PROMPTS), samples=samples))
    lengths = check(generation, alone, range(PROMPTS), samples)
    assert len(set(lengths.tolist())) >= 4
    before = np.asarray(generation.steps_before)
    if 0 < slots < PROMPTS * samples:
        assert sorted(before)[slots - 1] == 0
        # A few late prompts can find slots at once, where the first token was a stop token.
        assert before.max() > 0 or slots > PROMPTS * samples // 2
        # Never more answers at work than slots.
        steps = np.arange((before + lengths).max())[:, None]
        assert ((before <= steps) & (steps < before + lengths - 1)).sum(axis=-1).max() <= slots
    else:
        assert not before.any()


@pytest.mark.parametrize(("devices", "slots", "samples"), [(2, 4, 1), (8, 2, 3), (8, 0, 1)])
def test_devices_with_queues_of_their_own_give_the_same(plain, alone, devices, slots, samples):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    how = SETTINGS | {"stop_tokens": (STOP,), "slots": slots, "shards": devices, "drop_ended": True}
    keys = answer_keys(KEY, jnp.arange(PROMPTS), samples=samples)
    given = jax.device_put((*questions(), keys), rows)
    generation = jit(make_generate(PLAIN, **how), out_shardings=rows)(plain.params, *given)
    check(generation, alone, range(PROMPTS), samples)


def test_prompts_beside_it_and_their_order_change_no_answer(plain, alone):
    generate = jit(make_generate(PLAIN, **SETTINGS, stop_tokens=(STOP,), slots=4))
    tokens, mask = questions()
    for seed in range(3):
        numbers = np.random.default_rng(seed).permutation(PROMPTS)[:12]
        keys = answer_keys(KEY, jnp.asarray(numbers, jnp.int32), samples=1)
        check(generate(plain.params, tokens[numbers], mask[numbers], keys), alone, numbers, 1)
    assert generate._cache_size() == 1


def test_what_cannot_be_is_refused(plain):
    keys = answer_keys(KEY, jnp.arange(PROMPTS), samples=1)
    with pytest.raises(ValueError, match="slots: these decode functions have no insert"):
        make_generate(PLAIN._replace(insert=None), **SETTINGS, stop_tokens=(STOP,), slots=4)
    with pytest.raises(ValueError, match="shards: 24 prompts do not divide over 5"):
        make_generate(PLAIN, **SETTINGS, stop_tokens=(STOP,), shards=5)(plain.params, *questions(), keys)
