"""Checks that a stage which resumes or is finished still has the inputs that it began with."""

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
from jrlhf.runs.checkpoints import NOTES_FILE
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
from jrlhf.system.errors import reason_of

logger = logging.getLogger("jrlhf.origin")

ORIGIN_FILE = "origin.json"
MISSING_ERRORS = (OSError, ConfigError)
"""Errors from reading an input that no longer exists."""


def finished_summary(inputs: StageInputs, folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished stage, or None; raise ConfigError if its inputs have changed since.

    Files with unchanged stamps are not read. Inputs that no longer exist are only named in a warning.
    """
    summary = read_summary(folder)
    if summary is None:
        return None
    old = read_origin(inputs.stage, folder)
    if old is None:
        return summary
    files = [
        Input(**item) for item in from_first("compare its models", lambda: [*map(_plain, _finished_files(inputs, old))])
    ]
    new = files + _finished_rows(inputs, old, files)
    origin = _compare(inputs, folder, old, new)
    if [*origin.changed] != summary.get("changed_inputs", []):
        summary |= changed_inputs(origin)
        write_json(folder / "summary.json", summary)
    return summary


def check_origin(inputs: StageInputs, folder: Path) -> Origin:
    """Return the origin of a stage that begins or resumes; raise ConfigError if it began with other inputs."""
    resumes = from_first("look for an earlier run", lambda: has_begun(folder))
    old = read_origin(inputs.stage, folder) if resumes else None
    records = old.inputs if old else ()
    # All processes read the rows together, so rows come before the files that only the first one reads.
    rows = [item for key, read in inputs.rows().items() for item in _read_rows(key, read)]
    files = from_first("look at its models", lambda: [*map(_plain, _files(inputs, records))])
    return _compare(inputs, folder, old, [*(Input(**item) for item in files), *rows])


def check_base(inputs: StageInputs, metadata: Mapping[str, Any]) -> None:
    """Raise ConfigError if a checkpoint's adapters were trained on other weights than its stage now starts from.

    ``metadata`` belongs to the checkpoint. Checkpoints of early versions have no record and are not checked.
    """
    if metadata.get("origin") is None:
        return
    old = [item for item in Origin.from_json(metadata["origin"]).inputs if item.kind == "weights"]
    new = [item for item in model_inputs(inputs.model, inputs.source, records=old) if item.kind == "weights"]
    if lines := differences(
        inputs.stage, inputs.model, [item for item in old if item.key in {item.key for item in new}], new
    ):
        raise ConfigError(f"{'; '.join(lines)}: the checkpoint's adapters need the old weights; restore them")


def changed_inputs(origin: Origin) -> dict[str, list[str]]:
    """Return the summary's entry about accepted changes of inputs; empty if there are none."""
    return {"changed_inputs": [*origin.changed]} if origin.changed else {}


def _plain(item: Input) -> dict[str, Any]:
    return item._asdict()


def _read_rows(key: str, read: RowsInput) -> list[Input]:
    rows = read.load()
    return [] if rows is None else rows_inputs(key, rows)


def _files(inputs: StageInputs, records: Sequence[Input]) -> Iterator[Input]:
    for key, source in inputs.models().items():
        yield from model_inputs(key, source(), records=records)
    for key, path in inputs.files().items():
        if (file := path()) is not None:
            yield file_input(key, file, records=records)


def read_origin(stage: str, folder: Path) -> Origin | None:
    """Read the origin that a stage began with from its folder or its newest checkpoint.

    Returns None, with a warning, for a stage of an early version, which has no record.
    """

    def read() -> dict[str, Any] | None:
        path = folder / ORIGIN_FILE
        if not path.exists():
            steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
            path = folder / "checkpoints" / str(max(steps, default=0)) / NOTES_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8") if path.exists() else "{}")
            content = content if path.name == ORIGIN_FILE else content.get("metadata", {}).get("origin")
            return None if content is None else Origin.from_json(content).as_json()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path}: damaged ({reason_of(error)}); remove it to resume without comparing inputs"
            ) from error

    value = from_first(f"read what {stage} was made from", read)
    if value is None and is_first():
        logger.warning(
            "%s: inputs are not compared, because the run began with a version that did not record them", folder
        )
    return None if value is None else Origin.from_json(value)


