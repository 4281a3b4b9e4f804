"""Attention on a TPU by JAX's splash kernel, which skips fully masked blocks and never stores a square of scores.

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

from jrlhf.models.attention import CHECKPOINT_NAME
from jrlhf.parallel.mesh import BATCH_AXES
from jrlhf.system.errors import UsageError

UNIT, KEYS_AT_ONCE = 128, 512
"""Multiple of a block's length, and the number of keys whose scores are computed at once."""

BLOCKS = 4
"""Number of blocks of keys in a row. A causal mask leaves out 6 of the 16 squares of four blocks, and none of one."""

MAX_QUERIES, MAX_KEYS = 1024, 2048
"""Maximum length of a block of queries and of keys, for heads of up to 256 bytes; wider ones take shorter blocks.

Keys are read less often in larger blocks, but more than this does not fit a kernel's 16 MB on every TPU from v4 on.
"""


class Segments(NamedTuple):
    """A mask in compact form: a query attends to keys of its own segment at its own slot or before."""

    ids: Int[Array, "B T"]
    """Segment of each token; 0 for padding, which attends to padding alone."""
    kind: Int[Array, ""]
    """Index of the kind of attention; it may be traced, since layers are scanned."""


def needs_interpreter(mesh: Mesh | None) -> bool:
    """Tell whether there is no TPU; the kernel then runs interpreted, correctly but fast enough only for tests."""
    return (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) != "tpu"


def key_block(length: int, head_bytes: int) -> int:
    """Return the length of a block of keys for rows of ``length`` tokens, which are padded to a multiple of it."""
    most = max(KEYS_AT_ONCE, MAX_KEYS * 256 // max(256, head_bytes))
    count = max(-(-length // most), min(BLOCKS, -(-length // KEYS_AT_ONCE)))
    block = UNIT * -(-length // (UNIT * count))
    return block if block <= KEYS_AT_ONCE else block // KEYS_AT_ONCE * KEYS_AT_ONCE


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Segments,
    *,
    windows: tuple[int, ...],
    cap: float | None,
    mesh: Mesh | None,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Return softmax(q · kᵀ) · v for scaled queries within sequences with increasing positions.

    ``windows`` holds, for each kind of attention, the number of last slots that a query attends to (0: all); they are
    tokens if a sequence is contiguous. Rows are spread over the mesh like a batch and heads over ``tensor``; if an axis
    does not divide them, each of its devices computes all of them. Raises UsageError if JAX's matmul precision for
    bfloat16 is above the default, which the kernel does not support.
    """
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if q.dtype == jnp.bfloat16 and precision not in (None, "default", "bfloat16"):
        raise UsageError(
            f"attention: splash takes bfloat16 at the default matmul precision alone, not at {precision!r}"
        )
    rows, length, _, _ = q.shape
    block = key_block(length, q.shape[-1] * q.dtype.itemsize)
    padding = -length % block

    def heads_first(x: Array) -> Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padding), (0, 0)))

    def kernel_of_window(window: int) -> Callable[..., Array]:
        on_device = partial(_on_device, block=block, window=window, cap=cap, interpret=interpret)
        if mesh is None or mesh.size == 1:
            return on_device
        by_rows = BATCH_AXES if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
        by_heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        heads = PartitionSpec(by_rows, by_heads)
        specs = (heads, heads, heads, PartitionSpec(by_rows))
        # A kernel's output does not declare the axes over which it varies.
        return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)

    # There is one kernel per kind, since the window is compiled in; a traced kind runs only one of them.
    mixed = lax.switch(
        segments.kind, [kernel_of_window(window) for window in windows],
        heads_first(q), heads_first(k), heads_first(v), jnp.pad(segments.ids, ((0, 0), (0, padding))),
    )  # fmt: skip
    return mixed.transpose(0, 2, 1, 3)[:, :length]


def _on_device(
    q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, ids: Array, *, block: int, window: int, cap: float | None,
    interpret: bool,
) -> Array:  # fmt: skip
    """Attend over the rows and heads of one device, with the keys in blocks of ``block``."""
    # Imported here because importing Pallas is slow.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, heads, length, _ = q_BNTH.shape
    queries, at_once = block if block <= MAX_QUERIES else block // 2, min(block, KEYS_AT_ONCE)
    square = length, length
    mask = splash.LocalMask(square, (window - 1, 0), offset=0) if window else splash.CausalMask(square)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        # One kernel computes all gradients, from one product of queries and keys. It rounds and stores the queries'
        # gradients once per block of keys, of which a row has few.
        block_sizes=splash.BlockSizes(
            block_q=queries,
            block_kv=block,
            block_kv_compute=at_once,
            block_q_dkv=queries,
            block_kv_dkv=block,
            block_kv_dkv_compute=at_once,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=CHECKPOINT_NAME,
        interpret=interpret,
    )
    mixed = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, splash.SegmentIds(ids, ids))
    return mixed  # pyright: ignore[reportReturnType]  # the kernel returns a pair only with residuals
