import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import answer_keys, from_logits, gae
from jrlhf.steps import make_experience, make_generate, make_readings, rollout_metrics, separate, shared
from jrlhf.steps.experience import repetition
from jrlhf.types import DecodeFns, Generation
from tests.support.batches import all_finite, assert_close, assert_same, jit
from tests.support.prompts import prompts
from tests.support.tiny_models import VOCABULARY, plain_decode, plain_init, plain_init_cache, recomputing_decode

SCORES = jnp.array([1.0, -2.0, 0.5, 3.0, 0.0, 1.5])
BETA = jnp.float32(0.3)


def generation_of(model, decode_fns=None, key=3):
    decode_fns = decode_fns or DecodeFns(*recomputing_decode(model.apply_fn))
    generate = make_generate(
        decode_fns, max_new_tokens=6, temperature=0.7, top_k=0, top_p=1.0, stop_tokens=(2,), pad_token=0
    )
    tokens, mask = prompts()
    return jit(generate)(
        model.params, tokens, mask, answer_keys(jax.random.key(key), jnp.arange(len(tokens)), samples=1)
    )


@pytest.fixture(scope="module")
def generation(plain):
    return generation_of(plain, DecodeFns(plain_init_cache, plain_decode))


def experience_of(model, **changes):
    settings = {
        "temperature": 0.7,
        "gamma": 1.0,
        "lam": 1.0,
        "kl_estimator": "k1",
        "missing_eos_penalty": 0.0,
        "whiten_rewards": False,
    } | changes
    networks = separate(from_logits(model.apply_fn), model.score_fn)
    return jit(make_experience(networks, **settings))


def test_the_sampler_s_own_log_probs_save_a_pass_and_change_nothing_else(plain, generation):
    """The policy's own function is never called; all that follows of its log-probs is the same up to rounding."""
    args = plain.params, reference(), plain.value_params, generation, SCORES, BETA
    read = experience_of(plain)(*args)
    taken = experience_of(plain, from_sampler=True)(*args)
    assert_same(taken.logprobs, generation.logprobs)
    assert np.any(np.asarray(read.logprobs) != np.asarray(taken.logprobs)), "the two are not computed in one way"
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "returns", "advantages"):
        where = np.asarray(generation.response_mask)
        assert_close(np.where(where, getattr(taken, name), 0.0), np.where(where, getattr(read, name), 0.0), atol=1e-4)
    assert_same(taken.entropy, -generation.logprobs)
    # Nothing of the policy's weights is used.
    nowhere = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), plain.params)
    assert all_finite(experience_of(plain, from_sampler=True)(nowhere, *args[1:]))
    with pytest.raises(ValueError, match="share a network"):
        make_readings(shared(lambda *_, **__: None), temperature=0.7, from_sampler=True)


def reference():
    """A policy that is not the one that sampled."""
    return plain_init(7, VOCABULARY)


def by_hand(model, ref, generation, *, estimator="k1", penalty=0.0, whiten=False):
    """With γ = λ = 1 an advantage is the reward to go less the value. Loops in double precision."""
    tokens, response = np.asarray(generation.tokens), np.asarray(generation.response_mask)
    rows, width = tokens.shape
    apply_fn, score_fn = jit(model.apply_fn), jit(model.score_fn)
    out = {name: np.zeros((rows, width)) for name in ("logprobs", "ref_logprobs", "values", "rewards", "returns")}
    for b in range(rows):
        real = np.asarray(generation.mask[b])
        # The row alone, moved to the left: not as the sampler laid it out.
        alone = np.concatenate([tokens[b][real], tokens[b][~real]])[None], np.sort(~real)[None] == 0
        logits = [np.asarray(apply_fn(p, *alone), np.float64)[0] / 0.7 for p in (model.params, ref)]
        scalars = np.asarray(score_fn(model.value_params, *alone))[0]
        at = np.flatnonzero(real)
        for i, t in enumerate(at):
            if response[b, t]:
                logp, ref_logp = (x[i - 1] - np.log(np.sum(np.exp(x[i - 1]))) for x in logits)
                out["logprobs"][b, t], out["ref_logprobs"][b, t] = logp[tokens[b, t]], ref_logp[tokens[b, t]]
                out["values"][b, t] = scalars[i - 1]
        x = out["logprobs"][b] - out["ref_logprobs"][b]
        out["rewards"][b] = -0.3 * {"k1": x, "k2": x**2 / 2, "k3": np.exp(-x) - 1 + x}[estimator]
        out["rewards"][b, at[-1]] += float(SCORES[b]) - (0.0 if generation.stopped[b] else penalty)
    if whiten:
        kept = out["rewards"][response]
        scaled = (out["rewards"] - kept.mean()) / np.sqrt(kept.var() + 1e-8) + kept.mean()
        out["rewards"] = np.where(response, scaled, 0.0)
    to_go = np.cumsum(out["rewards"][:, ::-1], axis=1)[:, ::-1]
    out["returns"] = np.where(response, to_go, 0.0)
    advantages = to_go - out["values"]
    kept = advantages[response]
    out["advantages"] = np.where(response, (advantages - kept.mean()) / np.sqrt(kept.var() + 1e-8), 0.0)
    return out


