"""Every kind of source gives the same rows, and says where a bad one stands."""

import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

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


def csv_text(newline: str = "\n") -> bytes:
    cells = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)]
    quoted = (",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells)
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
    "lines.jsonl.gz": gzip.compress(lines(ROWS)),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "table.csv": csv_text(),
    "windows.csv": b"\xef\xbb\xbf" + csv_text("\r\n"),
    "table.csv.gz": gzip.compress(csv_text()),
    "odd [name]* {x}.jsonl": lines(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_every_kind_of_file(name, write):
    assert rows_of(write(FILES[name], name)) == ROWS


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("name", ["rows.parquet", "odd [name]* {x}.parquet"])
def test_parquet(tmp_path, name):
    rows = [{**row, "messages": [{"role": "user", "content": "hi"}], "ranks": [0, 1]} for row in ROWS]
    assert rows_of(write_parquet(tmp_path / name, rows)) == rows


def test_a_parquet_file_edited_in_place_is_read_anew(tmp_path):
    path = tmp_path / "rows.parquet"
    before, after = [{"text": "one"}], [{"text": "two"}]
    write_parquet(path, before)
    assert rows_of(str(path)) == before
    size, at = path.stat().st_size, path.stat().st_mtime_ns
    write_parquet(path, after)
    os.utime(path, ns=(at + 10_000_000, at + 10_000_000))
    assert path.stat().st_size == size
    assert rows_of(str(path)) == after


def test_a_text_file_edited_in_place_is_read_anew(write):
    assert rows_of(write([{"text": "one"}])) == [{"text": "one"}]
    assert rows_of(write([{"text": "two"}])) == [{"text": "two"}]


@pytest.mark.parametrize("megabytes", [1, 10])
def test_a_row_of_megabytes(megabytes, write):
    long = "a word " * (150_000 * megabytes)
    assert rows_of(write([{"text": long}])) == [{"text": long}]
    assert rows_of(write(f'text\n"{long}"\n', "rows.csv")) == [{"text": long}]


BAD_LINES = {
    b'{"text": "a"': "not a JSON object a line: Expecting ',' delimiter at 13",
    b"hello": "not a JSON object a line: Expecting value at 1",
    b'{"text": "a"} {"text": "b"}': "not a JSON object a line: Extra data at 15",
    b'{"text": "a\x00b"}': "not a JSON object a line: Invalid control character at at 12",
    b'{"text": "caf\xe9"}': "not UTF-8 at byte 14",
    b"[1, 2]": "expected an object with a value a column, found list",
    b"7": "expected an object with a value a column, found int",
    b'{"text": "a", "text": "b"}': "text: given twice in one object",
    b'{"messages": [{"role": "user", "role": "user"}]}': "role: given twice in one object",
    b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}": "nested too deeply",
    b'{"x": ' + b'{"x": ' * 200_000 + b"}" * 200_001: "nested too deeply",
    b'{"text": "a", "x": ' + b"9" * 5000 + b"}": "a whole number has too many digits",
    b"\x00\x00\x00\x00": "not a JSON object a line: Expecting value at 1",
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
    assert f"{place}: {error}" == f"{path}: row 2: expected an object with a value a column, found int"


def test_csv_places_count_lines_within_quotes(write):
    path = write('text,more\n"two\nlines",x\n\nonly\na,b,c\nlast,y\n', "rows.csv")
    places = {place.removeprefix(path): row for place, row in open_source(path).rows}
    assert places[":2"] == {"text": "two\nlines", "more": "x"}
    assert str(places[":5"]) == "1 cells under a header of 2"
    assert str(places[":6"]) == "3 cells under a header of 2"
    assert places[":7"] == {"text": "last", "more": "y"}
    assert len(places) == 4


BROKEN_FILES = {
    "array.json": (b'[{"text": "a"},\n {"text": }]', ":2: not a JSON array: Expecting value at 11"),
    "twice.json": (b'[{"text": "a", "text": "b"}]', ": text: given twice in one object"),
    "bytes.json": (b'[{"text": "\xff"}]', ": not UTF-8 at byte 12"),
    "deep.json": (b"[" * 200_000, ": nested too deeply"),
    "digits.json": (b'[{"x": ' + b"9" * 5000 + b"}]", ": a whole number has too many digits"),
    "quote.csv": (b'text\n"open\n', ":2: not CSV: unexpected end of data"),
    "bytes.csv": (b"text\nok\ncaf\xe9\n", ":3: not UTF-8 at byte 4"),
    "header.csv": (b"text,text\na,b\n", ":1: two columns of one name: text, text"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-12], ": cannot be read: Compressed file ended"),
    "plain.jsonl.gz": (b'{"text": "a"}\n', ": cannot be read: Not a gzipped file"),
    "not.parquet": (b"hello", ": cannot be read: ArrowInvalid: Parquet"),
    "empty.jsonl": (b"", ": the file is empty"),
    "notes.txt": (b"hello", ": unknown kind of file; known: .jsonl, .json, .csv, .parquet"),
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
    with pytest.raises(DataError, match=r"a folder; name a file in it, or several as .*/\*\.jsonl$"):
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
    with pytest.raises(DataError, match=r"\*\.parquet: no file fits$"):
        open_source(str(tmp_path / "*.parquet"))
    write("hello", "notes.txt")
    with pytest.raises(DataError, match=r"notes\.txt: unknown kind of file"):
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
