"""Our decoder against transformers' own, in torch, on checkpoints that transformers wrote."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.core import at_last_token
from jrlhf.models import load_pretrained, load_reward_model, reward_from_pretrained, save_pretrained, save_reward_model
from jrlhf.models.reward import normalise_reward
from tests.support.checkpoints import CONFIGS, VARIANTS, write_named
from tests.support.checkpoints import write_checkpoint as checkpoint_of

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
    expected = torch_logits(model.eval(), *padded["none"])[0]
    # The golden logits are another CPU's, which sums in another order: a few units in the last place of the largest.
    np.testing.assert_allclose(golden[variant], expected, atol=1e-5 * max(1.0, float(np.max(np.abs(expected)))))


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


def without(variant, *keys, **fields):
    """A variant's config without some fields, and with others."""
    return {key: value for key, value in CONFIGS[variant].items() if key not in keys} | fields


ODD = {
    # Fields that a family's config has and its modeling does not read, and the other way round.
    "gemma3, attention without its cap": without("gemma3", attn_logit_softcapping=0.5),
    "gemma3, logits with theirs": without("gemma3", final_logit_softcapping=0.5),
    "gemma3, a pattern": without("gemma3", "layer_types", sliding_window_pattern=2),
    "gemma3, a pattern by its private name": without("gemma3", "layer_types", _sliding_window_pattern=2),
    "gemma3, scaling over rope_parameters": without("gemma3", rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "gemma3, hidden_act beside hidden_activation": without("gemma3", hidden_act="silu", hidden_activation="gelu"),
    "gemma2, no caps": without("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma2, hidden_act alone": without("gemma2", hidden_act="silu"),
    "gemma2, biases": without("gemma2", attention_bias=True),
    "mistral, attention_bias": without("mistral", attention_bias=True),
    "mistral, no window": without("mistral", sliding_window=None),
    "qwen2, a window that is not used": without("qwen2", sliding_window=2),
    "qwen2, attention_bias": without("qwen2", attention_bias=False),
    "qwen2, head_dim": without("qwen2", head_dim=12),
    "qwen3, biases and windows": without(
        "qwen3", attention_bias=True, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "llama, a window and a pretraining_tp": without(
        "llama2", sliding_window=2, pretraining_tp=2, use_bidirectional=True
    ),
    "gpt2, upcast attention": without("gpt2", reorder_and_upcast_attn=True, n_ctx=5),
    "gpt_neox, the old names": without("gpt_neox", "rope_parameters", rotary_pct=0.5, rotary_emb_base=77),
}


@pytest.mark.parametrize("name", ODD)
def test_a_field_is_read_where_transformers_reads_it(name, tmp_path, padded):
    transformers = pytest.importorskip("transformers")
    folder = checkpoint_of(tmp_path, ODD[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_pretrained(folder, dtype="float32")
    tokens, mask = padded["left"]
    found = ours.apply_fn(ours.params, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(np.asarray(found)[mask], torch_logits(theirs, tokens, mask)[mask], atol=1e-4, rtol=0)


KNOWN_FIELDS = {
    # Read, or refused but for one value.
    "activation_function", "add_cross_attention", "attention_bias", "attn_logit_softcapping", "final_logit_softcapping",
    "head_dim", "hidden_act", "hidden_activation", "hidden_size", "intermediate_size", "layer_norm_eps",
    "layer_norm_epsilon", "layer_types", "max_position_embeddings", "max_window_layers", "mlp_bias", "n_embd", "n_head",
    "n_inner", "n_layer", "n_positions", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "query_pre_attn_scalar", "rms_norm_eps", "rope_parameters", "scale_attn_by_inverse_layer_idx", "scale_attn_weights",
    "sliding_window", "tie_word_embeddings", "use_bidirectional_attention", "use_parallel_residual",
    "use_sliding_window", "vocab_size",
    # Of training: dropout and how weights are drawn. Of generation: ids of tokens, caches.
    "attention_dropout", "attn_pdrop", "bos_token_id", "classifier_dropout", "embd_pdrop", "eos_token_id",
    "hidden_dropout", "initializer_range", "pad_token_id", "resid_pdrop", "use_cache",
    # Of heads that are not read, of the order of sums, and what no modeling of a language model reads.
    "is_decoder", "pretraining_tp", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj",
}  # fmt: skip


@pytest.mark.parametrize("model_type", sorted({config["model_type"] for config in CONFIGS.values()}))
def test_every_field_of_a_family_s_config_is_known(model_type):
    """A new version of transformers may add one that changes what a model computes."""
    transformers = pytest.importorskip("transformers")
    fields = vars(type(transformers.AutoConfig.for_model(model_type))).get("__annotations__")
    if fields is None:
        pytest.skip("configs of this version declare no fields")
    assert set(fields) - KNOWN_FIELDS == set()
