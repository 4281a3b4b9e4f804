"""A tokenizer as files: those it came from, byte for byte, but for a pad token that was chosen here."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jrlhf.data.protocol import Tokenizer
from jrlhf.data.tokenizer import read_tokenizer, tokenizer_folder
from jrlhf.models.hf.folder import TOKENIZER_FILES
from jrlhf.models.hf.folder_files import read_files

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that an export has of a tokenizer, by name: its folder's own, so that whatever reads those reads these.

    Where ``load_tokenizer`` chose another pad token, that alone is changed. A tokenizer that comes from no folder, or
    was changed since, is written by transformers.
    """
    folder = tokenizer_folder(tokenizer)
    original = None if folder is None else read_tokenizer(str(folder))
    if folder is None or original is None or not _same(original, tokenizer):
        with TemporaryDirectory() as saved:
            tokenizer.save_pretrained(saved)
            return read_files(Path(saved), ["**/*"])
    files = read_files(folder, TOKENIZER_FILES)
    if original.pad_token == tokenizer.pad_token:
        return files
    return with_pad_token(files, str(tokenizer.pad_token))


def with_pad_token(files: Mapping[str, bytes], token: str) -> dict[str, bytes]:
    """A tokenizer's files with another pad token, which its vocabulary has: the one field, wherever it stands."""
    changed = dict(files)
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if name in files or name == TOKENIZER_CONFIG:
            content: dict[str, Any] = json.loads(files.get(name, b"{}"))
            text = json.dumps(content | {"pad_token": token}, indent=2, ensure_ascii=False) + "\n"
            changed[name] = text.encode()
    return changed


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers differ in no more than their pad token."""
    if one.get_vocab() != other.get_vocab() or one.chat_template != other.chat_template:
        return False
    ours, theirs = ({k: v for k, v in t.special_tokens_map.items() if k != "pad_token"} for t in (one, other))
    return ours == theirs
