"""What a decoder is made of: one frozen dataclass of sizes and switches, read from a Hugging Face config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]
RopeKind = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions in the half-split form. The last four fields belong to the scaled kinds."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


@dataclass(frozen=True)
class ArchConfig:
    """Sizes and switches of a decoder: the Llama family is one setting of them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Positions the weights were trained for; nothing here enforces it."""
    norm_eps: float
    rope: Rope
    activation: Activation
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    """The LM head is the transposed embedding; there is no lm_head leaf."""


CAUSAL_LM = "LlamaForCausalLM"
SEQUENCE_CLASSIFICATION = "LlamaForSequenceClassification"

_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


def arch_from_hf(config: Mapping[str, Any]) -> ArchConfig:
    """Read ``config.json`` of a Llama-family model, as transformers 4 or 5 writes it.

    Fields that transformers itself makes optional get transformers' defaults. A family, rope type or activation that is
    not understood here is a ``ValueError`` that names the field.
    """
    _check_family(config)
    hidden_size, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
    explicit = config.get("head_dim") is not None
    if not explicit and hidden_size % heads:
        raise ValueError(f"num_attention_heads: {heads} does not divide hidden_size {hidden_size}; head_dim is not set")
    head_dim = _size(config, "head_dim") if explicit else hidden_size // heads
    if head_dim % 2:
        raise ValueError(f"head_dim: {head_dim} is odd; rotary positions need pairs")
    attention_bias = _switch(config, "attention_bias")
    return ArchConfig(
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=_size({"max_position_embeddings": 2048} | dict(config), "max_position_embeddings"),
        norm_eps=_number(config, "rms_norm_eps", "rms_norm_eps", 1e-6),
        rope=_rope(config),
        activation=_activation(config.get("hidden_act", "silu")),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=_switch(config, "mlp_bias"),
        tie_embeddings=_switch(config, "tie_word_embeddings"),
    )


def _check_family(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != "llama":
        raise ValueError(f"model_type: {model_type!r} is not supported; supported: 'llama'")
    for name in config.get("architectures") or ():
        if name not in (CAUSAL_LM, SEQUENCE_CLASSIFICATION):
            raise ValueError(
                f"architectures: {name!r} is not supported; supported: {CAUSAL_LM}, {SEQUENCE_CLASSIFICATION}"
            )
    if config.get("quantization_config") is not None:
        raise ValueError("quantization_config: quantised weights are not supported; use the unquantised checkpoint")


def _rope(config: Mapping[str, Any]) -> Rope:
    """transformers 5 keeps everything in rope_parameters; before, rope_theta stood beside an optional rope_scaling."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(field) or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{field}: expected a mapping, found {given!r}")
    for key in given:
        if key not in _ROPE_KEYS and given[key] is not None:
            raise ValueError(f"{field}.{key}: not supported")
    for place, source in ((f"{field}.", given), ("", config)):
        if source.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(
                f"{place}partial_rotary_factor: {source['partial_rotary_factor']!r} is not supported; only 1.0"
            )
    theta_in = given if given.get("rope_theta") is not None else config
    theta = _number(theta_in, "rope_theta", f"{field}.rope_theta" if theta_in is given else "rope_theta", 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    match kind:
        case "default":
            return Rope(kind="default", theta=theta)
        case "linear":
            return Rope(kind="linear", theta=theta, factor=_number(given, "factor", f"{field}.factor"))
        case "llama3":
            low, high = (_number(given, key, f"{field}.{key}") for key in ("low_freq_factor", "high_freq_factor"))
            if low == high:
                raise ValueError(f"{field}.high_freq_factor: {high!r} must differ from low_freq_factor")
            return Rope(
                kind="llama3",
                theta=theta,
                factor=_number(given, "factor", f"{field}.factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_positions=_original_positions(config, given),
            )
        case _:
            raise ValueError(f"{field}.rope_type: {kind!r} is not supported; supported: 'default', 'linear', 'llama3'")


def _original_positions(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """In transformers' order: beside the rope mapping, in it, else the model's own maximum."""
    key = "original_max_position_embeddings"
    for source in (config, rope):
        if source.get(key) is not None:
            return _size(source, key)
    return _size(config, "max_position_embeddings")


def _activation(name: Any) -> Activation:
    match name:
        case "silu" | "swish":
            return "silu"
        case "gelu":
            return "gelu"
        case "gelu_new" | "gelu_pytorch_tanh":
            return "gelu_tanh"
        case _:
            raise ValueError(
                f"hidden_act: {name!r} is not supported; supported: 'silu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh'"
            )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key}: expected a positive integer, found {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, field: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{field}: expected a positive number, found {value!r}")
    return float(value)


def _switch(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key}: expected true or false, found {value!r}")
    return bool(value)
