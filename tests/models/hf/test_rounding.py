"""Weights as a folder of narrower dtypes would hold them, and folders whose dtype is chosen."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jrlhf.models import (
    add_adapters,
    init_params,
    load_pretrained,
    load_reward_model,
    merge_adapters,
    reward_from_pretrained,
    save_pretrained,
    save_reward_model,
)
from jrlhf.models.hf.folder import Stored
from jrlhf.models.hf.folder_files import generation_config, read_files, write_atomically, write_files
from jrlhf.models.hf.names import language_model_table
from jrlhf.models.hf.rounding import round_to_stored
from jrlhf.models.hf.write import write_folder
from tests.support.checkpoints import SMALL_LLAMA


@pytest.fixture
def arch32(arch):
    return replace(arch, tie_embeddings=False, qkv_bias=True, attention_out_bias=True)


@pytest.fixture
def narrow(arch32, spread, tmp_path):
    """``(stored dtype of a tensor by its name) -> folder`` in two files."""

    def write(dtype):
        params = spread(init_params(arch32, jax.random.key(0)))
        # Values at both ends of float16: subnormal, and just within.
        params["embed"] = params["embed"].at[0, :4].set(jnp.asarray([3e-8, -5.9e-6, 64000.0, 1e-30]))
        table, source = language_model_table(arch32), tmp_path / "source"
        names = [n.format(layer=i) for entry in table for n in [entry.name] for i in range(3)]
        stored = {n: Stored(dtype(n), f"model-0000{1 + ('layers' in n)}-of-00002.safetensors") for n in names}
        source.mkdir()
        write_folder(source, SMALL_LLAMA | {"torch_dtype": "bfloat16"}, params, arch32, table, stored, source, ())
        return source

    return write


@pytest.mark.parametrize(
    "dtype",
    [
        lambda name: "BF16",
        lambda name: "F16",
        lambda name: "F32" if "norm" in name else "BF16",
        lambda name: {"0": "F16", "1": "BF16"}.get(name.removeprefix("model.layers.")[0], "F32"),
    ],
    ids=["bfloat16", "float16", "norms in float32", "another dtype in every layer"],
)
def test_rounded_parameters_are_those_that_come_back_from_the_file(dtype, narrow, tmp_path):
    model = load_pretrained(narrow(dtype), dtype="float32")
    trained = jax.tree.map(lambda x: x * 1.01, model.params)
    adapted = add_adapters(trained, model.arch, jax.random.key(1), rank=2, alpha=2.0, targets="q_proj")
    merged = merge_adapters(adapted)
    rounded = round_to_stored(merged, model.arch, model.stored)
    save_pretrained(replace(model, params=merged), tmp_path / "out")
    again = load_pretrained(tmp_path / "out", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, rounded, again.params)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), rounded, merged)))
    # Rounded twice is rounded once.
    twice = round_to_stored(rounded, model.arch, model.stored)
    jax.tree.map(np.testing.assert_array_equal, rounded, twice)
    reward = reward_from_pretrained(replace(model, params=merged), jax.random.key(2))
    rounded = round_to_stored(reward.params, model.arch, model.stored)
    save_reward_model(reward, tmp_path / "reward")
    jax.tree.map(np.testing.assert_array_equal, rounded, load_reward_model(tmp_path / "reward", dtype="float32").params)


def test_a_weight_that_float16_cannot_hold_is_an_error_and_not_infinite(narrow, tmp_path):
    model = load_pretrained(narrow(lambda name: "F16"), dtype="float32")
    trained = replace(model, params=jax.tree.map(lambda x: x * 1.1, model.params))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: a weight exceeds 65504"):
        save_pretrained(trained, tmp_path / "out")
    save_pretrained(trained, tmp_path / "out", dtype="float32")


def test_parameters_in_float32_are_shared(arch32):
    params = init_params(arch32, jax.random.key(0))
    assert round_to_stored(params, arch32, {})["embed"] is params["embed"]


def test_a_sharded_folder_in_float32_counts_its_bytes_and_loses_nothing(narrow, tmp_path):
    model = load_pretrained(narrow(lambda name: "BF16"), dtype="float32")
    trained = replace(model, params=jax.tree.map(lambda x: x * 1.01, model.params))
    out = tmp_path / "out"
    save_pretrained(trained, out, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(out, dtype="float32").params, trained.params)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = [value for file in set(index["weight_map"].values()) for value in load_file(out / file).values()]
    assert {value.dtype for value in tensors} == {np.dtype(np.float32)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "", "C:\\a", "..\\a"])
def test_a_file_that_would_lie_elsewhere_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="is not the name of a file in a folder"):
        write_files(tmp_path / "in", {"fine.txt": b"1", name: b"2"})
    assert list(tmp_path.iterdir()) == []


def test_files_come_back_with_their_folders(tmp_path):
    files = {"a.bin": bytes(range(256)), "inner/b.txt": b"\r\n"}
    write_files(tmp_path, files)
    assert read_files(tmp_path, ["*.bin", "inner/*"]) == files


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


GENERATION = [
    ({"eos_token_id": 2, "pad_token_id": 0}, (2,), None),
    ({"eos_token_id": [9, 2], "pad_token_id": 0}, (2, 9), None),
    ({"eos_token_id": 2, "pad_token_id": 0}, (2, 7), {"eos_token_id": [2, 7], "pad_token_id": 0}),
    ({"eos_token_id": [9, 2]}, (2, 7, 9), {"eos_token_id": [9, 2, 7], "pad_token_id": 0}),
    ({"eos_token_id": None, "top_p": 0.9}, (2,), {"eos_token_id": 2, "top_p": 0.9, "pad_token_id": 0}),
    ({"eos_token_id": 2, "pad_token_id": 2}, (2,), {"eos_token_id": 2, "pad_token_id": 0}),
    (None, (2, 7), {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}),
]


@pytest.mark.parametrize(("theirs", "stops", "expected"), GENERATION)
def test_a_generation_config_keeps_its_bytes_unless_it_must_change(theirs, stops, expected, tmp_path):
    text = json.dumps(theirs, indent=7)
    if theirs is not None:
        (tmp_path / "generation_config.json").write_text(text)
    found = generation_config(tmp_path, {"bos_token_id": 1, "eos_token_id": 5}, stop_tokens=stops, pad_token=0)
    assert found == text.encode() if expected is None else json.loads(found) == expected
