"""Conversion of ``config.json`` to an architecture, for each supported family and transformers 4 and 5."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jrlhf.models.arch import ArchConfig, Family, Rope
from jrlhf.models.hf.fields import activation, number, number_or_none, require, size, size_or, switch
from jrlhf.models.rope import layer_rope, rope_field, rope_from_hf
from jrlhf.system.errors import UsageError


class Classes(NamedTuple):
    """transformers' class names of a family's models."""

    causal_lm: str
    sequence_classification: str


CLASSES: dict[Family, Classes] = {
    "llama": Classes("LlamaForCausalLM", "LlamaForSequenceClassification"),
    "mistral": Classes("MistralForCausalLM", "MistralForSequenceClassification"),
    "qwen2": Classes("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": Classes("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "gemma2": Classes("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    "gemma3_text": Classes("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    "gpt2": Classes("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "gpt_neox": Classes("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
}


def arch_from_hf(config: Mapping[str, Any]) -> ArchConfig:
    """Convert a config to an architecture.

    Fields that are optional in transformers get transformers' defaults; dropout is not applied. An unsupported family,
    rope type, activation or switch is a ``ValueError`` that names the field.
    """
    match config.get("model_type"):
        case "llama":
            arch = _llama(config)
        case "mistral":
            arch = _mistral(config)
        case "qwen2":
            arch = _qwen2(config)
        case "qwen3":
            arch = _qwen3(config)
        case "gemma2":
            arch = _gemma2(config)
        case "gemma3_text":
            arch = _gemma3(config)
        case "gpt2":
            arch = _gpt2(config)
        case "gpt_neox":
            arch = _gpt_neox(config)
        case "gemma3":
            raise UsageError(
                "model_type: 'gemma3' reads images too and is not supported; its text model, 'gemma3_text', is"
            )
        case other:
            raise UsageError(f"model_type: {other!r} is not supported; supported: {', '.join(map(repr, CLASSES))}")
    for name in config.get("architectures") or ():
        if name not in CLASSES[arch.family]:
            raise UsageError(f"architectures: {name!r} is not supported; supported: {', '.join(CLASSES[arch.family])}")
    if config.get("quantization_config") is not None:
        raise UsageError("quantization_config: quantised weights are not supported; use the unquantised checkpoint")
    return arch


def is_sequence_classification(config: Mapping[str, Any], arch: ArchConfig) -> bool:
    """Tell whether a config is that of a reward model."""
    return CLASSES[arch.family].sequence_classification in (config.get("architectures") or ())


def _llama(config: Mapping[str, Any]) -> ArchConfig:
    bias = switch(config, "attention_bias")
    mlp_bias = switch(config, "mlp_bias")
    return _gated(config, "llama", max_positions=2048, qkv_bias=bias, attention_out_bias=bias, mlp_bias=mlp_bias)


def _mistral(config: Mapping[str, Any]) -> ArchConfig:
    config = {"num_key_value_heads": 8, "sliding_window": 4096} | dict(config)
    if config.get("layer_types") is not None:
        raise UsageError("layer_types: not supported for 'mistral', whose layers are all alike")
    window = size_or(config, "sliding_window", 0)
    local = (True,) * size(config, "num_hidden_layers") if window else ()
    return _gated(config, "mistral", max_positions=131072, window=window, local_layers=local)


def _qwen2(config: Mapping[str, Any]) -> ArchConfig:
    config = {"num_key_value_heads": 32} | dict(config)
    window, local = _qwen_windows(config)
    return _gated(config, "qwen2", max_positions=32768, qkv_bias=True, window=window, local_layers=local)


def _qwen3(config: Mapping[str, Any]) -> ArchConfig:
    config = {"head_dim": 128, "num_key_value_heads": 32} | dict(config)
    bias, (window, local) = switch(config, "attention_bias"), _qwen_windows(config)
    return _gated(
        config,
        "qwen3",
        max_positions=32768,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm=True,
        window=window,
        local_layers=local,
    )


def _qwen_windows(config: Mapping[str, Any]) -> tuple[int, tuple[bool, ...]]:
    """Return the window and the local layers: with use_sliding_window, those from max_window_layers on."""
    layers = size(config, "num_hidden_layers")
    first = config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise UsageError(f"max_window_layers: expected 0 or a positive integer, found {first!r}")
    window = size_or(config, "sliding_window", 0) if switch(config, "use_sliding_window") else 0
    local = _local_layers(config, [bool(window) and layer >= first for layer in range(layers)])
    if any(local) and not window:
        raise UsageError("layer_types: 'sliding_attention' needs use_sliding_window and sliding_window")
    return window, local


def _gemma2(config: Mapping[str, Any]) -> ArchConfig:
    softcaps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    layers = size(config, "num_hidden_layers")
    local = _local_layers(config, [layer % 2 == 0 for layer in range(layers)])
    return _gemma(softcaps | dict(config), "gemma2", max_positions=8192, local_layers=local)


def _gemma3(config: Mapping[str, Any]) -> ArchConfig:
    """Convert a Gemma 3 config, whose local layers have rotary positions of their own without scaling.

    attn_logit_softcapping is ignored, since transformers' attention ignores it too.
    """
    config = {"head_dim": 256} | dict(config) | {"attn_logit_softcapping": None}
    pattern = size_or(config, "sliding_window_pattern", 6)
    layers = size(config, "num_hidden_layers")
    local = _local_layers(config, [bool((layer + 1) % pattern) for layer in range(layers)])
    return _gemma(
        config,
        "gemma3_text",
        max_positions=131072,
        local_layers=local,
        qk_norm=True,
        rope=layer_rope(config, "full_attention", "rope_theta", 1e6, scaling=config.get("rope_scaling")),
        local_rope=layer_rope(config, "sliding_attention", "rope_local_base_freq", 1e4, scaling=None),
    )


def _gemma(config: Mapping[str, Any], family: Family, **switches: Any) -> ArchConfig:
    """Convert the fields that Gemma 2 and 3 share (Team Gemma 2024, arXiv 2408.00118; 2025, arXiv 2503.19786)."""
    optional: dict[str, Any] = {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096}
    config = optional | {"query_pre_attn_scalar": 256, "tie_word_embeddings": True} | dict(config)
    require(config, "use_bidirectional_attention", value=False)
    bias = switch(config, "attention_bias")
    return _gated(
        config,
        family,
        activation_key="hidden_activation",
        activation_default="gelu_pytorch_tanh",
        qkv_bias=bias,
        attention_out_bias=bias,
        norm="rms_plus_one",
        post_norms=True,
        scale_embeddings=True,
        query_scalar=number(config, "query_pre_attn_scalar"),
        attention_softcap=number_or_none(config, "attn_logit_softcapping"),
        final_softcap=number_or_none(config, "final_logit_softcapping"),
        window=size(config, "sliding_window"),
        **switches,
    )


def _gated(
    config: Mapping[str, Any],
    family: Family,
    *,
    max_positions: int,
    activation_key: str = "hidden_act",
    activation_default: str = "silu",
    **switches: Any,
) -> ArchConfig:
    """Convert the fields that all families after GPT-NeoX share: RMS norms, rotary positions and a gated MLP."""
    hidden_size, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    kv_heads = size_or(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UsageError(f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
    head_dim = _head_dim(config, hidden_size, heads)
    config = {"max_position_embeddings": max_positions} | dict(config)
    if "rope" not in switches:
        _check_full_rotation(config)
        switches["rope"] = _rope(config, "rope_theta", head_dim)
    defaults: dict[str, Any] = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}
    return ArchConfig(
        family=family,
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size(config, "intermediate_size"),
        num_layers=size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=size(config, "max_position_embeddings"),
        norm_eps=number(config, "rms_norm_eps", default=1e-6),
        activation=activation(config, activation_key, default=activation_default),
        tie_embeddings=switch(config, "tie_word_embeddings"),
        **defaults | switches,
    )


def _gpt2(config: Mapping[str, Any]) -> ArchConfig:
    """Convert a GPT-2 config (Radford et al. 2019)."""
    require(config, "scale_attn_weights", value=True)
    require(config, "scale_attn_by_inverse_layer_idx", value=False)
    require(config, "add_cross_attention", value=False)
    width, heads = size(config, "n_embd"), size(config, "n_head")
    if width % heads:
        raise UsageError(f"n_head: {heads} does not divide n_embd {width}")
    return ArchConfig(
        family="gpt2",
        vocab_size=size(config, "vocab_size"),
        hidden_size=width,
        intermediate_size=size_or(config, "n_inner", 4 * width),
        num_layers=size(config, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_positions=size_or(config, "n_positions", 1024),
        norm_eps=number(config, "layer_norm_epsilon", default=1e-5),
        rope=None,
        activation=activation(config, "activation_function", default="gelu_new"),
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_embeddings=switch(config, "tie_word_embeddings", default=True),
        norm="layer",
        gated_mlp=False,
    )


def _gpt_neox(config: Mapping[str, Any]) -> ArchConfig:
    """Convert a GPT-NeoX or Pythia config (Black et al. 2022, arXiv 2204.06745)."""
    width, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    head_dim = _head_dim(config, width, heads)
    settings = config.get(rope_field(config)) or {}
    old = number(config, "rotary_pct", default=0.25)
    fraction = number(settings, "partial_rotary_factor", field="rope_parameters.partial_rotary_factor", default=old)
    rotary_dim = int(head_dim * fraction)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise UsageError(f"rotary_pct: {fraction} of {head_dim} dimensions is not an even number of dimensions")
    config = {"max_position_embeddings": 2048} | dict(config)
    bias = switch(config, "attention_bias", default=True)
    return ArchConfig(
        family="gpt_neox",
        vocab_size=size(config, "vocab_size"),
        hidden_size=width,
        intermediate_size=size(config, "intermediate_size"),
        num_layers=size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_positions=size(config, "max_position_embeddings"),
        norm_eps=number(config, "layer_norm_eps", default=1e-5),
        rope=_rope(config, "rotary_emb_base", rotary_dim),
        activation=activation(config, "hidden_act", default="gelu"),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=True,
        tie_embeddings=switch(config, "tie_word_embeddings"),
        norm="layer",
        gated_mlp=False,
        parallel_residual=switch(config, "use_parallel_residual", default=True),
        rotary_dim=rotary_dim,
    )


def _head_dim(config: Mapping[str, Any], hidden_size: int, heads: int) -> int:
    explicit = config.get("head_dim") is not None
    if not explicit and hidden_size % heads:
        raise UsageError(f"num_attention_heads: {heads} does not divide hidden_size {hidden_size}; head_dim is not set")
    head_dim = size(config, "head_dim") if explicit else hidden_size // heads
    if head_dim % 2:
        raise UsageError(f"head_dim: {head_dim} is odd; rotary positions need pairs")
    return head_dim


def _rope(config: Mapping[str, Any], theta_key: str, dim: int) -> Rope:
    field = rope_field(config)
    theta = number(config, theta_key, default=10000.0)
    return rope_from_hf(config, config.get(field), field=field, theta=theta, head_dim=dim)


def _check_full_rotation(config: Mapping[str, Any]) -> None:
    field = rope_field(config)
    settings = config.get(field)
    for place, source in ((f"{field}.", settings if isinstance(settings, Mapping) else {}), ("", config)):
        value = source.get("partial_rotary_factor")
        if value not in (None, 1, 1.0):
            raise UsageError(f"{place}partial_rotary_factor: {value!r} is not supported; only 1.0")


def _local_layers(config: Mapping[str, Any], default: list[bool]) -> tuple[bool, ...]:
    """Return which layers are local, from ``layer_types`` or, without it, ``default``."""
    types = config.get("layer_types")
    if types is None:
        return tuple(default)
    if not isinstance(types, list) or len(types) != len(default):
        raise UsageError(f"layer_types: expected a list of {len(default)} names, found {types!r}")
    for name in types:
        if name not in ("sliding_attention", "full_attention"):
            raise UsageError(
                f"layer_types: {name!r} is not supported; supported: 'sliding_attention', 'full_attention'"
            )
    return tuple(name == "sliding_attention" for name in types)
