"""Small tokenizers of the kinds that differ, and files to load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jrlhf import assets
from jrlhf.config import DataConfig
from jrlhf.data import load_tokenizer
from tests.support.chats import CHATML

CORPUS = ["Hello there, what is the answer? The answer is 42!\n\nHuman: hi\n\nAssistant: Well, hello world.\n"] * 3

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Write = Callable[..., str]


def _byte_level(specials: list[str]) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=specials)
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """``(specials, template=None, **tokens)``: byte-level BPE, as in GPT-2, Llama 3 and SmolLM2; it adds no BOS."""

    def make(specials: list[str], template: str | None = None, **tokens: str) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(specials), **tokens)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chat(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """Byte-level, with a ChatML template whose end of turn is not the EOS."""
    specials = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return make_tokenizer(specials, CHATML, eos_token="<|endoftext|>", pad_token="<pad>")


@pytest.fixture(scope="session")
def metaspace() -> Any:
    """Llama's kind: a BOS, a dummy space before a text, bytes for what is not in the vocabulary."""
    return load_tokenizer(assets.resolve("asset:stories260k"))


@pytest.fixture(scope="session", params=["chat", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``(rows, name="rows.jsonl") -> path``; rows: objects, or the very text or bytes of the file."""

    def write_file(rows: list[Any] | str | bytes, name: str = "rows.jsonl") -> str:
        if isinstance(rows, list):
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = tmp_path / name
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        return str(path)

    return write_file


@pytest.fixture
def config() -> Callable[..., DataConfig]:
    return lambda **changes: DataConfig(**{"max_length": 256, **changes})
