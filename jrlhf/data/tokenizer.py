"""The tokenizer of a model folder, with a pad token that is not its EOS, and the tokens that end an answer."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jrlhf.data.errors import DataError
from jrlhf.models.adapter_folder import VOCABULARIES, tokenizer_folder
from jrlhf.models.hf import CONFIG, TOKENIZER_FILES, read_json

log = logging.getLogger("jrlhf.data")

Tokenizer = Any
"""A transformers tokenizer; the library is imported only when one is loaded."""

PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
NUL_BYTE = ("<0x00>", "Ā")
"""The byte 0, as Llama's and GPT-2's vocabularies write it: no text that is let in holds one."""


def load_tokenizer(path: str) -> Tokenizer:
    """From a Hugging Face folder or a hub id; never with code of its own. A PEFT folder without one has its base's.

    Where there is no pad token, or it is the EOS, another special token takes its place and the log says which: with
    pad == EOS other libraries mask the EOS away and the model never learns to stop.
    """
    # Only tokenizers are wanted; that PyTorch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        folder = tokenizer_folder(path)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path}: no tokenizer: {str(error).removeprefix(f'{path}: ')}") from error
    if problem := _unreadable_sentencepiece(folder):
        raise DataError(f"{path}: no tokenizer: {problem}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a missing file, JSON, the Rust library's own
        raise DataError(f"{path}: no tokenizer: {_reason(folder, error)}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no EOS token, so no answer could end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_token(tokenizer, path)
        log.warning("%s: no pad token apart from EOS; padding with %r", path, tokenizer.pad_token)
    return tokenizer


def _unreadable_sentencepiece(folder: Path) -> str | None:
    """What to do about a tokenizer that is in sentencepiece's format alone, without the libraries that read it."""
    file = folder / "tokenizer.model"
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")) or not file.is_file():
        return None
    with file.open("rb") as opened:
        # A protocol buffer begins with the tag of its first field; tiktoken's files of the same name are text.
        if opened.read(1) != b"\n":
            return None
    if all(_installed(name) for name in ("sentencepiece", "google.protobuf")):
        return None
    convert = f"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')"
    return (
        "there is only tokenizer.model, in sentencepiece's format: pip install sentencepiece protobuf; or convert it "
        f'once where they are installed: python -c "{convert}"'
    )


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _reason(folder: Path, error: Exception) -> str:
    """Why a folder gives no tokenizer: the file that is missing or broken, else what transformers says, in one line."""
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    for name in (name for name in names if name.endswith(".json") and name in (CONFIG, *TOKENIZER_FILES)):
        try:
            read_json(folder / name)
        except ValueError as broken:
            return str(broken)
    said = " ".join(str(error).split()) or type(error).__name__
    if "tokenizer.json" in names:
        return f"{folder / 'tokenizer.json'} cannot be read: {type(error).__name__}: {said}"
    if "vocab.json" in names and "merges.txt" not in names:
        return f"{folder} has vocab.json without merges.txt, and no tokenizer.json"
    if not any(name in names for name in VOCABULARIES):
        listed = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" or "nothing"
        return (
            f"{folder} holds {listed}: no tokenizer.json, nor vocab.json and merges.txt, nor tokenizer.model; "
            "copy the tokenizer's files from the model that it was trained from"
        )
    return said


def _spare_token(tokenizer: Tokenizer, path: str) -> str:
    """Masks go by position, so any token may pad; but one that ends answers, or stands in texts, is lost elsewhere."""
    known, end = tokenizer.get_vocab(), end_of_turn(tokenizer)
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    for token in (*PADS, tokenizer.unk_token, *added, *NUL_BYTE):
        if token in known and known[token] not in (tokenizer.eos_token_id, end):
            return token
    raise DataError(f"{path}: the tokenizer has no token to pad with: set pad_token to one that is not its EOS")


def stop_token_ids(tokenizer: Tokenizer, extra: tuple[str, ...]) -> tuple[int, ...]:
    """What ends an answer: EOS, the chat template's end of an assistant turn, and the tokens named in ``extra``."""
    known = tokenizer.get_vocab()
    for token in extra:
        if token not in known:
            raise DataError(f"sampling.stop: {token!r} is not a token of this tokenizer")
    found = [tokenizer.eos_token_id, end_of_turn(tokenizer), *(known[token] for token in extra)]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts after an assistant's answer; None without template or token."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # whatever the template raises: it is somebody's program
        reason = str(error) or type(error).__name__
        raise DataError(f"the tokenizer's chat template refuses a question and its answer: {reason}") from error
    after = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"]
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in after if token in specials), None)
