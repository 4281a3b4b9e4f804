import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import answer_keys, from_logits, sample_at, uniforms
from jrlhf.steps import make_generate
from jrlhf.types import DecodeFns
from tests.support.batches import assert_same, jit
from tests.support.prompts import LENGTHS, prompts
from tests.support.tiny_models import VOCABULARY, plain_decode, plain_init_cache, recomputing_decode

KEY, NEW = jax.random.key(3), 8
KEYS = answer_keys(KEY, jnp.arange(len(LENGTHS)), samples=1)
PLAIN = DecodeFns(plain_init_cache, plain_decode)


def generator(decode_fns, **changes):
    settings = {
        "max_new_tokens": NEW,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "stop_tokens": (2,),
        "pad_token": 0,
    } | changes
    return jit(make_generate(decode_fns, **settings))


def simulate(model, *, temperature=0.7, top_k=0, top_p=1.0, stop_tokens=(2,)):
    """Right-padded and without a cache, unlike the sampler: responses with their log-probs, and which were stopped."""
    tokens, mask = (np.asarray(x) for x in prompts())
    rows = [list(t[m]) for t, m in zip(tokens, mask, strict=True)]
    out = [([], []) for _ in rows]
    done = [False] * len(rows)
    width = max(LENGTHS) + NEW
    apply_fn = jit(model.apply_fn)
    for n in range(NEW):
        whole = [row + response for row, (response, _) in zip(rows, out, strict=True)]
        padded = jnp.array([w + [6] * (width - len(w)) for w in whole], jnp.int32)
        lengths = np.array([len(w) for w in whole])
        logits = apply_fn(model.params, padded, jnp.asarray(np.arange(width)[None] < lengths[:, None]))
        last = logits[np.arange(len(rows)), lengths - 1]
        draws = uniforms(KEYS[:, 0], jnp.full((len(rows),), n))
        drawn = sample_at(last, draws, temperature=temperature, top_k=top_k, top_p=top_p)
        for b, (token, logprob) in enumerate(zip(*map(np.asarray, drawn), strict=True)):
            if not done[b]:
                out[b][0].append(int(token))
                out[b][1].append(float(logprob))
                done[b] = int(token) in stop_tokens
    return out, done


def check(generation, expected, pad_token=0):
    """The generation holds exactly the expected responses, padded and masked by position."""
    responses, stopped = expected
    tokens, mask = prompts()
    width = tokens.shape[1]
    np.testing.assert_array_equal(generation.tokens[:, :width], tokens)
    np.testing.assert_array_equal(generation.mask[:, :width], mask)
    np.testing.assert_array_equal(generation.stopped, stopped)
    for b, (response, logprobs) in enumerate(responses):
        padded = response + [pad_token] * (NEW - len(response))
        np.testing.assert_array_equal(generation.tokens[b, width:], padded)
        real = np.arange(NEW) < len(response)
        np.testing.assert_array_equal(generation.response_mask[b], [False] * width + real.tolist())
        np.testing.assert_array_equal(generation.mask[b, width:], real)
        np.testing.assert_allclose(generation.logprobs[b, width:][real], logprobs, atol=1e-5)
        assert not generation.logprobs[b][~np.asarray(generation.response_mask[b])].any()


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}], ids=["sampled", "greedy"])
def test_equals_a_simulation_that_is_right_padded_and_has_no_cache(model, how):
    generate = generator(DecodeFns(*recomputing_decode(model.apply_fn)), **how)
    check(generate(model.params, *prompts(), KEYS), simulate(model, **how))


@pytest.mark.parametrize("pad_token", [0, 2], ids=["own pad", "pad is the stop token"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"stop_tokens": ()},
        {"stop_tokens": (2, 5)},
        {"stop_tokens": tuple(range(VOCABULARY))},
        {"top_k": 3, "top_p": 0.9},
        {"temperature": 0.0},
    ],
    ids=["one stop", "no stop", "two stops", "all stop", "truncated", "greedy"],
)
def test_cached_decode_equals_the_simulation(plain, how, pad_token):
    generate = generator(PLAIN, pad_token=pad_token, **how)
    expected = simulate(plain, **how)
    check(generate(plain.params, *prompts(), KEYS), expected, pad_token)
    if how == {}:  # the key is fixed: rows stop at different times, and one does not stop at all
        lengths = {len(tokens) for tokens, _ in expected[0]}
        assert len(lengths) >= 3
        assert {True, False} == set(expected[1])


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}], ids=["sampled", "greedy"])
def test_width_of_the_padding_does_not_matter(plain, how):
    generate = generator(PLAIN, **how)
    narrow, wide = (generate(plain.params, *prompts(width), KEYS) for width in (4, 9))
    np.testing.assert_array_equal(narrow.tokens[:, 4:], wide.tokens[:, 9:])
    np.testing.assert_array_equal(narrow.response_mask[:, 4:], wide.response_mask[:, 9:])
    np.testing.assert_allclose(narrow.logprobs[:, 4:], wide.logprobs[:, 9:], atol=1e-5)


@pytest.mark.parametrize(("stop_tokens", "calls"), [(tuple(range(VOCABULARY)), 1), ((), NEW)])
def test_the_loop_ends_when_all_rows_have_stopped(plain, stop_tokens, calls):
    seen = []

    def counted(params, tokens, positions, cache):
        jax.debug.callback(lambda: seen.append(1))
        return plain_decode(params, tokens, positions, cache)

    generate = generator(DecodeFns(plain_init_cache, counted), stop_tokens=stop_tokens)
    jax.block_until_ready(generate(plain.params, *prompts(), KEYS))
    jax.effects_barrier()
    assert len(seen) == calls  # the prefill is the first; the last token is never decoded


