"""A decoder as the protocols of ``jrlhf.types``: pure functions over its parameter tree, made from sizes alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jrlhf.models.arch import ArchConfig
from jrlhf.models.attention import AttentionKernel
from jrlhf.models.decoder import Decoder, KVCache, init_cache
from jrlhf.models.unembedding import hidden_logprobs
from jrlhf.system.errors import UsageError
from jrlhf.types import (
    ActorCriticFn,
    ApplyFn,
    DecodeFns,
    Key,
    LogprobFn,
    Params,
    PPOParams,
    ScoreFn,
    TokenMask,
)

LOGITS_AT_ONCE = 2**26
"""Logits that ``logprob_fn`` holds at a time on a device unless told otherwise: 256 MB."""

WEIGHTS = frozenset({"kernel", "embed", "position_embed", "lora_a", "lora_b"})
"""The leaves that are cast to the compute dtype wherever they are used; norms are computed with in float32."""


class DecoderFns(NamedTuple):
    """What a decoder can be asked for. The first three take a language model's tree, ``score_fn`` a reward model's."""

    apply_fn: ApplyFn
    logprob_fn: LogprobFn
    decode_fns: DecodeFns
    score_fn: ScoreFn
    actor_critic_fn: ActorCriticFn
    """Its ``PPOParams``: a language model's tree, and ``{"head": ...}`` on its last hidden states."""


def decoder_fns(
    arch: ArchConfig,
    *,
    dtype: Any,
    remat: bool,
    attention: AttentionKernel = "xla",
    mesh: Mesh | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> DecoderFns:
    """The decoder's functions, without any weights. ``dtype``: what is computed in ("float32", "bfloat16").

    The backward pass computes again what is not a product with a weight, with ``remat`` whole layers.
    ``logits_at_once`` bounds ``B · T · V`` of what ``logprob_fn`` holds on a device. Both change memory, not results.
    ``attention``: "cudnn" wants a GPU and bfloat16; UsageError where the architecture's attention has a soft cap.
    "splash" wants a TPU, elsewhere it is interpreted, far too slowly but for tests; a window counts places, so tokens
    of a sequence must stand in one piece.
    ``mesh``: rows stay spread over it, whatever the parameters' shardings would suggest.
    """
    dtype = jnp.dtype(dtype)
    if attention == "cudnn" and arch.attention_softcap is not None:
        raise UsageError(f"attention: {attention!r} knows no soft cap, which this architecture has")
    module = Decoder(arch, dtype, remat, attention, mesh)
    devices = 1 if mesh is None else mesh.size

    def run(params: Params, *args: Any, method: str) -> Any:
        return module.apply({"params": params}, *args, method=method)

    def apply_fn(params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T V"]:
        return run(params, tokens, mask, method="__call__")

    def score_fn(params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T"]:
        return by_head(params["head"], run(params["decoder"], tokens, mask, method="hidden"))

    def by_head(head: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        return jnp.einsum("BTD,D->BT", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]

    def empty_cache(batch: int, length: int, /) -> KVCache:
        return init_cache(arch, batch, length, dtype)

    def decode(
        params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: KVCache, /
    ) -> tuple[Float[Array, "B V"], KVCache]:
        return run(params, tokens, positions, cache, method="decode")

    def prepare(params: Params) -> Params:
        def cast(path: tuple[Any, ...], leaf: Array) -> Array:
            return leaf.astype(dtype) if path[-1].key in WEIGHTS else leaf

        return jax.tree_util.tree_map_with_path(cast, params)

    def logprob_fn(
        params: Params,
        tokens: Int[Array, "B T"],
        mask: TokenMask,
        /,
        *,
        temperature: float,
        where: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        hidden = run(params, tokens, mask, method="hidden")
        return of_hidden(params, hidden, tokens, temperature=temperature, where=where)

    def of_hidden(
        params: Params, hidden: Float[Array, "B T D"], tokens: Int[Array, "B T"], *, temperature: float, where: Any
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        return hidden_logprobs(
            lambda hidden: run(params, hidden, method="unembed"),
            hidden,
            tokens,
            temperature=temperature,
            columns=max(1, logits_at_once * devices // (len(tokens) * arch.vocab_size)),
            wanted=where,
        )

    def actor_critic_fn(
        params: PPOParams,
        tokens: Int[Array, "B T"],
        mask: TokenMask,
        /,
        *,
        temperature: float,
        where: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
        hidden = run(params.policy, tokens, mask, method="hidden")
        logprobs, entropy = of_hidden(params.policy, hidden, tokens, temperature=temperature, where=where)
        return logprobs, entropy, by_head(params.value["head"], hidden)

    decoding = DecodeFns(empty_cache, decode, prepare)
    return DecoderFns(apply_fn, logprob_fn, decoding, score_fn, actor_critic_fn)


def init_params(arch: ArchConfig, key: Key) -> Params:
    """Untrained parameters in float32: kernels and embedding normal with std 0.02, norms 1, biases 0."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    module = Decoder(arch, jnp.dtype(jnp.float32), remat=False, kernel="xla", mesh=None)
    return module.init(key, tokens, jnp.ones((1, 1), jnp.bool_))["params"]


def init_head(arch: ArchConfig, key: Key) -> Params:
    """A scalar head: kernel normal with std 1/√(d+1), bias 0. Stiennon et al. 2020, appendix B.1."""
    std = (arch.hidden_size + 1) ** -0.5
    return {
        "kernel": std * jax.random.normal(key, (arch.hidden_size,), jnp.float32),
        "bias": jnp.zeros((), jnp.float32),
    }


def is_matrix(params: Params) -> Params:
    """For each leaf of a model's tree whether it is a matrix: weight decay leaves vectors alone.

    The decoder's layers are stacked on axis 0, so that a norm of all of them is a matrix in shape only.
    """

    def matrix(path: tuple, leaf: jax.Array) -> bool:
        stacked = jax.tree_util.DictKey("layers") in path
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(matrix, params)


def reward_params(params: Params, arch: ArchConfig, key: Key) -> Params:
    """A reward model's tree: a language model's decoder without its LM head, and a fresh scalar head."""
    decoder = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    return {"decoder": decoder, "head": init_head(arch, key)}


def abstract_params(arch: ArchConfig) -> Params:
    """Shapes and dtypes of a language model's tree; no memory, no device."""
    return jax.eval_shape(lambda: init_params(arch, jax.random.key(0)))


def abstract_head(arch: ArchConfig) -> Params:
    """Shapes and dtypes of a scalar head."""
    return jax.eval_shape(lambda: init_head(arch, jax.random.key(0)))


def abstract_reward_params(arch: ArchConfig) -> Params:
    """Shapes and dtypes of a reward model's tree; no memory, no device."""
    return jax.eval_shape(lambda: reward_params(init_params(arch, jax.random.key(0)), arch, jax.random.key(0)))
