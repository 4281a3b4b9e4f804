"""Weights that are rounded in memory, and exports that do not show it: the source is read again for them."""

import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models import (
    add_adapters,
    load_pretrained,
    load_reward_model,
    merge_adapters,
    reward_from_pretrained,
    save_adapter,
    save_pretrained,
    save_reward_model,
)
from jrlhf.models.hf.folder import Stored
from jrlhf.models.hf.names import language_model_table
from jrlhf.models.hf.rounding import round_to_stored
from jrlhf.models.hf.write import write_folder
from jrlhf.parallel import make_mesh
from jrlhf.system.errors import UsageError
from tests.support.checkpoints import write_named

BASES = {
    "float32": lambda name: "F32",
    "bfloat16": lambda name: "BF16",
    "float16": lambda name: "F16",
    "another dtype in every layer": lambda name: {"0": "F16", "1": "BF16"}.get(name.split(".")[2][:1], "F32"),
}


def stored_as(folder, source, dtype):
    """The model of ``source`` in a folder whose tensors have the dtype that ``dtype`` says of their names."""
    model = load_pretrained(source, dtype="float32")
    table = language_model_table(model.arch)
    stored = {name: Stored(dtype(name + "..."), "model.safetensors") for name in model.stored}
    write_folder(folder, model.config, model.params, model.arch, table, stored, folder, ())
    return folder


def awake(params, key=5):
    """B not 0, so that the adapters change something."""

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        return 0.3 * jax.random.normal(jax.random.key(key + len(name)), x.shape) if "lora_b" in name else x

    return jax.tree_util.tree_map_with_path(leaf, params)


def adapted(model, rank=2):
    return awake(add_adapters(model.params, model.arch, jax.random.key(1), rank=rank, alpha=4.0, targets="q_proj|mlp"))


def both(load, folder, **options):
    """The same model with its weights in float32, and rounded."""
    return [load(folder, dtype="bfloat16", weights=weights, **options) for weights in ("float32", "auto")]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


@pytest.mark.parametrize("name", BASES)
def test_merged_exports_have_the_bytes_of_those_of_a_base_in_float32(name: str, tmp_path: Path) -> None:
    source = stored_as(tmp_path / "base", write_named(tmp_path / "named", "llama2"), BASES[name])
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    written = []
    for number, model in enumerate(both(load_pretrained, source, mesh=mesh)):
        assert (model.params["embed"].dtype == jnp.bfloat16) == bool(number)
        merged = merge_adapters(adapted(model), model.exact)
        save_pretrained(replace(model, params=merged), tmp_path / str(number))
        written.append([merged, round_to_stored(merged, model.arch, model.stored)])
    equal(*written)
    files = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(2)]
    assert files[0] == files[1]
    assert files[0] != (source / "model.safetensors").read_bytes()


def test_a_base_that_is_an_adapter_itself_is_merged_before_it_is_rounded(tmp_path: Path) -> None:
    base = stored_as(tmp_path / "base", write_named(tmp_path / "named", "gpt2"), BASES["bfloat16"])
    model = load_pretrained(base, dtype="float32")
    save_adapter(adapted(model, rank=3), model.arch, tmp_path / "peft", base=str(base), alpha=4.0)
    whole, rounded = both(load_pretrained, tmp_path / "peft")
    kernel = whole.params["layers"]["mlp"]["down"]["kernel"]
    assert not np.array_equal(kernel, model.params["layers"]["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(rounded.params["layers"]["mlp"]["down"]["kernel"], kernel.astype(jnp.bfloat16))
    equal(merge_adapters(rounded.params, rounded.exact), whole.params)


@pytest.mark.parametrize("kind", ["model", "adapter of a language model", "adapter of a reward model"])
def test_a_reward_model_s_head_is_never_rounded(kind: str, tmp_path: Path, padded) -> None:
    folder = write_named(tmp_path / "base", "llama3")
    start = reward_from_pretrained(load_pretrained(folder, dtype="float32"), jax.random.key(1))
    if kind != "adapter of a language model":
        folder = tmp_path / "reward"
        save_reward_model(start, folder)
    if kind != "model":
        save_adapter(adapted(start), start.arch, tmp_path / "peft", base=str(folder), alpha=4.0)
        folder = tmp_path / "peft"
    whole, rounded = both(load_reward_model, folder)
    assert rounded.params["head"]["kernel"].dtype == jnp.float32
    assert rounded.params["decoder"]["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    equal(merge_adapters(rounded.params, rounded.exact), whole.params)
    tokens, mask = map(jnp.asarray, padded["left"])
    np.testing.assert_array_equal(*(model.score(model.params, tokens, mask) for model in (whole, rounded)))


def test_a_reward_model_made_of_a_language_model_knows_its_source(tmp_path: Path) -> None:
    whole, rounded = (
        reward_from_pretrained(model, jax.random.key(1))
        for model in both(load_pretrained, write_named(tmp_path, "gpt2_untied"))
    )
    equal(merge_adapters(adapted(rounded), rounded.exact), merge_adapters(adapted(whole)))


def test_a_source_that_has_changed_meanwhile_is_an_error(tmp_path: Path) -> None:
    folder = write_named(tmp_path, "llama2")
    model = load_pretrained(folder, dtype="bfloat16", weights="auto")
    os.utime(folder / "model.safetensors", ns=(0, 0))
    with pytest.raises(UsageError, match=r"model\.safetensors: has changed since the model was loaded"):
        merge_adapters(adapted(model), model.exact)
