"""Kahneman-Tversky optimisation (KTO): a policy trained on answers that people have called desirable or not."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jrlhf.core import combine, kto_loss, reference_point
from jrlhf.steps.accumulate import Sums, accumulate_gradients, apply_gradients, sum_slices
from jrlhf.steps.dpo import AnswerLogprobs, answer_logprobs
from jrlhf.steps.reward import AnyRankingBatch, rankings_of
from jrlhf.types import Key, LogprobFn, Metrics, Params, TrainState, UnpairedBatch


class KTOSettings(NamedTuple):
    """The hyper-parameters of KTO; see ``kto_loss``."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


class Labelled(NamedTuple):
    """``N`` answers as KTO's loss reads them."""

    logprobs: Float[Array, "N"]
    """Sum over the tokens of the answer, in nats."""
    ref_logprobs: Float[Array, "N"]
    desirable: Bool[Array, "N"]
    valid: Bool[Array, "N"]

    def log_ratios(self) -> Float[Array, "N"]:
        """log π - log π_ref of every answer, in float32; 0 where it is not valid."""
        ratios = self.logprobs.astype(jnp.float32) - self.ref_logprobs.astype(jnp.float32)
        return jnp.where(self.valid, ratios, 0.0)


def labelled(answers: AnswerLogprobs, batch: AnyRankingBatch) -> Labelled:
    """The answers of a batch with their labels. The batch needs ``ref_logprobs``."""
    if batch.ref_logprobs is None:
        raise ValueError("the batch of answers has no ref_logprobs, which the loss kto needs")
    rankings = rankings_of(batch)
    if rankings.ranks.shape[1] != 1:
        raise ValueError(f"KTO reads one answer a ranking, but the batch has {rankings.ranks.shape[1]}")
    flat = (answers.total, batch.ref_logprobs, rankings.ranks == 0, rankings.valid)
    return Labelled(*(x.reshape(-1) for x in flat))


def kto_figures(answers: Labelled, settings: KTOSettings) -> Metrics:
    """Return the figures beside the loss: implicit rewards β·(log π - log π_ref) and log-probs of both kinds.

    ``accuracy`` is the share of all pairs of a desirable and an undesirable answer, to whatever prompts, in which the
    desirable one has the larger implicit reward. ``margin`` is the difference of the mean rewards. A mean of no
    answers, and the accuracy and margin of one kind alone, are 0.
    """
    rewards = settings.beta * answers.log_ratios()
    logprobs = jnp.where(answers.valid, answers.logprobs.astype(jnp.float32), 0.0)
    chosen, rejected = answers.valid & answers.desirable, answers.valid & ~answers.desirable
    counts = [jnp.sum(kind, dtype=jnp.float32) for kind in (chosen, rejected)]

    def mean(x: Float[Array, "N"], kind: Bool[Array, "N"], count: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(kind, x, 0.0)) / jnp.maximum(count, 1.0)

    better, worse = (mean(rewards, *kind) for kind in zip((chosen, rejected), counts, strict=True))
    # Not by all pairs, of which there may be a hundred million in held-out rows.
    below = jnp.searchsorted(jnp.sort(jnp.where(rejected, rewards, jnp.inf)), rewards).astype(jnp.float32)
    pairs = counts[0] * counts[1]
    return {
        "accuracy": jnp.sum(jnp.where(chosen, below, 0.0)) / jnp.maximum(pairs, 1.0),
        "margin": jnp.where(pairs > 0, better - worse, 0.0),
        "rewards/chosen": better,
        "rewards/rejected": worse,
        "logprobs/chosen": mean(logprobs, chosen, counts[0]),
        "logprobs/rejected": mean(logprobs, rejected, counts[1]),
        "answers/desirable": counts[0],
        "answers/undesirable": counts[1],
    }


def make_kto_step(
    logprob_fn: LogprobFn, tx: optax.GradientTransformation, settings: KTOSettings, *, accumulation: int
) -> Callable[[TrainState, UnpairedBatch, Key], tuple[TrainState, Metrics]]:
    """A pure step on labelled answers: the mean of ``kto_loss`` over all answers of the batch.

    The mismatched pairs are read first, without a gradient, and z₀, logged as ``reference_point``, is that of the whole
    batch for any ``accumulation``, which is as in ``make_sft_step``. Both parts of the batch need ``loss_mask`` and
    ``ref_logprobs``: ``answer_logprobs`` of the reference, which is not read here. The key is not used, as nothing here
    is random. ``tokens`` counts the tokens whose log-probs the loss reads.
    """

    def step(state: TrainState, batch: UnpairedBatch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        params = combine(state.params, state.frozen)
        point = _batch_point(logprob_fn, params, batch.mismatched, slices=accumulation)
        rows = batch.answers.ranks.size
        count = jnp.maximum(jnp.sum(batch.answers.valid, dtype=jnp.float32), 1.0)
        places = jnp.arange(rows).reshape(batch.answers.ranks.shape)

        def loss_fn(params: Params, part: tuple[AnyRankingBatch, jax.Array]) -> tuple[jax.Array, Sums]:
            answers = answer_logprobs(logprob_fn, params, part[0])
            these = labelled(answers, part[0])
            losses = kto_loss(these.log_ratios(), these.desirable, point, **settings._asdict())
            loss = jnp.sum(jnp.where(these.valid, losses, 0.0)) / count
            tokens = jnp.sum(jnp.where(these.valid, answers.tokens.reshape(-1), 0.0))
            # In its own place of the whole batch, since the accuracy compares answers of all slices.
            logprobs = jnp.zeros(rows).at[part[1].reshape(-1)].set(these.logprobs, unique_indices=True)
            return loss, Sums({"loss": loss, "tokens": tokens, "logprobs": logprobs}, {})

        parts = (batch.answers, places)
        grads, sums = accumulate_gradients(loss_fn, state.params, parts, slices=accumulation, frozen=state.frozen)
        new_state, update_metrics = apply_gradients(tx, state, grads, sums.total["loss"])
        logprobs = sums.total.pop("logprobs").reshape(places.shape)
        every = labelled(AnswerLogprobs(logprobs.reshape(-1, 1), jnp.ones((rows, 1))), batch.answers)
        figures = kto_figures(every, settings) | {"reference_point": point, "answers": count}
        return new_state, sums.total | figures | update_metrics

    return step


def _batch_point(logprob_fn: LogprobFn, params: Params, batch: AnyRankingBatch, *, slices: int) -> Float[Array, ""]:
    """z₀ of the mismatched pairs of a batch; see ``reference_point``."""

    def total(part: AnyRankingBatch) -> Float[Array, ""]:
        return jnp.sum(labelled(answer_logprobs(logprob_fn, params, part), part).log_ratios())

    return reference_point(sum_slices(total, batch, slices=slices), jnp.sum(batch.valid, dtype=jnp.float32))
