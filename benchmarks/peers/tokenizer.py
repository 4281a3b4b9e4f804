"""Tokenizers whose words are the token numbers: a prompt's length in tokens is its number of words."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD, EOS = 0, 1


def make_tokenizer(vocabulary: int, **options: str):
    """For transformers; token i is the word ``ti``, 0 pads and 1 ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=f"t{PAD}", eos_token=f"t{EOS}", unk_token="t2", **options
    )


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    make_tokenizer(vocabulary).save_pretrained(folder)


def words(tokens: Iterable[int]) -> str:
    """The text that is tokenised to these tokens."""
    return " ".join(f"t{token}" for token in tokens)


class Numbers:
    """A tokenizer of Tunix's form, whose text is the token numbers."""

    def encode(self, text: str, **options: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, numbers: Any, **options: Any) -> str:
        return " ".join(str(int(number)) for number in numbers)

    def bos_id(self) -> int:
        return PAD

    def eos_id(self) -> int:
        return EOS

    def pad_id(self) -> int:
        return PAD
