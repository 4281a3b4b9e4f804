"""Adapters against a plain sum of matrices, and against PEFT where torch is there."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf.core import combine, partition
from jrlhf.models import (
    add_adapters,
    is_trained,
    load_pretrained,
    load_reward_model,
    merge_adapters,
    reward_from_pretrained,
    save_adapter,
)
from jrlhf.models.hf.peft_read import insert_adapter
from jrlhf.models.reward import normalise_reward
from jrlhf.parallel import init_sharded, jit_step, make_mesh, shard_batch, tree_shardings
from jrlhf.steps import make_reward_step, make_sft_step
from jrlhf.types import RankingBatch, SFTBatch, TrainState
from tests.support.checkpoints import write_named

FAMILIES = ("llama2", "qwen3", "gemma3", "gpt2", "gpt_neox")


def model_of(variant, folder):
    return load_pretrained(write_named(folder, variant), dtype="float32")


def awake(params, key=5):
    """B not 0, so that the adapters say something."""

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        return 0.3 * jax.random.normal(jax.random.key(key + len(name)), x.shape) if "lora_b" in name else x

    return jax.tree_util.tree_map_with_path(leaf, params)


@pytest.mark.parametrize("variant", FAMILIES)
def test_adapters_add_a_product_of_two_matrices_to_every_target(variant, tmp_path, padded):
    model = model_of(variant, tmp_path)
    tokens, mask = map(jnp.asarray, padded["left"])
    fresh = add_adapters(model.params, model.arch, jax.random.key(0), rank=4, alpha=8.0, targets=".")
    before = model.apply_fn(model.params, tokens, mask)
    np.testing.assert_array_equal(model.apply_fn(fresh, tokens, mask), before)

    params = awake(fresh)
    expected = jax.tree.map(np.array, model.params)
    for part, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            leaves = params["layers"][part].get(name)
            if leaves is None:
                assert (part, name) == ("mlp", "gate")
                continue
            for layer in range(model.arch.num_layers):
                a, b = (np.asarray(leaves[side][layer]) for side in ("lora_a", "lora_b"))
                expected["layers"][part][name]["kernel"][layer] += 2.0 * a @ b
    merged = merge_adapters(params)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), merged, expected)
    logits = model.apply_fn(params, tokens, mask)
    assert float(jnp.max(jnp.abs(logits - before))) > 0.1
    np.testing.assert_allclose(logits, model.apply_fn(merged, tokens, mask), atol=2e-4)


def test_targets_are_found_in_hugging_face_names(tmp_path):
    model = model_of("llama2", tmp_path)

    def adapted(targets):
        params = add_adapters(model.params, model.arch, jax.random.key(0), rank=2, alpha=4.0, targets=targets)
        return {
            f"{part}/{name}"
            for part in ("attention", "mlp")
            for name, leaves in params["layers"][part].items()
            if "lora_a" in leaves
        }

    assert adapted("q_proj|v_proj") == {"attention/q", "attention/v"}
    assert adapted("^mlp") == {"mlp/gate", "mlp/up", "mlp/down"}
    with pytest.raises(ValueError, match=r"targets: 'c_attn' matches none of self_attn\.q_proj, self_attn\.k_proj"):
        adapted("c_attn")


def test_only_adapters_and_head_are_trained_and_the_base_is_not_copied(tmp_path):
    """On 8 devices; the update is that of plain matrices A and B, the frozen arrays are the very same objects."""
    model = reward_from_pretrained(model_of("llama2", tmp_path), jax.random.key(1))
    params = awake(add_adapters(model.params, model.arch, jax.random.key(0), rank=4, alpha=8.0, targets="."))
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 9, (8, 3))
    batch = RankingBatch(
        rng.integers(1, 61, (8, 3, 8)).astype(np.int32),
        np.arange(8) < lengths[..., None],
        np.argsort(rng.random((8, 3))).astype(np.int32),
        np.ones((8, 3), bool),
        np.zeros(8, np.float32),
    )
    mesh, tx = make_mesh(data=2, fsdp=2, tensor=2), optax.sgd(0.5)
    trained, frozen = partition(jax.device_put(params, tree_shardings(params, mesh, model.rules)), is_trained)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[1]
        for path, _ in jax.tree_util.tree_leaves_with_path(trained)
    }
    assert names == {"lora_a", "lora_b", "kernel", "bias"}
    assert trained["decoder"]["layers"]["attention"]["q"]["kernel"] is None

    def init(trained):
        return TrainState(trained, tx.init(trained), jnp.int32(0))

    state = init_sharded(init, trained, mesh=mesh, rules=model.rules)
    step = make_reward_step(model.score_fn, tx, center_coef=0.0, accumulation=1)
    jitted = jit_step(step, mesh=mesh, state_shardings=tree_shardings(state, mesh, model.rules))
    after, _ = jitted(state._replace(frozen=frozen), shard_batch(batch, mesh), jax.random.key(0))
    assert all(a is b for a, b in zip(jax.tree.leaves(after.frozen), jax.tree.leaves(frozen), strict=True))
    assert all(not x.is_deleted() for x in jax.tree.leaves(frozen))

    whole = TrainState(params, tx.init(params), jnp.int32(0))
    expected, _ = jax.jit(step)(whole, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    chosen, _ = partition(expected.params, is_trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.params, chosen)
    moved = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))), jax.device_get(after.params), jax.device_get(trained)
    )
    assert min(jax.tree.leaves(moved["decoder"])) > 1e-6
    assert combine(after.params, after.frozen)["decoder"]["embed"] is frozen["decoder"]["embed"]


def test_an_sft_step_gives_no_gradient_to_frozen_leaves(tmp_path, padded):
    model, tx = model_of("gpt2", tmp_path), optax.sgd(0.1)
    params = awake(add_adapters(model.params, model.arch, jax.random.key(0), rank=2, alpha=2.0, targets="attn"))
    trained, frozen = partition(params, is_trained)
    tokens, mask = map(jnp.asarray, padded["right"])
    step = jax.make_jaxpr(make_sft_step(model.logprob_fn, tx, accumulation=1))
    state = TrainState(trained, tx.init(trained), jnp.int32(0), frozen=frozen)
    jaxpr = step(state, SFTBatch(tokens, mask, mask), jax.random.key(0))
    vocabulary = (model.arch.vocab_size, model.arch.hidden_size)
    made = [var.aval.shape for equation in jaxpr.jaxpr.eqns for var in equation.outvars]
    assert vocabulary not in made, "a gradient of the frozen embedding is computed"


# peft asks transformers for an attribute under its old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@OLD_NAME
@pytest.mark.parametrize("variant", FAMILIES)
def test_peft_loads_what_is_written_and_is_read_back(variant, tmp_path, padded):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = model_of(variant, tmp_path / "base")
    params = awake(add_adapters(model.params, model.arch, jax.random.key(0), rank=4, alpha=8.0, targets="."))
    save_adapter(params, model.arch, tmp_path / "peft", base=str(model.source), alpha=8.0)
    base = transformers.AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    tokens, mask = padded["none"]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    found = model.apply_fn(params, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    read = load_pretrained(tmp_path / "peft", dtype="float32")
    np.testing.assert_allclose(read.apply_fn(read.params, jnp.asarray(tokens), jnp.asarray(mask)), expected, atol=2e-4)
    theirs.save_pretrained(tmp_path / "again")
    again = load_pretrained(tmp_path / "again", dtype="float32")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again.params, read.params)


@OLD_NAME
def test_peft_loads_a_reward_model_with_its_head(tmp_path, padded):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = reward_from_pretrained(model_of("llama3", tmp_path / "base"), jax.random.key(1))
    params = awake(add_adapters(model.params, model.arch, jax.random.key(0), rank=4, alpha=8.0, targets="q_proj|down"))
    save_adapter(params, model.arch, tmp_path / "peft", base=str(model.source), alpha=8.0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        model.source, num_labels=1, pad_token_id=0, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    tokens, mask = padded["right"]
    with torch.no_grad():
        masks = torch.tensor(mask, dtype=torch.long)
        expected = theirs(torch.tensor(tokens, dtype=torch.long), attention_mask=masks).logits.numpy()[:, 0]
    found = model.score(params, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    read = load_reward_model(tmp_path / "peft", dtype="float32")
    np.testing.assert_allclose(read.score(read.params, jnp.asarray(tokens), jnp.asarray(mask)), expected, atol=1e-4)


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_written_adapter_is_read_back_without_torch(variant, tmp_path):
    model = model_of(variant, tmp_path / "base")
    params = awake(add_adapters(model.params, model.arch, jax.random.key(0), rank=3, alpha=6.0, targets="."))
    save_adapter(params, model.arch, tmp_path / "peft", base=str(model.source), alpha=6.0)
    read = merge_adapters(insert_adapter(model.params, model.arch, tmp_path / "peft"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), read, merge_adapters(params))


def test_a_normalised_reward_model_scores_the_same_when_its_adapter_is_read_back(tmp_path, padded):
    model = reward_from_pretrained(model_of("llama3", tmp_path / "base"), jax.random.key(1))
    adapted = add_adapters(model.params, model.arch, jax.random.key(0), rank=4, alpha=8.0, targets="q_proj")
    model = normalise_reward(replace(model, params=awake(adapted)), gain=3.0, bias=-1.7)
    save_adapter(model.params, model.arch, tmp_path / "peft", base=str(model.source), alpha=8.0)
    read = load_reward_model(tmp_path / "peft", dtype="float32")
    tokens, mask = map(jnp.asarray, padded["right"])
    expected = model.score(model.params, tokens, mask)
    np.testing.assert_allclose(read.score(read.params, tokens, mask), expected, atol=1e-5)


def test_what_is_no_plain_lora_is_refused(tmp_path):
    model = model_of("llama2", tmp_path / "base")
    params = awake(add_adapters(model.params, model.arch, jax.random.key(0), rank=3, alpha=6.0, targets="q_proj"))
    folder = tmp_path / "peft"

    def changed(**fields):
        save_adapter(params, model.arch, folder, base=str(model.source), alpha=6.0)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | fields))

    for fields, message in (
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora: not supported"),
        ({"bias": "all"}, "bias: 'all' is not supported"),
        ({"r": 0}, "r: expected a positive number"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: expected a folder"),
    ):
        changed(**fields)
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder, dtype="float32")
    changed()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), np.float32)},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=r"tensors that are not supported: base_model\.model\.lm_head\.lora_A\.weight"):
        load_pretrained(folder, dtype="float32")
    with pytest.raises(ValueError, match="a reward model's adapter needs"):
        load_reward_model(folder, dtype="float32")
