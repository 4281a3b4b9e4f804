"""A tokenizer's files for an export: copies of the files it was loaded from, with the pad token set if needed."""

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
    """Return a tokenizer's files for an export, by name: those of its folder, so that the same tools can read them.

    Only the pad token is changed, if ``load_tokenizer`` chose one. For a tokenizer without a folder, or one that was
    changed after loading, transformers writes the files.
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
    """Return a tokenizer's files with another pad token from its vocabulary; only the field ``pad_token`` changes."""
    changed = dict(files)
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if name in files or name == TOKENIZER_CONFIG:
            content: dict[str, Any] = json.loads(files.get(name, b"{}"))
            text = json.dumps(content | {"pad_token": token}, indent=2, ensure_ascii=False) + "\n"
            changed[name] = text.encode()
    return changed


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Tell whether two tokenizers are the same except for their pad token."""
    if one.get_vocab() != other.get_vocab() or one.chat_template != other.chat_template:
        return False
    ours, theirs = ({k: v for k, v in t.special_tokens_map.items() if k != "pad_token"} for t in (one, other))
    return ours == theirs
