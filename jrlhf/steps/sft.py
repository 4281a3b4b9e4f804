"""Supervised fine-tuning: next-token loss on the answers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jrlhf.core import masked_sum, predictable
from jrlhf.steps.accumulate import Sums, accumulate_gradients, apply_gradients
from jrlhf.types import Key, LogprobFn, Metrics, Params, SelectiveLogprobFn, SFTBatch, TrainState


def trained_tokens(batch: SFTBatch) -> jax.Array:
    """The tokens that count: in the loss mask, real, and with a real token before them."""
    return batch.loss_mask & predictable(batch.mask)


def nll_sum(
    logprob_fn: LogprobFn | SelectiveLogprobFn, params: Params, batch: SFTBatch, *, selective: bool
) -> Float[Array, ""]:
    """Σ -log π(token | tokens before it) over the trained tokens, in nats."""
    trained = trained_tokens(batch)
    only = {"wanted": trained} if selective else {}
    logprobs, _ = logprob_fn(params, batch.tokens, batch.mask, temperature=1.0, **only)
    return masked_sum(-logprobs, trained)


def make_sft_step(
    logprob_fn: LogprobFn | SelectiveLogprobFn,
    tx: optax.GradientTransformation,
    *,
    accumulation: int,
    selective: bool = False,
) -> Callable[[TrainState, SFTBatch, Key], tuple[TrainState, Metrics]]:
    """A pure step that lowers the mean negative log-likelihood of the trained tokens.

    ``accumulation``: the batch is read in this many slices (it must divide the rows); the update is the same.
    ``selective``: ``logprob_fn`` is a ``SelectiveLogprobFn``, and asked about the trained tokens alone.
    The key is not used, as nothing here is random; it is there so that every step is called alike.
    """

    def step(state: TrainState, batch: SFTBatch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        count = jnp.sum(trained_tokens(batch), dtype=jnp.float32)

        def loss_fn(params: Params, part: SFTBatch) -> tuple[jax.Array, Sums]:
            loss = nll_sum(logprob_fn, params, part, selective=selective) / jnp.maximum(count, 1.0)
            return loss, Sums({"loss": loss}, {})

        grads, sums = accumulate_gradients(loss_fn, state.params, batch, slices=accumulation, frozen=state.frozen)
        # Frozen weights are no part of it: nothing may be selected of them.
        moved, applied = apply_gradients(tx, state._replace(frozen=None), grads, sums.total["loss"])
        return moved._replace(frozen=state.frozen), sums.total | applied | {"tokens": count}

    return step


def make_sft_eval(
    logprob_fn: LogprobFn | SelectiveLogprobFn, *, selective: bool = False
) -> Callable[[Params, SFTBatch], tuple[jax.Array, jax.Array]]:
    """``(Σ nll, tokens)`` of a batch, both to be summed over batches before dividing; see ``make_sft_step``."""

    def evaluate(params: Params, batch: SFTBatch) -> tuple[jax.Array, jax.Array]:
        return nll_sum(logprob_fn, params, batch, selective=selective), jnp.sum(
            trained_tokens(batch), dtype=jnp.float32
        )

    return evaluate
