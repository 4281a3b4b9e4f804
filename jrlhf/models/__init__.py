"""Language and reward models of Hugging Face folders, read and written, and wrappers for a user's own modules.

What ``__all__`` lists is public: its names and signatures stay. The modules below are internal and may change with any
release. No step needs this package: ``jrlhf.steps`` runs on any model.
"""

from jrlhf.models.arch import ArchConfig, Rope
from jrlhf.models.decoder import int8_cache
from jrlhf.models.functions import DecoderFns, decoder_fns, init_params, reward_params
from jrlhf.models.hf.families import arch_from_hf
from jrlhf.models.hf.peft import save_adapter
from jrlhf.models.lora import add_adapters, is_trained, merge_adapters
from jrlhf.models.pretrained import Pretrained, load_pretrained, save_pretrained
from jrlhf.models.reward import RewardModel, load_reward_model, reward_from_pretrained, save_reward_model
from jrlhf.models.wrap import from_equinox, from_linen, from_nnx

__all__ = [
    "ArchConfig",
    "DecoderFns",
    "Pretrained",
    "RewardModel",
    "Rope",
    "add_adapters",
    "arch_from_hf",
    "decoder_fns",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "init_params",
    "int8_cache",
    "is_trained",
    "load_pretrained",
    "load_reward_model",
    "merge_adapters",
    "reward_from_pretrained",
    "reward_params",
    "save_adapter",
    "save_pretrained",
    "save_reward_model",
]
