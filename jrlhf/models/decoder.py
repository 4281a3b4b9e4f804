"""The bundled decoder: pre-norm blocks with parameters stacked on axis 0, and an explicit KV cache.

Shape suffixes: B batch, T query tokens, S key slots, D hidden, K key-value heads, H head dimension, V vocabulary.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jrlhf.core import positions_from_mask
from jrlhf.models.arch import ArchConfig
from jrlhf.models.attention import CHECKPOINT_NAME, AttentionKernel, attention_mask, soft_cap
from jrlhf.models.cache import CachedArray, Quantised, insert_entries
from jrlhf.models.decoding import layer_weights
from jrlhf.models.layers import AttentionInputs, Block, LayerCache, Norm
from jrlhf.models.linear import NORMAL, Linear, matmul_transposed
from jrlhf.models.rope import rotary_angles
from jrlhf.models.splash import Segments
from jrlhf.parallel.mesh import spread_rows
from jrlhf.parallel.platforms import barrier_on_cpu
from jrlhf.system.errors import UsageError
from jrlhf.types import DecodeFns, TokenMask


class KVCache(NamedTuple):
    """Keys and values of every layer; all rows write to the same slots, a ring whose next slot is ``used`` mod S.

    There is one array per layer, so that each is updated in place and read without a slice.
    """

    keys: tuple[CachedArray, ...]
    values: tuple[CachedArray, ...]
    positions: Int[Array, "B S"]
    """Position of each slot's token; -1 for padding and empty slots, to which no query attends."""
    used: Int[Array, ""]
    """Number of slots that were ever written, in turn."""

    @property
    def next_slot(self) -> Int[Array, ""]:
        """The slot of the next token."""
        return self.used % self.positions.shape[1]


def init_cache(arch: ArchConfig, batch: int, length: int, dtype: Any) -> KVCache:
    """Return an empty cache for ``batch`` rows of at most ``length`` tokens.

    Raises UsageError if "dynamic" rotary positions would rescale within ``length`` tokens: cached keys keep the angles
    of a shorter sequence, so the sampler's probabilities would differ from the trainer's.
    """
    if arch.rope is not None and arch.rope.kind == "dynamic" and length > arch.rope.original_max_positions:
        raise UsageError(
            f"{length} tokens, but 'dynamic' rotary positions can be sampled only up to the "
            f"{arch.rope.original_max_positions} that the weights were trained for"
        )
    shape = (batch, arch.num_kv_heads, length, arch.head_dim)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(arch.num_layers)) for _ in range(2))
    return KVCache(keys, values, jnp.full((batch, length), -1, jnp.int32), jnp.zeros((), jnp.int32))


