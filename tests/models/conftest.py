"""Tiny random checkpoints, written by transformers itself where torch is there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models import ArchConfig, Rope

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "smollm2": {
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
    },
    "llama3": {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "hidden_act": "gelu"},
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def arch() -> ArchConfig:
    """Grouped queries and odd sizes, for tests that need no checkpoint."""
    return ArchConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=64,
        norm_eps=1e-5,
        rope=Rope(kind="default", theta=10000.0),
        activation="silu",
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        tie_embeddings=True,
    )


@pytest.fixture(scope="session")
def spread() -> Callable[[Any], Any]:
    """Untrained parameters with five times the usual spread (not norms and biases), to make differences show."""
    return lambda params: jax.tree.map(lambda x: x * 5.0 if float(jnp.std(x)) > 0.0 else x, params)


@pytest.fixture(scope="session")
def write_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """``(variant, reward=False, dtype="float32", **save) -> (folder, torch model)``, biases and norms random too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def write(variant: str, *, reward: bool = False, dtype: str = "float32", **save: Any) -> tuple[Path, Any]:
        config = transformers.LlamaConfig(**SIZES | VARIANTS[variant])
        kind = transformers.LlamaForCausalLM
        if reward:
            config.num_labels = 1
            kind = transformers.LlamaForSequenceClassification
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
        model = model.to(getattr(torch, dtype))
        folder = tmp_path_factory.mktemp(variant)
        model.save_pretrained(folder, **save)
        return folder, model

    return write


@pytest.fixture
def padded() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same three sequences, of 9, 4 and 6 tokens, padded on either side; and the first of them alone."""
    rng = np.random.default_rng(0)
    lengths, width = (9, 4, 6), 9
    rows = [rng.integers(1, SIZES["vocab_size"], n).astype(np.int32) for n in lengths]
    batches = {"none": (rows[0][None], np.ones((1, width), bool))}
    for side in ("left", "right"):
        tokens, mask = np.zeros((3, width), np.int32), np.zeros((3, width), bool)
        for place, row in enumerate(rows):
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            tokens[place, where], mask[place, where] = row, True
        batches[side] = (tokens, mask)
    return batches
