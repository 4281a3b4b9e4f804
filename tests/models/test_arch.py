"""Configs in: both generations of transformers' format, and errors that name their field."""

import pytest

from jrlhf.models import Rope, arch_from_hf

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
        ({"model_type": "gpt2"}, "model_type: 'gpt2'"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures: 'LlamaForTokenClassification'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type: 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.rope_type: 'yarn'"),
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
