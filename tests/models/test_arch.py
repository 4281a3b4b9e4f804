"""Configs in: both generations of transformers' format, and errors that name their field."""

import pytest

from jrlhf.models import Rope, arch_from_hf
from jrlhf.models.arch import AttentionKind
from tests.support.checkpoints import CONFIGS

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_missing_optional_fields_get_the_defaults_of_transformers():
    arch = arch_from_hf(BASE)
    assert (arch.num_kv_heads, arch.head_dim, arch.max_positions, arch.norm_eps) == (4, 8, 2048, 1e-6)
    assert arch.rope == Rope("default", 10000.0)
    assert (arch.activation, arch.tie_embeddings, arch.qkv_bias, arch.mlp_bias) == ("silu", False, False, False)


def test_attention_bias_covers_all_four_maps():
    arch = arch_from_hf(BASE | {"attention_bias": True})
    assert (arch.qkv_bias, arch.attention_out_bias, arch.mlp_bias) == (True, True, False)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
            Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
            Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192),
        ),
        ({"rope_theta": 1e5, "rope_scaling": None}, Rope("default", 1e5)),
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, Rope("default", 1e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Rope("linear", 10000.0, 2.0)),
        ({"rope_theta": 1e5, "rope_parameters": {"rope_type": "linear", "factor": 2}}, Rope("linear", 1e5, 2.0)),
    ],
)
def test_rope_is_read_in_the_old_and_the_new_form(rope, expected):
    assert arch_from_hf(BASE | rope).rope == expected


def test_llama3_positions_fall_back_as_in_transformers():
    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    config = BASE | {"max_position_embeddings": 77, "rope_scaling": {"rope_type": "llama3"} | rope}
    assert arch_from_hf(config).rope.original_max_positions == 77
    assert arch_from_hf(config | {"original_max_position_embeddings": 33}).rope.original_max_positions == 33


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "opt"}, "model_type: 'opt' is not supported; supported: 'llama', 'mistral'"),
        ({"model_type": "gemma3"}, "its text model, 'gemma3_text', is"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures: 'LlamaForTokenClassification'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type: 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "beta_slow": 0}}, "rope_parameters.beta_slow: expected a positive"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.factor: expected a positive number"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: expected a positive number"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_parameters.low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor: 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor: 0.25"),
        ({"rope_theta": -1.0}, "rope_theta: expected a positive number"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, found None"),
        ({"vocab_size": "61"}, "vocab_size: expected a positive integer, found '61'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"hidden_size": 30}, "num_attention_heads: 4 does not divide hidden_size 30"),
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"mlp_bias": "no"}, "mlp_bias: expected true or false"),
        ({"rms_norm_eps": None, "quantization_config": {}}, "quantization_config"),
    ],
)
def test_what_is_not_understood_is_an_error_that_names_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        arch_from_hf(BASE | change)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types: not supported for 'mistral'"),
        ("mistral", {"sliding_window": -1}, "sliding_window: expected a positive integer"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 3},
            "layer_types: 'sliding_attention' needs use_sliding_window",
        ),
        ("qwen2_windows", {"max_window_layers": -1}, "max_window_layers: expected 0 or a positive integer"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: true is not supported"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation: 'relu'"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping: expected a positive number"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types: expected a list of 3 names"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "layer_types: 'chunked_attention' is not supported"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "x"}}}, "full_attention.rope_type: 'x'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: false is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: true is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: true is not supported"),
        ("gpt2", {"n_head": 5}, "n_head: 5 does not divide n_embd 32"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: 'relu'"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotary_pct: 0.4 of 8 dimensions"),
        ("gpt_neox", {"architectures": ["LlamaForCausalLM"]}, "architectures: 'LlamaForCausalLM' is not supported"),
    ],
)
def test_what_a_family_does_not_understand_is_named(variant, change, message):
    with pytest.raises(ValueError, match=message):
        arch_from_hf(CONFIGS[variant] | change)


def test_configs_of_transformers_4_are_read_as_those_of_5():
    """Rotary settings stood beside each other, Gemma 3's layers followed from a pattern, defaults were left out."""
    old = {key: value for key, value in CONFIGS["gemma3"].items() if key not in ("rope_parameters", "layer_types")}
    old |= {
        "num_hidden_layers": 6,
        "sliding_window_pattern": 3,
        "rope_theta": 5e4,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    arch = arch_from_hf(old)
    assert arch.layer_kinds == (1, 1, 0, 1, 1, 0)
    local, everywhere = AttentionKind(4, Rope("default", 100.0)), AttentionKind(0, Rope("linear", 5e4, 2.0))
    assert arch.attention_kinds == (everywhere, local)
    assert arch.tie_embeddings
    neox = {key: value for key, value in CONFIGS["gpt_neox"].items() if key != "rope_parameters"}
    arch = arch_from_hf(neox | {"rotary_pct": 0.75, "rotary_emb_base": 500})
    assert (arch.rotary_dim, arch.rope) == (6, Rope("default", 500.0))


def test_windows_as_each_family_has_them():
    assert arch_from_hf(CONFIGS["mistral"]).attention_kinds == (AttentionKind(4, Rope("default", 10000.0)),)
    assert arch_from_hf(CONFIGS["mistral"] | {"sliding_window": None}).attention_kinds[0].window == 0
    assert arch_from_hf(CONFIGS["qwen2_windows"]).layer_kinds == (0, 1, 1)
    assert arch_from_hf(CONFIGS["qwen2_windows"] | {"use_sliding_window": False}).layer_kinds == (0, 0, 0)
    gemma2 = {key: value for key, value in CONFIGS["gemma2"].items() if key != "layer_types"}
    assert arch_from_hf(gemma2).layer_kinds == (1, 0, 1)
