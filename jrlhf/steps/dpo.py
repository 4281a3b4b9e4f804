"""Direct preference optimisation (DPO): a policy trained on people's rankings, without a reward model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import (
    PreferenceLoss,
    kwise_dpo_loss,
    normalises_length,
    ordered_pairs,
    pair_differences,
    predictable,
)
from jrlhf.steps.accumulate import Sums, accumulate_gradients, apply_gradients
from jrlhf.steps.reward import AnyRankingBatch, rankings_of
from jrlhf.types import Key, LogprobFn, Metrics, PackedRankingBatch, Params, TrainState


class DPOSettings(NamedTuple):
    """The hyper-parameters of preference losses; see ``dpo_loss``."""

    kind: PreferenceLoss
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0
    """Margin γ of SimPO, which is added to the margin of each ranking; 0 is off."""


class AnswerLogprobs(NamedTuple):
    """The log-prob of every completion, and the number of its tokens that have one; ``N`` prompts, one row each."""

    total: Float[Array, "N K"]
    """Σ log π(token | tokens before it) over the completion's own tokens, in nats; anything finite where not valid."""
    tokens: Float[Array, "N K"]


def answer_logprobs(logprob_fn: LogprobFn, params: Params, batch: AnyRankingBatch) -> AnswerLogprobs:
    """The log-probs of every prompt's completions, each of which is read once. The batch needs its ``loss_mask``."""
    if isinstance(batch, PackedRankingBatch):
        tokens, mask, marks = batch.tokens, batch.segments, batch.loss_mask
    else:
        flat = (-1, batch.tokens.shape[-1])
        tokens, mask = batch.tokens.reshape(flat), batch.mask.reshape(flat)
        marks = None if batch.loss_mask is None else batch.loss_mask.reshape(flat)
    if marks is None:
        raise ValueError("the batch of rankings has no loss_mask, so the tokens of the completions are not known")
    scored = marks & predictable(mask)
    logprobs, _ = logprob_fn(params, tokens, mask, temperature=1.0, where=scored)
    logprobs = jnp.where(scored, logprobs.astype(jnp.float32), 0.0)
    if isinstance(batch, PackedRankingBatch):
        sums = (_segment_sums(x, batch) for x in (logprobs, scored.astype(jnp.float32)))
        return AnswerLogprobs(*sums)
    rows = batch.ranks.shape
    return AnswerLogprobs(
        jnp.sum(logprobs, axis=-1).reshape(rows), jnp.sum(scored, axis=-1, dtype=jnp.float32).reshape(rows)
    )


def _segment_sums(x: Float[Array, "B T"], batch: PackedRankingBatch) -> Float[Array, "N K"]:
    """Σ x over the tokens of each completion of packed rows."""
    rows, _, completions = batch.ends.shape
    numbers = jnp.take_along_axis(batch.segments, batch.ends.reshape(rows, -1), axis=1)
    # Not by a scatter: on some devices its sums have no fixed order.
    inside = batch.segments[:, :, None] == numbers[:, None, :]
    return jnp.sum(jnp.where(inside, x[:, :, None], 0.0), axis=1).reshape(-1, completions)


class Compared(NamedTuple):
    """The completions of ``N`` prompts as a preference loss reads them: sums of log-probs, or means (IPO, SimPO)."""

    logprobs: Float[Array, "N K"]
    ref_logprobs: Float[Array, "N K"]
    ranks: Int[Array, "N K"]
    valid: Bool[Array, "N K"]
    margin: Float[Array, "N"]


def compared(answers: AnswerLogprobs, batch: AnyRankingBatch, settings: DPOSettings) -> Compared:
    """The completions of a batch with the margins of their rankings. SimPO's reference is 0, and it takes no other."""
    rankings = rankings_of(batch)
    reference = jnp.zeros_like(answers.total)
    if settings.kind == "simpo":
        if batch.ref_logprobs is not None:
            raise ValueError("the batch of rankings has ref_logprobs, but the loss simpo has no reference")
    else:
        if batch.ref_logprobs is None:
            raise ValueError(f"the batch of rankings has no ref_logprobs, which the loss {settings.kind} needs")
        reference = batch.ref_logprobs.reshape(answers.total.shape).astype(jnp.float32)
    count = jnp.maximum(answers.tokens, 1.0) if normalises_length(settings.kind) else jnp.ones_like(answers.tokens)
    margin = rankings.margin.astype(jnp.float32) + settings.gamma
    return Compared(answers.total / count, reference / count, rankings.ranks, rankings.valid, margin)


