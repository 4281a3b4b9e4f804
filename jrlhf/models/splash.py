"""Attention on a TPU by JAX's splash kernel, which skips blocks that no query of them sees and never holds a square.

Shape suffixes: B batch, T tokens, N heads, K key-value heads, H head dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jrlhf.models.attention import KEPT
from jrlhf.parallel.mesh import BATCH_AXES
from jrlhf.system.errors import UsageError

LANES, LARGEST = 128, 512
"""What a block's length is a multiple of, and its most. Larger ones are read less often, but a square of 512 scores
takes 1 MB in float32, of the 16 MB that XLA grants a kernel for all it holds."""


class Segments(NamedTuple):
    """What queries see, said without a square: keys of their own segment, at their own place or before."""

    ids: Int[Array, "B T"]
    """0 for padding, which sees padding alone."""
    kind: Int[Array, ""]
    """Which of the kinds of attention; it may be traced, as layers are scanned over."""


def interpreted(mesh: Mesh | None) -> bool:
    """Whether there is no TPU: the kernel's steps are then taken one by one, right and far too slow but for tests."""
    return (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) != "tpu"


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    seen: Segments,
    *,
    windows: tuple[int, ...],
    cap: float | None,
    mesh: Mesh | None,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """softmax(q · kᵀ) · v of scaled queries within sequences, in whose order positions rise.

    ``windows``: of each kind, the last so many places that are seen (0: all); they are the last so many tokens where a
    sequence stands in one piece. Rows are spread over the mesh as a batch's are and heads over ``tensor``; what does
    not divide, every device of that axis computes. UsageError where JAX is told to multiply bfloat16 at more than the
    default precision, for which there is no such kernel.
    """
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if q.dtype == jnp.bfloat16 and asked not in (None, "default", "bfloat16"):
        raise UsageError(f"attention: splash takes bfloat16 at the default matmul precision alone, not at {asked!r}")
    rows, length, _, _ = q.shape
    count = -(-length // LARGEST)
    block = LANES * -(-length // (LANES * count))
    more = count * block - length

    def heads_first(x: Array) -> Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, more), (0, 0)))

    def of_kind(window: int) -> Callable[..., Array]:
        on_device = partial(_on_device, block=block, window=window, cap=cap, interpret=interpret)
        if mesh is None or mesh.size == 1:
            return on_device
        by_rows = BATCH_AXES if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
        by_heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        heads = PartitionSpec(by_rows, by_heads)
        specs = (heads, heads, heads, PartitionSpec(by_rows))
        # What a kernel gives varies over axes of which it says nothing.
        return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)

    # One kernel a kind, as windows are compiled into them: of a traced kind only one runs.
    mixed = lax.switch(
        seen.kind, [of_kind(window) for window in windows],
        heads_first(q), heads_first(k), heads_first(v), jnp.pad(seen.ids, ((0, 0), (0, more))),
    )  # fmt: skip
    return mixed.transpose(0, 2, 1, 3)[:, :length]


def _on_device(
    q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, ids: Array, *, block: int, window: int, cap: float | None,
    interpret: bool,
) -> Array:  # fmt: skip
    """Of rows and heads that a device holds whole, ``block`` queries by ``block`` keys at a time."""
    # Here: nobody else waits for Pallas to be imported.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, heads, length, _ = q_BNTH.shape
    square = length, length
    mask = splash.LocalMask(square, (window - 1, 0), offset=0) if window else splash.CausalMask(square)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        # Queries' gradients from a kernel of their own: fused with keys' they are rounded, and held, once a block.
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    mixed = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, splash.SegmentIds(ids, ids))
    return mixed  # pyright: ignore[reportReturnType]  # a pair only where residuals are asked for
