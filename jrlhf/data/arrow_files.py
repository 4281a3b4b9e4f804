"""Readers of columnar files (Parquet, Arrow, ``save_to_disk`` folders) that use Arrow and read a slice at a time.

They do not use ``datasets``, whose cache knows a file by path and modification time and can return old rows.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jrlhf.data.errors import BadRow, DataError, PlacedRow, Row
from jrlhf.data.messages import without_fill

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BATCH_ROWS = 256
"""Number of rows that are converted to Python objects at a time."""
READ_BUFFER_BYTES = 2**20
"""Bytes of a column to read at a time, since a whole file may be a single row group."""
ARROW_MAGIC = b"ARROW1"
"""First bytes of Arrow's file format. Arrow's stream format, which ``datasets`` uses for its caches, has none."""

SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"
"""Files that ``save_to_disk`` writes into a folder of splits and into a folder of rows."""


def parquet_rows(path: Path) -> Iterator[PlacedRow]:
    """Yield the rows of a Parquet file."""
    return _rows(str(path), _check_batches(path, _parquet_batches(path)))


def arrow_rows(path: Path) -> Iterator[PlacedRow]:
    """Yield the rows of an Arrow file, in the stream format or the file format."""
    return _rows(str(path), _check_batches(path, _arrow_batches(path)))


def saved_rows(name: str, files: Sequence[Path]) -> Iterator[PlacedRow]:
    """Yield the rows of the Arrow files of a ``save_to_disk`` folder, numbered through all files."""
    return _rows(name, chain.from_iterable(_check_batches(file, _arrow_batches(file)) for file in files))


def dataset_rows(name: str, dataset: "Dataset") -> Iterator[PlacedRow]:
    """Yield the rows of a data set that ``datasets`` has loaded."""
    formatted: Any = dataset.with_format("arrow")
    tables = formatted.iter(batch_size=BATCH_ROWS)
    return _rows(name, chain.from_iterable(table.to_batches() for table in tables))


def _parquet_batches(path: Path) -> "Iterator[pa.RecordBatch]":
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=READ_BUFFER_BYTES) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS)


def _arrow_batches(path: Path) -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        if file.read(len(ARROW_MAGIC)) == ARROW_MAGIC:
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def _check_batches(path: Path, batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    """Yield the batches; an error names the file, and so does a duplicate column name."""
    import pyarrow as pa

    try:
        for batch in batches:
            if len(set(batch.schema.names)) < len(batch.schema.names):
                raise DataError(f"{path}: two columns have the same name: {', '.join(batch.schema.names)}")
            yield batch
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error


def _rows(name: str, batches: "Iterable[pa.RecordBatch]") -> Iterator[PlacedRow]:
    number = 0
    for batch in batches:
        decoders = _decoders(batch.schema)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in _row_objects(batch.slice(start, BATCH_ROWS), decoders):
                number += 1
                yield f"{name}: row {number}", row


def _row_objects(batch: "pa.RecordBatch", decoders: dict[str, Callable[[Any], Any]]) -> Iterator[Row | BadRow]:
    """Yield each row, or a ``BadRow``; where the batch fails, each of its rows is read alone to find the bad one."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
        rows = batch.to_pylist()
        # Only tools and tool calls can hold fill, and the search copies every row.
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
    """Return a decoder for each column of JSON texts, the form in which ``datasets`` writes lists of mixed objects."""
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
    """Tell whether ``save_to_disk`` wrote the folder."""
    return (folder / SPLITS_FILE).is_file() or (folder / STATE_FILE).is_file()


def saved_files(folder: Path, split: str) -> tuple[Path, ...]:
    """Return the file that lists the Arrow files of a split, followed by these files.

    An empty ``split`` means the train split where the folder has several.
    """
    if (folder / SPLITS_FILE).is_file():
        splits = _json_field(folder / SPLITS_FILE, "splits")
        if not (isinstance(splits, list) and all(isinstance(name, str) for name in splits)):
            raise DataError(f"{folder / SPLITS_FILE}: lists no splits")
        if (split or "train") not in splits:
            names = ", ".join(f"{folder}:{name}" for name in splits) or "none"
            raise DataError(f"{folder}: no split {split or 'train'}; the splits are {names}")
        return saved_files(folder / (split or "train"), "")
    if split and (actual := _json_field(folder / STATE_FILE, "_split")) != split:
        raise DataError(f"{folder}: no split {split}; the folder holds {actual or 'rows without splits'}")
    if _json_field(folder / STATE_FILE, "_indices_data_files"):
        raise DataError(
            f"{folder}: an old version of datasets saved indices beside the rows; load the folder and save it again"
        )
    files = _json_field(folder / STATE_FILE, "_data_files")
    if not (isinstance(files, list) and all(isinstance(f, dict) and isinstance(f.get("filename"), str) for f in files)):
        raise DataError(f"{folder / STATE_FILE}: lists no _data_files")
    paths = [folder / file["filename"] for file in files]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(f"{folder}: {missing[0]}: the file is missing, but {STATE_FILE} lists it")
    return (folder / STATE_FILE, *paths)


def _json_field(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
