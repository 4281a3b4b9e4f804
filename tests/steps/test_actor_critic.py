"""Policy and critic on one network: what one forward pass says, and the update of it, beside two passes."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jrlhf.models.functions import decoder_fns, init_head, init_params
from jrlhf.steps import PPOSettings, make_ppo_step, make_readings, shared
from jrlhf.types import Generation, PPOParams, TrainState
from tests.steps.test_packing import ARCH
from tests.support.batches import KEY, assert_close, jit, rollout_batch, sft_batch

FNS = decoder_fns(ARCH, dtype="float32", remat=False)


def actors() -> PPOParams:
    keys = jax.random.split(jax.random.key(0))
    return PPOParams(init_params(ARCH, keys[0]), {"head": init_head(ARCH, keys[1])})


def as_two(params, tokens, mask, /, *, temperature, where=None):
    """The same networks by two forward passes."""
    logprobs, entropy = FNS.logprob_fn(params.policy, tokens, mask, temperature=temperature, where=where)
    return logprobs, entropy, FNS.score_fn({"decoder": params.policy} | params.value, tokens, mask)


def test_one_pass_says_what_two_say() -> None:
    params = actors()
    rollout = rollout_batch(FNS.apply_fn, params.policy, rows=4, noise=0.0)
    generation = Generation(
        rollout.tokens, rollout.mask, rollout.response_mask, rollout.logprobs, jnp.zeros(4, jnp.bool_)
    )
    found, expected = (
        jit(make_readings(shared(actor_critic_fn), temperature=0.7))(
            params.policy, init_params(ARCH, jax.random.key(5)), params.value, generation
        )
        for actor_critic_fn in (FNS.actor_critic_fn, as_two)
    )
    assert_close(found, expected, atol=1e-5)
    assert float(jnp.max(jnp.abs(found.values))) > 0.01


@pytest.mark.parametrize("drop_padding", [False, True])
def test_the_update_is_that_of_both_losses_on_one_network(drop_padding: bool) -> None:
    params, tx = actors(), optax.sgd(0.1)
    rollout = rollout_batch(FNS.apply_fn, params.policy, rows=4, noise=0.1)._replace(ptx=sft_batch())

    def updated(actor_critic_fn):
        settings = PPOSettings(
            epochs=2, minibatches=1, temperature=0.7, clip=0.2, value_clip=0.2, value_coef=0.5, entropy_coef=0.01,
            ptx_coef=0.3, accumulation=2, drop_padding=drop_padding,
        )  # fmt: skip
        step = make_ppo_step(shared(actor_critic_fn), tx, settings)
        return jit(step)(TrainState(params, tx.init(params), jnp.int32(0)), rollout, KEY)

    (found, metrics), (expected, expected_metrics) = updated(FNS.actor_critic_fn), updated(as_two)
    assert_close(found.params, expected.params, atol=1e-5)
    for name in ("loss/value", "loss/ptx"):
        assert_close(metrics[name], expected_metrics[name], atol=1e-5)
