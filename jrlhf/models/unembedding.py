"""Log-probs from the last hidden states, with the logits of only a slice of tokens in memory at a time.

Every device reads its own tokens. It gathers the LM head once, in the compute dtype, sums the head's gradient over its
slices, and sends that once, in float32. Left to XLA's partitioner, each slice would gather and send the head again.

Shape suffixes: n tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jrlhf.core import align_to_tokens, next_token_logprobs
from jrlhf.core.logprobs import next_token_gradient
from jrlhf.models.attention import soft_cap
from jrlhf.models.linear import input_gradient, kernel_gradient, product
from jrlhf.parallel.mesh import AXES
from jrlhf.parallel.platforms import barrier_on_cpu

MAX_SLICES = 8
"""Maximum number of slices when only some tokens need logits. More slices waste less computation."""

MIN_SLICE_TOKENS = 256
"""Minimum number of tokens per slice, since each slice adds once to the gradient of the LM head."""

TOKEN_MULTIPLE = 128
"""Multiple of the tokens per slice where there are as many: TPUs and GPUs pad a product to it."""

BY_TOKEN = PartitionSpec(AXES)


class LMHead(NamedTuple):
    """How hidden states become log-probs, apart from the weights."""

    tied: bool
    """Whether the kernel is the embedding, ``[V, D]``, instead of ``[D, V]``."""
    softcap: float | None
    """Soft cap of the logits."""
    logits_at_once: int
    """Maximum number of logits in memory on a device."""
    mesh: Mesh | None
    """Mesh over which the tokens are spread; None: one device."""
    spec: PartitionSpec
    """Sharding of the kernel over the mesh."""
    temperature: float


class Work(NamedTuple):
    """The tokens of a device in the order in which they are computed, and how many of them are requested."""

    order: Int[Array, "n"] | None
    """None: all tokens, in their own order."""
    requested: Int[Array, ""]


def hidden_logprobs(
    head: LMHead,
    kernel: Float[Array, "I O"],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    where: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return log-probs and entropy, aligned to ``tokens``; tokens outside the mask ``where`` (None: none) get 0.

    The requested tokens of a device are computed first, and slices without any are skipped. The backward pass computes
    logits again if they were more than ``head.logits_at_once``.
    """
    rows, length = tokens.shape
    # The target of position t is token t + 1; the alignment drops the target of the last position.
    targets = jnp.roll(tokens, -1, axis=1)
    requested = None if where is None else jnp.roll(where, -1, axis=1).at[:, -1].set(False)
    devices = 1 if head.mesh is None else head.mesh.size

    def flat(x: Array) -> Array:
        x = x.reshape(rows * length, *x.shape[2:])
        return jnp.pad(x, ((0, -len(x) % devices),) + ((0, 0),) * (x.ndim - 1))

    outputs = _logprobs(head, kernel, flat(hidden), flat(targets), None if requested is None else flat(requested))
    logprobs, entropy = (align_to_tokens(x[: rows * length].reshape(rows, length)) for x in outputs)
    return logprobs, entropy


class Gradients(NamedTuple):
    """What the backward pass reads of each token; without a gradient of the entropy both of its fields are None."""

    logprobs: Float[Array, "n"]
    entropy: Float[Array, "n"] | None
    of_entropy: Float[Array, "n"] | None


def _primal(head: LMHead, *args: Any) -> Any:
    return _outputs(head, *args)[0]


def _outputs(head: LMHead, kernel: Array, hidden: Array, targets: Array, requested: Array | None) -> Any:
    out_specs = (BY_TOKEN, BY_TOKEN), PartitionSpec(None, AXES)
    return _on_devices(head, _forward_on_device, out_specs)(kernel, hidden, targets, requested)


def _forward(head: LMHead, *primals: Any) -> Any:
    args = jax.custom_derivatives.custom_vjp_primal_tree_values(primals)
    outputs, logits = _outputs(head, *args)
    return outputs, (args, logits, outputs[1])


