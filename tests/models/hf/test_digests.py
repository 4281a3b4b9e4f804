"""Digests of a model's folder: what changes them, what does not, and how much of a large file is read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf import assets
from jrlhf.models.hf.digests import (
    BLOCK_BYTES,
    MAX_FULL_READ,
    config_digest,
    model_file_digest,
    model_files,
    weights_digest,
)

MIB = 2**20


def sparse(path: Path, tensors: dict[str, int]) -> dict[str, tuple[int, int]]:
    """A safetensors file of zeros, which takes no room on the disk; where each tensor begins and ends in it."""
    header, at, place = {}, {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [place, place + size]}
        at[name], place = (place, place + size), place + size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    return {name: (8 + len(text) + start, 8 + len(text) + end) for name, (start, end) in at.items()}


def write_at(path: Path, start: int, values: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(values)


def bytes_read() -> int:
    """By this process, from whatever it has open."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(1000, dtype=np.float32), "b": np.zeros(3, np.float32)}, path)
    first, size = weights_digest(path), path.stat().st_size
    assert weights_digest(Path(shutil.copy(path, tmp_path / "elsewhere.safetensors"))) == first
    for place in (9, size // 2, size - 1):
        before = path.read_bytes()
        write_at(path, place, bytes([before[place] ^ 1]))
        assert weights_digest(path) != first
        path.write_bytes(before)
    assert weights_digest(path) == first
    write_at(path, size, b"\0")
    assert weights_digest(path) != first


def test_of_a_large_file_a_bounded_part_is_read_and_a_change_of_any_tensor_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    sizes = {"embed": 700 * MIB, "norm": 8192, "layer": 300 * MIB, "small": BLOCK_BYTES + 1, "head": 4096}
    at = sparse(path, sizes)
    before = bytes_read()
    first = weights_digest(path)
    # Some for /proc's own text.
    assert bytes_read() - before < 2 * MAX_FULL_READ + MIB
    for name in ("norm", "head"):
        start, end = at[name]
        for place in (start, end - 1):
            write_at(path, place, b"\1")
            assert weights_digest(path) != first, name
            write_at(path, place, b"\0")
    # What training does: it moves weights all over a tensor, of which some in a hundred differ in the file's precision.
    for name in ("embed", "layer", "small"):
        start, end = at[name]
        changed = np.zeros(end - start if name == "small" else 4 * MIB, np.uint8)
        changed[::100] = 1
        write_at(path, (start + end - len(changed)) // 2, changed.tobytes())
        assert weights_digest(path) != first, name
        write_at(path, (start + end - len(changed)) // 2, bytes(len(changed)))
    assert weights_digest(path) == first


@pytest.mark.parametrize("count", [1, 20_000])
def test_the_bound_holds_for_any_number_of_tensors(count: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    sparse(path, {f"model.layers.{i}.weight": 2**30 // count for i in range(count)})
    before = bytes_read()
    weights_digest(path)
    assert bytes_read() - before < 2 * MAX_FULL_READ + 4 * MIB


def test_a_large_file_that_is_no_safetensors_has_a_digest_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for head in (b"\xff" * 8, (2**20).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}"):
        with path.open("wb") as file:
            file.write(head)
            file.truncate(MAX_FULL_READ + 1)
        assert weights_digest(path) == weights_digest(path)


def test_a_config_is_what_it_says_not_how_it_is_laid_out(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    said = {"vocab_size": 512, "rope": {"a": 1, "b": 2}, "_name_or_path": "/here", "transformers_version": "5.0"}
    path.write_text(json.dumps(said))
    first = config_digest(path)
    path.write_text(json.dumps(dict(reversed(said.items())) | {"_name_or_path": "/there"}, indent=7))
    assert config_digest(path) == first
    path.write_text(json.dumps(said | {"vocab_size": 513}))
    assert config_digest(path) != first


def test_a_folder_s_files_are_found_by_what_they_are_for(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(assets.resolve("asset:stories260k"), tmp_path / "model"))
    (folder / "README.md").write_text("no part of the model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    files = model_files(folder)
    names = {kind: [file.name for file in files if file.kind == kind] for kind in ("weights", "config", "tokenizer")}
    assert names["weights"] == ["model.safetensors"]
    assert "config.json" in names["config"]
    assert {"tokenizer.json", "additional_chat_templates/tools.jinja"} <= {*names["tokenizer"]}
    assert "README.md" not in {file.name for file in files}
    assert all(model_file_digest(folder / file.name, file.kind) for file in files)
    # Shards are those that the index names, and no file outside the folder.
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors") | {"x": "../outside.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert [f.name for f in model_files(folder) if f.kind == "weights"] == ["model-00001-of-00001.safetensors"]
