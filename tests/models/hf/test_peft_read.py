"""What an adapter folder may ask for: read as PEFT reads it, known to have no effect, or refused by name."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf.models import (
    add_adapters,
    load_pretrained,
    load_reward_model,
    reward_from_pretrained,
    save_adapter,
    save_reward_model,
)
from jrlhf.models.hf.peft_read import FIELDS_READ, FIELDS_WITHOUT_EFFECT
from jrlhf.models.reward import normalise_reward
from tests.support.checkpoints import CONFIGS, write_checkpoint, write_named

# peft asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter on every q_proj of a tiny Llama, beside it."""
    model = load_pretrained(write_named(tmp_path / "base", "llama2"), dtype="float32")
    params = add_adapters(model.params, model.arch, jax.random.key(0), rank=2, alpha=4.0, targets="q_proj")
    save_adapter(params, model.arch, tmp_path / "adapter", base=str(model.source), alpha=4.0)
    return tmp_path / "adapter"


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit(folder: Path, edited: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edited(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"init_lora_weights": name}, f"init_lora_weights: '{name}' subtracts the first factors from the base's weights")
      for name in ("pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "corda_kpm", "lora_ga")),
    ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion .* merge it in PEFT"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq' .* model; merge it in PEFT"),
    ({"init_lora_weights": "svd_of_2027"}, "init_lora_weights: 'svd_of_2027' is not supported; supported: true"),
    ({"init_lora_weights": 1}, "init_lora_weights: 1 is not supported"),
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save: 'embed_tokens' is not supported, only a"),
    *(({key: value}, f"{key}: not supported, and it may change what the adapter does; merge it in PEFT")
      for key, value in {
          "use_dora": True, "use_qalora": True, "lora_bias": True, "layer_replication": [[0, 2], [1, 3]],
          "target_parameters": ["mlp.up_proj.weight"], "trainable_token_indices": [1], "megatron_config": {"a": 1},
          "alora_invocation_tokens": [5], "arrow_config": {"top_k": 2}, "use_bdlora": {"nblocks": 2},
          "kasa_config": {"beta": 0.1}, "monteclora_config": {"num_samples": 2}, "velora_config": {"scale": 1.0},
          "a_field_of_2027": "on",
      }.items()),
    ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern: expected positive numbers, found 0"),
    ({"rank_pattern": {"q_proj": 3}}, r"lora_B have shapes \[2, 32\] and \[32, 2\]; .* their rank is 3"),
    ({"r": 4}, "their rank is 4"),
    ({"rank_pattern": ["q_proj"]}, r"rank_pattern: expected one number per pattern, found \['q_proj'\]"),
    ({"layers_to_transform": "0,2"}, "layers_to_transform: expected whole numbers, found '0,2'"),
    ({"target_modules": "q_proj)"}, r"target_modules: 'q_proj\)' is not a valid pattern"),
    ({"target_modules": ["q_proj", "v_proj"]}, r"missing tensor: .*\.layers\.0\.self_attn\.v_proj"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_would_change_the_model_unseen_is_refused(adapter: Path, values: dict[str, Any], message: str) -> None:
    change(adapter, **values)
    with pytest.raises(ValueError, match=message):
        load_pretrained(adapter, dtype="float32")


def test_what_is_off_or_has_no_effect_is_read_over(adapter: Path) -> None:
    before = load_pretrained(adapter, dtype="float32").params
    off = dict.fromkeys(("use_dora", "a_field_of_2027", "bias", "layer_replication", "lora_bias"), None)
    off |= {"another": False, "target_parameters": [], "corda_config": {"corda_method": "ipm"}, "lora_dropout": 0.3}
    off |= {"auto_mapping": {"base_model_class": "X"}, "ensure_weight_tying": True, "modules_to_save": ["classifier"]}
    for init in (True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"):
        change(adapter, init_lora_weights=init, **off)
        jax.tree.map(np.testing.assert_array_equal, load_pretrained(adapter, dtype="float32").params, before)


def test_a_file_that_lost_a_part_is_named(adapter: Path) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    edit(adapter, lambda tensors: tensors.pop(name.format("B")))
    with pytest.raises(ValueError, match=r"missing tensor: .*layers\.1\.self_attn\.q_proj\.lora_B"):
        load_pretrained(adapter, dtype="float32")
    edit(adapter, lambda tensors: tensors.pop(name.format("A")))
    with pytest.raises(ValueError, match=r"missing tensor: .*layers\.1\.self_attn\.q_proj\.lora_A"):
        load_pretrained(adapter, dtype="float32")
    # Unless the config says that the layer has none.
    change(adapter, layers_to_transform=[0, 2])
    load_pretrained(adapter, dtype="float32")
    change(adapter, layers_to_transform=None, exclude_modules=["layers.1.self_attn.q_proj"])
    load_pretrained(adapter, dtype="float32")
    edit(adapter, lambda tensors: tensors.update({name.format("A"): np.zeros((0,), np.float32)}))
    edit(adapter, lambda tensors: tensors.update({name.format("B"): np.zeros((0,), np.float32)}))
    with pytest.raises(ValueError, match=r"lora_B have shapes \[0\] and \[0\]"):
        load_pretrained(adapter, dtype="float32")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors: missing; adapter_model\.bin is pickled"):
        load_pretrained(adapter, dtype="float32")


def test_the_base_is_found_from_the_adapter_before_the_working_directory(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_pretrained(adapter, dtype="float32").params
    monkeypatch.chdir(adapter.parent)
    for base in ("../base", "base", str(adapter.parent / "base")):
        change(adapter, base_model_name_or_path=base)
        jax.tree.map(np.testing.assert_array_equal, load_pretrained(adapter, dtype="float32").params, expected)
    change(adapter, base_model_name_or_path="../bass")
    message = r"adapter: base_model_name_or_path in adapter_config\.json: \.\./bass: no such folder"
    with pytest.raises(FileNotFoundError, match=message):
        load_pretrained(adapter, dtype="float32")
    change(adapter, base_model_name_or_path=".")
    with pytest.raises(ValueError, match="the adapter is its own base"):
        load_pretrained(adapter, dtype="float32")


def test_adapters_on_adapters_are_merged_from_the_base_on(adapter: Path, tmp_path: Path) -> None:
    edit(adapter, lambda tensors: [tensors.update({n: t + 0.5}) for n, t in list(tensors.items()) if "lora_B" in n])
    once = load_pretrained(adapter, dtype="float32")
    params = add_adapters(once.params, once.arch, jax.random.key(1), rank=2, alpha=4.0, targets="down_proj")
    kernel = params["layers"]["mlp"]["down"]
    kernel["lora_b"] = kernel["lora_b"] + 0.5
    save_adapter(params, once.arch, tmp_path / "second", base="../adapter", alpha=4.0)
    twice = load_pretrained(tmp_path / "second", dtype="float32")
    np.testing.assert_array_equal(*(m.params["layers"]["attention"]["q"]["kernel"] for m in (once, twice)))
    assert not np.array_equal(*(m.params["layers"]["mlp"]["down"]["kernel"] for m in (once, twice)))


@pytest.mark.parametrize("own_head", [True, False])
def test_an_adapter_on_a_reward_model_keeps_its_head_or_brings_one(tmp_path: Path, padded: Any, own_head: bool) -> None:
    config = CONFIGS["llama2"] | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    base = load_reward_model(write_checkpoint(tmp_path / "plain", config), dtype="float32")
    save_reward_model(normalise_reward(base, gain=2.0, bias=-0.75), tmp_path / "base")
    model = load_reward_model(tmp_path / "base", dtype="float32")
    params = add_adapters(model.params, model.arch, jax.random.key(0), rank=2, alpha=4.0, targets="v_proj")
    leaves = params["decoder"]["layers"]["attention"]["v"]
    leaves["lora_b"] = leaves["lora_b"] + 0.5
    if own_head:
        params = params | {"head": {"kernel": params["head"]["kernel"] * 3.0, "bias": jnp.float32(0.5)}}
    save_adapter(params, model.arch, tmp_path / "adapter", base="../base", alpha=4.0)
    if not own_head:
        edit(tmp_path / "adapter", lambda tensors: tensors.pop("base_model.model.score.weight"))
        # PEFT lists a classifier's head for the task whether it was trained or not; others leave both out.
        change(tmp_path / "adapter", modules_to_save=None, task_type=None)
    read = load_reward_model(tmp_path / "adapter", dtype="float32")
    assert (read.gain, read.bias) == ((1.0, 0.0) if own_head else (2.0, -0.75))
    tokens, mask = map(jnp.asarray, padded["right"])
    expected = model.score(params, tokens, mask)
    np.testing.assert_allclose(read.score(read.params, tokens, mask), expected, atol=1e-5)
    assert not np.allclose(expected, model.score(model.params, tokens, mask), atol=1e-2)
    with pytest.raises(ValueError, match="adapter: is the adapter of a reward model; a language model is needed"):
        load_pretrained(tmp_path / "adapter", dtype="float32")


def test_a_head_of_a_peft_folder_may_have_a_bias(tmp_path: Path) -> None:
    model = reward_from_pretrained(
        load_pretrained(write_named(tmp_path / "base", "llama2"), dtype="float32"), jax.random.key(0)
    )
    params = add_adapters(model.params, model.arch, jax.random.key(0), rank=2, alpha=4.0, targets="v_proj")
    save_adapter(params, model.arch, tmp_path / "adapter", base="../base", alpha=4.0)
    bias = {"base_model.model.score.bias": np.asarray([1.25], np.float32)}
    edit(tmp_path / "adapter", lambda tensors: tensors.update(bias))
    assert float(load_reward_model(tmp_path / "adapter", dtype="float32").params["head"]["bias"]) == 1.25


SETTINGS: dict[str, dict[str, Any]] = {
    "gaussian": {"init_lora_weights": "gaussian", "target_modules": "all-linear"},
    "rank-stabilised, of patterns": {
        "use_rslora": True, "r": 4, "rank_pattern": {"mlp.down_proj": 6, r"layers\.2\..*q_proj": 2},
        "alpha_pattern": {"v_proj": 5, r".*\.0\..*gate_proj": 3},
        "target_modules": ["q_proj", "v_proj", "mlp.down_proj", "gate_proj"],
    },
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers", "target_modules": ["q_proj", "up_proj"]},
    "one layer": {"layers_to_transform": 1, "target_modules": ["o_proj"]},
    "by a pattern, but for some": {
        "target_modules": r".*\.(q|k)_proj", "exclude_modules": r".*layers\.1\..*k_proj", "init_lora_weights": False,
    },
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": ["o_proj", "up_proj"]},
    "mica": {"init_lora_weights": "mica", "target_modules": ["o_proj", "up_proj"]},
}  # fmt: skip


def peft_folder(base: Path, out: Path, *, reward: bool = False, **settings: Any) -> Any:
    """An adapter as PEFT saves it, of random factors, and the model that it makes."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=torch.float32)
    common = {"r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS" if reward else "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**common | settings)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(out)
    return model


def their_logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask)).logits.numpy()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_read_is_what_peft_makes_of_it(name: str, tmp_path: Path, padded: Any) -> None:
    base = write_named(tmp_path / "base", "llama2")
    theirs = peft_folder(base, tmp_path / "adapter", **SETTINGS[name])
    ours = load_pretrained(tmp_path / "adapter", dtype="float32")
    tokens, mask = padded["none"]
    found = ours.apply_fn(ours.params, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(found, their_logits(theirs, tokens, mask), atol=3e-4)
    plain = load_pretrained(base, dtype="float32")
    assert not np.allclose(found, plain.apply_fn(plain.params, jnp.asarray(tokens), jnp.asarray(mask)), atol=0.1)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_is_refused_and_its_conversion_read(tmp_path: Path, padded: Any) -> None:
    base = write_named(tmp_path / "base", "llama2")
    start = tmp_path / "start"
    start.mkdir()
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    model = peft.get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start)
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    model.save_pretrained(tmp_path / "as it is")
    with pytest.raises(ValueError, match="init_lora_weights: 'pissa' subtracts the first factors"):
        load_pretrained(tmp_path / "as it is", dtype="float32")
    tokens, mask = padded["none"]
    expected = their_logits(model.eval(), tokens, mask)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=os.fspath(start))
    ours = load_pretrained(tmp_path / "converted", dtype="float32")
    np.testing.assert_allclose(ours.apply_fn(ours.params, jnp.asarray(tokens), jnp.asarray(mask)), expected, atol=1e-3)


@pytest.mark.parametrize("reward_base", [True, False])
def test_a_reward_model_s_adapter_scores_as_in_peft(reward_base: bool, tmp_path: Path, padded: Any) -> None:
    kind = {"architectures": ["LlamaForSequenceClassification"]} if reward_base else {}
    base = write_checkpoint(tmp_path / "base", CONFIGS["llama2"] | kind | {"num_labels": 1})
    theirs = peft_folder(base, tmp_path / "adapter", reward=True, target_modules=["q_proj"])
    ours = load_reward_model(tmp_path / "adapter", dtype="float32")
    tokens, mask = padded["right"]
    scores = ours.score(ours.params, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(scores, their_logits(theirs, tokens, mask)[:, 0], atol=1e-4)


def test_every_field_of_the_installed_peft_is_read_without_effect_or_refused() -> None:
    peft = pytest.importorskip("peft")
    refused = {key for values, _ in REFUSED for key in values}
    names = {field.name for field in fields(peft.LoraConfig)}
    assert names - FIELDS_READ - FIELDS_WITHOUT_EFFECT - refused == set()
    assert not FIELDS_READ & FIELDS_WITHOUT_EFFECT
