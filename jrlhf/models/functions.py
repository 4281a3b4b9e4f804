"""A decoder as the protocols of ``jrlhf.types``: pure functions over its parameter tree, made from sizes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jrlhf.core import align_to_tokens, logprobs_and_entropy, next_token_logprobs
from jrlhf.models.arch import ArchConfig
from jrlhf.models.decoder import Decoder, KVCache, init_cache
from jrlhf.types import ApplyFn, DecodeFns, Key, LogprobFn, Params, ScoreFn, TokenMask

LOGITS_AT_ONCE = 2**26
"""Logits that ``logprob_fn`` holds at a time unless told otherwise: 256 MB."""


class DecoderFns(NamedTuple):
    """What a decoder can be asked for. The first three take a language model's tree, ``score_fn`` a reward model's."""

    apply_fn: ApplyFn
    logprob_fn: LogprobFn
    decode_fns: DecodeFns
    score_fn: ScoreFn


def decoder_fns(arch: ArchConfig, *, dtype: Any, remat: bool, logits_at_once: int = LOGITS_AT_ONCE) -> DecoderFns:
    """The decoder's functions, without any weights. ``dtype``: what is computed in ("float32", "bfloat16").

    The backward pass computes again what is not a product with a weight, with ``remat`` whole layers.
    ``logits_at_once`` bounds ``B · T · V`` of what ``logprob_fn`` holds. Both change memory, not results.
    """
    dtype = jnp.dtype(dtype)
    module = Decoder(arch, dtype, remat)

    def run(params: Params, *args: Any, method: str) -> Any:
        return module.apply({"params": params}, *args, method=method)

    def apply_fn(params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T V"]:
        return run(params, tokens, mask, method="__call__")

    def score_fn(params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T"]:
        hidden = run(params["decoder"], tokens, mask, method="hidden")
        head = params["head"]
        return jnp.einsum("BTD,D->BT", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]

    def empty_cache(batch: int, length: int, /) -> KVCache:
        return init_cache(arch, batch, length, dtype)

    def decode(
        params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: KVCache, /
    ) -> tuple[Float[Array, "B V"], KVCache]:
        return run(params, tokens, positions, cache, method="decode")

    logprob_fn = _chunked_logprobs(run, arch.vocab_size, logits_at_once)
    return DecoderFns(apply_fn, logprob_fn, DecodeFns(empty_cache, decode), score_fn)


def _chunked_logprobs(run: Callable[..., Any], vocab_size: int, logits_at_once: int) -> LogprobFn:
    """Log-probs from the last hidden states, a slice of columns at a time once all logits would be too many."""

    def logprob_fn(
        params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /, *, temperature: float
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        rows, length = tokens.shape
        # Whole columns, so that rows stay on the devices they are on; slices of one size, so that little is padded.
        slices = -(-length // max(1, logits_at_once // (rows * vocab_size)))
        chunk = -(-length // slices)
        hidden = run(params, tokens, mask, method="hidden")
        if slices == 1:
            logits = run(params, hidden, method="unembed")
            return logprobs_and_entropy(logits, tokens, temperature=temperature)

        # The backward pass makes a slice's logits again instead of keeping them.
        @jax.checkpoint
        def of_slice(hidden: Float[Array, "B C D"], targets: Int[Array, "B C"]) -> tuple[Array, Array]:
            logits = run(params, hidden, method="unembed")
            return next_token_logprobs(logits, targets, temperature=temperature)

        def split(x: Array) -> Array:
            padded = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
            return jnp.swapaxes(padded.reshape(rows, -1, chunk, *x.shape[2:]), 0, 1)

        # Position t is asked about token t + 1; what the last position is asked about, the alignment drops.
        parts = split(hidden), split(jnp.roll(tokens, -1, axis=1))
        _, results = lax.scan(lambda carry, x: (carry, of_slice(*x)), None, parts)
        logprobs, entropy = (jnp.swapaxes(x, 0, 1).reshape(rows, -1)[:, :length] for x in results)
        return align_to_tokens(logprobs), align_to_tokens(entropy)

    return logprob_fn


def init_params(arch: ArchConfig, key: Key) -> Params:
    """Untrained parameters in float32: kernels and embedding normal with std 0.02, norms 1, biases 0."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    module = Decoder(arch, jnp.dtype(jnp.float32), remat=False)
    return module.init(key, tokens, jnp.ones((1, 1), jnp.bool_))["params"]


def init_head(arch: ArchConfig, key: Key) -> Params:
    """A scalar head: kernel normal with std 1/√(d+1), bias 0. Stiennon et al. 2020, appendix B.1."""
    std = (arch.hidden_size + 1) ** -0.5
    return {
        "kernel": std * jax.random.normal(key, (arch.hidden_size,), jnp.float32),
        "bias": jnp.zeros((), jnp.float32),
    }


def reward_params(params: Params, arch: ArchConfig, key: Key) -> Params:
    """A reward model's tree: a language model's decoder without its LM head, and a fresh scalar head."""
    decoder = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    return {"decoder": decoder, "head": init_head(arch, key)}


def abstract_params(arch: ArchConfig) -> Params:
    """Shapes and dtypes of a language model's tree; no memory, no device."""
    return jax.eval_shape(lambda: init_params(arch, jax.random.key(0)))


def abstract_reward_params(arch: ArchConfig) -> Params:
    """Shapes and dtypes of a reward model's tree; no memory, no device."""
    return jax.eval_shape(lambda: reward_params(init_params(arch, jax.random.key(0)), arch, jax.random.key(0)))
