"""The stop tokens in a model's ``generation_config.json``."""

from pathlib import Path

from jrlhf.models.hf.adapter_folder import base_folder, is_adapter_folder
from jrlhf.models.hf.fields import size
from jrlhf.models.hf.folder import CONFIG, GENERATION_CONFIG, find_folder, read_config, read_json
from jrlhf.system.errors import UsageError


def generation_eos(path: str | Path) -> tuple[int, ...]:
    """Return the stop token ids of ``generation_config.json`` in its order; empty if it names none.

    A PEFT folder without this file uses its base model's. Raises UsageError for an id outside the model's vocabulary.
    """
    folder = find_folder(path, weights=False)
    while is_adapter_folder(folder) and not (folder / GENERATION_CONFIG).is_file():
        folder = base_folder(folder, weights=False)
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return ()
    value = read_json(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    vocabulary = size(read_config(folder), "vocab_size") if (folder / CONFIG).is_file() else None
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise UsageError(f"{file}: eos_token_id: expected a token id or a list of them, found {value!r}")
        if vocabulary is not None and token >= vocabulary:
            raise UsageError(f"{file}: eos_token_id: {token} is not an id of the model's {vocabulary} tokens")
    return tuple(dict.fromkeys(ids))
