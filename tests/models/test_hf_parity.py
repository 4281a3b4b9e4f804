"""Our decoder against transformers' own, in torch, on checkpoints that transformers wrote."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import at_last_token
from jrlhf.models import (
    load_pretrained,
    load_reward_model,
    normalise_reward,
    reward_from_pretrained,
    save_pretrained,
    save_reward_model,
)

from .checkpoints import VARIANTS, write_named

torch = pytest.importorskip("torch")


def torch_logits(model, tokens, mask):
    positions = np.where(mask, np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
        ).logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, write_checkpoint, padded):
    folder, theirs = write_checkpoint(variant)
    ours = load_pretrained(folder, dtype="float32")
    for tokens, mask in padded.values():
        if variant == "dynamic_rope":
            # transformers turns every row by the length of the batch's longest: only that one can be compared.
            tokens, mask = tokens[:1], mask[:1]
        expected = torch_logits(theirs, tokens, mask)
        found = ours.apply_fn(ours.params, jnp.asarray(tokens), jnp.asarray(mask))
        assert found.dtype == jnp.float32
        # Logits of some size, or closeness would say little.
        assert np.std(expected[mask]) > 0.5
        np.testing.assert_allclose(np.asarray(found)[mask], expected[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_scores_equal_transformers(side, write_checkpoint, padded):
    folder, theirs = write_checkpoint("llama3", reward=True)
    ours = load_reward_model(folder, dtype="float32")
    tokens, mask = padded[side]
    expected = torch_logits(theirs, tokens, mask)[:, 0]
    found = ours.score(ours.params, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4, rtol=0)


def test_normalised_reward_export_is_read_by_transformers_and_by_us(write_checkpoint, padded, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = write_checkpoint("biases")
    model = reward_from_pretrained(load_pretrained(folder, dtype="float32"), jax.random.key(1))
    tokens, mask = map(jnp.asarray, padded["right"])
    raw = model.score(model.params, tokens, mask)
    model = normalise_reward(normalise_reward(model, gain=2.0, bias=1.0), gain=0.5, bias=-3.25)
    assert (model.gain, model.bias) == (1.0, -2.75)
    save_reward_model(model, tmp_path / "reward")

    ours = load_reward_model(tmp_path / "reward", dtype="float32")
    assert (ours.gain, ours.bias) == (1.0, -2.75)
    np.testing.assert_allclose(ours.score(ours.params, tokens, mask), raw - 2.75, atol=1e-5)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert theirs.config.num_labels == 1
    scores = torch_logits(theirs.eval(), *padded["right"])[:, 0]
    np.testing.assert_allclose(scores - 2.75, np.asarray(raw) - 2.75, atol=1e-4)

    save_reward_model(ours, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "reward" / name).read_bytes()


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("llama2", "float32"), ("llama3", "bfloat16"), ("biases", "float16"), ("smollm2", "bfloat16")],
)
def test_export_is_byte_equal(variant, dtype, write_checkpoint, tmp_path):
    folder, _ = write_checkpoint(variant, dtype=dtype)
    (folder / "tokenizer_config.json").write_text("{}")
    save_pretrained(load_pretrained(folder, dtype="float32"), tmp_path / "out")
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


def test_reward_export_is_byte_equal(write_checkpoint, tmp_path):
    folder, _ = write_checkpoint("llama2", reward=True)
    save_reward_model(load_reward_model(folder, dtype="float32"), tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_is_exported_byte_equal_with_its_shards(variant, write_checkpoint, tmp_path):
    folder, _ = write_checkpoint(variant, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    save_pretrained(load_pretrained(folder, dtype="float32"), tmp_path / "out")
    names = sorted(file.name for file in folder.iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("variant", ["mistral", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox"])
def test_a_reward_model_made_here_is_scored_equally_by_transformers(variant, write_checkpoint, padded, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = write_checkpoint(variant, max_shard_size="20KB")
    model = reward_from_pretrained(load_pretrained(folder, dtype="float32"), jax.random.key(1))
    model = replace(model, config=model.config | {"pad_token_id": 0})
    save_reward_model(model, tmp_path / "reward")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", output_loading_info=True
    )
    assert not any(info.values()), info
    for tokens, mask in padded.values():
        expected = torch_logits(theirs.eval(), tokens, mask)[:, 0]
        found = model.score(model.params, jnp.asarray(tokens), jnp.asarray(mask))
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_logits_are_those_of_transformers(variant, tmp_path, padded, golden):
    """What stands in for torch where it is not installed. Written anew by ``python -m tests.models.write_golden``."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(write_named(tmp_path, variant), dtype=torch.float32)
    np.testing.assert_allclose(golden[variant], torch_logits(model.eval(), *padded["none"])[0], atol=1e-5)


def test_reward_of_a_language_model_reads_the_hidden_state_of_the_last_real_token(write_checkpoint, padded):
    folder, theirs = write_checkpoint("llama2")
    ours = reward_from_pretrained(load_pretrained(folder, dtype="float32"), jax.random.key(3))
    assert "lm_head" not in ours.params["decoder"]
    tokens, mask = padded["right"]
    with torch.no_grad():
        hidden = theirs.model(torch.tensor(tokens, dtype=torch.long)).last_hidden_state.numpy()
    kernel = np.asarray(ours.params["head"]["kernel"])
    assert abs(kernel.std() - 33**-0.5) < 0.06
    scores = ours.score_fn(ours.params, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(np.asarray(scores)[mask], (hidden @ kernel)[mask], atol=1e-4)
    expected = [(hidden @ kernel)[row, mask[row].sum() - 1] for row in range(3)]
    np.testing.assert_allclose(at_last_token(scores, jnp.asarray(mask)), expected, atol=1e-4)
