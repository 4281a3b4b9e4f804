"""Bundled decoders: Hugging Face folders in and out, scalar heads, and adapters for a user's own modules."""

from jrlhf.models.abstract import abstract_pretrained, abstract_reward, placed
from jrlhf.models.arch import ArchConfig, Rope
from jrlhf.models.cache import CacheKind
from jrlhf.models.decoder import Decoder, KVCache, int8_cache
from jrlhf.models.flops import decode_bytes, forward_flops
from jrlhf.models.functions import (
    DecoderFns,
    abstract_params,
    abstract_reward_params,
    decoder_fns,
    init_params,
    reward_params,
)
from jrlhf.models.hf.adapter_folder import (
    ModelKind,
    base_folder,
    base_of,
    find_tokenizer,
    is_adapter_folder,
    model_folder,
    model_kind,
    require_kind,
)
from jrlhf.models.hf.digests import file_digest, model_file_digest, model_files
from jrlhf.models.hf.families import arch_from_hf
from jrlhf.models.hf.folder import find_folder
from jrlhf.models.hf.generation import generation_eos
from jrlhf.models.hf.names import SHARDING_RULES
from jrlhf.models.hf.peft import save_adapter
from jrlhf.models.hf.peft_read import insert_adapter
from jrlhf.models.hf.rounding import round_to_stored
from jrlhf.models.hf.write import WeightDtype
from jrlhf.models.lora import add_adapters, is_trained, merge_adapters
from jrlhf.models.pretrained import Pretrained, load_pretrained, save_pretrained
from jrlhf.models.reading import STOP_TOKEN, Reading, reading_of
from jrlhf.models.reward import (
    RewardModel,
    load_reward_model,
    load_reward_start,
    normalise_reward,
    reward_from_pretrained,
    save_reward_model,
)
from jrlhf.models.wrap import from_equinox, from_linen, from_nnx

__all__ = [
    "SHARDING_RULES",
    "STOP_TOKEN",
    "ArchConfig",
    "CacheKind",
    "Decoder",
    "DecoderFns",
    "KVCache",
    "ModelKind",
    "Pretrained",
    "Reading",
    "RewardModel",
    "Rope",
    "WeightDtype",
    "abstract_params",
    "abstract_pretrained",
    "abstract_reward",
    "abstract_reward_params",
    "add_adapters",
    "arch_from_hf",
    "base_folder",
    "base_of",
    "decode_bytes",
    "decoder_fns",
    "file_digest",
    "find_folder",
    "find_tokenizer",
    "forward_flops",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "generation_eos",
    "init_params",
    "insert_adapter",
    "int8_cache",
    "is_adapter_folder",
    "is_trained",
    "load_pretrained",
    "load_reward_model",
    "load_reward_start",
    "merge_adapters",
    "model_file_digest",
    "model_files",
    "model_folder",
    "model_kind",
    "normalise_reward",
    "placed",
    "reading_of",
    "require_kind",
    "reward_from_pretrained",
    "reward_params",
    "round_to_stored",
    "save_adapter",
    "save_pretrained",
    "save_reward_model",
]
