"""GRPO's loss written from its formulas, and the step that is held against it."""

import functools

import jax
import jax.numpy as jnp
import optax

from jrlhf.core import from_logits
from jrlhf.steps import GRPOSettings, make_grpo_step
from tests.support.batches import jit, new_state

LENGTH = 6
"""The length limit of the answers of ``rollout_batch``."""


def grpo_settings(**changes):
    """One epoch, one minibatch, GRPO's own choices, all that is optional off."""
    return GRPOSettings(
        epochs=1,
        minibatches=1,
        temperature=0.7,
        loss="clip",
        ratio="token",
        aggregation="token",
        max_new_tokens=LENGTH,
        clip=0.2,
        clip_high=0.2,
        kl_estimator="k3",
    )._replace(**changes)


def reference_loss(model, params, rollout, settings):
    """Answer by answer and token by token, from the formulas."""
    logp = jax.nn.log_softmax(model.apply_fn(params, rollout.tokens, rollout.mask) / settings.temperature)
    learnt = rollout.response_mask & (rollout.stopped[:, None] | (not settings.leave_out_cut))
    answers = [[t for t in range(learnt.shape[1]) if learnt[b, t]] for b in range(learnt.shape[0])]
    real, every = [a for a in answers if a], sum(map(len, answers))
    loss = jnp.float32(0.0)
    for b, places in enumerate(answers):
        new = [logp[b, t - 1, rollout.tokens[b, t]] for t in places]
        differences = [x - rollout.logprobs[b, t] for x, t in zip(new, places, strict=True)]
        for t, own, difference in zip(places, new, differences, strict=True):
            whole = sum(differences) / len(differences) if settings.ratio == "sequence" else difference
            ratio, advantage = jnp.exp(whole), rollout.advantages[b, t]
            bounded = jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip_high)
            if settings.loss == "cispo":
                term = -jax.lax.stop_gradient(bounded) * advantage * own
            else:
                term = -jnp.minimum(advantage * ratio, advantage * bounded)
                if settings.dual_clip is not None:
                    term = jnp.where(advantage < 0, jnp.minimum(term, -advantage * settings.dual_clip), term)
            if settings.sampler_weight_cap:
                off = rollout.logprobs[b, t] - rollout.sampler_logprobs[b, t]
                term = term * jnp.minimum(jnp.exp(off), settings.sampler_weight_cap)
            if rollout.kl_coef is not None:
                x = own - rollout.ref_logprobs[b, t]
                term = term + rollout.kl_coef[b] * (jnp.exp(-x) - 1 + x)
            term = term + settings.entropy_coef * jnp.sum(jnp.exp(logp[b, t - 1]) * logp[b, t - 1])
            match settings.aggregation:
                case "token":
                    loss += term / every
                case "sequence":
                    loss += term / len(places) / len(real)
                case "constant":
                    loss += term / settings.max_new_tokens / len(real)
    return loss


def start(model, tx=None, ema=None):
    return new_state(model.params, tx or optax.sgd(1.0), ema)


def grpo_step(model, tx=None, **changes):
    """Gradient descent with rate 1 where no ``tx`` is given: compiled once for all tests that ask for the same."""
    if tx is None:
        return _descent_step(model.apply_fn, tuple(sorted(changes.items())))
    return jit(make_grpo_step(from_logits(model.apply_fn), tx, grpo_settings(**changes)))


@functools.cache
def _descent_step(apply_fn, changes):
    return jit(make_grpo_step(from_logits(apply_fn), optax.sgd(1.0), grpo_settings(**dict(changes))))
