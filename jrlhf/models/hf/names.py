"""The Hugging Face names and mesh axes of all parameters: one table per family, used for reading and writing."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from jax.sharding import PartitionSpec as P

from jrlhf.models.arch import ArchConfig
from jrlhf.parallel import ShardingRules

SHARDING_RULES: ShardingRules = (
    (r"(^|/)embed$", P("tensor", "fsdp")),
    (r"(^|/)position_embed$", P(None, "fsdp")),
    (r"/(q|k|v|gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"/(q|k|v|gate|up)/bias$", P(None, "tensor")),
    (r"/(o|down)/kernel$", P(None, "tensor", "fsdp")),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"/(q|k|v|gate|up)/lora_a$", P(None, "fsdp", None)),
    (r"/(q|k|v|gate|up)/lora_b$", P(None, None, "tensor")),
    (r"/(o|down)/lora_a$", P(None, "tensor", None)),
    (r"/(o|down)/lora_b$", P(None, None, "fsdp")),
    (r"/lora_scale$", P()),
    (r"norm/(scale|bias)$|/(o|down)/bias$|(^|/)head/(kernel|bias)$", P()),
)
"""Mesh axes of each parameter for ``parallel.tree_shardings``: matrices over fsdp and tensor, norms replicated.

Over tensor, kernels into heads or the MLP split their output and kernels out of them split their input, so that each
pair needs one sum over devices (Shoeybi et al. 2019, section 3).
"""

IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(bias|masked_bias)$")
"""Tensors of old checkpoints that repeat the config: rotary frequencies and causal masks."""

HEAD_KERNEL = "score.weight"
HEAD_BIAS = "score.bias"
"""Tensor of a scalar head's bias, in checkpoints of model classes that have one."""


class Fused(NamedTuple):
    """Place of a parameter in a Hugging Face tensor that holds queries, keys and values on its output axis."""

    part: int
    """0: queries, 1: keys, 2: values."""
    groups: int
    """1: all queries, then all keys, then all values (GPT-2); number of heads: the three per head (GPT-NeoX)."""


@dataclass(frozen=True)
class Entry:
    """A parameter's place in jrlhf's tree and in a Hugging Face checkpoint.

    ``path`` leads to the leaf in the tree, whose layers are stacked on axis 0. ``name`` is its name in the checkpoint,
    with ``{layer}`` if there is one tensor per layer. ``form`` is "transposed" for torch's linear maps ``[out, in]``,
    which the tree has as ``[in, out]``, and "row" for a head ``[1, in]``, which the tree has as ``[in]``.
    """

    path: tuple[str, ...]
    name: str
    form: Literal["same", "transposed", "row"] = "same"
    fused: Fused | None = None

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


def base_prefix(arch: ArchConfig) -> str:
    """Return the prefix of all names except a head's; checkpoints of the bare decoder omit it."""
    match arch.family:
        case "gpt2":
            return "transformer"
        case "gpt_neox":
            return "gpt_neox"
        case _:
            return "model"


def lm_head_name(arch: ArchConfig) -> str:
    """Return the name of the LM head's tensor."""
    return "embed_out.weight" if arch.family == "gpt_neox" else "lm_head.weight"


def decoder_table(arch: ArchConfig) -> tuple[Entry, ...]:
    """Return the entries of a decoder without a head; q and k are in the half-split rotary order on both sides."""
    match arch.family:
        case "gpt2":
            return tuple(_gpt2())
        case "gpt_neox":
            return tuple(_gpt_neox(arch))
        case _:
            return tuple(_gated(arch))


def language_model_table(arch: ArchConfig) -> tuple[Entry, ...]:
    """Return the entries of a decoder and of its LM head, unless it is tied to the embedding."""
    head = Entry(("lm_head", "kernel"), lm_head_name(arch), form="transposed")
    return decoder_table(arch) + (() if arch.tie_embeddings else (head,))


def reward_model_table(arch: ArchConfig, *, head_bias: bool = False) -> tuple[Entry, ...]:
    """Return the entries of a decoder and a scalar head.

    transformers' head has no bias, so jrlhf stores it in config.json; with ``head_bias`` it is a tensor, as other tools
    write it.
    """
    decoder = tuple(replace(entry, path=("decoder", *entry.path)) for entry in decoder_table(arch))
    bias = (Entry(("head", "bias"), HEAD_BIAS, form="row"),) if head_bias else ()
    return (*decoder, Entry(("head", "kernel"), HEAD_KERNEL, form="row"), *bias)


