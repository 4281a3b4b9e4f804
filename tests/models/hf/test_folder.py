"""Folders in and out without torch: shardings, shards, and files that are not as they should be."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf.data import DataError, load_tokenizer
from jrlhf.models import (
    init_params,
    load_pretrained,
    load_reward_model,
    reward_from_pretrained,
    save_pretrained,
    save_reward_model,
)
from jrlhf.models.hf.adapter_folder import model_folder
from jrlhf.models.hf.folder_files import copy_files
from jrlhf.models.hf.names import language_model_table
from jrlhf.models.hf.write import write_folder
from jrlhf.models.reward import load_reward_start, normalise_reward
from jrlhf.parallel import make_mesh, shard_batch, tree_shardings
from tests.support.checkpoints import SMALL_LLAMA


@pytest.fixture
def folder(arch, spread, tmp_path):
    """Spacing and order of config.json are not those of transformers: they must survive too."""
    arch = replace(arch, tie_embeddings=False, qkv_bias=True, attention_out_bias=True)
    params = spread(init_params(arch, jax.random.key(0)))
    out = tmp_path / "source"
    out.mkdir()
    write_folder(out, SMALL_LLAMA, params, arch, language_model_table(arch), {}, out, ())
    (out / "config.json").write_text(json.dumps(SMALL_LLAMA).replace("1e-05", "1e-5"))
    return out


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def batch():
    tokens = np.random.default_rng(0).integers(1, 61, (8, 6)).astype(np.int32)
    return tokens, np.arange(6)[None, :] >= np.arange(8)[:, None] % 3


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_parameters_are_born_sharded_and_give_equal_logits(folder, shape):
    mesh = make_mesh(data=shape[0], fsdp=shape[1], tensor=shape[2])
    plain, sharded = (load_pretrained(folder, dtype="float32", mesh=m) for m in (None, mesh))
    expected = tree_shardings(sharded.params, mesh, sharded.rules)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), sharded.params, expected)
    assert all(jax.tree.leaves(same))
    kernel = sharded.params["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * shape[1] * shape[2] == kernel.size
    jax.tree.map(np.testing.assert_array_equal, sharded.params, plain.params)
    logits = jax.jit(sharded.apply_fn)(sharded.params, *shard_batch(batch(), mesh))
    np.testing.assert_allclose(logits, plain.apply_fn(plain.params, *map(jnp.asarray, batch())), atol=1e-5)


def test_sharded_parameters_are_exported_byte_equal(folder, tmp_path):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    save_pretrained(load_pretrained(folder, dtype="bfloat16", mesh=mesh), tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_trained_parameters_come_back(folder, tmp_path):
    model = load_pretrained(folder, dtype="float32")
    trained = replace(model, params=jax.tree.map(lambda x: x + 1.0, model.params))
    save_pretrained(trained, tmp_path / "out")
    again = load_pretrained(tmp_path / "out", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    # Onto its own source as well.
    save_pretrained(trained, folder)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_normalisation_and_bias_survive_the_folder(folder, tmp_path):
    mesh = make_mesh(data=1, fsdp=8, tensor=1)
    model = reward_from_pretrained(load_pretrained(folder, dtype="float32"), jax.random.key(1))
    tokens, mask = map(jnp.asarray, batch())
    raw = model.score(model.params, tokens, mask)
    model.params["head"]["bias"] = jnp.float32(0.125)
    normal = normalise_reward(model, gain=3.0, bias=-0.5)
    save_reward_model(normal, tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward", dtype="float32", mesh=mesh)
    assert (again.gain, again.bias) == (3.0, -0.5)
    assert again.params["head"]["bias"].sharding.mesh == mesh
    np.testing.assert_allclose(again.score(again.params, tokens, mask), 3.0 * (raw + 0.125) - 0.5, atol=1e-5)


@pytest.mark.parametrize(("gain", "bias"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, float("inf"))])
def test_a_normalisation_that_would_destroy_the_order_is_refused(folder, gain, bias):
    model = reward_from_pretrained(load_pretrained(folder, dtype="float32"), jax.random.key(1))
    with pytest.raises(ValueError, match="gain and bias must be finite and gain positive"):
        normalise_reward(model, gain=gain, bias=bias)


def test_missing_and_unexpected_tensors_are_named(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    edit(folder, change)
    with pytest.raises(
        ValueError, match=r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight; unexpected tensors: model\.l"
    ) as e:
        load_pretrained(folder, dtype="float32")
    assert "inv_freq" not in str(e.value)


def test_a_misshapen_tensor_is_named(folder):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(31, np.float32)}))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[31\], the config asks for \[32\]"):
        load_pretrained(folder, dtype="float32")


def test_a_dtype_that_is_no_weight_is_named(folder):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is I8"):
        load_pretrained(folder, dtype="float32")


def test_a_tied_checkpoint_may_hold_its_matrix_twice(folder, tmp_path):
    (folder / "config.json").write_text(json.dumps(SMALL_LLAMA | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"unexpected tensors: lm_head\.weight"):
        load_pretrained(folder, dtype="float32")
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    model = load_pretrained(folder, dtype="float32")
    assert "lm_head" not in model.params
    save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is pickled and is never opened"):
        load_pretrained(folder, dtype="float32")
    with pytest.raises(ValueError, match="pickled weights are never opened"):
        load_pretrained(folder / "pytorch_model.bin", dtype="float32")


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", None])
def test_a_broken_weights_file_is_named(folder, content):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5] if content is None else content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "weights.bin", "gone.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"is not the name of a safetensors file|not a readable safetensors file"):
        load_pretrained(folder, dtype="float32")


def test_an_index_that_names_the_wrong_shard_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"nowhere": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"nowhere is not in a\.safetensors"):
        load_pretrained(folder, dtype="float32")


def test_a_path_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing: no such folder$"):
        load_pretrained(tmp_path / "missing", dtype="float32")
    with pytest.raises(FileNotFoundError, match=r"config\.json: missing"):
        load_pretrained(tmp_path, dtype="float32")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_pretrained(tmp_path, dtype="float32")


def test_a_hub_id_asks_the_hub_for_safe_files_only(folder, monkeypatch):
    asked = {}

    def snapshot_download(name, *, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load_pretrained("someone/model-1.7B", dtype="float32")
    assert asked["name"] == "someone/model-1.7B"
    assert model.source == folder
    assert {p.rsplit(".", 1)[1] for p in asked["patterns"]} <= {"safetensors", "json", "model", "txt", "jinja"}


def test_the_two_kinds_of_folder_are_not_mistaken_for_each_other(folder, tmp_path):
    with pytest.raises(ValueError, match="architectures: a reward model is a LlamaForSequenceClassification"):
        load_reward_model(folder, dtype="float32")
    model = reward_from_pretrained(load_pretrained(folder, dtype="float32"), jax.random.key(1))
    save_reward_model(model, tmp_path / "reward")
    with pytest.raises(ValueError, match=r": is a reward model \(LlamaForSequenceClassification\); a language model"):
        load_pretrained(tmp_path / "reward", dtype="float32")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    (tmp_path / "reward" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ValueError, match="num_labels: a reward model must have 1 label, found 2"):
        load_reward_model(tmp_path / "reward", dtype="float32")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothere", r"no such folder$"),
        ("/abs/nothere", r"no such folder$"),
        ("~/nothere", r"no such folder$"),
        ("folder/that/isnt", r"no such folder$"),
        (
            "models/lama",
            r"no such folder; did you mean models/llama\?; and no such model on the hub: it is not in",
        ),
        ("./model/llama", r"no such folder; did you mean models\?$"),
        ("~/models/llamma", r"no such folder; did you mean .*/models/llama\?$"),
        ("someone/model", r"no such folder; and no such model on the hub: it is not in the local cache, and"),
        ("models/readme.txt", r"is a file; name the Hugging Face folder that contains it$"),
    ],
)
def test_every_door_says_what_is_wrong_with_a_path(tmp_path, monkeypatch, name, message):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "readme.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for door in (load_pretrained, load_reward_model):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(name)}: {message}"):
            door(name, dtype="float32")
    with pytest.raises(DataError, match=f"^{re.escape(name)}: no tokenizer: {message}"):
        load_tokenizer(name)
    with pytest.raises(FileNotFoundError, match="the path of a model is empty"):
        load_pretrained("", dtype="float32")


def test_a_folder_of_models_names_them(folder):
    with pytest.raises(FileNotFoundError, match=r"config\.json: missing, so .*; there is one in source$"):
        load_pretrained(folder.parent, dtype="float32")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (
            {"tie_word_embeddings": True},
            r"unexpected tensors: lm_head\.weight; config\.json says tie_word_embeddings, but lm_head\.weight is not "
            r"model\.embed_tokens\.weight: .* set tie_word_embeddings to false",
        ),
        ({"architectures": None}, r"unexpected tensors: score\.weight; score\.weight is a reward model's head"),
    ],
)
def test_tensors_that_people_are_known_to_have_come_with_what_to_do(folder, change, hint):
    if "architectures" in change:
        edit(folder, lambda tensors: tensors.update({"score.weight": np.zeros((1, 32), np.float32)}))
    (folder / "config.json").write_text(json.dumps(SMALL_LLAMA | change))
    with pytest.raises(ValueError, match=hint):
        load_pretrained(folder, dtype="float32")


def test_a_missing_head_may_be_the_embedding(folder):
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing tensors: lm_head\.weight; if .* set tie_word_embeddings to true"):
        load_pretrained(folder, dtype="float32")


def test_a_head_may_have_a_bias_of_its_own(folder, tmp_path):
    model = reward_from_pretrained(load_pretrained(folder, dtype="float32"), jax.random.key(1))
    save_reward_model(model, tmp_path / "theirs")
    edit(tmp_path / "theirs", lambda tensors: tensors.update({"score.bias": np.asarray([-1.5], np.float32)}))
    mesh, (tokens, mask) = make_mesh(data=2, fsdp=4, tensor=1), map(jnp.asarray, batch())
    expected = model.score(model.params, tokens, mask) - 1.5
    read = load_reward_model(tmp_path / "theirs", dtype="float32", mesh=mesh)
    assert read.params["head"]["bias"].shape == ()
    np.testing.assert_allclose(read.score(read.params, tokens, mask), expected, atol=1e-5)

    save_reward_model(read, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    save_reward_model(normalise_reward(read, gain=2.0, bias=0.5), tmp_path / "normal")
    again = load_reward_model(tmp_path / "normal", dtype="float32")
    np.testing.assert_allclose(again.score(again.params, tokens, mask), 2.0 * expected + 0.5, atol=1e-5)
    # A stage that starts from it exports a head as every stage does: its bias in config.json.
    start = load_reward_start(tmp_path / "normal", jax.random.key(0), dtype="float32")
    assert (start.gain, start.bias) == (1.0, 0.0)
    save_reward_model(start, tmp_path / "stage")
    assert "score.bias" not in load_file(tmp_path / "stage" / "model.safetensors")
    last = load_reward_model(tmp_path / "stage", dtype="float32")
    np.testing.assert_allclose(last.score(last.params, tokens, mask), 2.0 * expected + 0.5, atol=1e-5)
    edit(tmp_path / "theirs", lambda tensors: tensors.update({"score.bias": np.zeros(2, np.float32)}))
    with pytest.raises(ValueError, match=r"score\.bias has shape \[2\], the config asks for \[1\]"):
        load_reward_model(tmp_path / "theirs", dtype="float32")


def test_a_reward_start_is_a_reward_model_or_a_fresh_head(folder, tmp_path):
    base = load_pretrained(folder, dtype="float32")
    fresh = load_reward_start(folder, jax.random.key(1), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, fresh.params, reward_from_pretrained(base, jax.random.key(1)).params)
    save_reward_model(fresh, tmp_path / "reward")
    again = load_reward_start(tmp_path / "reward", jax.random.key(2), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, fresh.params)
    with pytest.raises(ValueError, match=r"reward: is a reward model \(LlamaForSeq.*\); sft\.model\.path needs a"):
        load_pretrained(tmp_path / "reward", dtype="float32", option="sft.model.path")
    with pytest.raises(ValueError, match=r"source: is a language model \(LlamaForCausalLM\); model needs a reward"):
        load_reward_model(folder, dtype="float32", option="model")


def test_a_base_on_the_hub_is_of_the_adapter_s_revision(folder, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, *, allow_patterns, revision="main"):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = {"base_model_name_or_path": "someone/model", "revision": "v2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert model_folder(tmp_path).base == folder
    assert asked == [("someone/model", "v2")]


def test_an_export_over_another_that_is_broken_off_cannot_be_loaded(folder, tmp_path):
    """Some of its files would be the new model's, and some the old one's."""
    model = load_pretrained(folder, dtype="float32", mesh=make_mesh(data=-1, fsdp=1, tensor=1))
    save_pretrained(model, tmp_path / "out")
    narrow = {name: tensor._replace(dtype="F16") for name, tensor in model.stored.items()}
    large = jax.tree.map(lambda leaf: leaf + 1e6, model.params)
    with pytest.raises(ValueError, match="65504"):
        save_pretrained(replace(model, params=large, stored=narrow), tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_copy_that_is_broken_off_cannot_be_loaded(folder, tmp_path):
    out = tmp_path / "out"
    (out / "model.safetensors").mkdir(parents=True)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        copy_files(folder, out)
    assert not (out / "config.json").exists()
    (out / "model.safetensors").rmdir()
    copy_files(folder, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in folder.iterdir())
