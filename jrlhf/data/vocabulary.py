"""The ids that a model has embeddings for, and the tokens of its tokenizer that lie beyond them.

JAX reads the last row of an array where an index is beyond it, so a token without an embedding would pass for another.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from jrlhf.data.errors import DataError
from jrlhf.data.protocol import Tokenizer
from jrlhf.models.hf.adapter_folder import model_folder
from jrlhf.models.hf.folder import CONFIG, read_json

log = logging.getLogger("jrlhf.data")

_ATTRIBUTE = "embedding_rows"
"""Stands on a tokenizer that has ids beyond: whoever gets the tokenizer gets the limit, and no file of it changes."""

SHOWN = 5
"""Tokens that a message names."""
REMEDY = (
    "resize the embeddings (model.resize_token_embeddings(len(tokenizer))) or use the tokenizer that the model was "
    "made with"
)


def embedding_rows(path: str | Path) -> int | None:
    """``vocab_size`` of the model in a folder or hub id, for an adapter of its base model.

    None where there is no such config.json, as beside a tokenizer alone: who reads the weights says what is missing.
    """
    try:
        folder = model_folder(path, weights=False).base
    except FileNotFoundError:
        return None
    rows = read_json(folder / CONFIG).get("vocab_size") if (folder / CONFIG).is_file() else None
    return rows if isinstance(rows, int) and not isinstance(rows, bool) else None


def limit_vocabulary(tokenizer: Tokenizer, rows: int | None) -> None:
    """Hold all texts of a tokenizer to the model's ``rows`` embeddings; nothing where it has no id beyond them."""
    if rows is not None and max(tokenizer.get_vocab().values(), default=0) >= rows:
        setattr(tokenizer, _ATTRIBUTE, rows)


def vocabulary_limit(tokenizer: Tokenizer) -> int | None:
    """The number of the model's embeddings where the tokenizer has ids beyond them, else None."""
    return vars(tokenizer).get(_ATTRIBUTE)


def check_roles(tokenizer: Tokenizer, roles: Mapping[str, int | None], *, where: str) -> None:
    """``DataError`` for a token with a role, such as the EOS, that the model has no embedding for."""
    limit = vocabulary_limit(tokenizer)
    beyond = {
        role: token for role, token in roles.items() if limit is not None and token is not None and token >= limit
    }
    if beyond:
        named = ", ".join(f"{role} {_spelt(tokenizer, [token])}" for role, token in beyond.items())
        raise DataError(f"{where}: {named}: {_numbers(tokenizer)}; {REMEDY}")


def check_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> None:
    """``DataError`` for a text with a token that the model has no embedding for."""
    limit = vocabulary_limit(tokenizer)
    if limit is not None and (beyond := sorted({token for token in ids if token >= limit})):
        raise DataError(f"{_spelt(tokenizer, beyond)}: {_numbers(tokenizer)}; {REMEDY}")


def warn_of_spare_tokens(tokenizer: Tokenizer, *, where: str) -> None:
    """Say once which tokens no text may use: some good models have a few, which none of theirs does."""
    limit = vocabulary_limit(tokenizer)
    if limit is not None:
        beyond = sorted(token for token in tokenizer.get_vocab().values() if token >= limit)
        log.warning("%s: %s: %s; no text may use them", where, _spelt(tokenizer, beyond), _numbers(tokenizer))


def _spelt(tokenizer: Tokenizer, ids: list[int]) -> str:
    names = [f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})" for token in ids[:SHOWN]]
    others = [f"{len(ids) - SHOWN} others"] if len(ids) > SHOWN else []
    return ", ".join([*names, *others])


def _numbers(tokenizer: Tokenizer) -> str:
    return (
        f"beyond the model's embeddings (its vocab_size is {vocabulary_limit(tokenizer)}, the tokenizer has "
        f"{len(tokenizer)} tokens)"
    )
