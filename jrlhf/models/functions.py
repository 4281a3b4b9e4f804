"""The bundled decoder's pure functions, which implement the protocols of ``jrlhf.types``, and its parameter trees."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jrlhf.models.arch import ArchConfig
from jrlhf.models.attention import AttentionKernel
from jrlhf.models.decoder import Decoder, KVCache, init_cache, insert_rows
from jrlhf.models.decoding import decoding_weights
from jrlhf.models.hf.names import SHARDING_RULES
from jrlhf.models.kernels import attention_kernel
from jrlhf.models.unembedding import LMHead, hidden_logprobs
from jrlhf.parallel.platforms import platform_settings
from jrlhf.parallel.sharding import leaf_spec
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


class DecoderFns(NamedTuple):
    """A decoder's functions. The first three take a language model's tree, ``score_fn`` a reward model's."""

    apply_fn: ApplyFn
    logprob_fn: LogprobFn
    decode_fns: DecodeFns
    score_fn: ScoreFn
    actor_critic_fn: ActorCriticFn
    """Policy and critic in one forward pass; ``PPOParams`` holds a language model's tree and ``{"head": ...}``."""


def decoder_fns(
    arch: ArchConfig,
    *,
    dtype: Any,
    remat: bool | Literal["auto"] = "auto",
    attention: AttentionKernel = "auto",
    mesh: Mesh | None = None,
    logits_at_once: int = 0,
) -> DecoderFns:
    """Return the decoder's functions, which hold no weights. ``dtype`` is the compute dtype ("float32", "bfloat16").

    The backward pass recomputes everything except products with weights and attention; with ``remat`` it recomputes
    whole layers ("auto": as suits the platform). ``logits_at_once`` bounds the number of logits, tokens · V, that
    ``logprob_fn`` holds on a device (0: as many as suit the platform). Both change memory, not results.

    ``attention``: "cudnn" needs a GPU and bfloat16, and is a UsageError for an architecture with a soft cap on
    attention. "splash" needs a TPU; elsewhere it runs interpreted, fast enough only for tests. Its window counts slots,
    so the tokens of a sequence must be contiguous. Rows stay spread over ``mesh``, whatever the parameters' shardings.
    """
    dtype = jnp.dtype(dtype)
    settings = platform_settings(mesh)
    remat = settings.remat if remat == "auto" else remat
    module = Decoder(arch, dtype, remat, attention_kernel(attention, arch, dtype, mesh), mesh)
    head_path = "embed" if arch.tie_embeddings else "lm_head/kernel"
    head_shape = (arch.vocab_size, arch.hidden_size) if arch.tie_embeddings else (arch.hidden_size, arch.vocab_size)
    head_spec = PartitionSpec() if mesh is None else leaf_spec(head_path, head_shape, mesh, SHARDING_RULES)

    def run(params: Params, *args: Any, method: str) -> Any:
        return module.apply({"params": params}, *args, method=method)

    def apply_fn(params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T V"]:
        return run(params, tokens, mask, method="__call__")

    def score_fn(params: Params, tokens: Int[Array, "B T"], mask: TokenMask, /) -> Float[Array, "B T"]:
        return head_scores(params["head"], run(params["decoder"], tokens, mask, method="hidden"))

    def head_scores(head: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        return jnp.einsum("BTD,D->BT", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]

    def empty_cache(batch: int, length: int, /) -> KVCache:
        return init_cache(arch, batch, length, dtype)

    def decode(
        params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: KVCache, /
    ) -> tuple[Float[Array, "B V"], KVCache]:
        return run(params, tokens, positions, cache, method="decode")

    def prepare(params: Params) -> Params:
        return decoding_weights(params, layers=arch.num_layers, dtype=dtype, mesh=mesh)

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
        return logprobs_of_hidden(params, hidden, tokens, temperature=temperature, where=where)

    def logprobs_of_hidden(
        params: Params, hidden: Float[Array, "B T D"], tokens: Int[Array, "B T"], *, temperature: float, where: Any
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        head = LMHead(
            tied=arch.tie_embeddings,
            softcap=arch.final_softcap,
            logits_at_once=logits_at_once or settings.logits_at_once,
            mesh=mesh,
            spec=head_spec,
            temperature=temperature,
        )
        kernel = params["embed"] if arch.tie_embeddings else params["lm_head"]["kernel"]
        return hidden_logprobs(head, kernel, hidden, tokens, where=where)

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
        logprobs, entropy = logprobs_of_hidden(params.policy, hidden, tokens, temperature=temperature, where=where)
        return logprobs, entropy, head_scores(params.value["head"], hidden)

    decoding = DecodeFns(empty_cache, decode, prepare, insert_rows)
    return DecoderFns(apply_fn, logprob_fn, decoding, score_fn, actor_critic_fn)


def init_params(arch: ArchConfig, key: Key) -> Params:
    """Return untrained parameters in float32: kernels and embedding normal with std 0.02, norms 1, biases 0."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    module = Decoder(arch, jnp.dtype(jnp.float32), remat=False, kernel="xla", mesh=None)
    return module.init(key, tokens, jnp.ones((1, 1), jnp.bool_))["params"]


def init_head(arch: ArchConfig, key: Key) -> Params:
    """Return a scalar head: kernel normal with std 1/√(d+1), bias 0. Stiennon et al. 2020, appendix B.1."""
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
    """Return a reward model's tree: a language model's decoder without its LM head, and a new scalar head."""
    decoder = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    return {"decoder": decoder, "head": init_head(arch, key)}


def abstract_params(arch: ArchConfig) -> Params:
    """Return the shapes and dtypes of a language model's tree, without using memory or a device."""
    return jax.eval_shape(lambda: init_params(arch, jax.random.key(0)))


def abstract_head(arch: ArchConfig) -> Params:
    """Return the shapes and dtypes of a scalar head."""
    return jax.eval_shape(lambda: init_head(arch, jax.random.key(0)))


def abstract_reward_params(arch: ArchConfig) -> Params:
    """Return the shapes and dtypes of a reward model's tree, without using memory or a device."""
    return jax.eval_shape(lambda: reward_params(init_params(arch, jax.random.key(0)), arch, jax.random.key(0)))
