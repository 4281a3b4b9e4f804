"""A stage that goes on, or is taken as done, is made from what it was begun with; else it is refused by name."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jrlhf.config import ConfigError
from jrlhf.data import DataError, open_source, stamp, stamps
from jrlhf.parallel import is_first
from jrlhf.parallel.hosts import from_first
from jrlhf.runs.checkpoints import NOTES
from jrlhf.runs.folder import has_begun, read_summary, write_json
from jrlhf.runs.inputs import RowsInput, StageInputs
from jrlhf.runs.metrics import RowLog
from jrlhf.runs.origin import (
    Input,
    Origin,
    differences,
    file_input,
    model_inputs,
    rows_inputs,
    tokenizer_differs,
    unchanged,
)

logger = logging.getLogger("jrlhf.origin")

ORIGIN = "origin.json"
GONE = (OSError, ConfigError)
"""What looking for a file ends in that is not there any more."""


def finished_summary(inputs: StageInputs, folder: Path) -> dict[str, Any] | None:
    """The summary of a stage that is done; None for one that is not. ConfigError where it was made from other inputs.

    Nothing is read whose files have their old stamps, and what cannot be read any more is only named in a warning.
    """
    summary = read_summary(folder)
    if summary is None:
        return None
    old = _read_origin(inputs.stage, folder)
    if old is None:
        return summary
    files = [Input(**of) for of in from_first("compare its models", lambda: [*map(_plain, _done_files(inputs, old))])]
    new = files + _done_rows(inputs, old, files)
    origin = _compared(inputs, folder, old, new)
    if [*origin.changed] != summary.get("changed_inputs", []):
        summary |= changed_inputs(origin)
        write_json(folder / "summary.json", summary)
    return summary


def check_origin(inputs: StageInputs, folder: Path) -> Origin:
    """What a stage is made from that begins or goes on; ConfigError where it was begun with other inputs."""
    begun = from_first("look for what it goes on from", lambda: has_begun(folder))
    old = _read_origin(inputs.stage, folder) if begun else None
    known = old.inputs if old else ()
    # Rows first, as all processes read them together.
    rows = [of for key, read in inputs.rows().items() for of in _read_rows(key, read)]
    files = from_first("look at its models", lambda: [*map(_plain, _files(inputs, known))])
    return _compared(inputs, folder, old, [*(Input(**of) for of in files), *rows])


def check_base(inputs: StageInputs, metadata: Mapping[str, Any]) -> None:
    """ConfigError where a checkpoint's adapters were trained on other weights than its stage would start from now.

    ``metadata`` is the checkpoint's. One of a version that noted nothing is taken as it is.
    """
    if metadata.get("origin") is None:
        return
    old = [of for of in Origin.from_json(metadata["origin"]).inputs if of.kind == "weights"]
    new = [of for of in model_inputs(inputs.model, inputs.source, known=old) if of.kind == "weights"]
    if lines := differences(inputs.stage, inputs.model, [of for of in old if of.key in {of.key for of in new}], new):
        raise ConfigError(f"{'; '.join(lines)}: the checkpoint's adapters belong to the weights of then; put them back")


def changed_inputs(origin: Origin) -> dict[str, list[str]]:
    """The part of a summary that says what a stage went on from that was not what it began with."""
    return {"changed_inputs": [*origin.changed]} if origin.changed else {}


def _plain(of: Input) -> dict[str, Any]:
    return of._asdict()


def _read_rows(key: str, read: RowsInput) -> list[Input]:
    rows = read.load()
    return [] if rows is None else rows_inputs(key, rows)


def _files(inputs: StageInputs, known: Sequence[Input]) -> Iterator[Input]:
    for key, source in inputs.models().items():
        yield from model_inputs(key, source(), known=known)
    for key, path in inputs.files().items():
        if (file := path()) is not None:
            yield file_input(key, file, known=known)


def _read_origin(stage: str, folder: Path) -> Origin | None:
    """What the stage was begun with, as its folder or else its newest checkpoint says; None, with a warning, where it
    is of a version that noted nothing."""

    def read() -> dict[str, Any] | None:
        path = folder / ORIGIN
        if not path.exists():
            steps = [int(at.name) for at in folder.glob("checkpoints/*") if at.name.isdecimal()]
            path = folder / "checkpoints" / str(max(steps, default=0)) / NOTES
        try:
            content = json.loads(path.read_text(encoding="utf-8") if path.exists() else "{}")
            content = content if path.name == ORIGIN else content.get("metadata", {}).get("origin")
            return None if content is None else Origin.from_json(content).as_json()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: damaged ({error!r}); remove it to go on without comparing inputs") from error

    value = from_first(f"read what {stage} was made from", read)
    if value is None and is_first():
        logger.warning(
            "%s: begun by an earlier version, which did not note what it was made from: not compared", folder
        )
    return None if value is None else Origin.from_json(value)


def _done_files(inputs: StageInputs, old: Origin) -> Iterator[Input]:
    """As ``_files``, of a stage that is done: what is not there any more is as it was."""
    for key, source in inputs.models().items():
        before = [of for of in old.inputs if of.key in (key, f"{key} (base)") and of.kind != "rows"]
        if any(not of.local for of in before) and all(_on_disk(of) for of in before):
            yield from before
            continue
        try:
            yield from [*model_inputs(key, source(), known=old.inputs)]
        except (OSError, ValueError) as error:
            if _is_folder(source):
                raise
            yield from _as_it_was(inputs, before, error)
    for key, path in inputs.files().items():
        try:
            if (file := path()) is None:
                raise FileNotFoundError(f"{key}: cannot be found")
            yield file_input(key, file, known=old.inputs)
        except GONE as error:
            yield from _as_it_was(inputs, [of for of in old.inputs if of.key == key], error)


def _is_folder(source: Callable[[], str]) -> bool:
    try:
        return Path(source()).is_dir()
    except ConfigError:
        return False


def _as_it_was(inputs: StageInputs, before: Sequence[Input], error: Exception) -> Sequence[Input]:
    if is_first():
        reason = str(error).partition("\n")[0]
        logger.warning("%s is done, and not compared with what it was made from: %s", inputs.stage, reason)
    return before


def _done_rows(inputs: StageInputs, old: Origin, files: Sequence[Input]) -> list[Input]:
    """The rows of a stage that is done: read where their files' stamps are others, and as they were elsewhere."""
    before = {key: [of for of in old.inputs if (of.key, of.kind) == (key, "rows")] for key in inputs.rows()}
    if tokenizer_differs(inputs.model, old.inputs, files):
        return [of for of_key in before.values() for of in of_key]
    rows: list[Input] = []
    for key, read in inputs.rows().items():
        if from_first(f"look at {key}", lambda read=read, key=key: _same_files(read, before[key])):
            rows += before[key]
            continue
        try:
            rows += _read_rows(key, read)
        except (DataError, *GONE) as error:
            rows += _unreadable_rows(inputs, read, before[key], error)
    return rows


