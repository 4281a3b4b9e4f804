"""Model FLOPs and bytes against a loop over every token, layer and key."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models import ArchConfig, decoder_fns
from jrlhf.models.cache import CacheKind
from jrlhf.models.flops import decode_bytes, forward_flops
from jrlhf.models.functions import abstract_params, init_params

LOCAL = {"window": 3, "local_layers": (True, False, True)}
GPT2 = {"gated_mlp": False, "norm": "layer", "rope": None}
POSITIONS = np.array([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, -1, -1]], np.int32)


def matrices(arch: ArchConfig) -> int:
    """Weights of all linear maps of the body, by their shapes in the parameter tree."""
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params(arch)["layers"])[0]
    return sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")


def keys_seen(arch: ArchConfig, position: int, layer: int) -> int:
    window = arch.window if arch.local_layers and arch.local_layers[layer] else 0
    return sum(1 for key in range(position + 1) if not window or key > position - window)


@pytest.mark.parametrize("changes", [{}, LOCAL, GPT2])
def test_a_forward_pass_counts_every_multiplication_that_is_needed(arch: ArchConfig, changes: dict[str, Any]) -> None:
    arch = replace(arch, **changes)
    tokens = [int(p) for p in POSITIONS.flat if p >= 0]
    expected = 2 * matrices(arch) * len(tokens) + 2 * arch.vocab_size * arch.hidden_size * 5
    for position in tokens:
        for layer in range(arch.num_layers):
            # Each head: a dot product with every key, and a sum of every value.
            expected += keys_seen(arch, position, layer) * arch.num_heads * 2 * (2 * arch.head_dim)
    assert float(forward_flops(arch, POSITIONS, logits=5)) == expected


@pytest.mark.parametrize(("kv_cache", "number", "vector"), [("compute", 2, 0), ("int8", 1, 4)])
@pytest.mark.parametrize("changes", [{}, LOCAL])
def test_decoding_reads_all_weights_a_step_and_the_cache_of_each_token(
    arch: ArchConfig, changes: dict[str, Any], kv_cache: CacheKind, number: int, vector: int
) -> None:
    """A number of the cache takes as many bytes as a weight, or one, and then each vector has a scale of four."""
    arch = replace(arch, **changes)
    weights = matrices(arch) + arch.vocab_size * arch.hidden_size
    cached = sum(
        keys_seen(arch, int(p), layer) * 2 * arch.num_kv_heads * (number * arch.head_dim + vector)
        for p in POSITIONS.flat
        if p >= 0
        for layer in range(arch.num_layers)
    )
    found = decode_bytes(arch, POSITIONS, steps=4, itemsize=2, kv_cache=kv_cache)
    assert float(found) == 2 * 4 * weights + cached


def test_xla_counts_the_same_for_a_forward_pass_over_full_attention(arch: ArchConfig) -> None:
    """XLA multiplies the whole square of attention, and counts what is element by element too."""
    arch = replace(arch, num_layers=1, intermediate_size=512, hidden_size=256, head_dim=64)
    rows, length = 2, 32
    fns = decoder_fns(arch, dtype="float32", remat=False)
    tokens, mask = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), jnp.bool_)
    params = init_params(arch, jax.random.key(0))
    counted = jax.jit(fns.apply_fn).lower(params, tokens, mask).compile().cost_analysis()["flops"]
    positions = np.tile(np.arange(length), (rows, 1))
    model = float(forward_flops(arch, positions, logits=rows * length))
    unseen = rows * arch.num_heads * 4 * arch.head_dim * (length * length - length * (length + 1) // 2)
    assert model + unseen == pytest.approx(counted, rel=0.05)