def _gated(arch: ArchConfig) -> Iterator[Entry]:
    """Yield the entries of Llama, Mistral, Qwen and Gemma."""
    yield Entry(("embed",), "model.embed_tokens.weight")
    yield Entry(("final_norm", "scale"), "model.norm.weight")
    layer = "model.layers.{layer}."
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if arch.post_norms:
        norms |= {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    for name, hf_name in norms.items():
        yield Entry(("layers", name, "scale"), f"{layer}{hf_name}.weight")
    for name in ("q_norm", "k_norm") if arch.qk_norm else ():
        yield Entry(("layers", "attention", name, "scale"), f"{layer}self_attn.{name}.weight")
    for name in ("q", "k", "v"):
        yield from _linear(("attention", name), f"{layer}self_attn.{name}_proj", bias=arch.qkv_bias)
    yield from _linear(("attention", "o"), f"{layer}self_attn.o_proj", bias=arch.attention_out_bias)
    for name in ("gate", "up", "down"):
        yield from _linear(("mlp", name), f"{layer}mlp.{name}_proj", bias=arch.mlp_bias)


def _gpt2() -> Iterator[Entry]:
    """Yield the entries of GPT-2, whose linear maps are ``[in, out]`` as in jrlhf's tree."""
    yield Entry(("embed",), "transformer.wte.weight")
    yield Entry(("position_embed",), "transformer.wpe.weight")
    yield from _layer_norm(("final_norm",), "transformer.ln_f")
    layer = "transformer.h.{layer}."
    yield from _layer_norm(("layers", "attention_norm"), f"{layer}ln_1")
    yield from _layer_norm(("layers", "mlp_norm"), f"{layer}ln_2")
    for index, name in enumerate(("q", "k", "v")):
        fused = Fused(index, groups=1)
        yield from _linear(("attention", name), f"{layer}attn.c_attn", bias=True, form="same", fused=fused)
    yield from _linear(("attention", "o"), f"{layer}attn.c_proj", bias=True, form="same")
    yield from _linear(("mlp", "up"), f"{layer}mlp.c_fc", bias=True, form="same")
    yield from _linear(("mlp", "down"), f"{layer}mlp.c_proj", bias=True, form="same")


def _gpt_neox(arch: ArchConfig) -> Iterator[Entry]:
    yield Entry(("embed",), "gpt_neox.embed_in.weight")
    yield from _layer_norm(("final_norm",), "gpt_neox.final_layer_norm")
    layer = "gpt_neox.layers.{layer}."
    yield from _layer_norm(("layers", "attention_norm"), f"{layer}input_layernorm")
    yield from _layer_norm(("layers", "mlp_norm"), f"{layer}post_attention_layernorm")
    for index, name in enumerate(("q", "k", "v")):
        fused = Fused(index, groups=arch.num_heads)
        stem = f"{layer}attention.query_key_value"
        yield from _linear(("attention", name), stem, bias=arch.qkv_bias, fused=fused)
    yield from _linear(("attention", "o"), f"{layer}attention.dense", bias=arch.attention_out_bias)
    yield from _linear(("mlp", "up"), f"{layer}mlp.dense_h_to_4h", bias=True)
    yield from _linear(("mlp", "down"), f"{layer}mlp.dense_4h_to_h", bias=True)


def _linear(
    path: tuple[str, str],
    stem: str,
    *,
    bias: bool,
    form: Literal["same", "transposed"] = "transposed",
    fused: Fused | None = None,
) -> Iterator[Entry]:
    yield Entry(("layers", *path, "kernel"), f"{stem}.weight", form=form, fused=fused)
    if bias:
        yield Entry(("layers", *path, "bias"), f"{stem}.bias", fused=fused)


def _layer_norm(path: tuple[str, ...], stem: str) -> Iterator[Entry]:
    yield Entry((*path, "scale"), f"{stem}.weight")
    yield Entry((*path, "bias"), f"{stem}.bias")