@pytest.mark.parametrize(
    ("settings", "hand"),
    [
        ({}, {}),
        ({"kl_estimator": "k3", "missing_eos_penalty": 2.0}, {"estimator": "k3", "penalty": 2.0}),
        ({"kl_estimator": "k2", "whiten_rewards": True}, {"estimator": "k2", "whiten": True}),
    ],
    ids=["k1", "k3 and penalty", "k2 whitened"],
)
def test_equals_the_loop(plain, generation, settings, hand):
    ref = reference()
    rollout = experience_of(plain, **settings)(plain.params, ref, plain.value_params, generation, SCORES, BETA)
    assert {True, False} == set(np.asarray(generation.stopped).tolist())  # the penalty meets some rows, not all
    expected = by_hand(plain, ref, generation, **hand)
    response = generation.response_mask
    for name, array in expected.items():
        np.testing.assert_allclose(
            jnp.where(response, getattr(rollout, name), 0.0), array, rtol=1e-3, atol=1e-4, err_msg=name
        )
    np.testing.assert_array_equal(rollout.scores, SCORES)  # as the reward model gave them


def test_three_users_models(model):
    generation = generation_of(model)
    rollout = experience_of(model)(model.params, model.params, model.value_params, generation, SCORES, BETA)
    assert all_finite(rollout._replace(stopped=SCORES))
    metrics = rollout_metrics(rollout)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-7)  # the policy is the reference
    assert metrics["sampler/max_abs_logprob_diff"] < 1e-5
    np.testing.assert_allclose(metrics["sampler/mean_ratio"], 1.0, atol=1e-5)
    np.testing.assert_allclose(metrics["reward/total"], SCORES.mean(), rtol=1e-5)


def test_a_forgotten_temperature_would_be_seen(plain, generation):
    rollout = experience_of(plain, temperature=1.0)(
        plain.params, plain.params, plain.value_params, generation, SCORES, BETA
    )
    assert rollout_metrics(rollout)["sampler/max_abs_logprob_diff"] > 1e-2


def test_lambda_and_gamma_reach_gae(plain, generation):
    ref = reference()
    rollout = experience_of(plain, gamma=0.9, lam=0.8)(plain.params, ref, plain.value_params, generation, SCORES, BETA)
    for b in range(6):
        _, returns = gae(rollout.rewards[b], rollout.values[b], generation.response_mask[b], gamma=0.9, lam=0.8)
        np.testing.assert_allclose(rollout.returns[b], returns, atol=1e-5)


def repeated(tokens, response):
    """How many answer tokens end a run of three that was there before in the answer, and how many end any."""
    again = whole = 0
    for row, real in zip(tokens, response, strict=True):
        seen = set()
        answer = row[real].tolist()
        for at in range(2, len(answer)):
            three = tuple(answer[at - 2 : at + 1])
            again, whole = again + (three in seen), whole + 1
            seen.add(three)
    return again, whole


def test_repetition_is_that_of_a_loop_over_the_answers():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (6, 14)).astype(np.int32)
    starts, ends = np.array([0, 1, 3, 6, 12, 5]), np.array([14, 13, 14, 9, 14, 5])
    response = (np.arange(14) >= starts[:, None]) & (np.arange(14) < ends[:, None])
    again, whole = repeated(tokens, response)
    assert 0 < again < whole
    np.testing.assert_allclose(repetition(jnp.asarray(tokens), jnp.asarray(response)), again / whole, rtol=1e-6)
    abcabc = jnp.array([[0, 1, 2, 0, 1, 2]], jnp.int32)
    np.testing.assert_allclose(repetition(abcabc, jnp.ones((1, 6), bool)), 1 / 4)


