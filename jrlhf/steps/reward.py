"""Reward model: scores trained on people's rankings of K completions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import at_last_token, kwise_centering_loss, kwise_ranking_loss, ordered_pairs
from jrlhf.steps.accumulate import Sums, accumulate_gradients, apply_gradients
from jrlhf.types import Key, Metrics, PackedRankingBatch, Params, RankingBatch, ScoreFn, TrainState

AnyRankingBatch = RankingBatch | PackedRankingBatch


def score_sequences(
    score_fn: ScoreFn, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """The scalar at each row's last real token, in float32."""
    return at_last_token(score_fn(params, tokens, mask).astype(jnp.float32), mask)


def score_completions(score_fn: ScoreFn, params: Params, batch: RankingBatch) -> Float[Array, "B K"]:
    """One forward a completion: ``[B, K, T]`` is read as ``B · K`` rows."""
    rows, completions, length = batch.tokens.shape
    flat = (rows * completions, length)
    scores = score_sequences(score_fn, params, batch.tokens.reshape(flat), batch.mask.reshape(flat))
    return scores.reshape(rows, completions)


class Rankings(NamedTuple):
    """Human rankings of ``N`` prompts, one row a prompt, however the completions' tokens are laid out."""

    ranks: Int[Array, "N K"]
    valid: Bool[Array, "N K"]
    margin: Float[Array, "N"]


def rankings_of(batch: AnyRankingBatch) -> Rankings:
    """The rankings of a batch, one row a prompt."""
    if isinstance(batch, RankingBatch):
        return Rankings(batch.ranks, batch.valid, batch.margin)
    completions = batch.ranks.shape[-1]
    return Rankings(
        batch.ranks.reshape(-1, completions), batch.valid.reshape(-1, completions), batch.margin.reshape(-1)
    )


def score_rankings(score_fn: ScoreFn, params: Params, batch: AnyRankingBatch) -> Float[Array, "N K"]:
    """The scores of every prompt's completions; anything finite for a completion that is not valid."""
    if isinstance(batch, RankingBatch):
        return score_completions(score_fn, params, batch)
    rows, _, completions = batch.ends.shape
    scores = score_fn(params, batch.tokens, batch.segments).astype(jnp.float32)
    return jnp.take_along_axis(scores, batch.ends.reshape(rows, -1), axis=1).reshape(-1, completions)


def make_reward_step(
    score_fn: ScoreFn, tx: optax.GradientTransformation, *, center_coef: float, accumulation: int
) -> Callable[[TrainState, AnyRankingBatch, Key], tuple[TrainState, Metrics]]:
    """A pure step on K-wise rankings; a prompt counts once, however many pairs it has, and not at all if it has none.

    ``center_coef``: weight of the mean (sᵢ + sⱼ)² that keeps scores near 0. ``accumulation`` as in ``make_sft_step``.
    The key is not used, as nothing here is random.
    """

    def step(state: TrainState, batch: AnyRankingBatch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        all_rankings = rankings_of(batch)
        pairs = ordered_pairs(all_rankings.ranks, all_rankings.valid)
        prompts = jnp.maximum(jnp.sum(jnp.any(pairs, axis=(1, 2)), dtype=jnp.float32), 1.0)
        pair_count = jnp.maximum(jnp.sum(pairs, dtype=jnp.float32), 1.0)

        def loss_fn(params: Params, part: AnyRankingBatch) -> tuple[jax.Array, Sums]:
            scores, rankings = score_rankings(score_fn, params, part), rankings_of(part)
            loss = jnp.sum(kwise_ranking_loss(scores, rankings.ranks, rankings.valid, rankings.margin)) / prompts
            if center_coef:
                loss += center_coef * jnp.sum(kwise_centering_loss(scores, rankings.ranks, rankings.valid)) / prompts
            correct, margin = pair_sums(scores, rankings)
            return loss, Sums({"loss": loss, "accuracy": correct / pair_count, "margin": margin / pair_count}, {})

        grads, sums = accumulate_gradients(loss_fn, state.params, batch, slices=accumulation, frozen=state.frozen)
        new_state, update_metrics = apply_gradients(tx, state, grads, sums.total["loss"])
        return new_state, sums.total | update_metrics | {"pairs": pair_count}

    return step


def pair_sums(scores: Float[Array, "N K"], rankings: Rankings) -> tuple[jax.Array, jax.Array]:
    """Number of strictly ordered pairs that are scored in the right order, and Σ (s_better - s_worse) over all."""
    pairs = ordered_pairs(rankings.ranks, rankings.valid)
    difference = scores[:, :, None] - scores[:, None, :]
    correct = jnp.sum(pairs & (difference > 0.0), dtype=jnp.float32)
    return correct, jnp.sum(jnp.where(pairs, difference, 0.0))
