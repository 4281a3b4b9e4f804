"""Converts a Llama in a GGUF file, and its tokenizer, to a Hugging Face folder. Needs the package gguf."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from scripts.build_assets import rope_half_split

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of Llama's tensors, with Hugging Face's names."""


def hf_tensor(name: str, weight: np.ndarray, *, heads: int, kv_heads: int) -> tuple[str, np.ndarray]:
    """Return Hugging Face's name and row order of a GGUF tensor; llama.cpp rotates neighbouring rows of q and k
    together."""
    layer, stem = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
    turned = {"attn_q": heads, "attn_k": kv_heads}
    if stem in turned:
        weight = rope_half_split(weight, turned[stem])
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{NAMES[stem]}.weight", np.ascontiguousarray(weight, np.float32)


def hf_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` from the metadata of GGUF."""
    llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    heads, hidden = llama["attention.head_count"], llama["embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 1 / hidden**0.5,
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.3g}"),  # GGUF stores a float32
        "rope_scaling": None,
        "rope_theta": llama["rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": llama["vocab_size"],
    }


def convert(gguf_file: Path, tokenizer: Path, out: Path) -> None:
    """Write a GGUF Llama and its ``tokenizer.json`` as a Hugging Face folder; the config comes last and marks
    completion."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = hf_config(fields)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = dict(
        hf_tensor(t.name, dequantize(t.data, t.tensor_type), heads=heads, kv_heads=kv_heads) for t in reader.tensors
    )
    ids = {name: config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    tokens = fields["tokenizer.ggml.tokens"]
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": fields["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            **{f"{name}_token": tokens[token] for name, token in ids.items()},
        },
    )
    write_json(out / "generation_config.json", {f"{name}_token_id": token for name, token in ids.items()})
    write_json(out / "config.json", config)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
