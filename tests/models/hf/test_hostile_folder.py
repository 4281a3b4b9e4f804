"""Model folders made to harm: each is refused in a line that names the file, before memory is taken for it."""

import json
import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jrlhf.models import load_pretrained
from tests.support.checkpoints import CONFIGS, write_named

Header = dict[str, Any] | bytes


@contextmanager
def bounded_memory(extra: int) -> Iterator[None]:
    """Address space for no more than so many bytes beyond what is in use: a bigger allocation fails."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def safetensors(header: Header, data: int = 0, *, length: int | None = None) -> bytes:
    """A file with a header, so many bytes of data, and a wrong ``length`` of the header where one is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def tensor(start: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD_FILES = {
    "header of 2^62 bytes": (safetensors(b"{}", length=2**62), "header too large"),
    "header of 2^64 - 1 bytes": (safetensors(b"{}", length=2**64 - 1), "header too large"),
    "header of 99 MB in a tiny file": (safetensors(b"{}", length=99_000_000), "invalid header length"),
    "overlapping": (safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, 12), "invalid offset for tensor `b`"),
    "a gap": (safetensors({"a": tensor(0, 8), "b": tensor(12, 20)}, 20), "invalid offset for tensor `b`"),
    "truncated": (safetensors({"a": tensor(0, 8)}, 5), "not fully covered"),
    "more than is told": (safetensors({"a": tensor(0, 8)}, 50), "not fully covered"),
    "beyond the file": (safetensors({"a": tensor(2**40, 2**40 + 8)}, 8), "invalid offset for tensor `a`"),
    "backwards": (safetensors({"a": tensor(8, 0)}, 8), "invalid offset for tensor `a`"),
    "negative": (safetensors({"a": tensor(-8, 0)}, 8), "invalid JSON in header"),
    "shape not its bytes": (safetensors({"a": tensor(0, 8, (3,))}, 8), "invalid shape, data type, or offset"),
    "dtype not its bytes": (safetensors({"a": tensor(0, 8, dtype="F64")}, 8), "invalid shape, data type, or offset"),
    "shape of 2^124": (safetensors({"a": tensor(0, 8, (2**62, 2**62))}, 8), "overflow"),
    "unknown dtype": (safetensors({"a": tensor(0, 8, dtype="F128")}, 8), "unknown variant `F128`"),
    "two of one name": (
        safetensors(f'{{"a":{json.dumps(tensor(0, 8))},"a":{json.dumps(tensor(8, 16))}}}'.encode(), 16),
        "invalid offset for tensor `a`",
    ),
    "nested too deeply": (safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "recursion limit exceeded"),
    "not UTF-8": (safetensors(b'{"\xff":1}'), "invalid UTF-8"),
    "a list": (safetensors(b"[]"), "invalid JSON in header"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_named(tmp_path / "model", "smollm2")


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_weights_file_that_lies_is_named_and_takes_no_memory(name: str, folder: Path) -> None:
    content, reason = BAD_FILES[name]
    file = folder / "model.safetensors"
    file.write_bytes(content)
    with bounded_memory(64 * 2**20), pytest.raises(ValueError, match="safetensors") as error:
        load_pretrained(folder, dtype="float32")
    assert str(error.value).startswith(f"{file}: not a readable safetensors file: ")
    assert reason in str(error.value)


def test_the_bound_on_memory_binds() -> None:
    if sys.platform == "linux":
        with bounded_memory(64 * 2**20), pytest.raises(MemoryError):
            bytearray(512 * 2**20)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 10**6},
        {"vocab_size": 10**15},
        {"hidden_size": 10**30},
        {"num_attention_heads": 10**9},
        {"head_dim": 10**12},
        {"intermediate_size": 2**40},
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have_take_no_memory(change: dict[str, int], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIGS["smollm2"] | change))
    [(field, value)] = change.items()
    with bounded_memory(512 * 2**20), pytest.raises(ValueError, match=f"{field}|{value}"):
        load_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "sub/../../outside.safetensors", ".", ""])
def test_an_index_reads_nothing_outside_its_folder(name: str, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    name = name.replace("ABSOLUTE", str(outside))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json: .* is not the name of a safetensors file in this folder"):
        load_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"vocab_size": ' + "9" * 5000 + "}"], ids=["deep", "long"])
def test_a_config_that_python_cannot_read_is_named(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON: "):
        load_pretrained(folder, dtype="float32")
