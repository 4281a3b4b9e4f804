"""Architectures that are small enough for tests."""

from typing import Any

from jrlhf.models import ArchConfig


def small_arch(**changes: Any) -> ArchConfig:
    """A Llama of two layers with grouped queries, odd sizes and tied embeddings; ``changes`` are its fields."""
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_positions": 64,
        "tie_embeddings": True,
    }
    return ArchConfig(**(sizes | changes))


ONE_LAYER = small_arch(num_layers=1, qkv_bias=True, window=3)
"""Small enough to be trained in a test, with biases that adapters and packing must not lose."""