def preference_sums(answers: Compared, settings: DPOSettings) -> Metrics:
    """The figures of preference losses as sums, and the ``rankings`` and ``pairs`` to divide them by.

    ``loss`` is a sum over rankings that have a pair, each the mean over its pairs. All others are sums over pairs:
    ``accuracy`` of those whose better answer has the larger implicit reward β·(log π - log π_ref), ``margin`` of the
    differences of that reward, ``logprobs/chosen`` and ``logprobs/rejected`` of the better and worse log-probs.
    """
    pairs = ordered_pairs(answers.ranks, answers.valid)
    options = {"beta": settings.beta, "kind": settings.kind, "label_smoothing": settings.label_smoothing}
    loss = kwise_dpo_loss(*answers, **options)
    rewards = settings.beta * (answers.logprobs - answers.ref_logprobs)
    margins = pair_differences(rewards, answers.valid)
    logprobs = jnp.where(answers.valid, answers.logprobs, 0.0)
    return {
        "loss": jnp.sum(loss),
        "accuracy": jnp.sum(pairs & (margins > 0.0), dtype=jnp.float32),
        "margin": jnp.sum(jnp.where(pairs, margins, 0.0)),
        "logprobs/chosen": jnp.sum(logprobs * jnp.sum(pairs, axis=2, dtype=jnp.float32)),
        "logprobs/rejected": jnp.sum(logprobs * jnp.sum(pairs, axis=1, dtype=jnp.float32)),
        "rankings": jnp.sum(jnp.any(pairs, axis=(1, 2)), dtype=jnp.float32),
        "pairs": jnp.sum(pairs, dtype=jnp.float32),
    }


def preference_means(sums: dict[str, Any], rankings: Any, pairs: Any) -> dict[str, Any]:
    """The means of ``preference_sums``, without the counts: the loss over rankings, all else over pairs."""
    counts = ("rankings", "pairs")
    return {name: x / (rankings if name == "loss" else pairs) for name, x in sums.items() if name not in counts}


def make_dpo_step(
    logprob_fn: LogprobFn, tx: optax.GradientTransformation, settings: DPOSettings, *, accumulation: int
) -> Callable[[TrainState, AnyRankingBatch, Key], tuple[TrainState, Metrics]]:
    """A pure step on K-wise rankings; a prompt counts once, however many pairs it has, and not at all if it has none.

    The batch needs its ``loss_mask`` and, unless the loss is SimPO, ``ref_logprobs``: ``answer_logprobs`` of the
    reference, which is not read here. ``accumulation`` as in ``make_sft_step``. The key is not used, as nothing here is
    random. ``tokens`` counts the tokens whose log-probs the loss reads.
    """

    def step(state: TrainState, batch: AnyRankingBatch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        rankings = rankings_of(batch)
        pairs = ordered_pairs(rankings.ranks, rankings.valid)
        prompts = jnp.maximum(jnp.sum(jnp.any(pairs, axis=(1, 2)), dtype=jnp.float32), 1.0)
        pair_count = jnp.maximum(jnp.sum(pairs, dtype=jnp.float32), 1.0)

        def loss_fn(params: Params, part: AnyRankingBatch) -> tuple[jax.Array, Sums]:
            answers = answer_logprobs(logprob_fn, params, part)
            sums = preference_sums(compared(answers, part, settings), settings)
            means = preference_means(sums, prompts, pair_count)
            tokens = jnp.sum(jnp.where(rankings_of(part).valid, answers.tokens, 0.0))
            return means["loss"], Sums(means | {"tokens": tokens}, {})

        grads, sums = accumulate_gradients(loss_fn, state.params, batch, slices=accumulation, frozen=state.frozen)
        new_state, update_metrics = apply_gradients(tx, state, grads, sums.total["loss"])
        return new_state, sums.total | update_metrics | {"pairs": pair_count}

    return step