def insert_rows(cache: KVCache, rows: Int[Array, "R"], prefilled: KVCache, /) -> KVCache:
    """Replace rows of the cache by prefilled ones; see ``jrlhf.types.InsertFn``."""
    place, (length, slots) = cache.next_slot, (prefilled.positions.shape[1], cache.positions.shape[1])

    def insert(layers: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(insert_entries(old, rows, x, place) for old, x in zip(layers, new, strict=True))

    positions = jnp.pad(prefilled.positions, ((0, 0), (slots - length, 0)), constant_values=-1)
    return KVCache(
        insert(cache.keys, prefilled.keys),
        insert(cache.values, prefilled.values),
        cache.positions.at[rows].set(jnp.roll(positions, place, axis=1), mode="drop"),
        cache.used,
    )


def int8_cache(decode_fns: DecodeFns) -> DecodeFns:
    """Return a bundled decoder's functions with an int8 cache; see ``Quantised``."""

    def init_cache(batch: int, length: int, /) -> KVCache:
        cache: KVCache = decode_fns.init_cache(batch, length)

        def empty(x: Float[Array, "B K S H"]) -> Quantised:
            return Quantised(jnp.zeros(x.shape, jnp.int8), jnp.zeros(x.shape[:-1], jnp.float32))

        keys, values = jax.tree.map(empty, (cache.keys, cache.values))
        return cache._replace(keys=keys, values=values)

    return decode_fns._replace(init_cache=init_cache)


def attention_inputs(
    arch: ArchConfig, queries: Int[Array, "B T"], keys: Int[Array, "B S"], *, segments: Int[Array, "B T"] | None
) -> tuple[AttentionInputs, ...]:
    """Return the rotary angles at the queries and the mask for each kind of attention in ``arch``."""
    rotary_dim = arch.rotary_dim or arch.head_dim
    if segments is not None and not arch.packable:
        raise UsageError("sequences cannot be packed: 'dynamic' rotary positions depend on a sequence's length")
    return tuple(
        AttentionInputs(
            angles=None if kind.rope is None else rotary_angles(kind.rope, rotary_dim, queries),
            mask=attention_mask(queries, keys, window=kind.window, segments=segments),
        )
        for kind in arch.attention_kinds
    )


class Decoder(nn.Module):
    """Maps tokens to logits. Parameters and logits are float32; ``dtype`` is the compute dtype."""

    arch: ArchConfig
    dtype: Any
    remat: bool
    kernel: AttentionKernel
    mesh: Mesh | None
    """Mesh over which rows stay spread; None: no constraint."""

    def setup(self) -> None:
        arch = self.arch
        self.embed = self.param("embed", NORMAL, (arch.vocab_size, arch.hidden_size), jnp.float32)
        if arch.rope is None:
            self.position_embed = self.param(
                "position_embed", NORMAL, (arch.max_positions, arch.hidden_size), jnp.float32
            )
        # Recomputing is cheaper than saving for everything except products with weights and attention.
        products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = jax.checkpoint_policies.save_from_both_policies(
            products, jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
        )
        # Inside a scan XLA cannot merge the recomputation with the first computation, so CSE need not be prevented.
        block = nn.remat(Block, prevent_cse=False, policy=None if self.remat else policy)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=arch.num_layers,
        )(arch, self.dtype, self.kernel, self.mesh)
        self.final_norm = Norm(arch.norm, arch.norm_eps, self.dtype)
        if not arch.tie_embeddings:
            self.lm_head = Linear(arch.vocab_size, use_bias=False, dtype=self.dtype, out=jnp.float32)

    def __call__(self, tokens: Int[Array, "B T"], mask: TokenMask) -> Float[Array, "B T V"]:
        return self.unembed(self.hidden(tokens, mask))

    def hidden(self, tokens: Int[Array, "B T"], mask: TokenMask) -> Float[Array, "B T D"]:
        """Return the last hidden states, which the LM head or another head reads."""
        positions = positions_from_mask(mask)
        kinds = jnp.asarray(self.arch.layer_kinds, jnp.int32)
        segments = None if mask.dtype == jnp.bool_ else mask
        layer_inputs = attention_inputs(self.arch, positions, positions, segments=segments)
        if self.kernel == "splash":
            # Splash reads segments instead of square masks, so XLA never computes the squares.
            ids = mask.astype(jnp.int32)
            layer_inputs = tuple(
                inputs._replace(mask=Segments(ids, jnp.int32(kind))) for kind, inputs in enumerate(layer_inputs)
            )
        x_BTD, _ = self.layers(self.lookup(tokens, positions), kinds, layer_inputs, None)
        return self.final_norm(x_BTD)

    def lookup(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the embeddings of tokens, plus those of their positions if positions are learned."""
        x_BTD = self.embed[tokens].astype(self.dtype)
        if self.arch.scale_embeddings:
            x_BTD = x_BTD * jnp.asarray(self.arch.hidden_size**0.5, self.dtype)
        if self.arch.rope is None:
            x_BTD = x_BTD + self.position_embed[jnp.maximum(positions, 0)].astype(self.dtype)
        return spread_rows(x_BTD, self.mesh)

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return the logits of hidden states, in float32."""
        tied = self.arch.tie_embeddings
        logits = matmul_transposed(hidden, self.embed, jnp.float32) if tied else self.lm_head(hidden)
        # XLA for CPU would fuse the product with the softmax that follows, which takes twice as long.
        return soft_cap(barrier_on_cpu(logits), self.arch.final_softcap)

    def decode(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Append ``T`` tokens to the cache and return the logits after the last one. Layers are unrolled.

        Past the last slot a single token goes to the first. Several tokens must fit into the slots that are left: those
        that do not would silently overwrite the last slots.
        """
        length, slots = tokens.shape[1], cache.positions.shape[1]
        if length > slots:
            raise ValueError(f"{length} tokens do not fit a cache of {slots}")
        place = cache.next_slot
        stored = lax.dynamic_update_slice(cache.positions, positions, (jnp.int32(0), place))
        kinds = attention_inputs(self.arch, positions, stored, segments=None)
        block = Block(self.arch, self.dtype, "xla", self.mesh, parent=None)

        # A function of its own, so that layers of one kind are traced and lowered once, not each.
        @jax.jit
        def run_layer(params: Any, x_BTD: Array, inputs: AttentionInputs, layer_cache: LayerCache) -> Any:
            return block.apply({"params": params}, x_BTD, jnp.int32(0), (inputs,), layer_cache)

        layers = self.variables["params"]["layers"]
        x_BTD, keys, values = self.lookup(tokens, positions), [], []
        for layer, kind in enumerate(self.arch.layer_kinds):
            layer_cache = LayerCache(cache.keys[layer], cache.values[layer], place)
            x_BTD, layer_cache = run_layer(layer_weights(layers, layer), x_BTD, kinds[kind], layer_cache)
            keys.append(layer_cache.keys)
            values.append(layer_cache.values)
        logits = self.unembed(self.final_norm(x_BTD[:, -1:]))[:, 0]
        return logits, KVCache(tuple(keys), tuple(values), stored, cache.used + jnp.int32(length))
