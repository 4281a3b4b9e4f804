"""Files of lines: only "\\n" ends one, all are UTF-8, and a write is whole or not there."""

import ast
import io
import json
import os
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jrlhf
from jrlhf.runs.metrics import MetricsLog, RowLog, drop_after, read_metrics
from jrlhf.system.lines import (
    ascii_json,
    json_line,
    json_text,
    numbered_lines,
    read_json_lines,
    read_whole_json_lines,
    whole_lines,
    write_output,
    write_text,
)

FILES = sorted(Path(jrlhf.__file__).parent.rglob("*.py"))
SEPARATORS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
TEXT = f"Once{SEPARATORS}upon é 語 🙂"


@pytest.mark.parametrize("separator", [*SEPARATORS, "\r\n"], ids=ascii)
def test_a_text_that_holds_a_separator_is_one_line_to_every_reader(tmp_path: Path, separator: str) -> None:
    rows = [{"prompt": f"Once{separator}upon"}, {"é": [separator, "é"]}]
    path = tmp_path / "rows.jsonl"
    write_text(path, "".join(map(json_line, rows)))
    assert read_json_lines(path) == read_whole_json_lines(path) == rows
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    assert "é".encode() in path.read_bytes()


@given(st.text(alphabet=st.characters(exclude_categories=())) | st.text(SEPARATORS))
def test_any_text_comes_back(text: str) -> None:
    line = json_line({"text": text})
    assert len(line.splitlines()) == 1
    assert line.encode("utf-8").endswith(b"\n")
    # Two halves of a pair, one behind the other, are one character in JSON.
    read = json.loads(line)["text"]
    assert read == text or read.encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")
    assert ascii_json(line).isascii()
    assert json.loads(ascii_json(line)) == json.loads(line)


def test_what_others_wrote_raw_is_read(tmp_path: Path) -> None:
    """As earlier versions wrote it, with a byte order mark, other line ends and blank lines."""
    path = tmp_path / "rows.jsonl"
    rows = [{"a": "x\u2028y\x85z"}, {"a": 2}]
    raw = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + (raw[0] + "\r\n\n" + raw[1]).encode())
    assert read_json_lines(path) == rows
    assert [number for number, _ in numbered_lines(path)] == [1, 3]


@pytest.mark.parametrize("line", [b'{"a": 1', b"caf\xe9", b"[" * 100_000])
def test_a_line_that_is_no_json_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    for read in (read_json_lines, read_whole_json_lines):
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: not JSON"):
            read(path)


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    """Even within a character, or where nothing but it is there."""
    path = tmp_path / "rows.jsonl"
    assert whole_lines(path) == read_whole_json_lines(path) == []
    first, second = json_line({"step": 1, "text": "é"}).encode(), json_line({"step": 2, "text": "é"}).encode()
    for cut in range(len(second)):
        path.write_bytes(first + second[:cut])
        assert read_whole_json_lines(path) == [{"step": 1, "text": "é"}]
        drop_after(path, 5)
        assert path.read_bytes() == first
    path.write_bytes(first[:-2])
    assert read_whole_json_lines(path) == []


def test_a_log_keeps_what_it_is_told(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "samples.jsonl", resume_step=None)
    log.write(1, {"text": TEXT})
    log.write(2, {"text": "\ud800"})
    log.close()
    again = RowLog(tmp_path / "samples.jsonl", resume_step=1)
    again.write(2, {"text": TEXT})
    again.close()
    assert [(r["step"], r["text"]) for r in read_json_lines(tmp_path / "samples.jsonl")] == [(1, TEXT), (2, TEXT)]
    with MetricsLog(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.event(1, "guard", told=TEXT)
        metrics.write(1, {"loss\u2028": float("nan")})
    [event] = read_json_lines(tmp_path / "events.jsonl")
    assert event["told"] == TEXT
    with MetricsLog(tmp_path, tensorboard=False, resume_step=1):
        pass
    assert [*read_metrics(tmp_path / "metrics.jsonl")[0]] == ["step", "time", "loss\u2028"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old\r\n\u2028")
    assert path.read_bytes() == "old\r\n\u2028".encode()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_bytes() == "old\r\n\u2028".encode()


def test_a_write_goes_where_its_path_leads(tmp_path: Path) -> None:
    """Through a link, onto a device, never through a link that stands where the new file is made."""
    target, link, other = tmp_path / "target", tmp_path / "link", tmp_path / "other"
    target.write_text("old", encoding="utf-8")
    other.write_text("other", encoding="utf-8")
    link.symlink_to(target)
    (tmp_path / "target.partial").symlink_to(other)
    write_text(link, "new")
    assert (target.read_text("utf-8"), other.read_text("utf-8"), link.is_symlink()) == ("new", "other", True)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~_umask()
    write_text(Path(os.devnull), "gone")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "no")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "latin-1", "ascii", "cp1252", "utf-16"])
def test_json_on_stdout_is_read_back_whatever_its_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    write_output("-", json_line({"text": TEXT}))
    content = stream.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert json.loads(content.decode(encoding)) == {"text": TEXT}
    if encoding not in ("utf-16",):
        assert json.loads(content.decode("utf-8")) == {"text": TEXT}


def test_output_makes_its_folder(tmp_path: Path) -> None:
    write_output(str(tmp_path / "a" / "é.jsonl"), json_line({"text": TEXT}))
    assert read_json_lines(tmp_path / "a" / "é.jsonl") == [{"text": TEXT}]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["é.jsonl"]


def test_indented_json_is_safe_too() -> None:
    assert json.loads(json_text({"a": [TEXT]}, indent=1)) == {"a": [TEXT]}
    assert json_text("\u2028\ud800") == '"\\u2028\\ud800"'


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_of_the_package_reads_lines_or_encodings_by_chance(path: Path) -> None:
    """``splitlines`` ends lines inside texts; a text file without an encoding has the locale's."""
    for call in calls(path):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        where = f"{path}:{call.lineno}: {name}"
        assert name != "splitlines", where
        named = any(keyword.arg == "encoding" for keyword in call.keywords)
        constants = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        if name == "read_text":
            assert named or constants == ["utf-8"], where
        elif name == "write_text" and isinstance(call.func, ast.Attribute):
            assert named, where
        elif name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
            owner = ast.unparse(call.func)
            modes = [value for value in constants if isinstance(value, str)]
            assert (
                named
                or owner in ("os.open", "build_opener(_NoRedirects(), *direct).open")
                or any("b" in mode for mode in modes)
            ), where
        elif name in ("run", "Popen", "check_output"):
            assert not any(keyword.arg == "text" for keyword in call.keywords), where