def _backward(head: LMHead, saved: Any, gradients: tuple[Any, Any]) -> Any:
    args, logits, entropy = saved
    zero = [isinstance(x, jax.custom_derivatives.SymbolicZero) for x in gradients]
    of_logprobs = jnp.zeros_like(entropy) if zero[0] else gradients[0]
    # Where nothing is learnt from the entropy, as in SFT, nobody reads it, and it is not computed in either direction.
    wanted = Gradients(of_logprobs, *((None, None) if zero[1] else (entropy, gradients[1])))
    on_devices = _on_devices(head, _backward_on_device, (head.spec, BY_TOKEN))
    return *on_devices(*args, logits, wanted), None, None


_logprobs: Any = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_devices(head: LMHead, function: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """Run ``function`` on the tokens of each device and its part of the kernel."""
    function = partial(function, head)
    if head.mesh is None or head.mesh.size == 1:
        return function
    specs = head.spec, BY_TOKEN, BY_TOKEN, BY_TOKEN, PartitionSpec(None, AXES), BY_TOKEN

    def call(*args: Any) -> Any:
        # The loops start from zeros, which do not declare the axes over which they will vary.
        in_specs = specs[: len(args)]
        return jax.shard_map(function, mesh=head.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return call


def _forward_on_device(
    head: LMHead, kernel: Array, hidden: Array, targets: Array, requested: Array | None
) -> tuple[tuple[Array, Array], Array | None]:
    """Return log-probs and entropy, and the logits if they are few enough to be kept for the backward pass."""
    kernel = _gathered(head, kernel, hidden.dtype)
    size, slices, keep = _slices(head, len(targets), _vocabulary(head, kernel), requested)
    work = _work(requested, len(targets))

    def compute(hidden: Array, targets: Array) -> Any:
        logits = _logits(head, kernel, hidden)
        return *_figures(head, logits, targets), logits if keep else None

    def skip(*piece: Array) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, *piece))

    def visit(start: Array, piece: tuple[Array, ...]) -> tuple[Array, Any]:
        return start + size, _while_requested(work, start, compute, skip, *piece)

    pieces = tuple(_split(_first(work, x), size, slices) for x in (hidden, targets))
    _, (logprobs, entropy, logits) = lax.scan(visit, jnp.int32(0), pieces)
    logprobs, entropy = (_back(work, _joined(x, len(targets))) for x in (logprobs, entropy))
    return (logprobs, entropy), logits


