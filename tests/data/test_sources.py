"""Every kind of source gives the same rows, and says where a bad one stands."""

import datetime
import decimal
import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jrlhf.data import BadRow, DataError
from jrlhf.data.sources import open_source

ROWS = [
    {"prompt": "What is 1+1?", "completion": "007"},
    {"prompt": "A date", "completion": "2020-01-01"},
    {"prompt": "Not available", "completion": "NA"},
    {"prompt": 'Quotes " and, commas', "completion": "two\nlines é 漢 😀"},
]


def rows_of(source: str) -> list[Any]:
    return [row for _, row in open_source(source).rows]


def lines(rows: list[dict[str, Any]], newline: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows).encode()


def csv_text(newline: str = "\n", separator: str = ",") -> bytes:
    cells = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)]
    quoted = (separator.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells)
    return (newline.join(quoted) + newline).encode()


FILES = {
    "lines.jsonl": lines(ROWS),
    "lines.json": lines(ROWS),
    "windows.jsonl": b"\xef\xbb\xbf" + lines(ROWS, "\r\n"),
    "blank.jsonl": b"\n  \n" + lines(ROWS, "\n\n"),
    "no_last_newline.jsonl": lines(ROWS).rstrip(b"\n"),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "array.jsonl": b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode(),
    "UPPER.JSONL": lines(ROWS),
    "lines.ndjson": lines(ROWS),
    "lines.ndjson.gz": gzip.compress(lines(ROWS)),
    "lines.jsonl.gz": gzip.compress(lines(ROWS)),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "table.csv": csv_text(),
    "windows.csv": b"\xef\xbb\xbf" + csv_text("\r\n"),
    "table.csv.gz": gzip.compress(csv_text()),
    "spaces.csv": csv_text(separator=", "),
    "more spaces.csv": csv_text("\r\n", separator=",   "),
    "table.tsv": csv_text(separator="\t"),
    "table.TSV.GZ": gzip.compress(csv_text(separator="\t")),
    "tabs.csv": csv_text(separator="\t"),
    "semicolons.csv": csv_text(separator=";"),
    "spaced semicolons.csv": csv_text(separator="; "),
    "commas.tsv": csv_text(),
    "odd [name]* {x}.jsonl": lines(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_every_kind_of_file(name, write):
    assert rows_of(write(FILES[name], name)) == ROWS


def write_table(path: Path, rows: list[dict[str, Any]] | pa.Table, size: int = 1000) -> str:
    """As what the name ends with; ``size``: rows of a group or batch."""
    table = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=size)
        return str(path)
    new = pa.ipc.new_file if path.name.startswith("file") else pa.ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=size)
    return str(path)


TABLES = ["rows.parquet", "odd [name]* {x}.parquet", "stream.arrow", "file.arrow"]


@pytest.mark.parametrize("size", [3, 1000])
@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name, size):
    """Of some batches, and of one that is larger than what is made objects of at a time."""
    rows = [
        {**row, "messages": [{"role": "user", "content": "hi"}], "ranks": [0, i]} for i in range(200) for row in ROWS
    ]
    path = write_table(tmp_path / name, rows, size)
    placed = list(open_source(path).rows)
    assert [row for _, row in placed] == rows
    assert [place for place, _ in placed] == [f"{path}: row {i}" for i in range(1, len(rows) + 1)]
    assert open_source(path).files == (Path(path),)


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow"])
def test_cells_are_those_that_datasets_reads(tmp_path, name):
    import datasets

    day = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    first = {"day": day.date(), "time": day, "clock": day.time(), "took": datetime.timedelta(seconds=3)}
    first |= {"money": decimal.Decimal("1.50"), "bytes": b"\xff", "flag": True, "real": 0.5, "whole": -7}
    first |= {"deep": [{"a": [None, {"b": "c"}]}, None], "nothing": None, "empty": [], "pair": {"x": 1, "y": None}}
    rows = [first, dict.fromkeys(first)]
    path = write_table(tmp_path / name, rows)
    theirs = datasets.load_dataset(Path(name).suffix[1:], data_files=path, split="train", cache_dir=str(tmp_path))
    assert rows_of(path) == list(theirs) == rows


