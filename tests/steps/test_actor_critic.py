"""Policy and critic on one network: what one forward pass says, and the update of it, beside two passes."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jrlhf.models.functions import decoder_fns, init_head, init_params
from jrlhf.steps import make_ppo_step, make_readings
from jrlhf.types import Generation, PPOParams, TrainState
from tests.support.archs import ONE_LAYER as ARCH
from tests.support.batches import KEY, assert_close, jit, rollout_batch

FNS = decoder_fns(ARCH, dtype="float32", remat=False)


def actors() -> PPOParams:
    keys = jax.random.split(jax.random.key(0))
    return PPOParams(init_params(ARCH, keys[0]), {"head": init_head(ARCH, keys[1])})


def as_two(params, tokens, mask, /, *, temperature, wanted=None):
    """The same networks by two forward passes."""
    logprobs, entropy = FNS.logprob_fn(params.policy, tokens, mask, temperature=temperature, wanted=wanted)
    return logprobs, entropy, FNS.score_fn({"decoder": params.policy} | params.value, tokens, mask)


def test_one_pass_says_what_two_say() -> None:
    params = actors()
    rollout = rollout_batch(FNS.apply_fn, params.policy, rows=4, noise=0.0)
    generation = Generation(
        rollout.tokens, rollout.mask, rollout.response_mask, rollout.logprobs, jnp.zeros(4, jnp.bool_)
    )
    found, expected = (
        jit(make_readings(FNS.logprob_fn, FNS.score_fn, temperature=0.7, selective=True, actor_critic_fn=both))(
            params.policy, init_params(ARCH, jax.random.key(5)), params.value, generation
        )
        for both in (FNS.actor_critic_fn, as_two)
    )
    assert_close(found, expected, atol=1e-5)
    assert float(jnp.max(jnp.abs(found.values))) > 0.01


@pytest.mark.parametrize("drop_padding", [False, True])
def test_the_update_is_that_of_both_losses_on_one_network(drop_padding: bool) -> None:
    params, tx = actors(), optax.sgd(0.1)
    rollout = rollout_batch(FNS.apply_fn, params.policy, rows=4, noise=0.1)

    def updated(both):
        step = make_ppo_step(
            FNS.logprob_fn, FNS.score_fn, tx, epochs=2, minibatches=1, accumulation=2, drop_padding=drop_padding,
            temperature=0.7, clip=0.2, dual_clip=None, value_clip=0.2, value_coef=0.5, entropy_coef=0.01, ptx_coef=0.0,
            target_approx_kl=None, critic_warmup_updates=0, ema_decay=None, selective=True, actor_critic_fn=both,
        )  # fmt: skip
        return jit(step)(TrainState(params, tx.init(params), jnp.int32(0)), rollout, KEY)

    (found, metrics), (expected, told) = updated(FNS.actor_critic_fn), updated(as_two)
    assert_close(found.params, expected.params, atol=1e-5)
    assert_close(metrics["loss/value"], told["loss/value"], atol=1e-5)