def _backward_on_device(
    head: LMHead, kernel: Array, hidden: Array, targets: Array, requested: Array | None, logits: Array | None,
    gradients: Gradients,
) -> tuple[Array, Array]:  # fmt: skip
    """Return the gradients of the kernel's part and of the hidden states."""
    dtype = kernel.dtype
    kernel = _gathered(head, kernel, hidden.dtype)
    size, slices, _ = _slices(head, len(targets), _vocabulary(head, kernel), requested)
    work = _work(requested, len(targets))

    def compute(d_kernel: Array, hidden: Array, targets: Array, logits: Array | None, gradients: Gradients) -> Any:
        logits = _logits(head, kernel, hidden) if logits is None else logits
        d_logits = barrier_on_cpu(_logits_gradient(head, logits, targets, gradients).astype(hidden.dtype))
        d_kernel = d_kernel + kernel_gradient(hidden, d_logits, jnp.float32, axis=int(head.tied))
        return d_kernel, input_gradient(d_logits, kernel, axis=int(head.tied))

    def skip(d_kernel: Array, hidden: Array, *_: Any) -> Any:
        return d_kernel, jnp.zeros_like(hidden)

    def visit(carry: tuple[Array, Array], piece: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        start, d_kernel = carry
        d_kernel, d_hidden = _while_requested(work, start, compute, skip, d_kernel, *piece)
        return (start + size, d_kernel), d_hidden

    if requested is not None:
        # What is not requested is 0 whatever the weights are, also where it shares a slice.
        gradients = jax.tree.map(lambda x: jnp.where(requested, x, 0.0), gradients)
    pieces = jax.tree.map(lambda x: _split(_first(work, x), size, slices), (hidden, targets, gradients))
    start = jnp.int32(0), jnp.zeros(kernel.shape, jnp.float32)
    (_, d_kernel), d_hidden = lax.scan(visit, start, (*pieces[:2], logits, pieces[2]))
    return _summed(head, d_kernel).astype(dtype), _back(work, _joined(d_hidden, len(targets)))


def _while_requested(
    work: Work, start: Array, compute: Callable[..., Any], skip: Callable[..., Any], *args: Any
) -> Any:
    """Return ``compute(*args)``, or ``skip(*args)`` for a slice at ``start`` that holds no requested token."""
    if work.order is None:
        return compute(*args)
    return lax.cond(start < work.requested, compute, skip, *args)


def _vocabulary(head: LMHead, kernel: Array) -> int:
    return kernel.shape[0 if head.tied else 1]


def _logits(head: LMHead, kernel: Array, hidden: Array) -> Array:
    # XLA for CPU would fuse the product with the softmax that follows, which takes twice as long.
    return barrier_on_cpu(product(hidden, kernel, jnp.float32, axis=int(head.tied)))


def _figures(head: LMHead, logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return log-probs and entropy of the products with the LM head."""
    return next_token_logprobs(soft_cap(logits, head.softcap), targets, temperature=head.temperature)


def _logits_gradient(head: LMHead, logits: Array, targets: Array, gradients: Gradients) -> Array:
    """Return the gradient of the products with the LM head."""
    capped = soft_cap(logits, head.softcap)
    gradient = next_token_gradient(capped, targets, *gradients, temperature=head.temperature)
    return gradient if head.softcap is None else gradient * (1.0 - jnp.square(capped / head.softcap))


def _slices(head: LMHead, tokens: int, vocabulary: int, requested: Array | None) -> tuple[int, int, bool]:
    """Return the tokens per slice, the number of slices, and whether all logits are kept for the backward pass."""
    most = max(1, head.logits_at_once // vocabulary)
    keep = tokens <= most
    if requested is not None:
        most = min(most, max(-(-tokens // MAX_SLICES), MIN_SLICE_TOKENS))
    size = -(-tokens // -(-tokens // most))
    if size < tokens and most >= TOKEN_MULTIPLE:
        size = min(-(-size // TOKEN_MULTIPLE), most // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    return size, -(-tokens // size), keep


def _work(requested: Array | None, tokens: int) -> Work:
    if requested is None:
        return Work(None, jnp.int32(tokens))
    return Work(jnp.argsort(~requested, stable=True).astype(jnp.int32), jnp.sum(requested, dtype=jnp.int32))


def _first(work: Work, x: Array) -> Array:
    """Move the requested tokens of a device to the front."""
    return x if work.order is None else x[work.order]


def _back(work: Work, x: Array) -> Array:
    """Undo ``_first``; what was not requested becomes 0."""
    if work.order is None:
        return x
    x = jnp.where((jnp.arange(len(x)) < work.requested).reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
    return x[jnp.argsort(work.order)]


def _split(x: Array, size: int, slices: int) -> Array:
    padded = jnp.pad(x, ((0, size * slices - len(x)),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(slices, size, *x.shape[1:])


def _joined(x: Array, tokens: int) -> Array:
    return x.reshape(-1, *x.shape[2:])[:tokens]


def _gathered(head: LMHead, kernel: Array, dtype: Any) -> Array:
    """Return the whole kernel in the compute dtype, which halves what is sent, from the part of each device."""
    kernel = kernel.astype(dtype)
    for dimension, axes in enumerate(head.spec if head.mesh is not None and head.mesh.size > 1 else ()):
        if axes is not None:
            kernel = lax.all_gather(kernel, axes, axis=dimension, tiled=True)
    return kernel


def _summed(head: LMHead, gradient: Array) -> Array:
    """Sum the kernel's gradient over all devices, and return the part of this device."""
    if head.mesh is None or head.mesh.size == 1:
        return gradient
    split: set[str] = set()
    for dimension, axes in enumerate(head.spec):
        if axes is not None:
            gradient = lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
            split |= {axes} if isinstance(axes, str) else set(axes)
    return lax.psum(gradient, tuple(axis for axis in AXES if axis not in split))
