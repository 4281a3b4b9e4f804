"""Explanations of why a folder's tokenizer cannot be read, with what to do about it."""

from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from jrlhf.models.hf.adapter_folder import VOCABULARIES
from jrlhf.models.hf.folder import CONFIG, TOKENIZER_FILES, read_json


def unreadable_sentencepiece(folder: Path) -> str | None:
    """Return advice if the tokenizer exists only in sentencepiece's format and its libraries are missing, else None."""
    file = folder / "tokenizer.model"
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")) or not file.is_file():
        return None
    with file.open("rb") as opened:
        # A sentencepiece file is a protocol buffer, which begins with a tag; tiktoken's files of this name are text.
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
    except (ModuleNotFoundError, ValueError):
        return False


def failure_reason(folder: Path, error: Exception) -> str:
    """Explain in one line why a folder's tokenizer cannot be read: a missing or broken file, or the library's error."""
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    for name in (name for name in names if name.endswith(".json")):
        if not any(fnmatch(name, pattern) for pattern in (CONFIG, *TOKENIZER_FILES)):
            continue
        try:
            read_json(folder / name)
        except ValueError as broken:
            return str(broken)
    message = " ".join(str(error).split()) or type(error).__name__
    if "tokenizer.json" in names:
        return f"{folder / 'tokenizer.json'} cannot be read: {type(error).__name__}: {message}"
    if "vocab.json" in names and "merges.txt" not in names:
        return f"{folder} has vocab.json without merges.txt, and no tokenizer.json"
    if not any(name in names for name in VOCABULARIES):
        names_text = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" or "nothing"
        return (
            f"{folder} holds {names_text}: no tokenizer.json, nor vocab.json and merges.txt, nor tokenizer.model; "
            "copy the tokenizer's files from the base model"
        )
    return message
