"""Rotary positions: their settings in a Hugging Face config, and their angles."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jrlhf.models.arch import Rope
from jrlhf.models.hf.fields import number, number_or_none, size, switch
from jrlhf.system.errors import UsageError

_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


class Angles(NamedTuple):
    """Cosine and sine of the rotary angles at each query position."""

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]


def rope_field(config: Mapping[str, Any]) -> str:
    """Return the config field with rotary settings: transformers 5's rope_parameters, or the older rope_scaling."""
    return "rope_scaling" if config.get("rope_scaling") else "rope_parameters"


def rope_from_hf(config: Mapping[str, Any], settings: Any, *, field: str, theta: float, head_dim: int) -> Rope:
    """Build rotary positions from the ``settings`` at ``field``; ``theta`` is the default of rope_theta."""
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise UsageError(f"{field}: expected a mapping, found {settings!r}")
    for key in settings:
        if key not in _KEYS and settings[key] is not None:
            raise UsageError(f"{field}.{key}: not supported")
    theta = number(settings, "rope_theta", field=f"{field}.rope_theta", default=theta)

    def setting_number(key: str, default: float | None = None) -> float:
        return number(settings, key, field=f"{field}.{key}", default=default)

    kind = settings.get("rope_type", settings.get("type", "default"))
    match kind:
        case "default":
            return Rope(kind="default", theta=theta)
        case "linear":
            return Rope(kind="linear", theta=theta, factor=setting_number("factor"))
        case "dynamic":
            if head_dim <= 2:
                raise UsageError(f"{field}.rope_type: 'dynamic' needs heads of more than 2 dimensions")
            max_positions = size(config, "max_position_embeddings")
            return Rope(
                kind="dynamic", theta=theta, factor=setting_number("factor"), original_max_positions=max_positions
            )
        case "llama3":
            low, high = setting_number("low_freq_factor"), setting_number("high_freq_factor")
            if low == high:
                raise UsageError(f"{field}.high_freq_factor: {high!r} must differ from low_freq_factor")
            return Rope(
                kind="llama3",
                theta=theta,
                factor=setting_number("factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_positions=_original_positions(config, settings),
            )
        case "yarn":
            original = _original_positions(config, settings)
            by_length = size(config, "max_position_embeddings") / original
            factor = setting_number("factor", by_length)
            return Rope(
                kind="yarn",
                theta=theta,
                factor=factor,
                original_max_positions=original,
                beta_fast=setting_number("beta_fast", 32.0),
                beta_slow=setting_number("beta_slow", 1.0),
                truncate=switch(settings, "truncate", default=True),
                attention_factor=setting_number("attention_factor", _yarn_attention_factor(settings, factor)),
            )
        case _:
            supported = "'default', 'linear', 'dynamic', 'llama3', 'yarn'"
            raise UsageError(f"{field}.rope_type: {kind!r} is not supported; supported: {supported}")


def layer_rope(config: Mapping[str, Any], kind: str, theta_key: str, theta: float, *, scaling: Any) -> Rope:
    """Build the rotary positions of one of ``layer_types`` from ``rope_parameters``, which ``scaling`` overrides."""
    new = config.get("rope_parameters")
    new = {} if new is None else new
    for key in new if isinstance(new, Mapping) else ():
        if key not in ("full_attention", "sliding_attention") and new[key] is not None:
            raise UsageError(f"rope_parameters.{key}: not supported; in this family each of layer_types has its own")
    settings = new.get(kind) if isinstance(new, Mapping) else new
    field = f"rope_parameters.{kind}" if settings else "rope_scaling"
    parts = [part for part in (settings, scaling) if part is not None]
    if any(not isinstance(part, Mapping) for part in parts):
        raise UsageError(f"{field}: expected a mapping, found {next(p for p in parts if not isinstance(p, Mapping))!r}")
    rope: dict[str, Any] = {key: value for part in parts for key, value in part.items()}
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UsageError(f"{field}.partial_rotary_factor: {rope['partial_rotary_factor']!r} is not supported; only 1.0")
    # With one mapping per layer type, transformers reads the original positions only from that mapping.
    sizes = {key: value for key, value in config.items() if key != "original_max_position_embeddings"}
    theta = number(config, theta_key, default=theta)
    return rope_from_hf(sizes, rope, field=field, theta=theta, head_dim=size(config, "head_dim"))


def _original_positions(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """Return the original positions from the config, from the rope mapping, or the model's maximum, in this order."""
    key = "original_max_position_embeddings"
    for source in (config, rope):
        if source.get(key) is not None:
            return size(source, key)
    return size(config, "max_position_embeddings")


def _yarn_attention_factor(settings: Mapping[str, Any], factor: float) -> float:
    """Return 0.1 · log(factor) + 1, the paper's fit, or the ratio of two such terms for DeepSeek's two scales."""

    def fitted(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    scale, scale_all = (number_or_none(settings, key) for key in ("mscale", "mscale_all_dim"))
    if scale is not None and scale_all is not None:
        return fitted(scale) / fitted(scale_all)
    return fitted(1.0)


def inverse_frequencies(rope: Rope, dim: int) -> Float[np.ndarray, "half"]:
    """Return θ^(-2i/d) for each pair of dimensions, scaled as ``rope`` says, in radians per position.

    Su et al. 2021, section 3.2.2. "linear": Chen et al. 2023, arXiv 2306.15595. "llama3" (Llama 3.1) stretches long
    wavelengths by ``factor``, keeps short ones and interpolates between. "yarn": Peng et al. 2023, arXiv 2309.00071,
    section 3.2. "dynamic" depends on the sequence; the result is that of a short one.
    """
    frequencies = 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    match rope.kind:
        case "default" | "dynamic":
            scaled = frequencies
        case "linear":
            scaled = frequencies / rope.factor
        case "llama3":
            turns = rope.original_max_positions * frequencies / (2.0 * math.pi)
            smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            scaled = frequencies * ((1.0 - smooth) / rope.factor + smooth)
        case "yarn":
            stretched = _yarn_ramp(rope, dim)
            scaled = frequencies * (stretched / rope.factor + (1.0 - stretched))
    return scaled.astype(np.float32)


def _yarn_ramp(rope: Rope, dim: int) -> Float[np.ndarray, "half"]:
    """Return 0 for pairs with over beta_fast turns in the original positions, 1 below beta_slow, linear between."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(rope.original_max_positions / (times * 2.0 * math.pi)) / (2.0 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # Equal bounds would divide by 0; transformers adds the same amount to the upper one.
    high = high + 0.001 if low == high else high
    return np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)


def rotary_angles(rope: Rope, dim: int, positions: Int[Array, "B T"]) -> Angles:
    """Return the angles at ``positions`` in float32. Padding (-1) counts as position 0, since nothing attends to it."""
    frequencies = jnp.asarray(inverse_frequencies(rope, dim))[None, None, None, :]
    if rope.kind == "dynamic":
        frequencies = _dynamic_frequencies(rope, dim, positions)[:, None, None, :]
    angles = jnp.maximum(positions, 0).astype(jnp.float32)[:, :, None, None] * frequencies
    return Angles(jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor)


def _dynamic_frequencies(rope: Rope, dim: int, positions: Int[Array, "B T"]) -> Float[Array, "B half"]:
    """Return frequencies whose θ grows with a row's length beyond the original positions ("NTK-aware" scaling).

    Each row uses its own length; transformers uses the longest of the batch, so there a row depends on the others.
    """
    original = float(rope.original_max_positions)
    length = jnp.maximum(jnp.max(positions, axis=1).astype(jnp.float32) + 1.0, original)
    theta = rope.theta * (rope.factor * length / original - (rope.factor - 1.0)) ** (dim / (dim - 2))
    exponents = jnp.asarray(np.arange(0, dim, 2, dtype=np.float32) / dim)
    return 1.0 / theta[:, None] ** exponents[None]