def _unreadable_rows(
    inputs: StageInputs, read: RowsInput, before: Sequence[Input], error: Exception
) -> Sequence[Input]:
    """As they were where their source or its tokenizer is not there any more; others where they are no rows now."""
    try:
        inputs.tokenizer  # noqa: B018
        _files_now(read)
    except (DataError, *GONE):
        return _as_it_was(inputs, before, error)
    return [of._replace(digest="", files={}) for of in before]


def _same_files(read: RowsInput, before: Sequence[Input]) -> bool:
    """Whether rows are known without reading them. Only what is in files here is looked for anew."""
    if not all(of.local for of in before):
        return all(_on_disk(of) for of in before)
    try:
        now = _files_now(read)
    except (DataError, OSError):
        return False
    return len(now) == len(before) > 0 and all(unchanged(of, files) for of, files in zip(before, now, strict=True))


def _files_now(read: RowsInput) -> list[dict[str, list[int]]]:
    """The files of each source, with their stamps."""
    sources = [read.sources] if isinstance(read.sources, str) else [*read.sources]
    return [stamps(open_source(source).files) for source in sources]


def _on_disk(of: Input) -> bool:
    """Whether its files are where they were, as they were."""
    return all(Path(path).is_file() and stamp(Path(path)) == noted for path, noted in of.files.items())


def _compared(inputs: StageInputs, folder: Path, old: Origin | None, new: Sequence[Input]) -> Origin:
    """The origin that is noted from now on; the first process compares and writes."""

    def settle() -> dict[str, Any]:
        lines = [] if old is None else differences(inputs.stage, inputs.model, old.inputs, new)
        if lines and not inputs.config.accept_changes:
            listed = "\n  ".join(lines)
            raise ConfigError(
                f"{folder} was made from other inputs:\n  {listed}\n"
                f"put back what it was made from, or remove {folder} to make it anew, or go on all the same with "
                "--accept_changes"
            )
        changed = () if old is None else tuple(dict.fromkeys((*old.changed, *lines)))
        origin = Origin(tuple(new), changed)
        if origin != old:
            write_json(folder / ORIGIN, origin.as_json())
        if lines:
            _note_accepted(folder, lines)
        return origin.as_json()

    return Origin.from_json(from_first(f"compare what {inputs.stage} is made from", settle))


def _note_accepted(folder: Path, lines: Sequence[str]) -> None:
    """An event of the step that the run goes on from, and a warning."""
    steps = [int(at.name) for at in folder.glob("checkpoints/*") if at.name.isdecimal()]
    log = RowLog(folder / "events.jsonl", resume_step=sys.maxsize)
    log.write(max(steps, default=0), {"event": "changed inputs", "accepted": "; ".join(lines)})
    log.close()
    for line in lines:
        logger.warning("accepted: %s", line)