def test_lists_of_unlike_objects_come_back_from_what_datasets_writes(tmp_path):
    """Such as the arguments of tool calls: it keeps them as JSON texts in the cells."""
    import datasets

    rows = [{"calls": [{"city": "Oslo"}, {"n": 1}], "one": {"x": [{"a": 1}, {"b": "2"}]}}, {"calls": None, "one": None}]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    assert rows_of(str(tmp_path / "rows.parquet")) == list(table) == rows
    assert rows_of(str(tmp_path / "saved")) == rows


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow", "saved", "org/name"])
def test_tool_calls_have_the_arguments_that_were_written(tmp_path, name, monkeypatch):
    """Arrow gives every struct the fields of all, as null; null that stands in a JSON text was written by somebody."""
    import datasets

    def row(arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"function": {"name": "weather", "arguments": arguments}}
        return {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [call]}

    rows = [row({"city": "Oslo"}), row({"days": 3})]
    if name == "org/name":
        monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: datasets.Dataset.from_list(rows))
        assert rows_of(name) == rows
    elif name == "saved":
        kept = [{"tool_calls": [{"n": None}, {"c": 1}]}]
        datasets.Dataset.from_list(kept, on_mixed_types="use_json").save_to_disk(tmp_path / name)
        assert rows_of(str(tmp_path / name)) == kept
    else:
        assert rows_of(write_table(tmp_path / name, rows)) == rows


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_rows_and_one_that_is_cut_off(tmp_path, name):
    table = pa.Table.from_pylist(ROWS)
    assert rows_of(write_table(tmp_path / name, table.slice(0, 0))) == []
    path = Path(write_table(tmp_path / name, ROWS * 500))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError) as error:
        rows_of(str(path))
    assert str(error.value).startswith(f"{path}: cannot be read: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TABLES)
def test_a_cell_that_is_no_text_is_named_and_the_others_are_read(tmp_path, name):
    ends, data = np.array([0, 2, 6, 8], np.int32).tobytes(), b"okcaf\xe9ok"
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(ends), pa.py_buffer(data))
    path = write_table(tmp_path / name, pa.table({"text": texts}))
    first, (place, error), last = open_source(path).rows
    assert [first, last] == [(f"{path}: row {i}", {"text": "ok"}) for i in (1, 3)]
    assert isinstance(error, BadRow)
    assert f"{place}: {error}".startswith(f"{path}: row 2: cannot be read: ")


def test_two_columns_of_one_name_in_a_table(tmp_path):
    path = write_table(tmp_path / "rows.parquet", pa.table([pa.array(["a"])] * 2, names=["text", "text"]))
    with pytest.raises(DataError, match=r"rows\.parquet: two columns have the same name: text, text$"):
        rows_of(path)


def test_a_folder_that_datasets_saved(tmp_path):
    """Its rows in their order, however many files there are, and by whatever indices they were chosen."""
    import datasets

    rows = [{"text": f"row {i}"} for i in range(50)]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved", num_shards=3)
    source = open_source(str(tmp_path / "saved"))
    assert [place for place, _ in open_source(str(tmp_path / "saved")).rows][-1] == f"{tmp_path / 'saved'}: row 50"
    assert [row for _, row in source.rows] == rows
    assert [file.name for file in source.files] == [
        "state.json",
        *(f"data-{i:05d}-of-00003.arrow" for i in range(3)),
    ]
    assert rows_of(str(tmp_path / "saved" / "data-*.arrow")) == rows
    chosen = table.shuffle(seed=1).select(range(5, 25))
    chosen.save_to_disk(tmp_path / "chosen")
    assert rows_of(str(tmp_path / "chosen")) == list(chosen) != rows[5:25]
    table.select([]).save_to_disk(tmp_path / "none")
    assert rows_of(str(tmp_path / "none")) == []
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: the file is missing, but state\.json lists it$"):
        rows_of(str(tmp_path / "saved"))


def test_a_folder_of_splits(tmp_path, monkeypatch):
    import datasets

    splits = {name: [{"text": name}] for name in ("train", "test")}
    tables = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    tables.save_to_disk(tmp_path / "saved")
    folder = str(tmp_path / "saved")
    assert rows_of(folder) == rows_of(f"{folder}:train") == rows_of(f"{folder}/train") == splits["train"]
    assert rows_of(f"{folder}:test") == rows_of(f"{folder}/test") == splits["test"]
    [(place, _)] = open_source(f"{folder}:test").rows
    assert place == f"{folder}:test: row 1"
    with pytest.raises(DataError, match=f"^{folder}: no split dev; the splits are {folder}:train, {folder}:test$"):
        open_source(f"{folder}:dev")
    monkeypatch.chdir(tmp_path)
    assert rows_of("saved:test") == splits["test"]
    tables.pop("train")
    tables.save_to_disk("other")
    with pytest.raises(DataError, match=r"^other: no split train; the splits are other:test$"):
        open_source("other")
    datasets.Dataset.from_list(splits["test"], split=datasets.NamedSplit("test")).save_to_disk("one")
    assert rows_of("one") == rows_of("one:test") == splits["test"]
    with pytest.raises(DataError, match=r"^one: no split train; the folder holds test$"):
        open_source("one:train")


