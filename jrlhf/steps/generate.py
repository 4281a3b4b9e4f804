"""Sampling: one prefill, then one ``while_loop`` that ends when every row has stopped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import positions_from_mask, sample_at, uniforms
from jrlhf.types import DecodeFns, Generation, Key, Params


class SamplingState(NamedTuple):
    """The loop's carry. Column ``length`` is the next to be written; every row writes the same column.

    ``n`` rows are decoded, which ``rows`` names; None: all of them.
    """

    tokens: Int[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    stopped: Bool[Array, "B"]
    length: Int[Array, ""]
    rows: Int[Array, "n"] | None
    logits: Float[Array, "n V"]
    cache: Any

    @property
    def decoded(self) -> Any:
        """The index of the rows that are decoded."""
        return slice(None) if self.rows is None else self.rows


def map_rows(take: Callable[[Array], Array], tree: Any) -> Any:
    """``take`` applied to every leaf that has rows: all but scalars."""
    return jax.tree.map(lambda x: take(x) if x.ndim else x, tree)


def make_generate(
    decode_fns: DecodeFns,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    samples: int = 1,
    drop_stopped: bool = False,
) -> Callable[[Params, Int[Array, "B P"], Bool[Array, "B P"], Key], Generation]:
    """A pure sampler of ``max_new_tokens`` at most; a row ends with the first of ``stop_tokens``, which it keeps.

    Prompts are left-padded, so that all rows write their next token to the same column; how wide the padding is does
    not change what is drawn. After its stop token a row holds ``pad_token``, masked: by position, so ``pad_token`` may
    be a stop token itself.

    ``samples``: answers to each prompt, which is read once; they are neighbours, and what comes out has ``B · samples``
    rows. ``drop_stopped``: once half of the rows have stopped, and again once three quarters have, only the others are
    decoded further; what is drawn is the same. Rows that lie on several devices would have to be moved between them.
    With either, every leaf of the cache but scalars must have the rows on axis 0.
    """

    def is_stop(tokens: Int[Array, "B"]) -> Bool[Array, "B"]:
        if not stop_tokens:
            return jnp.zeros(tokens.shape, jnp.bool_)
        return jnp.isin(tokens, jnp.asarray(stop_tokens, jnp.int32))

    def emit(state: SamplingState, key: Key) -> SamplingState:
        """Sample the next column; rows that have stopped get padding."""
        column = state.length
        # Counted from the answer's first token: the draw must not depend on how far its prompt was padded.
        key = jax.random.fold_in(key, column - (state.tokens.shape[1] - max_new_tokens))
        # Of all rows, those that have left too: a row's draw must not depend on who is still there.
        rows = state.decoded
        draws = uniforms(key, len(state.tokens))[:, rows]
        new_tokens, logprobs = sample_at(state.logits, draws, temperature=temperature, top_k=top_k, top_p=top_p)
        live = ~state.stopped[rows]
        return state._replace(
            tokens=state.tokens.at[rows, column].set(jnp.where(live, new_tokens, jnp.int32(pad_token))),
            response_mask=state.response_mask.at[rows, column].set(live),
            logprobs=state.logprobs.at[rows, column].set(jnp.where(live, logprobs, 0.0)),
            stopped=state.stopped.at[rows].set(~live | is_stop(new_tokens)),
            length=column + 1,
        )

    def without_stopped(state: SamplingState, left: int) -> SamplingState:
        """Decode only ``left`` rows further, those that have not stopped first."""
        order = jnp.argsort(state.stopped[state.decoded], stable=True)[:left].astype(jnp.int32)
        logits, cache = map_rows(lambda x: x[order], (state.logits, state.cache))
        return state._replace(rows=order if state.rows is None else state.rows[order], logits=logits, cache=cache)

    def generate(params: Params, prompts: Int[Array, "B P"], mask: Bool[Array, "B P"], key: Key) -> Generation:
        total = prompts.shape[1] + max_new_tokens
        params = decode_fns.prepare(params)
        cache = decode_fns.init_cache(len(prompts), total)
        logits, cache = decode_fns.decode(params, prompts, positions_from_mask(mask), cache)
        if samples > 1:
            prefill = (prompts, mask, logits, cache)
            prompts, mask, logits, cache = map_rows(lambda x: jnp.repeat(x, samples, axis=0), prefill)
        rows, prompt_length = prompts.shape
        prompt_tokens = jnp.sum(mask, axis=-1, dtype=jnp.int32)

        def advance(state: SamplingState) -> SamplingState:
            last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
            position = prompt_tokens + state.length - 1 - prompt_length
            position = jnp.where(state.stopped, -1, position)[:, None]
            rows = state.decoded
            logits, cache = decode_fns.decode(params, last[rows], position[rows], state.cache)
            return emit(state._replace(logits=logits, cache=cache), key)

        def until(state: SamplingState, left: int) -> SamplingState:
            """Advance while more than ``left`` rows have not stopped."""
            return jax.lax.while_loop(
                lambda s: (s.length < total) & (jnp.sum(~s.stopped, dtype=jnp.int32) > left), advance, state
            )

        tail = ((0, 0), (0, max_new_tokens))
        state = SamplingState(
            tokens=jnp.pad(prompts, tail, constant_values=pad_token),
            response_mask=jnp.zeros((rows, total), jnp.bool_),
            logprobs=jnp.zeros((rows, total), jnp.float32),
            stopped=jnp.zeros((rows,), jnp.bool_),
            length=jnp.asarray(prompt_length, jnp.int32),
            rows=None,
            logits=logits,
            cache=cache,
        )
        state = emit(state, key)
        for left in (rows // 2, rows // 4) if drop_stopped else ():
            if left:
                state = without_stopped(until(state, left), left)
        state = until(state, 0)
        return Generation(
            tokens=state.tokens,
            mask=jnp.pad(mask, tail) | state.response_mask,
            response_mask=state.response_mask,
            logprobs=state.logprobs,
            stopped=state.stopped,
        )

    return generate
