"""PEFT folders without their weights: the base model of an adapter, and the kind of model that both make."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from jrlhf.models.hf.families import CLASSES, arch_from_hf, is_sequence_classification
from jrlhf.models.hf.folder import ADAPTER_CONFIG, find_folder, read_config, read_json
from jrlhf.system.errors import UsageError

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tekken.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files with a tokenizer's vocabulary; a folder without any of them has no tokenizer of its own."""

ModelKind = Literal["language", "reward"]
"""A language model outputs logits; a reward model (...ForSequenceClassification with one label) outputs a score."""


def is_adapter_folder(folder: Path) -> bool:
    """Tell whether the folder holds a PEFT adapter instead of a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> str:
    """Return the folder or hub id of an adapter's base model, as its config names it."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UsageError(f"{folder}: base_model_name_or_path: expected a folder or hub id, found {base!r}")
    return base


def base_folder(folder: Path, *, weights: bool = True) -> Path:
    """Find the base model's folder: relative to the adapter's folder, to the working directory, or on the hub.

    The adapter's ``revision`` is that of its base on the hub.
    """
    base = base_of(folder)
    beside = folder / base
    if beside.is_dir():
        return beside
    revision = read_json(folder / ADAPTER_CONFIG).get("revision")
    if revision is not None and not isinstance(revision, str):
        raise UsageError(f"{folder}: revision: expected a name, found {revision!r}")
    try:
        return find_folder(base, weights=weights, revision=revision or None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: base_model_name_or_path in {ADAPTER_CONFIG}: {error}") from error


def _adapter_chain(folder: Path, *, weights: bool) -> Iterator[Path]:
    """Yield a folder and, while it is an adapter's, the folder of its base, down to a model's folder."""
    visited: list[Path] = []
    while is_adapter_folder(folder):
        if any(folder.samefile(other) for other in visited):
            raise UsageError(f"{folder}: base_model_name_or_path: the adapter is its own base")
        visited.append(folder)
        yield folder
        folder = base_folder(folder, weights=weights)
    yield folder


class ModelFolder(NamedTuple):
    """The folders of a model and its adapters."""

    path: str
    """Folder or hub id from the user."""
    base: Path
    """Folder of the model itself."""
    adapters: tuple[Path, ...]
    """PEFT folders to merge into the model, the innermost first."""


def model_folder(path: str | Path, *, weights: bool = True) -> ModelFolder:
    """Find the folders of a model; without ``weights`` only configs and tokenizers are downloaded from the hub."""
    *adapters, base = _adapter_chain(find_folder(path, weights=weights), weights=weights)
    return ModelFolder(str(path), base, tuple(adapters[::-1]))


def find_tokenizer(path: str | Path) -> Path:
    """Return the folder of a model's tokenizer; an adapter without one uses its base's."""
    folders = _adapter_chain(find_folder(path, weights=False), weights=False)
    return next(f for f in folders if not is_adapter_folder(f) or any((f / name).is_file() for name in VOCABULARIES))


def model_kind(source: ModelFolder) -> ModelKind:
    """Return the kind of a model from its configs."""
    for adapter in source.adapters:
        config = read_json(adapter / ADAPTER_CONFIG)
        saved = config.get("modules_to_save")
        if config.get("task_type") == "SEQ_CLS" or (isinstance(saved, list) and "score" in saved):
            return "reward"
    config = read_config(source.base)
    return "reward" if is_sequence_classification(config, arch_from_hf(config)) else "language"


def require_kind(source: ModelFolder, kind: ModelKind, *, option: str) -> None:
    """Raise UsageError for a model of the other kind; ``option`` is the config field of its path, or ""."""
    actual = model_kind(source)
    if actual == kind:
        return
    needs = f"{option} needs a {kind} model" if option else f"a {kind} model is needed"
    if source.adapters:
        hint = ": a reward model's adapter needs score in modules_to_save, or a reward model as its base"
        hint = hint if kind == "reward" else ""
        raise UsageError(f"{source.path}: is the adapter of a {actual} model; {needs}{hint}")
    config = read_config(source.base)
    names = ", ".join(config.get("architectures") or ()) or "no architectures"
    classes = CLASSES[arch_from_hf(config).family]
    hint = f" (architectures: a reward model is a {classes.sequence_classification})" if kind == "reward" else ""
    raise UsageError(f"{source.path}: is a {actual} model ({names}); {needs}{hint}")
