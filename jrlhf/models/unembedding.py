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
from jrlhf.core.logprobs import next_token_gradient, normaliser
from jrlhf.models.attention import soft_cap
from jrlhf.models.linear import input_gradient, kernel_gradient, product
from jrlhf.models.token_slices import token_slices
from jrlhf.parallel.mesh import AXES
from jrlhf.parallel.platforms import barrier_on_cpu

BY_TOKEN = PartitionSpec(AXES)


class LMHead(NamedTuple):
    """The settings of an LM head, without its weights."""

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


class Figures(NamedTuple):
    """The results of the forward pass, by token."""

    logprobs: Float[Array, "n"]
    entropy: Float[Array, "n"]
    largest: Float[Array, "n"]
    log_z: Float[Array, "n"]
    """See ``core.logprobs.normaliser``; not 0 where a token is not requested."""


class Gradients(NamedTuple):
    """The inputs of the backward pass, by token; without a gradient of the entropy both of its fields are None."""

    largest: Float[Array, "n"]
    log_z: Float[Array, "n"]
    d_logprobs: Float[Array, "n"]
    entropy: Float[Array, "n"] | None
    d_entropy: Float[Array, "n"] | None


def _primal(head: LMHead, *args: Any) -> Any:
    return _outputs(head, *args)[0][:2]


def _outputs(head: LMHead, kernel: Array, hidden: Array, targets: Array, requested: Array | None) -> Any:
    out_specs = BY_TOKEN, PartitionSpec(None, AXES)
    return _on_devices(head, _forward_on_device, out_specs)(kernel, hidden, targets, requested)


def _forward(head: LMHead, *primals: Any) -> Any:
    args = jax.custom_derivatives.custom_vjp_primal_tree_values(primals)
    figures, logits = _outputs(head, *args)
    return figures[:2], (args, logits, figures)


def _backward(head: LMHead, saved: Any, gradients: tuple[Any, Any]) -> Any:
    args, logits, figures = saved
    d_logprobs, d_entropy = (None if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in gradients)
    d_logprobs = jnp.zeros_like(figures.logprobs) if d_logprobs is None else d_logprobs
    # Where nothing is learnt from the entropy, as in SFT, nobody reads it, and it is not computed in either direction.
    entropy = None if d_entropy is None else figures.entropy
    gradients_of_tokens = Gradients(figures.largest, figures.log_z, d_logprobs, entropy, d_entropy)
    on_devices = _on_devices(head, _backward_on_device, (head.spec, BY_TOKEN))
    return *on_devices(*args, logits, gradients_of_tokens), None, None


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
) -> tuple[Figures, Array | None]:
    """Return the figures of each token, and the logits if they are few enough to be kept for the backward pass."""
    kernel = _gathered(head, kernel, hidden.dtype)
    most = _most_tokens(head, kernel)
    slices, keep = token_slices(len(targets), requested, most=most), len(targets) <= most

    def compute(hidden: Array, targets: Array) -> Any:
        logits = _logits(head, kernel, hidden)
        return _figures(head, logits, targets), logits if keep else None

    def skip(*piece: Array) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, *piece))

    def visit(start: Array, piece: tuple[Array, ...]) -> tuple[Array, Any]:
        return start + slices.size, slices.apply(start, compute, skip, *piece)

    _, (figures, logits) = lax.scan(visit, jnp.int32(0), tuple(map(slices.split, (hidden, targets))))
    figures = Figures(*map(slices.joined, figures))
    if requested is not None:
        logprobs, entropy = (jnp.where(requested, x, 0.0) for x in figures[:2])
        figures = figures._replace(logprobs=logprobs, entropy=entropy)
    return figures, logits


def _backward_on_device(
    head: LMHead, kernel: Array, hidden: Array, targets: Array, requested: Array | None, logits: Array | None,
    gradients: Gradients,
) -> tuple[Array, Array]:  # fmt: skip
    """Return the gradients of the kernel's part and of the hidden states."""
    dtype = kernel.dtype
    kernel = _gathered(head, kernel, hidden.dtype)
    slices = token_slices(len(targets), requested, most=_most_tokens(head, kernel))

    def compute(d_kernel: Array, hidden: Array, targets: Array, logits: Array | None, gradients: Gradients) -> Any:
        logits = _logits(head, kernel, hidden) if logits is None else logits
        d_logits = barrier_on_cpu(_logits_gradient(head, logits, targets, gradients).astype(hidden.dtype))
        d_kernel = d_kernel + kernel_gradient(hidden, d_logits, jnp.float32, axis=int(head.tied))
        return d_kernel, input_gradient(d_logits, kernel, axis=int(head.tied))

    def skip(d_kernel: Array, hidden: Array, *_: Any) -> Any:
        return d_kernel, jnp.zeros_like(hidden)

    def visit(carry: tuple[Array, Array], piece: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        start, d_kernel = carry
        d_kernel, d_hidden = slices.apply(start, compute, skip, d_kernel, *piece)
        return (start + slices.size, d_kernel), d_hidden

    if requested is not None:
        # What is not requested is 0 whatever the weights are, also where it shares a slice.
        d_logprobs, d_entropy = jax.tree.map(
            lambda x: jnp.where(requested, x, 0.0), (gradients.d_logprobs, gradients.d_entropy)
        )
        gradients = gradients._replace(d_logprobs=d_logprobs, d_entropy=d_entropy)
    hidden, targets, gradients = jax.tree.map(slices.split, (hidden, targets, gradients))
    start = jnp.int32(0), jnp.zeros(kernel.shape, jnp.float32)
    (_, d_kernel), d_hidden = lax.scan(visit, start, (hidden, targets, logits, gradients))
    return _summed(head, d_kernel).astype(dtype), slices.joined(d_hidden)


def _most_tokens(head: LMHead, kernel: Array) -> int:
    """Return the number of tokens whose logits may be in memory."""
    return max(1, head.logits_at_once // kernel.shape[0 if head.tied else 1])


def _logits(head: LMHead, kernel: Array, hidden: Array) -> Array:
    # XLA for CPU would fuse the product with the softmax that follows, which takes twice as long.
    return barrier_on_cpu(product(hidden, kernel, jnp.float32, axis=int(head.tied)))


def _figures(head: LMHead, logits: Array, targets: Array) -> Figures:
    """Return the figures of tokens from the products with the LM head."""
    capped = soft_cap(logits, head.softcap)
    outputs = next_token_logprobs(capped, targets, temperature=head.temperature)
    return Figures(*outputs, *normaliser(capped, temperature=head.temperature))


def _logits_gradient(head: LMHead, logits: Array, targets: Array, gradients: Gradients) -> Array:
    """Return the gradient of the products with the LM head."""
    capped = soft_cap(logits, head.softcap)
    gradient = next_token_gradient(capped, targets, *gradients, temperature=head.temperature)
    return gradient if head.softcap is None else gradient * (1.0 - jnp.square(capped / head.softcap))


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
