"""Columnar files, read by Arrow as they are now, a slice at a time: Parquet, Arrow, and folders of ``save_to_disk``.

``datasets`` would read them by way of a cache of its own, which knows a file by its path and time of change.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jrlhf.data.errors import BadRow, DataError, Placed, Row
from jrlhf.data.messages import without_fill

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ROWS = 256
"""That are Python objects at a time."""
BUFFER = 2**20
"""Bytes of a column that are read at a time: a file may be one group of rows."""
ARROW_FILE = b"ARROW1"
"""First bytes of the file format. The stream format, in which ``datasets`` keeps its caches, has no mark."""

SPLITS, STATE = "dataset_dict.json", "state.json"
"""Files that ``save_to_disk`` writes into a folder of splits, and into one of rows."""


def parquet_rows(path: Path) -> Iterator[Placed]:
    """Rows of a Parquet file."""
    return _rows(str(path), _named(path, _parquet_batches(path)))


def arrow_rows(path: Path) -> Iterator[Placed]:
    """Rows of an Arrow file, be it of the stream or the file format."""
    return _rows(str(path), _named(path, _arrow_batches(path)))


def saved_rows(name: str, files: Sequence[Path]) -> Iterator[Placed]:
    """Rows of the Arrow files of ``save_to_disk``, counted through, as ``datasets`` counts them."""
    return _rows(name, chain.from_iterable(_named(file, _arrow_batches(file)) for file in files))


def dataset_rows(name: str, dataset: "Dataset") -> Iterator[Placed]:
    """Rows of what ``datasets`` has loaded."""
    formatted: Any = dataset.with_format("arrow")
    tables = formatted.iter(batch_size=ROWS)
    return _rows(name, chain.from_iterable(table.to_batches() for table in tables))


def _parquet_batches(path: Path) -> "Iterator[pa.RecordBatch]":
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=BUFFER) as file:
        yield from file.iter_batches(batch_size=ROWS)


def _arrow_batches(path: Path) -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        if file.read(len(ARROW_FILE)) == ARROW_FILE:
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def _named(path: Path, batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    """The batches; an error names the file."""
    import pyarrow as pa

    try:
        for batch in batches:
            if len(set(batch.schema.names)) < len(batch.schema.names):
                raise DataError(f"{path}: two columns of one name: {', '.join(batch.schema.names)}")
            yield batch
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error


def _rows(name: str, batches: "Iterable[pa.RecordBatch]") -> Iterator[Placed]:
    number = 0
    for batch in batches:
        decoders = _decoders(batch.schema)
        for start in range(0, batch.num_rows, ROWS):
            for row in _row_objects(batch.slice(start, ROWS), decoders):
                number += 1
                yield f"{name}: row {number}", row


def _row_objects(batch: "pa.RecordBatch", decoders: dict[str, Callable[[Any], Any]]) -> Iterator[Row | BadRow]:
    """Each row, or what is wrong with it, which then is looked for row by row."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
        rows = batch.to_pylist()
        # Nothing else can be filled, and to look costs a copy of every row.
        if "tools" in batch.schema.names or "tool_calls" in str(batch.schema):
            rows = [without_fill(row) for row in rows]
        for column, decode in decoders.items():
            for row in rows:
                row[column] = decode(row[column])
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            for i in range(batch.num_rows):
                yield from _row_objects(batch.slice(i, 1), decoders)
        else:
            yield BadRow(None, "cannot be read", f": {_reason(error)}")
    else:
        yield from rows


def _decoders(schema: "pa.Schema") -> dict[str, Callable[[Any], Any]]:
    """A decoder for each column that holds JSON texts, as ``datasets`` writes lists of unlike objects."""
    decoders = {field.name: _decoder(field.type) for field in schema}
    return {name: decode for name, decode in decoders.items() if decode is not None}


def _decoder(kind: "pa.DataType") -> Callable[[Any], Any] | None:
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        each = _decoder(kind.value_type)
        return each and (lambda value: None if value is None else [each(item) for item in value])
    if pa.types.is_struct(kind):
        fields = {field.name: _decoder(field.type) for field in kind}
        decoders = {name: decode for name, decode in fields.items() if decode is not None}
        if decoders:
            return lambda value: (
                value and {name: decoders[name](field) if name in decoders else field for name, field in value.items()}
            )
    return None


def is_saved(folder: Path) -> bool:
    """Whether it is a folder that ``save_to_disk`` has written."""
    return (folder / SPLITS).is_file() or (folder / STATE).is_file()


def saved_files(folder: Path, split: str) -> tuple[Path, ...]:
    """The file that lists the Arrow files of a split, and those. ``split`` may be empty: the train split of several."""
    if (folder / SPLITS).is_file():
        splits = _described(folder / SPLITS, "splits")
        if not (isinstance(splits, list) and all(isinstance(name, str) for name in splits)):
            raise DataError(f"{folder / SPLITS}: lists no splits")
        if (split or "train") not in splits:
            names = ", ".join(f"{folder}:{name}" for name in splits) or "none"
            raise DataError(f"{folder}: no split {split or 'train'}; the splits are {names}")
        return saved_files(folder / (split or "train"), "")
    if split and (own := _described(folder / STATE, "_split")) != split:
        raise DataError(f"{folder}: no split {split}; the folder holds {own or 'rows without splits'}")
    if _described(folder / STATE, "_indices_data_files"):
        raise DataError(
            f"{folder}: old versions of datasets kept indices beside the rows, as here; load and save it anew"
        )
    files = _described(folder / STATE, "_data_files")
    if not (isinstance(files, list) and all(isinstance(f, dict) and isinstance(f.get("filename"), str) for f in files)):
        raise DataError(f"{folder / STATE}: lists no _data_files")
    paths = [folder / file["filename"] for file in files]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise DataError(f"{folder}: {absent[0]}: no such file, but {STATE} lists it")
    return (folder / STATE, *paths)


def _described(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
