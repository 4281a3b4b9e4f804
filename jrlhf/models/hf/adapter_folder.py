"""PEFT folders without their weights: which model they belong to, and what kind of model comes of both."""

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
"""Files that hold a tokenizer's vocabulary; a folder with none of them has no tokenizer of its own."""

ModelKind = Literal["language", "reward"]
"""A language model gives logits, a reward model (a ...ForSequenceClassification with one label) a score."""


def is_adapter_folder(folder: Path) -> bool:
    """A PEFT adapter, not a model of its own."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The folder or hub id of the model that an adapter belongs to, as its config has it."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UsageError(f"{folder}: base_model_name_or_path: expected a folder or hub id, found {base!r}")
    return base


def base_folder(folder: Path, *, weights: bool = True) -> Path:
    """The folder that ``base_of`` names: relative to the adapter's own, else to the working directory, else the hub's.

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


def _down_to_base(folder: Path, *, weights: bool) -> Iterator[Path]:
    """A folder, and where it is an adapter's the folder of its base, and so on down to a model of its own."""
    seen: list[Path] = []
    while is_adapter_folder(folder):
        if any(folder.samefile(other) for other in seen):
            raise UsageError(f"{folder}: base_model_name_or_path: the adapter is its own base")
        seen.append(folder)
        yield folder
        folder = base_folder(folder, weights=weights)
    yield folder


class ModelFolder(NamedTuple):
    """Where a model is read from."""

    path: str
    """The folder or hub id that was asked for."""
    base: Path
    """The folder of the model itself."""
    adapters: tuple[Path, ...]
    """PEFT folders to be merged into it, the innermost first."""


def model_folder(path: str | Path, *, weights: bool = True) -> ModelFolder:
    """The folders of a model; without ``weights`` only configs and tokenizers are asked of the hub."""
    *adapters, base = _down_to_base(find_folder(path, weights=weights), weights=weights)
    return ModelFolder(str(path), base, tuple(adapters[::-1]))


def find_tokenizer(path: str | Path) -> Path:
    """The folder that a model's tokenizer is read from: an adapter without one has its base's."""
    folders = _down_to_base(find_folder(path, weights=False), weights=False)
    return next(f for f in folders if not is_adapter_folder(f) or any((f / name).is_file() for name in VOCABULARIES))


def model_kind(source: ModelFolder) -> ModelKind:
    """What kind of model it is, by the configs alone."""
    for adapter in source.adapters:
        config = read_json(adapter / ADAPTER_CONFIG)
        saved = config.get("modules_to_save")
        if config.get("task_type") == "SEQ_CLS" or (isinstance(saved, list) and "score" in saved):
            return "reward"
    config = read_config(source.base)
    return "reward" if is_sequence_classification(config, arch_from_hf(config)) else "language"


def require_kind(source: ModelFolder, kind: ModelKind, *, option: str) -> None:
    """UsageError for a model of the other kind; ``option`` is what names its path in a config, or ""."""
    actual = model_kind(source)
    if actual == kind:
        return
    needs = f"{option} needs a {kind} model" if option else f"a {kind} model is needed"
    if source.adapters:
        hint = ": a reward model's adapter needs score in modules_to_save, or a reward model as its base"
        raise UsageError(f"{source.path}: the adapter of a {actual} model; {needs}{hint if kind == 'reward' else ''}")
    config = read_config(source.base)
    names = ", ".join(config.get("architectures") or ()) or "no architectures"
    classes = CLASSES[arch_from_hf(config).family]
    hint = f" (architectures: a reward model is a {classes.sequence_classification})" if kind == "reward" else ""
    raise UsageError(f"{source.path}: a {actual} model ({names}); {needs}{hint}")
