"""Tiny models of random weights with byte-level tokenizers, as Hugging Face folders."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.checkpoints import GPT2_SIZES, write_checkpoint

SPECIALS = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = None, **tokens: Any) -> PreTrainedTokenizerFast:
    """A token a byte, behind ``SPECIALS``: a text's length in tokens is its own."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIALS))
    tokens = {"eos_token": "<eos>", "pad_token": "<pad>"} | tokens
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def gpt2_folder(folder: Path, *, reward: bool = False, positions: int = 64, vocab_size: int | None = None) -> str:
    """A GPT-2, or a reward model of it, as jrlhf exports one."""
    tokenizer = byte_tokenizer(CHATML)
    config = GPT2_SIZES | {"model_type": "gpt2", "n_layer": 1, "n_positions": positions, "pad_token_id": 0}
    config |= {"vocab_size": vocab_size or len(tokenizer)}
    if reward:
        config |= {
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": {"0": "LABEL_0"},
            "num_labels": 1,
            "jrlhf": {"score_at": "stop_token"},
        }
    write_checkpoint(folder, config)
    tokenizer.save_pretrained(folder)
    return str(folder)
