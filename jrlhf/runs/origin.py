"""What a stage was made from, by digests: the records, and in what two of them differ."""

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
    """One file of a model, the rows of one source, or a file that a rule reads."""

    key: str
    """The config path that names it, such as "sft.model"."""
    kind: Kind
    name: str
    """The file in the model's folder, the source of several, or nothing."""
    source: str
    """The folder or hub id of the model, the source of rows, or the file."""
    digest: str
    files: dict[str, list[int]]
    """Each file it was read from, with its stamp: where all stamps are the same nothing need be read again."""
    local: bool = True
    """Whether its source is looked for anew; otherwise it came from the hub, and the files are where they came to."""

    @property
    def place(self) -> tuple[str, str, str]:
        """By this it is found in another record."""
        return self.key, self.kind, self.name


class Origin(NamedTuple):
    """All that a stage was made from, and every change of it that a user has accepted."""

    inputs: tuple[Input, ...]
    changed: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain lists and mappings, which ``from_json`` reads back."""
        return {"inputs": [of._asdict() for of in self.inputs], "changed": list(self.changed)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Origin":
        """KeyError or TypeError for what is none."""
        return cls(tuple(Input(**of) for of in value["inputs"]), tuple(value["changed"]))


def model_inputs(key: str, source: str, *, known: Sequence[Input], folder: Path | None = None) -> Iterator[Input]:
    """The files of a model's folder; of an adapter also those of its base, whose tokenizer it may lack.

    ``known``: inputs whose digests are taken over where their files have not changed. ``folder``: where ``source`` has
    been found already.
    """
    folder = find_folder(source) if folder is None else folder
    own = model_files(folder)
    for kind, name in own:
        files = stamps([folder / name])
        digest = _known_digest(known, (key, kind, name), files) or model_file_digest(folder / name, kind)
        yield Input(key, kind, name, source, digest, files, local=Path(source).is_dir())
    if is_adapter_folder(folder):
        has_tokenizer = any(file.kind == "tokenizer" for file in own)
        beside = folder / base_of(folder)
        source = str(beside) if beside.is_dir() else base_of(folder)
        base = model_inputs(f"{key} (base)", source, known=known, folder=base_folder(folder))
        yield from (of for of in base if not (has_tokenizer and of.kind == "tokenizer"))


def file_input(key: str, path: Path, *, known: Sequence[Input]) -> Input:
    """A file that a rule reads."""
    files = stamps([path])
    digest = _known_digest(known, (key, "file", ""), files) or file_digest(path)
    return Input(key, "file", "", str(path), digest, files)


def _known_digest(known: Sequence[Input], place: tuple[str, str, str], files: Mapping[str, list[int]]) -> str | None:
    same = (of.digest for of in known if of.place == place and unchanged(of, files))
    return next(same, None)


def unchanged(known: Input, files: Mapping[str, list[int]]) -> bool:
    """Whether its files are the very ones, wherever their folders are now."""
    return [*known.files.values()] == [*files.values()]


def rows_inputs(key: str, rows: Rows) -> list[Input]:
    """The rows that a stage reads under one key, a source each."""
    several = len(rows.sources) > 1
    return [
        Input(key, "rows", of.source if several else "", of.source, of.digest, of.files, of.local)
        for of in rows.sources
    ]


def differences(stage: str, model: str, old: Sequence[Input], new: Sequence[Input]) -> list[str]:
    """In what the inputs of ``stage`` have changed, a line each. ``model``: the key whose tokenizer reads the rows."""
    lines = [line for key in _keys(old, new) for line in _of_model(stage, key, old, new)]
    lines += [
        f"{now.key}: {now.source} has another content than when the run began"
        for was, now in _pairs(old, new, "file")
        if was.digest != now.digest
    ]
    # Another tokenizer makes other rows of everything.
    return lines if tokenizer_differs(model, old, new) else [*lines, *_of_rows(old, new)]


def tokenizer_differs(model: str, old: Sequence[Input], new: Sequence[Input]) -> bool:
    """Whether the model at this key, or the base of its adapter, has another tokenizer now."""
    return any(_differing(key, "tokenizer", old, new) for key in (model, f"{model} (base)"))


def _of_model(stage: str, key: str, old: Sequence[Input], new: Sequence[Input]) -> Iterator[str]:
    """A line for each kind of a model's files in which it differs."""
    kinds: dict[Kind, str] = {"weights": "other weights", "config": "another config", "tokenizer": "another tokenizer"}
    source = next((of.source for of in (*new, *old) if of.key == key), "")
    for kind, what in kinds.items():
        if names := _differing(key, kind, old, new):
            if all("chat_template" in name for name in names):
                what = "another chat template"
            yield f"{stage} was made from {source} with {what} ({', '.join(names)})"


def _differing(key: str, kind: Kind, old: Sequence[Input], new: Sequence[Input]) -> list[str]:
    """The names of those that have changed, come or gone."""
    was, now = ({of.name: of.digest for of in side if (of.key, of.kind) == (key, kind)} for side in (old, new))
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def _of_rows(old: Sequence[Input], new: Sequence[Input]) -> Iterator[str]:
    for was, now in _pairs(old, new, "rows"):
        # What a model is asked for its safety may be changed at any time, but by its name.
        if was.digest == now.digest or (was.key == SAFETY and was.source != now.source):
            continue
        if was.files and unchanged(was, now.files):
            by = "another version of jrlhf, transformers or tokenizers"
            yield f"{now.key}: {now.source} makes other rows than when the run began, by {by}"
        else:
            yield f"{now.key}: {now.source} has other rows than the run began with"
    was_keys, now_keys = ({of.key: of.source for of in side if of.kind == "rows"} for side in (old, new))
    for key, source in {**was_keys, **now_keys}.items():
        if key != SAFETY and (key in was_keys) != (key in now_keys):
            how = "no more" if key in was_keys else "now, but not when the run began"
            yield f"{key}: the rows of {source} are read {how}"


def _pairs(old: Sequence[Input], new: Sequence[Input], kind: Kind) -> Iterator[tuple[Input, Input]]:
    """Those of a kind that both records have."""
    before = {of.place: of for of in old if of.kind == kind}
    return ((before[of.place], of) for of in new if of.place in before)


def _keys(old: Sequence[Input], new: Sequence[Input]) -> list[str]:
    """The models that both records have, in their order."""
    had = {of.key for of in old}
    return [*dict.fromkeys(of.key for of in new if of.key in had)]
