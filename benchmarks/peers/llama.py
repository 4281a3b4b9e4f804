"""The Llama of Hugging Face's transformers, for the sides that run on torch."""

from typing import Any

from peers.tokenizer import EOS, PAD
from transformers import LlamaConfig


def llama(spec: dict[str, Any], kind: type, **options: Any) -> Any:
    """A model of class ``kind`` with random weights."""
    hidden, layers, heads, kv_heads, ffn, vocabulary, tied = spec["sizes"]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=65536,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **options,
    )
    return kind(config)


def size(*models: Any, trained: bool = False) -> int:
    """Parameters of all models, or the trained ones."""
    return sum(p.numel() for model in models for p in model.parameters() if p.requires_grad or not trained)