def _finished_files(inputs: StageInputs, old: Origin) -> Iterator[Input]:
    """Yield the files of a finished stage; for files that no longer exist, yield their records."""
    for key, source in inputs.models().items():
        before = [item for item in old.inputs if item.key in (key, f"{key} (base)") and item.kind != "rows"]
        if any(not item.local for item in before) and all(_on_disk(item) for item in before):
            yield from before
            continue
        try:
            yield from [*model_inputs(key, source(), records=old.inputs)]
        except (OSError, ValueError) as error:
            if _is_folder(source):
                raise
            yield from _keep_record(inputs, before, error)
    for key, path in inputs.files().items():
        try:
            if (file := path()) is None:
                raise FileNotFoundError(f"{key}: cannot be found")
            yield file_input(key, file, records=old.inputs)
        except MISSING_ERRORS as error:
            yield from _keep_record(inputs, [item for item in old.inputs if item.key == key], error)


def _is_folder(source: Callable[[], str]) -> bool:
    try:
        return Path(source()).is_dir()
    except ConfigError:
        return False


def _keep_record(inputs: StageInputs, before: Sequence[Input], error: Exception) -> Sequence[Input]:
    if is_first():
        reason = str(error).partition("\n")[0]
        logger.warning("%s is finished, and an input cannot be compared: %s", inputs.stage, reason)
    return before


def _finished_rows(inputs: StageInputs, old: Origin, files: Sequence[Input]) -> list[Input]:
    """Return the rows of a finished stage, read again only if the stamps of their files have changed."""
    before = {key: [item for item in old.inputs if (item.key, item.kind) == (key, "rows")] for key in inputs.rows()}
    if tokenizer_differs(inputs.model, old.inputs, files):
        return [item for items in before.values() for item in items]
    rows: list[Input] = []
    for key, read in inputs.rows().items():
        if from_first(f"look at {key}", lambda read=read, key=key: _same_files(read, before[key])):
            rows += before[key]
            continue
        try:
            rows += _read_rows(key, read)
        except (DataError, *MISSING_ERRORS) as error:
            rows += _unreadable_rows(inputs, read, before[key], error)
    return rows


def _unreadable_rows(
    inputs: StageInputs, read: RowsInput, before: Sequence[Input], error: Exception
) -> Sequence[Input]:
    """Return records for rows that cannot be read: the old ones if source or tokenizer is gone, else changed ones."""
    try:
        inputs.tokenizer  # noqa: B018
        _files_now(read)
    except (DataError, *MISSING_ERRORS):
        return _keep_record(inputs, before, error)
    return [item._replace(digest="", files={}) for item in before]


def _same_files(read: RowsInput, before: Sequence[Input]) -> bool:
    """Tell whether rows are unchanged without reading them; only local sources are searched for files again."""
    if not all(item.local for item in before):
        return all(_on_disk(item) for item in before)
    try:
        now = _files_now(read)
    except (DataError, OSError):
        return False
    return len(now) == len(before) > 0 and all(unchanged(item, files) for item, files in zip(before, now, strict=True))


def _files_now(read: RowsInput) -> list[dict[str, list[int]]]:
    """Return the stamps of each source's files."""
    sources = [read.sources] if isinstance(read.sources, str) else [*read.sources]
    return [stamps(open_source(source).files) for source in sources]


def _on_disk(item: Input) -> bool:
    """Tell whether the files exist with unchanged stamps."""
    return all(Path(path).is_file() and stamp(Path(path)) == recorded for path, recorded in item.files.items())


def _compare(inputs: StageInputs, folder: Path, old: Origin | None, new: Sequence[Input]) -> Origin:
    """Compare two records and return the new origin; the first process compares and writes."""

    def settle() -> dict[str, Any]:
        lines = [] if old is None else differences(inputs.stage, inputs.model, old.inputs, new)
        if lines and not inputs.config.accept_changes:
            listed = "\n  ".join(lines)
            raise ConfigError(
                f"{folder} was made from other inputs:\n  {listed}\n"
                f"restore the old inputs, or remove {folder} to start over, or accept the changes with --accept_changes"
            )
        changed = () if old is None else tuple(dict.fromkeys((*old.changed, *lines)))
        origin = Origin(tuple(new), changed)
        if origin != old:
            write_json(folder / ORIGIN_FILE, origin.as_json())
        if lines:
            _note_accepted(folder, lines)
        return origin.as_json()

    return Origin.from_json(from_first(f"compare what {inputs.stage} is made from", settle))


def _note_accepted(folder: Path, lines: Sequence[str]) -> None:
    """Log accepted changes as a warning and as an event at the step that the run resumes from."""
    steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
    log = RowLog(folder / "events.jsonl", resume_step=sys.maxsize)
    log.write(max(steps, default=0), {"event": "changed inputs", "accepted": "; ".join(lines)})
    log.close()
    for line in lines:
        logger.warning("accepted: %s", line)
