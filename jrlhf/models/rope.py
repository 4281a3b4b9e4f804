"""Rotary positions: read from a Hugging Face config, and turned into angles."""

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
    """transformers 5 keeps everything in rope_parameters; before, rope_theta stood beside an optional rope_scaling."""
    return "rope_scaling" if config.get("rope_scaling") else "rope_parameters"


def rope_from_hf(config: Mapping[str, Any], given: Any, *, field: str, theta: float, head_dim: int) -> Rope:
    """``given`` is what stands at ``field``; ``theta`` what holds where it names none."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise UsageError(f"{field}: expected a mapping, found {given!r}")
    for key in given:
        if key not in _KEYS and given[key] is not None:
            raise UsageError(f"{field}.{key}: not supported")
    theta = number(given, "rope_theta", field=f"{field}.rope_theta", default=theta)

    def given_number(key: str, default: float | None = None) -> float:
        return number(given, key, field=f"{field}.{key}", default=default)

    kind = given.get("rope_type", given.get("type", "default"))
    match kind:
        case "default":
            return Rope(kind="default", theta=theta)
        case "linear":
            return Rope(kind="linear", theta=theta, factor=given_number("factor"))
        case "dynamic":
            if head_dim <= 2:
                raise UsageError(f"{field}.rope_type: 'dynamic' needs heads of more than 2 dimensions")
            longest = size(config, "max_position_embeddings")
            return Rope(kind="dynamic", theta=theta, factor=given_number("factor"), original_max_positions=longest)
        case "llama3":
            low, high = given_number("low_freq_factor"), given_number("high_freq_factor")
            if low == high:
                raise UsageError(f"{field}.high_freq_factor: {high!r} must differ from low_freq_factor")
            return Rope(
                kind="llama3",
                theta=theta,
                factor=given_number("factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_positions=_original_positions(config, given),
            )
        case "yarn":
            original = _original_positions(config, given)
            by_length = size(config, "max_position_embeddings") / original
            factor = given_number("factor", by_length)
            return Rope(
                kind="yarn",
                theta=theta,
                factor=factor,
                original_max_positions=original,
                beta_fast=given_number("beta_fast", 32.0),
                beta_slow=given_number("beta_slow", 1.0),
                truncate=switch(given, "truncate", default=True),
                attention_factor=given_number("attention_factor", _yarn_attention_factor(given, factor)),
            )
        case _:
            supported = "'default', 'linear', 'dynamic', 'llama3', 'yarn'"
            raise UsageError(f"{field}.rope_type: {kind!r} is not supported; supported: {supported}")


def layer_rope(config: Mapping[str, Any], kind: str, theta_key: str, theta: float, *, scaling: Any) -> Rope:
    """Rotary positions of one of ``layer_types``: what ``rope_parameters`` has for it, and over that ``scaling``."""
    new = config.get("rope_parameters")
    new = {} if new is None else new
    for key in new if isinstance(new, Mapping) else ():
        if key not in ("full_attention", "sliding_attention") and new[key] is not None:
            raise UsageError(f"rope_parameters.{key}: not supported; this family has them by layer_types")
    given = new.get(kind) if isinstance(new, Mapping) else new
    field = f"rope_parameters.{kind}" if given else "rope_scaling"
    parts = [part for part in (given, scaling) if part is not None]
    if any(not isinstance(part, Mapping) for part in parts):
        raise UsageError(f"{field}: expected a mapping, found {next(p for p in parts if not isinstance(p, Mapping))!r}")
    rope: dict[str, Any] = {key: value for part in parts for key, value in part.items()}
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UsageError(f"{field}.partial_rotary_factor: {rope['partial_rotary_factor']!r} is not supported; only 1.0")
    # With one mapping a kind of layer, transformers looks for the original positions in it alone.
    sizes = {key: value for key, value in config.items() if key != "original_max_position_embeddings"}
    theta = number(config, theta_key, default=theta)
    return rope_from_hf(sizes, rope, field=field, theta=theta, head_dim=size(config, "head_dim"))


def _original_positions(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """In transformers' order: beside the rope mapping, in it, else the model's own maximum."""
    key = "original_max_position_embeddings"
    for source in (config, rope):
        if source.get(key) is not None:
            return size(source, key)
    return size(config, "max_position_embeddings")


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """0.1 · log(factor) + 1, the paper's fit; DeepSeek's two scales give a ratio of such terms."""

    def fitted(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    scale, scale_all = (number_or_none(given, key) for key in ("mscale", "mscale_all_dim"))
    if scale is not None and scale_all is not None:
        return fitted(scale) / fitted(scale_all)
    return fitted(1.0)


def inverse_frequencies(rope: Rope, dim: int) -> Float[np.ndarray, "half"]:
    """θ^(-2i/d) for each pair of dimensions, scaled as ``rope`` says; radians a position.

    Su et al. 2021, section 3.2.2; "linear": Chen et al. 2023, arXiv 2306.15595; "llama3" (Llama 3.1): long wavelengths
    are stretched by ``factor``, short ones kept, those between interpolated; "yarn": Peng et al. 2023, arXiv
    2309.00071, section 3.2. "dynamic" depends on the sequence: these are those of a short one.
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
    """0 for pairs that turn more than beta_fast times in the original positions, 1 below beta_slow, linear between."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(rope.original_max_positions / (times * 2.0 * math.pi)) / (2.0 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # Equal bounds would divide by 0; transformers moves the upper one by as much.
    high = high + 0.001 if low == high else high
    return np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)


def rotary_angles(rope: Rope, dim: int, positions: Int[Array, "B T"]) -> Angles:
    """In float32. Padding (-1) is given position 0: nothing attends to it."""
    frequencies = jnp.asarray(inverse_frequencies(rope, dim))[None, None, None, :]
    if rope.kind == "dynamic":
        frequencies = _dynamic_frequencies(rope, dim, positions)[:, None, None, :]
    angles = jnp.maximum(positions, 0).astype(jnp.float32)[:, :, None, None] * frequencies
    return Angles(jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor)


def _dynamic_frequencies(rope: Rope, dim: int, positions: Int[Array, "B T"]) -> Float[Array, "B half"]:
    """θ grows with the length of a row once that is beyond the original positions ("NTK-aware" scaling).

    Of each row's own length: transformers takes the longest of the batch, so there a row depends on its neighbours.
    """
    original = float(rope.original_max_positions)
    length = jnp.maximum(jnp.max(positions, axis=1).astype(jnp.float32) + 1.0, original)
    theta = rope.theta * (rope.factor * length / original - (rope.factor - 1.0)) ** (dim / (dim - 2))
    exponents = jnp.asarray(np.arange(0, dim, 2, dtype=np.float32) / dim)
    return 1.0 / theta[:, None] ** exponents[None]
