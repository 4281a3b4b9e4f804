"""The peers' cases of aot.py, with the settings that their scripts read."""

from typing import Any, NamedTuple


class PeerCase(NamedTuple):
    """One program of a peer."""

    name: str
    program: str
    topology: str
    settings: dict[str, Any]


LLAMA_1B = {
    "base_emb_dim": 2048,
    "base_num_query_heads": 32,
    "base_num_kv_heads": 8,
    "base_num_decoder_layers": 16,
    "base_mlp_dim": 8192,
    "head_dim": 64,
    "logits_via_embedding": True,
    "per_device_batch_size": 8,
    "max_target_length": 2048,
}
LLAMA_8B = {
    "base_emb_dim": 4096,
    "base_num_query_heads": 32,
    "base_num_kv_heads": 8,
    "base_num_decoder_layers": 32,
    "base_mlp_dim": 14336,
    "head_dim": 128,
    "logits_via_embedding": False,
    "per_device_batch_size": 4,
    "max_target_length": 4096,
}


def maxtext(name: str, topology: str, slice_name: str, devices: int, size: dict[str, Any], remat: str) -> PeerCase:
    """Return MaxText's training step; ``slice_name`` is its own name of the topology."""
    layout = {"compile_topology": slice_name, "ici_fsdp_parallelism": devices, "remat_policy": remat}
    return PeerCase(name, "update", topology, size | layout)


def tunix(name: str, program: str, topology: str, **settings: Any) -> PeerCase:
    return PeerCase(name, program, topology, {"program": program, "topology": topology} | settings)


PEER_CASES = {
    "maxtext": (
        maxtext("maxtext-1b-v5p", "v5p:2x2x1", "v5p-8", 4, LLAMA_1B, "minimal"),
        maxtext("maxtext-1b-remat-v5p", "v5p:2x2x1", "v5p-8", 4, LLAMA_1B, "full"),
        maxtext("maxtext-1b-remat-v5e-16", "v5e:4x4", "v5e-16", 16, LLAMA_1B, "full"),
        maxtext("maxtext-1b-remat-v6e-16", "v6e:4x4", "v6e-16", 16, LLAMA_1B, "full"),
        maxtext("maxtext-8b-remat-v5p-8", "v5p:2x2x2", "v5p-16", 8, LLAMA_8B, "full"),
        maxtext("maxtext-8b-remat-v6e-16", "v6e:4x4", "v6e-16", 16, LLAMA_8B, "full"),
    ),
    "tunix": (
        tunix("tunix-1b-v5p", "update", "v5p:2x2x1", dtype="bfloat16", remat="NONE", rows=8, length=2048),
        tunix("tunix-1b-remat-v5p", "update", "v5p:2x2x1", dtype="float32", remat="DECODER", rows=8, length=2048),
        tunix("tunix-1b-v5p", "decode", "v5p:2x2x1", dtype="bfloat16", remat="NONE", rows=64, length=1024),
    ),
}
"""Cases by peer: the sizes of jrlhf's cases of like names. Tunix's decode is one token of 64 rows with 1,024 slots."""