def test_rows_that_have_stopped_are_decoded_as_padding(plain):
    seen = []

    def watched(params, tokens, positions, cache):
        jax.debug.callback(lambda p: seen.append(np.asarray(p)), positions, ordered=True)
        return plain_decode(params, tokens, positions, cache)

    generate = generator(DecodeFns(plain_init_cache, watched))
    lengths = np.asarray(jax.block_until_ready(generate(plain.params, *prompts(), KEYS)).response_mask).sum(-1)
    jax.effects_barrier()
    for n, positions in enumerate(seen[1:]):
        live = n + 1 < lengths
        stopping = n + 1 == lengths  # a row's last token is fed only when another row goes on; then as padding
        np.testing.assert_array_equal(positions[live, 0], np.array(LENGTHS)[live] + n)
        ended_by_limit = n + 1 == NEW
        assert (positions[stopping, 0] == -1).all() or ended_by_limit


def test_sampler_and_trainer_agree_on_the_logprobs(model):
    generate = generator(DecodeFns(*recomputing_decode(model.apply_fn)))
    generation = generate(model.params, *prompts(), KEYS)
    trainer, _ = jit(lambda p, t, m: from_logits(model.apply_fn)(p, t, m, temperature=0.7))(
        model.params, generation.tokens, generation.mask
    )
    difference = jnp.where(generation.response_mask, trainer - generation.logprobs, 0.0)
    assert jnp.abs(difference).max() < 1e-5


def test_same_key_is_bitwise_the_same_and_another_key_is_not(plain):
    generate = generator(PLAIN)
    first = generate(plain.params, *prompts(), KEYS)
    assert_same(first, generate(plain.params, *prompts(), KEYS))
    assert (
        generate(plain.params, *prompts(), answer_keys(jax.random.key(4), jnp.arange(len(LENGTHS)), samples=1)).tokens
        != first.tokens
    ).any()


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"stop_tokens": ()}], ids=["sampled", "greedy", "no stop"])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_several_answers_are_those_to_a_prompt_that_stands_there_as_often(plain, samples, how):
    tokens, mask = prompts()
    often = (jnp.asarray(np.repeat(x, samples, axis=0)) for x in (tokens, mask))
    keys = answer_keys(KEY, jnp.arange(len(tokens)), samples=samples)
    expected = generator(PLAIN, **how)(plain.params, *often, keys.reshape(-1, 1))
    found = generator(PLAIN, **how)(plain.params, tokens, mask, keys)
    for name in ("tokens", "mask", "response_mask", "stopped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    if samples > 1 and not how:
        assert (found.tokens[0::samples] != found.tokens[1::samples]).any(), "each answer is a draw of its own"


def test_a_prompt_is_read_once_for_all_its_answers(plain):
    seen = []

    def watched(params, tokens, positions, cache):
        seen.append(tokens.shape)
        return plain_decode(params, tokens, positions, cache)

    keys = answer_keys(KEY, jnp.arange(len(LENGTHS)), samples=3)
    jax.eval_shape(generator(DecodeFns(plain_init_cache, watched)), plain.params, *prompts(), keys)
    assert seen[0] == (len(LENGTHS), 4)
    assert set(seen[1:]) == {(3 * len(LENGTHS), 1)}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.0}, {"stop_tokens": (2, 5, 7)}, {"stop_tokens": ()}, {"top_k": 3, "stop_tokens": (2, 5)}],
    ids=["one stop", "greedy", "three stops", "no stop", "truncated"],
)
def test_rows_that_have_stopped_may_leave_and_nothing_else_changes(plain, how, samples):
    keys = answer_keys(KEY, jnp.arange(len(LENGTHS)), samples=samples)
    expected = generator(PLAIN, **how)(plain.params, *prompts(), keys)
    found = generator(PLAIN, drop_ended=True, **how)(plain.params, *prompts(), keys)
    for name in ("tokens", "mask", "response_mask", "stopped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


def test_no_more_rows_are_decoded_than_are_left_but_for_the_halving(plain):
    seen = []

    def watched(params, tokens, positions, cache):
        jax.debug.callback(lambda p: seen.append((len(p), int((p >= 0).sum()))), positions, ordered=True)
        return plain_decode(params, tokens, positions, cache)

    generate = generator(DecodeFns(plain_init_cache, watched), drop_ended=True, stop_tokens=(2, 5, 7))
    keys = answer_keys(KEY, jnp.arange(len(LENGTHS)), samples=3)
    lengths = np.asarray(jax.block_until_ready(generate(plain.params, *prompts(), keys)).response_mask).sum(-1)
    jax.effects_barrier()
    live = [int((lengths > n).sum()) for n in range(1, NEW)]
    # Of 18 rows 18, 9 or 4 are decoded: half as soon as so few are left, a quarter likewise.
    expected = [18 if n > 9 else 9 if n > 4 else 4 for n in live]
    steps = seen[1:]
    assert [rows for rows, _ in steps] == expected[: len(steps)]
    assert {18, 9, 4} == {rows for rows, _ in steps}


def test_one_row_that_may_leave_is_decoded_to_its_end(plain):
    tokens, mask = (x[:1] for x in prompts())
    plainly, dropping = (
        generator(PLAIN, drop_ended=drop)(plain.params, tokens, mask, KEYS[:1]) for drop in (False, True)
    )
    assert_same(plainly, dropping)


def test_one_row_one_token(plain):
    tokens, mask = (x[:1] for x in prompts())
    generation = generator(PLAIN, max_new_tokens=1, stop_tokens=())(plain.params, tokens, mask, KEYS[:1])
    assert generation.response_mask.tolist() == [[False] * 4 + [True]]
    assert generation.stopped.tolist() == [False]
