"""The origin of a stage: digests of its inputs, and the differences between two origins."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jrlhf.data import stamps
from jrlhf.models.hf.adapter_folder import base_folder, base_of, is_adapter_folder
from jrlhf.models.hf.digests import file_digest, model_file_digest, model_files
from jrlhf.models.hf.folder import find_folder
from jrlhf.runs.inputs import SAFETY, Rows

Kind = Literal["weights", "config", "tokenizer", "rows", "file"]


class Input(NamedTuple):
    """An input of a stage: one file of a model, the rows of one source, or a file that a rule reads."""

    key: str
    """Config path of the input, such as "sft.model"."""
    kind: Kind
    name: str
    """File in the model's folder, or source of rows if there are several, or empty."""
    source: str
    """Folder or hub id of the model, source of rows, or path of the file."""
    digest: str
    files: dict[str, list[int]]
    """Stamp of each file that the input was read from; with equal stamps it need not be read again."""
    local: bool = True
    """True for files of the user; False for copies from the hub, which stay where they were downloaded to."""

    @property
    def place(self) -> tuple[str, str, str]:
        """Key that identifies the same input in another record."""
        return self.key, self.kind, self.name


class Origin(NamedTuple):
    """All inputs of a stage, and every change of them that the user has accepted."""

    inputs: tuple[Input, ...]
    changed: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain lists and mappings, which ``from_json`` reads back."""
        return {"inputs": [item._asdict() for item in self.inputs], "changed": list(self.changed)}

    @classmethod
    def from_json(cls, value: Any) -> "Origin":
        """Read an origin from JSON; raise KeyError or TypeError for anything else."""
        return cls(tuple(Input(**item) for item in value["inputs"]), tuple(value["changed"]))


def model_inputs(key: str, source: str, *, records: Sequence[Input], folder: Path | None = None) -> Iterator[Input]:
    """Yield the files of a model's folder and, for an adapter, those of its base.

    Digests of ``records`` are reused if their files have not changed. ``folder`` is the folder of ``source`` if the
    caller has found it.
    """
    folder = find_folder(source) if folder is None else folder
    model_file_list = model_files(folder)
    for kind, name in model_file_list:
        files = stamps([folder / name])
        digest = _known_digest(records, (key, kind, name), files) or model_file_digest(folder / name, kind)
        yield Input(key, kind, name, source, digest, files, local=Path(source).is_dir())
    if is_adapter_folder(folder):
        has_tokenizer = any(file.kind == "tokenizer" for file in model_file_list)
        beside = folder / base_of(folder)
        source = str(beside) if beside.is_dir() else base_of(folder)
        base = model_inputs(f"{key} (base)", source, records=records, folder=base_folder(folder))
        yield from (item for item in base if not (has_tokenizer and item.kind == "tokenizer"))


def file_input(key: str, path: Path, *, records: Sequence[Input]) -> Input:
    """Return the input for a file that a rule reads; its digest is reused from ``records`` if it has not changed."""
    files = stamps([path])
    digest = _known_digest(records, (key, "file", ""), files) or file_digest(path)
    return Input(key, "file", "", str(path), digest, files)


def _known_digest(records: Sequence[Input], place: tuple[str, str, str], files: Mapping[str, list[int]]) -> str | None:
    same = (item.digest for item in records if item.place == place and unchanged(item, files))
    return next(same, None)


def unchanged(records: Input, files: Mapping[str, list[int]]) -> bool:
    """Tell whether the files have the same stamps, even if their folders have moved."""
    return [*records.files.values()] == [*files.values()]


def rows_inputs(key: str, rows: Rows) -> list[Input]:
    """Return the inputs for the rows of one key, one per source."""
    several = len(rows.sources) > 1
    return [
        Input(key, "rows", item.source if several else "", item.source, item.digest, item.files, item.local)
        for item in rows.sources
    ]


def differences(stage: str, model: str, old: Sequence[Input], new: Sequence[Input]) -> list[str]:
    """Describe each changed input of ``stage`` in a line; the tokenizer of the model at ``model`` reads the rows."""
    lines = [line for key in _keys(old, new) for line in _model_lines(stage, key, old, new)]
    lines += [
        f"{now.key}: {now.source} has changed since the run began"
        for was, now in _pairs(old, new, "file")
        if was.digest != now.digest
    ]
    # With another tokenizer all rows differ, so they are not compared.
    return lines if tokenizer_differs(model, old, new) else [*lines, *_row_lines(old, new)]


def tokenizer_differs(model: str, old: Sequence[Input], new: Sequence[Input]) -> bool:
    """Tell whether the tokenizer of the model at this key, or of its adapter's base, has changed."""
    return any(_changed_names(key, "tokenizer", old, new) for key in (model, f"{model} (base)"))


def _model_lines(stage: str, key: str, old: Sequence[Input], new: Sequence[Input]) -> Iterator[str]:
    """Yield a line for each kind of a model's files that has changed."""
    kinds: dict[Kind, str] = {"weights": "other weights", "config": "another config", "tokenizer": "another tokenizer"}
    source = next((item.source for item in (*new, *old) if item.key == key), "")
    for kind, what in kinds.items():
        if names := _changed_names(key, kind, old, new):
            if all("chat_template" in name for name in names):
                what = "another chat template"
            yield f"{stage} was made from {source} with {what} ({', '.join(names)})"


def _changed_names(key: str, kind: Kind, old: Sequence[Input], new: Sequence[Input]) -> list[str]:
    """Return the names of files that have changed, appeared or disappeared."""
    was, now = (
        {item.name: item.digest for item in side if (item.key, item.kind) == (key, kind)} for side in (old, new)
    )
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def _row_lines(old: Sequence[Input], new: Sequence[Input]) -> Iterator[str]:
    for was, now in _pairs(old, new, "rows"):
        # Safety prompts may change at any time, but only together with the name of their source.
        if was.digest == now.digest or (was.key == SAFETY and was.source != now.source):
            continue
        if was.files and unchanged(was, now.files):
            by = "another version of jrlhf, transformers or tokenizers"
            yield f"{now.key}: {now.source} gives other rows than when the run began, because of {by}"
        else:
            yield f"{now.key}: {now.source} has other rows than when the run began"
    was_keys, now_keys = ({item.key: item.source for item in side if item.kind == "rows"} for side in (old, new))
    for key, source in {**was_keys, **now_keys}.items():
        if key != SAFETY and (key in was_keys) != (key in now_keys):
            how = "no longer read" if key in was_keys else "read now, but were not when the run began"
            yield f"{key}: the rows of {source} are {how}"


def _pairs(old: Sequence[Input], new: Sequence[Input], kind: Kind) -> Iterator[tuple[Input, Input]]:
    """Return the pairs of inputs of one kind that both records have."""
    before = {item.place: item for item in old if item.kind == kind}
    return ((before[item.place], item) for item in new if item.place in before)


def _keys(old: Sequence[Input], new: Sequence[Input]) -> list[str]:
    """Return the keys that both records have, in the new record's order."""
    old_keys = {item.key for item in old}
    return [*dict.fromkeys(item.key for item in new if item.key in old_keys)]
