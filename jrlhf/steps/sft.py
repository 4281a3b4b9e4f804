"""Supervised fine-tuning: next-token loss on the answers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jrlhf.core import masked_sum, predictable
from jrlhf.steps.accumulate import Sums, accumulate_gradients, apply_gradients
from jrlhf.types import Key, LogprobFn, Metrics, Params, SFTBatch, TrainState


def trained_tokens(batch: SFTBatch) -> jax.Array:
    """Mask of the tokens that the loss counts: in the loss mask, real, and with a real token before them."""
    return batch.loss_mask & predictable(batch.mask)


def nll_sum(logprob_fn: LogprobFn, params: Params, batch: SFTBatch) -> Float[Array, ""]:
    """Σ -log π(token | tokens before it) over the trained tokens, in nats."""
    trained = trained_tokens(batch)
    logprobs, _ = logprob_fn(params, batch.tokens, batch.mask, temperature=1.0, where=trained)
    return masked_sum(-logprobs, trained)


def make_sft_step(
    logprob_fn: LogprobFn, tx: optax.GradientTransformation, *, accumulation: int
) -> Callable[[TrainState, SFTBatch, Key], tuple[TrainState, Metrics]]:
    """A pure step that lowers the mean negative log-likelihood of the trained tokens.

    ``accumulation``: the batch is read in this many slices (it must divide the rows); the update is the same.
    The key is not used, as nothing here is random; it is there so that every step is called alike.
    """

    def step(state: TrainState, batch: SFTBatch, key: Key) -> tuple[TrainState, Metrics]:
        del key
        count = jnp.sum(trained_tokens(batch), dtype=jnp.float32)

        def loss_fn(params: Params, part: SFTBatch) -> tuple[jax.Array, Sums]:
            loss = nll_sum(logprob_fn, params, part) / jnp.maximum(count, 1.0)
            return loss, Sums({"loss": loss}, {})

        grads, sums = accumulate_gradients(loss_fn, state.params, batch, slices=accumulation, frozen=state.frozen)
        new_state, update_metrics = apply_gradients(tx, state, grads, sums.total["loss"])
        return new_state, sums.total | update_metrics | {"tokens": count}

    return step


def make_sft_eval(logprob_fn: LogprobFn) -> Callable[[Params, SFTBatch], tuple[jax.Array, jax.Array]]:
    """``(Σ nll, tokens)`` of a batch, both to be summed over batches before dividing; see ``make_sft_step``."""

    def evaluate(params: Params, batch: SFTBatch) -> tuple[jax.Array, jax.Array]:
        return nll_sum(logprob_fn, params, batch), jnp.sum(trained_tokens(batch), dtype=jnp.float32)

    return evaluate
