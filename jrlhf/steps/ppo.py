"""One PPO iteration over a rollout: several epochs of minibatches, one optimizer for actor and critic."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import (
    align_to_tokens,
    importance_ratio,
    masked_sum,
    ppo_policy_loss,
    ppo_value_loss,
)
from jrlhf.steps.accumulate import Sums, accumulate_gradients, apply_gradients, no_sums, select
from jrlhf.steps.networks import apart
from jrlhf.steps.packing import packed_layout
from jrlhf.steps.sft import nll_sum, trained_tokens
from jrlhf.types import (
    ActorCriticFn,
    Key,
    LogprobFn,
    Metrics,
    Params,
    PPOParams,
    Rollout,
    ScoreFn,
    SelectiveLogprobFn,
    SFTBatch,
    TrainState,
)


class PPOLoss(NamedTuple):
    """The terms of the loss and their weights; see ``make_ppo_step`` for each."""

    temperature: float
    clip: float
    dual_clip: float | None
    value_clip: float
    value_coef: float
    entropy_coef: float


class Progress(NamedTuple):
    """The carry over minibatches."""

    state: TrainState
    stopped: Bool[Array, ""]
    updates: Int[Array, ""]
    skipped: Float[Array, ""]
    totals: Metrics
    maxima: Metrics


def make_ppo_step(
    logprob_fn: LogprobFn | SelectiveLogprobFn,
    value_fn: ScoreFn,
    tx: optax.GradientTransformation,
    *,
    epochs: int,
    minibatches: int,
    accumulation: int,
    drop_padding: bool,
    temperature: float,
    clip: float,
    dual_clip: float | None,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
    ptx_coef: float,
    target_approx_kl: float | None,
    critic_warmup_updates: int,
    ema_decay: float | None,
    selective: bool = False,
    actor_critic_fn: ActorCriticFn | None = None,
) -> Callable[[TrainState, Rollout, Key], tuple[TrainState, Metrics]]:
    """A pure function that does all ``epochs`` x ``minibatches`` updates of one rollout.

    loss = policy + value_coef · value - entropy_coef · entropy + ptx_coef · nll(ptx), each a mean over its own tokens
    of the minibatch (Ouyang et al. 2022, eq. 2; Huang et al. 2024, arXiv 2403.17031).

    ``minibatches`` divides the rollout's rows, ``accumulation`` a minibatch's; each epoch draws a fresh permutation.
    ``drop_padding``: a minibatch's episodes are packed, and of its ``accumulation`` slices those that are left empty
    are not computed; the update is the same. Both functions must then know segment numbers, as the bundled models do.
    ``selective``: ``logprob_fn`` is a ``SelectiveLogprobFn``, and asked about the tokens alone that the loss reads.
    ``actor_critic_fn``: what is called in place of both, where policy and value share a network: one forward pass, and
    the value loss moves the policy's weights too. ``logprob_fn`` then reads ``ptx`` alone.
    ``target_approx_kl``: once a minibatch's mean ½(log π - log π_old)² exceeds it, the rest of the rollout is left
    (that minibatch's own update included). ``critic_warmup_updates``: for so many updates only the critic moves.
    ``ema_decay``: ``state.ema`` follows the policy at every update. With ``ptx_coef`` the rollout must carry ``ptx``.
    """
    terms = PPOLoss(temperature, clip, dual_clip, value_clip, value_coef, entropy_coef)
    loss_of = episode_loss(actor_critic_fn or apart(logprob_fn, value_fn, selective=selective), terms)

    def gradients(params: PPOParams, minibatch: Rollout, frozen: Any) -> tuple[PPOParams, Sums]:
        episodes, used = minibatch._replace(ptx=None), None
        loss_fn = loss_of(jnp.sum(episodes.response_mask, dtype=jnp.float32))
        if drop_padding:
            episodes, used = packed_minibatch(episodes, slices=accumulation)
        grads, sums = accumulate_gradients(loss_fn, params, episodes, slices=accumulation, frozen=frozen, used=used)
        if ptx_coef and minibatch.ptx is not None:
            of_policy = None if frozen is None else frozen.policy
            text = ptx_gradients(
                logprob_fn, params.policy, minibatch.ptx, slices=accumulation, frozen=of_policy, selective=selective
            )
            grads = grads._replace(policy=jax.tree.map(lambda a, b: a + ptx_coef * b, grads.policy, text[0]))
            nll = text[1].total["loss/ptx"]
            sums = sums._replace(total=sums.total | {"loss/ptx": nll, "loss": sums.total["loss"] + ptx_coef * nll})
        return grads, sums

    # Jitted, so that it is traced once for its shapes and for the loop.
    @jax.jit
    def update(state: TrainState, minibatch: Rollout, frozen: Params | None) -> tuple[TrainState, Sums, jax.Array]:
        grads, sums = gradients(state.params, minibatch, frozen)
        # Without a response there is no loss, not one of 0: nothing moves, where momentum and decay alone would.
        some = jnp.any(minibatch.response_mask)
        loss = jnp.where(some, sums.total["loss"], jnp.nan)
        moved, applied = apply_gradients(tx, state, grads, loss)
        params, ema = moved.params, state.ema
        if critic_warmup_updates:
            # A select, not a factor: weight decay and momentum must not move the policy either.
            warm = state.step < critic_warmup_updates
            params = params._replace(policy=select(warm, state.params.policy, params.policy))
        if ema_decay is not None and ema is not None:
            average = optax.incremental_update(params.policy, ema, 1.0 - ema_decay)
            ema = select(applied["skipped"] > 0, ema, average)
        sums.total["grad_norm"] = applied["grad_norm"]
        return moved._replace(params=params, ema=ema), sums, jnp.where(some, applied["skipped"], 0.0)

    def step(state: TrainState, rollout: Rollout, key: Key) -> tuple[TrainState, Metrics]:
        if ptx_coef and rollout.ptx is None:
            raise ValueError("ptx_coef is set, but the rollout carries no ptx batch")
        if ema_decay is not None and state.ema is None:
            raise ValueError("ema_decay is set, but the state has no ema")
        batches = shuffled_minibatches(rollout, key, epochs=epochs, minibatches=minibatches)
        # Out of the loop's carry: what no update moves need not be handed from one to the next.
        frozen, state = state.frozen, state._replace(frozen=None)
        _, shapes, _ = jax.eval_shape(update, state, jax.tree.map(lambda x: x[0], batches), frozen)

        def visit(progress: Progress, minibatch: Rollout) -> tuple[Progress, Metrics]:
            if target_approx_kl is None:
                new_state, sums, skipped = update(progress.state, minibatch, frozen)
            else:
                new_state, sums, skipped = jax.lax.cond(
                    progress.stopped,
                    lambda: (progress.state, no_sums(shapes), jnp.float32(0.0)),
                    lambda: update(progress.state, minibatch, frozen),
                )
            stop = progress.stopped
            if target_approx_kl is not None:
                # Not `>`: a NaN must stop it too.
                stop = stop | ~(sums.total["policy/approxkl"] <= target_approx_kl)
            kept = new_state if target_approx_kl is None else select(stop, progress.state, new_state)
            # What an update that was not made says of itself is not finite, and no part of any mean.
            counted = ~progress.stopped & (skipped == 0)
            totals = jax.tree.map(lambda a, b: a + jnp.where(counted, b, 0.0), progress.totals, sums.total)
            maxima = jax.tree.map(lambda a, b: jnp.where(counted, jnp.maximum(a, b), a), progress.maxima, sums.maximum)
            updates = progress.updates + jnp.where(counted, 1, 0)
            done = Progress(kept, stop, updates, progress.skipped + skipped, totals, maxima)
            return done, sums.maximum

        start = Progress(state, jnp.bool_(False), jnp.int32(0), jnp.float32(0.0), *no_sums(shapes))
        end, each = jax.lax.scan(visit, start, batches)
        seen = end.updates.astype(jnp.float32)
        metrics = {name: total / seen for name, total in end.totals.items()} | end.maxima
        metrics["policy/first_minibatch_max_abs_log_ratio"] = each["policy/max_abs_log_ratio"][0]
        metrics["skipped"] = end.skipped
        metrics["policy/updates"] = (end.state.step - state.step).astype(jnp.float32)
        return end.state._replace(frozen=frozen), metrics

    return step


def shuffled_minibatches(rollout: Rollout, key: Key, *, epochs: int, minibatches: int) -> Rollout:
    """``[B, ...] -> [epochs · minibatches, B / minibatches, ...]``, a fresh permutation of the rows in every epoch."""

    def shuffle(x: Array, order: Int[Array, "E B"]) -> Array:
        rows = x.shape[0]
        return x[order].reshape(epochs * minibatches, rows // minibatches, *x.shape[1:])

    def permutations(rows: int, key: Key) -> Int[Array, "E B"]:
        if rows % minibatches:
            raise ValueError(f"{rows} rows do not divide into {minibatches} minibatches")
        return jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, epochs))

    episode_key, ptx_key = jax.random.split(key)
    order = permutations(rollout.tokens.shape[0], episode_key)
    shuffled = jax.tree.map(lambda x: shuffle(x, order), rollout._replace(ptx=None))
    if rollout.ptx is None:
        return shuffled
    ptx_order = permutations(rollout.ptx.tokens.shape[0], ptx_key)
    return shuffled._replace(ptx=jax.tree.map(lambda x: shuffle(x, ptx_order), rollout.ptx))


def packed_minibatch(episodes: Rollout, *, slices: int) -> tuple[Rollout, Int[Array, ""]]:
    """What the loss reads of the episodes, in fewer rows, and how many of ``slices`` hold any."""
    layout = packed_layout(episodes.mask, slices=slices)
    packed = episodes._replace(
        tokens=layout.pack(episodes.tokens),
        mask=layout.segments,
        response_mask=layout.pack(episodes.response_mask),
        logprobs=layout.pack(episodes.logprobs),
        values=layout.pack(episodes.values),
        advantages=layout.pack(episodes.advantages),
        returns=layout.pack(episodes.returns),
    )
    return packed, layout.used


def ptx_gradients(
    logprob_fn: LogprobFn | SelectiveLogprobFn,
    policy: Params,
    text: SFTBatch,
    *,
    slices: int,
    frozen: Params | None,
    selective: bool,
) -> tuple[Params, Sums]:
    """Of the text's mean negative log-likelihood: Ouyang et al. 2022, eq. 2, its last term without the coefficient."""
    tokens = jnp.maximum(jnp.sum(trained_tokens(text), dtype=jnp.float32), 1.0)

    def loss_fn(policy: Params, part: SFTBatch) -> tuple[jax.Array, Sums]:
        nll = nll_sum(logprob_fn, policy, part, selective=selective) / tokens
        return nll, Sums({"loss/ptx": nll}, {})

    return accumulate_gradients(loss_fn, policy, text, slices=slices, frozen=frozen)


def episode_loss(
    both: ActorCriticFn, terms: PPOLoss
) -> Callable[[Float[Array, ""]], Callable[[PPOParams, Rollout], tuple[jax.Array, Sums]]]:
    """``response tokens of the whole minibatch -> loss_fn`` over a slice of that minibatch."""

    def of_count(tokens: Float[Array, ""]):
        tokens = jnp.maximum(tokens, 1.0)

        def loss_fn(params: PPOParams, part: Rollout) -> tuple[jax.Array, Sums]:
            mask = part.response_mask
            logprobs, entropy, values = both(params, part.tokens, part.mask, temperature=terms.temperature, wanted=mask)
            if not terms.entropy_coef:
                entropy = jax.lax.stop_gradient(entropy)
            values = align_to_tokens(values.astype(jnp.float32))
            # Masked slots are set to one harmless value before any arithmetic (law 6).
            logprobs, old_logprobs, advantages, values, old_values, returns = (
                jnp.where(mask, x, 0.0)
                for x in (logprobs, part.logprobs, part.advantages, values, part.values, part.returns)
            )
            per_token = ppo_policy_loss(logprobs, old_logprobs, advantages, clip=terms.clip, dual_clip=terms.dual_clip)
            policy = masked_sum(per_token, mask) / tokens
            value = masked_sum(ppo_value_loss(values, old_values, returns, clip=terms.value_clip), mask) / tokens
            mean_entropy = masked_sum(entropy, mask) / tokens
            loss = policy + terms.value_coef * value - terms.entropy_coef * mean_entropy
            log_ratio = logprobs - old_logprobs
            ratio = importance_ratio(logprobs, old_logprobs)
            total = {
                "loss": loss,
                "loss/policy": policy,
                "loss/value": value,
                "policy/entropy": mean_entropy,
                "policy/approxkl": masked_sum(0.5 * jnp.square(log_ratio), mask) / tokens,
                "policy/clipfrac": masked_sum(_is_far(ratio, 1.0, terms.clip), mask) / tokens,
                "policy/ratio_mean": masked_sum(ratio, mask) / tokens,
                "value/clipfrac": masked_sum(_is_far(values, old_values, terms.value_clip), mask) / tokens,
            }
            maximum = {
                "policy/ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
                "policy/max_abs_log_ratio": jnp.max(jnp.abs(log_ratio)),
            }
            return loss, Sums(total, maximum)

        return loss_fn

    return of_count


def _is_far(x: Array, centre: Array | float, distance: float) -> Array:
    return (jnp.abs(x - centre) > distance).astype(jnp.float32)
