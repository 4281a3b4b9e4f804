"""Tiny configs of every family, and checkpoints for them without torch: every number follows from its tensor's name."""

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from safetensors.numpy import save_file

from jrlhf.models import arch_from_hf
from jrlhf.models.functions import abstract_params, abstract_reward_params
from jrlhf.models.hf.families import is_sequence_classification
from jrlhf.models.hf.folder import WEIGHTS, leaf_at, names_of
from jrlhf.models.hf.names import language_model_table, reward_model_table
from jrlhf.models.hf.read import tensor_shape

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
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
GPT2_SIZES = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | {"eos_token_id": 2}
GEMMA_SIZES = SIZES | {"head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 20}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": SIZES | {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "smollm2": SIZES
    | {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
    },
    "llama3": SIZES | {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "linear_rope": SIZES
    | {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    "dynamic_rope": SIZES
    | {
        "model_type": "llama",
        "max_position_embeddings": 6,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    },
    "yarn_rope": SIZES | {"model_type": "llama", "rope_parameters": YARN_ROPE},
    "biases": SIZES
    | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12, "hidden_act": "gelu"},
    "mistral": SIZES | {"model_type": "mistral", "sliding_window": 4, "head_dim": 12},
    "qwen2": SIZES | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_windows": SIZES
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": SIZES | {"model_type": "qwen3", "head_dim": 12},
    "gemma2": GEMMA_SIZES | {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": GEMMA_SIZES
    | {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gpt2": GPT2_SIZES | {"model_type": "gpt2"},
    "gpt2_untied": GPT2_SIZES | {"model_type": "gpt2", "n_inner": 40, "tie_word_embeddings": False},
    "gpt_neox": NEOX_SIZES | {"model_type": "gpt_neox"},
    "gpt_neox_serial": NEOX_SIZES
    | {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}
VARIANTS = tuple(CONFIGS)

MASKED = (9, 4, 6)
"""Lengths of the three test sequences."""


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal with std 0.2, norms around what leaves them as they are."""
    drawn = np.random.default_rng(crc32(name.encode())).standard_normal(shape).astype(np.float32) * np.float32(0.2)
    is_scale = len(shape) == 1 and name.endswith("weight")
    return drawn + np.float32(1.0) if is_scale else drawn


def write_named(folder: Path, variant: str) -> Path:
    """A checkpoint whose tensors are ``values`` of their names."""
    return write_checkpoint(folder, CONFIGS[variant])


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """The same of any config; a reward model where it says ``...ForSequenceClassification``."""
    arch = arch_from_hf(config)
    reward = is_sequence_classification(config, arch)
    shapes, tensors = abstract_reward_params(arch) if reward else abstract_params(arch), {}
    for entry in reward_model_table(arch) if reward else language_model_table(arch):
        shape = leaf_at(shapes, entry.path).shape
        for name in names_of(entry, shapes):
            tensors[name] = values(name, tensor_shape(entry, shape[1:] if entry.stacked else shape))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def padded_batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same three sequences, of 9, 4 and 6 tokens, padded on either side; and the first of them alone."""
    rng, width = np.random.default_rng(0), max(MASKED)
    rows = [rng.integers(1, SIZES["vocab_size"], n).astype(np.int32) for n in MASKED]
    batches = {"none": (rows[0][None], np.ones((1, width), bool))}
    for side in ("left", "right"):
        tokens, mask = np.zeros((3, width), np.int32), np.zeros((3, width), bool)
        for place, row in enumerate(rows):
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            tokens[place, where], mask[place, where] = row, True
        batches[side] = (tokens, mask)
    return batches


SMALL_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": True,
    "hidden_size": 32,
    "intermediate_size": 48,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 61,
}
