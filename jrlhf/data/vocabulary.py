"""Checks for token ids that have no row in the model's embeddings.

JAX clamps an index beyond an array to its last row, so a token without an embedding would silently pass for another.
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
"""Attribute that carries the limit on a tokenizer with larger ids; it is never saved to the tokenizer's files."""

MAX_TOKENS_NAMED = 5
"""Number of tokens that a message names."""
REMEDY = (
    "resize the embeddings (model.resize_token_embeddings(len(tokenizer))) or use the tokenizer that the model was "
    "made with"
)


def embedding_rows(path: str | Path) -> int | None:
    """Return ``vocab_size`` of the model in a folder or hub id; for an adapter, that of its base model.

    Returns None without a config.json, as in a folder with only a tokenizer; reading the weights reports missing files.
    """
    try:
        folder = model_folder(path, weights=False).base
    except FileNotFoundError:
        return None
    rows = read_json(folder / CONFIG).get("vocab_size") if (folder / CONFIG).is_file() else None
    return rows if isinstance(rows, int) and not isinstance(rows, bool) else None


def limit_vocabulary(tokenizer: Tokenizer, rows: int | None) -> None:
    """Limit a tokenizer's texts to the model's ``rows`` embeddings, if it has larger ids."""
    if rows is not None and max(tokenizer.get_vocab().values(), default=0) >= rows:
        setattr(tokenizer, _ATTRIBUTE, rows)


def vocabulary_limit(tokenizer: Tokenizer) -> int | None:
    """Return the number of the model's embeddings if the tokenizer has larger ids, else None."""
    return vars(tokenizer).get(_ATTRIBUTE)


def check_roles(tokenizer: Tokenizer, roles: Mapping[str, int | None], *, where: str) -> None:
    """Raise ``DataError`` if the model has no embedding for a token with a role, such as the EOS."""
    limit = vocabulary_limit(tokenizer)
    beyond = {
        role: token for role, token in roles.items() if limit is not None and token is not None and token >= limit
    }
    if beyond:
        names = ", ".join(f"{role} {_token_names(tokenizer, [token])}" for role, token in beyond.items())
        raise DataError(f"{where}: {names}: {_size_text(tokenizer)}; {REMEDY}")


def check_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> None:
    """Raise ``DataError`` if the model has no embedding for one of these ids."""
    limit = vocabulary_limit(tokenizer)
    if limit is not None and (beyond := sorted({token for token in ids if token >= limit})):
        raise DataError(f"{_token_names(tokenizer, beyond)}: {_size_text(tokenizer)}; {REMEDY}")


def warn_of_spare_tokens(tokenizer: Tokenizer, *, where: str) -> None:
    """Log once which tokens no text may use; some good models have a few such tokens, which are never used."""
    limit = vocabulary_limit(tokenizer)
    if limit is not None:
        beyond = sorted(token for token in tokenizer.get_vocab().values() if token >= limit)
        log.warning("%s: %s: %s; no text may use them", where, _token_names(tokenizer, beyond), _size_text(tokenizer))


def _token_names(tokenizer: Tokenizer, ids: list[int]) -> str:
    names = [f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})" for token in ids[:MAX_TOKENS_NAMED]]
    others = [f"{len(ids) - MAX_TOKENS_NAMED} others"] if len(ids) > MAX_TOKENS_NAMED else []
    return ", ".join([*names, *others])


def _size_text(tokenizer: Tokenizer) -> str:
    return (
        f"beyond the model's embeddings (its vocab_size is {vocabulary_limit(tokenizer)}, the tokenizer has "
        f"{len(tokenizer)} tokens)"
    )
