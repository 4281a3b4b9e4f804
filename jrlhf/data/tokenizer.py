"""Loading of tokenizers, choice of a pad token that is not the EOS, and the tokens that end an answer."""

import logging
from pathlib import Path
from typing import Any

from jrlhf.data.errors import DataError
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.tokenizer_errors import failure_reason, unreadable_sentencepiece
from jrlhf.data.vocabulary import (
    check_roles,
    embedding_rows,
    limit_vocabulary,
    vocabulary_limit,
    warn_of_spare_tokens,
)
from jrlhf.models.hf.adapter_folder import find_tokenizer
from jrlhf.models.hf.generation import generation_eos
from jrlhf.system.environment import quiet_transformers

log = logging.getLogger("jrlhf.data")

PAD_CANDIDATES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
NUL_BYTE = ("<0x00>", "Ā")
"""Tokens of the byte 0 in Llama's and GPT-2's vocabularies; no valid text contains it."""


def load_tokenizer(path: str) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder or hub id; remote code never runs.

    A PEFT folder without a tokenizer uses that of its base model. Without a pad token other than the EOS, another
    special token pads and the log names it: with pad == EOS other libraries mask the EOS and the model never learns to
    stop. Tokens beyond the embeddings of the folder's model are a DataError if they are the pad, EOS, BOS or end of
    turn, and a warning otherwise.
    """
    tokenizer = read_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no EOS token, so no answer could end; set eos_token")
    limit_vocabulary(tokenizer, embedding_rows(path))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_token(tokenizer, path)
        log.warning("%s: no pad token apart from EOS; padding with %r", path, tokenizer.pad_token)
    if vocabulary_limit(tokenizer) is not None:
        roles = {"EOS": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id, "BOS": tokenizer.bos_token_id}
        check_roles(tokenizer, roles | {"end of turn": end_of_turn(tokenizer)}, where=path)
        warn_of_spare_tokens(tokenizer, where=path)
    return tokenizer


def read_tokenizer(path: str) -> Any:
    """Read the transformers tokenizer of a folder or hub id unchanged; it may lack what a ``Tokenizer`` has."""
    quiet_transformers()
    try:
        folder = find_tokenizer(path)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path}: no tokenizer: {str(error).removeprefix(f'{path}: ')}") from error
    if problem := unreadable_sentencepiece(folder):
        raise DataError(f"{path}: no tokenizer: {problem}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # from a missing file, bad JSON or the Rust library
        raise DataError(f"{path}: no tokenizer: {failure_reason(folder, error)}") from error


def tokenizer_folder(tokenizer: Tokenizer) -> Path | None:
    """Return the folder that a tokenizer was read from; None for one that was built in memory."""
    name = tokenizer.name_or_path
    return Path(name) if name and Path(name).is_dir() else None


def _spare_token(tokenizer: Tokenizer, path: str) -> str:
    """Choose a pad token that ends no answer and is rare in texts.

    Masks here go by position, so any token could pad, but other libraries mask by token.
    """
    limit, stops = vocabulary_limit(tokenizer), stop_token_ids(tokenizer, ())
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if limit is None or i < limit}
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    for token in (*PAD_CANDIDATES, tokenizer.unk_token, *added, *NUL_BYTE):
        if token in vocabulary and vocabulary[token] not in stops:
            return token
    raise DataError(f"{path}: the tokenizer has no token to pad with: set pad_token to one that is not its EOS")


def stop_token_ids(tokenizer: Tokenizer, extra: tuple[str, ...], *, option: str = "stop") -> tuple[int, ...]:
    """Return the ids of the tokens that end an answer.

    They are the EOS, the chat template's end of an assistant turn, the ``eos_token_id`` of the
    ``generation_config.json`` beside the tokenizer, and the tokens named in ``extra``. DataError, which
    names ``option``, for one of ``extra`` that the tokenizer or the model does not know.
    """
    vocabulary = tokenizer.get_vocab()
    for token in extra:
        if token not in vocabulary:
            raise DataError(f"{option}: {token!r} is not a token of the tokenizer")
        check_roles(tokenizer, {"stop token": vocabulary[token]}, where=option)
    folder = tokenizer_folder(tokenizer)
    generation_ids = () if folder is None else generation_eos(folder)
    ids = [tokenizer.eos_token_id, end_of_turn(tokenizer), *generation_ids, *(vocabulary[token] for token in extra)]
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None))


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Return the special token that the chat template writes after an answer; None without template or token."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template is a user's program and may raise anything
        reason = str(error) or type(error).__name__
        raise DataError(f"the tokenizer's chat template refuses a question and its answer: {reason}") from error
    after = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"]
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in after if token in specials), None)