def test_metrics_equal_the_loop(plain, generation):
    rollout = experience_of(plain)(plain.params, reference(), plain.value_params, generation, SCORES, BETA)
    metrics = jit(rollout_metrics)(rollout)
    response = np.asarray(generation.response_mask)
    r = jax.tree.map(np.asarray, rollout)
    difference = np.where(response, r.logprobs - r.ref_logprobs, 0.0)
    residual = (r.returns - r.values)[response].var()
    expected = {
        "reward/score_mean": np.mean(SCORES),
        "reward/score_std": np.std(SCORES),
        "reward/total": np.where(response, r.rewards, 0.0).sum(-1).mean(),
        "kl": difference.sum(-1).mean(),
        "entropy": r.entropy[response].mean(),
        "length/mean": response.sum() / 6,
        "length/tokens": response.sum(),
        "repetition": np.divide(*repeated(np.asarray(generation.tokens), response)),
        "eos_fraction": np.mean(generation.stopped),
        "value/explained_variance": 1 - residual / r.returns[response].var(),
        "sampler/max_abs_logprob_diff": np.abs((r.logprobs - r.sampler_logprobs)[response]).max(),
        "sampler/mean_ratio": np.exp((r.logprobs - r.sampler_logprobs)[response]).mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert metrics["entropy"] > 0.0


def test_metrics_and_targets_ignore_nan_behind_the_mask(plain, generation):
    rollout = experience_of(plain)(plain.params, reference(), plain.value_params, generation, SCORES, BETA)
    hide = lambda x: jnp.where(generation.response_mask, x, jnp.nan)  # noqa: E731
    floats = ("logprobs", "ref_logprobs", "sampler_logprobs", "entropy", "values", "rewards", "advantages", "returns")
    dirty = rollout._replace(**{name: hide(getattr(rollout, name)) for name in floats})
    assert_same(rollout_metrics(dirty), rollout_metrics(rollout))

    def nan_value(params, tokens, mask):  # a critic that gives NaN wherever no response token is predicted
        needed = jnp.roll(generation.response_mask, -1, axis=1)
        return jnp.where(needed, plain.score_fn(params, tokens, mask), jnp.nan)

    nan_model = plain._replace(score_fn=nan_value)
    again = experience_of(nan_model)(plain.params, reference(), plain.value_params, generation, SCORES, BETA)
    assert_close(again._replace(values=hide(again.values)), rollout._replace(values=hide(rollout.values)))


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("case", ["constant rewards", "batch of one", "masked row", "all masked"])
def test_degenerate_rollouts_are_finite(plain, generation, case, whiten_rewards):
    scores = jnp.full(6, 2.0) if case == "constant rewards" else SCORES
    if case == "batch of one":
        generation, scores = jax.tree.map(lambda x: x[:1], generation), scores[:1]
    if case in ("masked row", "all masked"):
        rows = slice(None) if case == "all masked" else 0
        generation = Generation(
            generation.tokens,
            generation.mask.at[rows].set(False),
            generation.response_mask.at[rows].set(False),
            generation.logprobs.at[rows].set(0.0),
            generation.stopped,
        )
    make = experience_of(plain, whiten_rewards=whiten_rewards)
    rollout = make(plain.params, reference(), plain.value_params, generation, scores, BETA)
    assert all_finite((rollout.advantages, rollout.returns, rollout.rewards, rollout_metrics(rollout)))


def test_targets_are_constants(plain, generation):
    make = make_experience(
        separate(from_logits(plain.apply_fn), plain.score_fn),
        temperature=0.7,
        gamma=1.0,
        lam=0.95,
        kl_estimator="k1",
        missing_eos_penalty=0.0,
        whiten_rewards=False,
    )

    def total(policy, value):
        rollout = make(policy, reference(), value, generation, SCORES, BETA)
        return jnp.sum(rollout.advantages) + jnp.sum(rollout.returns) + jnp.sum(rollout.logprobs)

    gradient = jit(jax.grad(total, argnums=(0, 1)))(plain.params, plain.value_params)
    assert all(not x.any() for x in jax.tree.leaves(gradient))
