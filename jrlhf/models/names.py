"""Where each parameter stands in a Hugging Face checkpoint, and on which mesh axes: the tables of the Llama family."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from jax.sharding import PartitionSpec as P

from jrlhf.models.arch import ArchConfig
from jrlhf.parallel import Rules

RULES: Rules = (
    (r"(^|/)embed$", P("tensor", "fsdp")),
    (r"/(q|k|v|gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"/(q|k|v|gate|up)/bias$", P(None, "tensor")),
    (r"/(o|down)/kernel$", P(None, "tensor", "fsdp")),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"norm/scale$|/(o|down)/bias$|(^|/)head/(kernel|bias)$", P()),
)
"""Mesh axes of each parameter, for ``parallel.tree_shardings``: matrices over fsdp and tensor, norms whole.

Over tensor, kernels that lead into heads or the MLP split their output, those that lead out of them their input: each
pair needs one sum over devices. Shoeybi et al. 2019, section 3.
"""

IGNORED = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors of old checkpoints that repeat what the config says."""


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

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


EMBEDDING, LM_HEAD, SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"

_LINEAR_HEAD = Entry(("lm_head", "kernel"), LM_HEAD, form="transposed")
_LINEAR = {
    "attention": (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj")),
    "mlp": (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")),
}
_THEIR_MODULE = {"attention": "self_attn", "mlp": "mlp"}
_NORMS = (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))


def decoder_table(arch: ArchConfig) -> tuple[Entry, ...]:
    """Everything but a head. q and k are in the half-split rotary order in both worlds: a transpose is enough."""
    entries = [Entry(("embed",), EMBEDDING), Entry(("final_norm", "scale"), "model.norm.weight")]
    entries += [Entry(("layers", ours, "scale"), f"model.layers.{{layer}}.{theirs}.weight") for ours, theirs in _NORMS]
    for module, pairs in _LINEAR.items():
        for ours, theirs in pairs:
            stem = f"model.layers.{{layer}}.{_THEIR_MODULE[module]}.{theirs}"
            entries.append(Entry(("layers", module, ours, "kernel"), f"{stem}.weight", form="transposed"))
            if _has_bias(arch, module, ours):
                entries.append(Entry(("layers", module, ours, "bias"), f"{stem}.bias"))
    return tuple(entries)


def language_model_table(arch: ArchConfig) -> tuple[Entry, ...]:
    """A decoder and, where it is not tied to the embedding, its LM head."""
    return decoder_table(arch) + (() if arch.tie_embeddings else (_LINEAR_HEAD,))


def reward_model_table(arch: ArchConfig) -> tuple[Entry, ...]:
    """A decoder and a scalar head. Their head has no bias: ours is kept in config.json."""
    decoder = tuple(replace(entry, path=("decoder", *entry.path)) for entry in decoder_table(arch))
    return (*decoder, Entry(("head", "kernel"), SCORE, form="row"))


def _has_bias(arch: ArchConfig, module: str, name: str) -> bool:
    if module == "mlp":
        return arch.mlp_bias
    return arch.attention_out_bias if name == "o" else arch.qkv_bias