def test_saved_folders_that_are_broken(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json: cannot be read: JSONDecodeError"):
        open_source(str(tmp_path))
    (tmp_path / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}')
    with pytest.raises(DataError, match=r"saved indices beside the rows; load the folder and save it again$"):
        open_source(str(tmp_path))
    for text in ("{}", '{"_data_files": ["data.arrow"]}', '{"_data_files": [{"filename": null}]}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(DataError, match=r"state\.json: lists no _data_files$"):
            open_source(str(tmp_path))
    for text in ("{}", '{"splits": "train"}', '{"splits": [1]}'):
        (tmp_path / "dataset_dict.json").write_text(text)
        with pytest.raises(DataError, match=r"dataset_dict\.json: lists no splits$"):
            open_source(str(tmp_path))


def test_a_folder_with_the_name_of_a_data_set_is_not_read_through_a_cache(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_table(tmp_path / "org" / "name" / "rows.parquet", ROWS)
    monkeypatch.chdir(tmp_path)
    for source in ("org/name", "org/name:train", "org/name:main:train"):
        with pytest.raises(
            DataError, match=r"^org/name: is a folder; name a file in it, or several with org/name/\*\.parquet$"
        ):
            open_source(source)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_replaced_is_read_as_it_is(tmp_path, name):
    """By one of the same name, size and time of change."""
    path = tmp_path / name
    for text in ("one", "two"):
        write_table(path, [{"text": text}])
        os.utime(path, ns=(10**18, 10**18))
        assert rows_of(str(path)) == [{"text": text}]


def test_a_table_is_read_in_parts(tmp_path):
    """A file of one group of rows takes no more memory than a part of it."""
    rows = pa.table({"text": pa.array([f"{i:05d}" * 200 for i in range(20_000)])})
    for name in ("rows.parquet", "stream.arrow", "file.arrow"):
        path = write_table(tmp_path / name, rows, 10**6)
        before = pa.total_allocated_bytes()
        for i, (_, row) in enumerate(open_source(path).rows):
            if i % 4000 == 0:
                assert row == {"text": f"{i:05d}" * 200}
                assert pa.total_allocated_bytes() - before < rows.nbytes / 3
    del rows


def test_a_text_file_edited_in_place_is_read_anew(write):
    assert rows_of(write([{"text": "one"}])) == [{"text": "one"}]
    assert rows_of(write([{"text": "two"}])) == [{"text": "two"}]


@pytest.mark.parametrize("megabytes", [1, 10])
def test_a_row_of_megabytes(megabytes, write):
    long = "a word " * (150_000 * megabytes)
    assert rows_of(write([{"text": long}])) == [{"text": long}]
    assert rows_of(write(f'text\n"{long}"\n', "rows.csv")) == [{"text": long}]


BAD_LINES = {
    b'{"text": "a"': "not a JSON object per line: Expecting ',' delimiter at 13",
    b"hello": "not a JSON object per line: Expecting value at 1",
    b'{"text": "a"} {"text": "b"}': "not a JSON object per line: Extra data at 15",
    b'{"text": "a\x00b"}': "not a JSON object per line: Invalid control character at at 12",
    b'{"text": "caf\xe9"}': "not UTF-8 at byte 14",
    b"[1, 2]": "expected an object with one value per column, found list",
    b"7": "expected an object with one value per column, found int",
    b'{"text": "a", "text": "b"}': "text: given twice in one object",
    b'{"messages": [{"role": "user", "role": "user"}]}': "role: given twice in one object",
    b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}": "nested too deeply",
    b'{"x": ' + b'{"x": ' * 200_000 + b"}" * 200_001: "nested too deeply",
    b'{"text": "a", "x": ' + b"9" * 5000 + b"}": "a whole number has too many digits",
    b"\x00\x00\x00\x00": "not a JSON object per line: Expecting value at 1",
    "{}".encode("utf-16"): "not UTF-8 at byte 1",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_and_the_others_are_read(bad, write):
    path = write(b'{"text": "ok"}\n\n' + bad + b'\n{"text": "fine"}\n')
    first, (place, error), last = open_source(path).rows
    assert first == (f"{path}:1", {"text": "ok"})
    assert last == (f"{path}:4", {"text": "fine"})
    assert isinstance(error, BadRow)
    assert f"{place}: {error}" == f"{path}:3: {BAD_LINES[bad]}"


def test_rows_of_an_array_are_numbered(write):
    path = write('[{"text": "a"},\n 7]', "rows.json")
    (_, row), (place, error) = open_source(path).rows
    assert row == {"text": "a"}
    assert f"{place}: {error}" == f"{path}: row 2: expected an object with one value per column, found int"


def test_csv_places_count_lines_within_quotes(write):
    path = write('text,more\n"two\nlines",x\n\nonly\na,b,c\nlast,y\n', "rows.csv")
    places = {place.removeprefix(path): row for place, row in open_source(path).rows}
    assert places[":2"] == {"text": "two\nlines", "more": "x"}
    assert str(places[":5"]) == "1 cells under a header of 2"
    assert str(places[":6"]) == "3 cells under a header of 2"
    assert places[":7"] == {"text": "last", "more": "y"}
    assert len(places) == 4


SPACED = {
    'a,b\n"x", "y"\n': ["x", "y"],
    'a,b\n "x","y"\n': ["x", "y"],
    "a,b\n x, y \n": [" x", " y "],
    'a,b\n"x", y\n': ["x", " y"],
    'a,b\n x, "y"\n': [" x", "y"],
    'a,b\n"x",  "y, ""z"", w"\n': ["x", 'y, "z", w'],
    'a,b\n"x, ""y""", ""\n': ['x, "y"', ""],
    'a,b\n"x, "" y", "z"\n': ['x, " y', "z"],
    'a,b\n"one\n, ""two"" \n", "three\n\n, four"\n': ['one\n, "two" \n', "three\n\n, four"],
    'a,b\n"one\n "", "", ", "x"\n': ['one\n ", ", ', "x"],
    'a,b\nx, "Hello" he said\n': ["x", ' "Hello" he said'],
    'a,b\nx, 5" or 6"\n': ["x", ' 5" or 6"'],
    'a,b\r\n"x", "y"\r\n': ["x", "y"],
    'a,b\n"x", "y"': ["x", "y"],
    '"a", "b"\n"x", "y"\n': ["x", "y"],
    'a\tb\n"x"\t "y\tz"\n': ["x", "y\tz"],
    'a;b\n"x; y"; "z"\n': ["x; y", "z"],
    "a;b\nx, y;z\n": ["x, y", "z"],
    'a,b\n"x;y",z\tw\n': ["x;y", "z\tw"],
}


@pytest.mark.parametrize("text", SPACED, ids=range(len(SPACED)))
def test_spaces_before_quoted_cells_go_and_those_of_text_stay(text, write):
    assert rows_of(write(text, "rows.csv")) == [dict(zip("ab", SPACED[text], strict=True))]


def test_spaced_rows_one_after_the_other(write):
    """A row's quotes have no effect on the next row."""
    cells = [cells for text, cells in SPACED.items() if text.startswith("a,b\n")]
    text = "a,b\n" + "".join(
        text.removeprefix("a,b\n").rstrip("\n") + "\n" for text in SPACED if text.startswith("a,b\n")
    )
    assert [list(row.values()) for row in rows_of(write(text, "rows.csv"))] == cells


def test_a_long_cell_of_many_lines_behind_a_space(write):
    cell = 'a line, "quoted"\n' * 10_000
    text = 'a, b\n"x", "' + cell.replace('"', '""') + '"\n'
    assert rows_of(write(text, "rows.csv")) == [{"a": "x", "b": cell}]


BROKEN_FILES = {
    "array.json": (b'[{"text": "a"},\n {"text": }]', ":2: not a JSON array: Expecting value at 11"),
    "twice.json": (b'[{"text": "a", "text": "b"}]', ": text: given twice in one object"),
    "bytes.json": (b'[{"text": "\xff"}]', ": not UTF-8 at byte 12"),
    "deep.json": (b"[" * 200_000, ": nested too deeply"),
    "digits.json": (b'[{"x": ' + b"9" * 5000 + b"}]", ": a whole number has too many digits"),
    "quote.csv": (b'text\n"open\n', ":2: not CSV: unexpected end of data"),
    "returns.csv": (b"text,x\ra,b\rc,d", ":1: not CSV: new-line character seen in unquoted field"),
    "bytes.csv": (b"text\nok\ncaf\xe9\n", ":3: not UTF-8 at byte 4"),
    "header.csv": (b"text,text\na,b\n", ":1: two columns have the same name: text, text"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-12], ": cannot be read: Compressed file ended"),
    "plain.jsonl.gz": (b'{"text": "a"}\n', ": cannot be read: Not a gzipped file"),
    "not.parquet": (b"hello", ": cannot be read: ArrowInvalid: Parquet"),
    "empty.jsonl": (b"", ": the file is empty"),
    "notes.txt": (b"hello", ": unknown file type; known: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"),
    "not.arrow": (b"hello", ": cannot be read: ArrowInvalid: "),
    "begins.arrow": (b"ARROW1\0\0hello", ": cannot be read: ArrowInvalid: "),
    "packed.parquet.gz": (gzip.compress(b"x"), ": a .parquet file cannot be read through gzip; unpack it"),
    "packed.arrow.gz": (gzip.compress(b"x"), ": a .arrow file cannot be read through gzip; unpack it"),
    "empty.parquet": (b"", ": the file is empty"),
    "empty.arrow": (b"", ": the file is empty"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_named(name, write):
    content, message = BROKEN_FILES[name]
    path = write(content, name)
    with pytest.raises(DataError) as error:
        rows_of(path)
    assert str(error.value).startswith(path + message)


def test_a_missing_file_names_the_nearest(write, tmp_path):
    write([{"text": "a"}], "train.jsonl")
    with pytest.raises(DataError, match=r"trian\.json: no such file; did you mean train\.jsonl\?"):
        open_source(str(tmp_path / "trian.json"))
    with pytest.raises(DataError, match=r"no such file, nor a folder .*nowhere"):
        open_source(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(DataError, match=r"is a folder; name a file in it, or several with .*/\*\.jsonl$"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"no asset 'sft_trian'; there are: .*sft_train"):
        open_source("asset:sft_trian")


def test_a_pattern_is_all_files_that_fit_in_the_order_of_their_names(write, tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    places = ("b.jsonl", "a.jsonl", "c.csv", "b/deep/d.jsonl")
    files = [write("text\nc\n" if name == "c.csv" else [{"text": name}], name) for name in places]
    assert rows_of(str(tmp_path / "*.jsonl")) == [{"text": "a.jsonl"}, {"text": "b.jsonl"}]
    assert rows_of(str(tmp_path / "[ac].*")) == [{"text": "a.jsonl"}, {"text": "c"}]
    assert rows_of(str(tmp_path / "[b].jsonl")) == [{"text": "b.jsonl"}]
    assert rows_of(str(tmp_path / "?.csv")) == [{"text": "c"}]
    assert rows_of(str(tmp_path / "**" / "*.jsonl")) == [{"text": name} for name in ("a.jsonl", "b.jsonl", places[3])]
    source = open_source(str(tmp_path / "*.*"))
    assert source.files == tuple(Path(files[i]) for i in (1, 0, 2))
    assert [place for place, _ in source.rows] == [f"{files[1]}:1", f"{files[0]}:1", f"{files[2]}:2"]
    with pytest.raises(DataError, match=r"\*\.parquet: no file matches$"):
        open_source(str(tmp_path / "*.parquet"))
    write("hello", "notes.txt")
    with pytest.raises(DataError, match=r"notes\.txt: unknown file type"):
        open_source(str(tmp_path / "*"))


def test_a_source_names_the_files_it_can_be_read_again_from(write, monkeypatch, tmp_path):
    import datasets

    path = write([{"text": "a"}])
    assert open_source(path).files == (Path(path),)
    assert open_source("-").files == ()
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "hub")
    on_disk = datasets.load_from_disk(tmp_path / "hub")
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: on_disk)
    [file] = open_source("org/name").files
    assert file.stat().st_size > 0
    assert file.suffix == ".arrow"


def test_stdin_is_a_prompt_a_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Hello \r\n\né".encode()), encoding="utf-8"))
    placed = list(open_source("-").rows)
    assert placed == [("stdin:1", {"prompt": "Hello "}), ("stdin:2", {"prompt": ""}), ("stdin:3", {"prompt": "é"})]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="stdin: not UTF-8"):
        list(open_source("-").rows)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("imdb", ("imdb", None, "train")),
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("org/name:main:test[:10%]", None),
        ("org/name:main:validation", ("org/name", "main", "validation")),
        ("org/name:", None),
    ],
)
def test_hub_ids(source, asked, monkeypatch):
    import datasets

    def load(name, config, *, split):
        assert (name, config, split) == asked
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    if asked is None:
        with pytest.raises(DataError, match="a hub id is name, name:split or name:config:split"):
            open_source(source)
    else:
        assert list(open_source(source).rows) == [(f"{source}: row 1", {"text": "a"})]


def test_a_hub_that_cannot_be_reached_is_an_error_with_both_readings(monkeypatch):
    import datasets

    def load(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError, match=r"^org/name: neither a file nor a data set on the hub: Couldn't reach the Hub$"
    ):
        open_source("org/name")
