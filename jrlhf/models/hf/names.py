"""Where each parameter stands in a Hugging Face checkpoint, on which mesh axes: a table a family, used both ways."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from jax.sharding import PartitionSpec as P

from jrlhf.models.arch import ArchConfig
from jrlhf.parallel import ShardingRules

RULES: ShardingRules = (
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
"""Mesh axes of each parameter, for ``parallel.tree_shardings``: matrices over fsdp and tensor, norms whole.

Over tensor, kernels that lead into heads or the MLP split their output, those that lead out of them their input: each
pair needs one sum over devices. Shoeybi et al. 2019, section 3.
"""

IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(bias|masked_bias)$")
"""Tensors of old checkpoints that repeat what the config says: rotary frequencies, causal masks."""

HEAD_KERNEL = "score.weight"
HEAD_BIAS = "score.bias"
"""The tensor of a scalar head's bias, in the checkpoints of those whose class has one."""


class Fused(NamedTuple):
    """Their tensor holds queries, keys and values side by side on its output axis, once a group."""

    part: int
    """0 queries, 1 keys, 2 values."""
    groups: int
    """1: all queries, then all keys (GPT-2); the number of heads: head by head (GPT-NeoX)."""


@dataclass(frozen=True)
class Entry:
    """One parameter in both worlds.

    ``path`` is its place in our tree, where layers are stacked on axis 0; ``name`` its name there, with ``{layer}``
    where there is one tensor a layer. ``form``: torch's linear maps are ``[out, in]``, ours ``[in, out]``
    ("transposed"); a scalar head's ``[1, in]`` is our ``[in]`` ("row").
    """

    path: tuple[str, ...]
    name: str
    form: Literal["same", "transposed", "row"] = "same"
    fused: Fused | None = None

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


def base_prefix(arch: ArchConfig) -> str:
    """What all names but a head's begin with; checkpoints of the bare decoder leave it out."""
    match arch.family:
        case "gpt2":
            return "transformer"
        case "gpt_neox":
            return "gpt_neox"
        case _:
            return "model"


def lm_head_name(arch: ArchConfig) -> str:
    """The LM head's tensor."""
    return "embed_out.weight" if arch.family == "gpt_neox" else "lm_head.weight"


def decoder_table(arch: ArchConfig) -> tuple[Entry, ...]:
    """Everything but a head. q and k are in the half-split rotary order in both worlds: a transpose is enough."""
    match arch.family:
        case "gpt2":
            return tuple(_gpt2())
        case "gpt_neox":
            return tuple(_gpt_neox(arch))
        case _:
            return tuple(_gated(arch))


def language_model_table(arch: ArchConfig) -> tuple[Entry, ...]:
    """A decoder and, where it is not tied to the embedding, its LM head."""
    head = Entry(("lm_head", "kernel"), lm_head_name(arch), form="transposed")
    return decoder_table(arch) + (() if arch.tie_embeddings else (head,))


def reward_model_table(arch: ArchConfig, *, head_bias: bool = False) -> tuple[Entry, ...]:
    """A decoder and a scalar head. transformers' head has no bias, and ours is kept in config.json; other people's may
    have one as a tensor, ``head_bias``."""
    decoder = tuple(replace(entry, path=("decoder", *entry.path)) for entry in decoder_table(arch))
    bias = (Entry(("head", "bias"), HEAD_BIAS, form="row"),) if head_bias else ()
    return (*decoder, Entry(("head", "kernel"), HEAD_KERNEL, form="row"), *bias)


def _gated(arch: ArchConfig) -> Iterator[Entry]:
    """Llama, Mistral, Qwen and Gemma."""
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
    for ours, theirs in norms.items():
        yield Entry(("layers", ours, "scale"), f"{layer}{theirs}.weight")
    for name in ("q_norm", "k_norm") if arch.qk_norm else ():
        yield Entry(("layers", "attention", name, "scale"), f"{layer}self_attn.{name}.weight")
    for name in ("q", "k", "v"):
        yield from _linear(("attention", name), f"{layer}self_attn.{name}_proj", bias=arch.qkv_bias)
    yield from _linear(("attention", "o"), f"{layer}self_attn.o_proj", bias=arch.attention_out_bias)
    for name in ("gate", "up", "down"):
        yield from _linear(("mlp", name), f"{layer}mlp.{name}_proj", bias=arch.mlp_bias)


def _gpt2() -> Iterator[Entry]:
    """Its linear maps are ``[in, out]`` as ours."""
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
