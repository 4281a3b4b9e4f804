"""The cases of aot.py: which programs of which stage are compiled for which devices, and at which sizes."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jrlhf.config import DataConfig, ModelConfig, PlanConfig, PPOConfig, RewardConfig, SamplingConfig, SFTConfig
from jrlhf.parallel import make_mesh
from jrlhf.parallel.devices.topology import Topology
from jrlhf.stages.table import stage_named
from jrlhf.train.programs import StagePlan, Target

LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128001,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
"""What each model's config.json adds to that of Llama 3."""

PPO_PROGRAMS = ("rollout", "readings", "scores", "update")


@dataclass(frozen=True)
class Case:
    """Programs of a stage, for devices by the name of their topology."""

    name: str
    stage: str
    model: str
    topology: str
    rows: int
    """Rows of a device: packed texts, prompts with two completions, or episodes."""
    length: int
    """Tokens of a row; an episode is half prompt, half answer."""
    programs: tuple[str, ...] = ("update",)


CASES = (
    Case("sft-tiny-v5p", "sft", "tiny", "v5p:2x2x1", rows=2, length=256),
    Case("sft-1b-v5p", "sft", "1b", "v5p:2x2x1", rows=8, length=2048),
    Case("sft-1b-v5e-16", "sft", "1b", "v5e:4x4", rows=8, length=2048),
    Case("sft-1b-v6e-16", "sft", "1b", "v6e:4x4", rows=8, length=2048),
    Case("sft-1b-h100x8", "sft", "1b", "h100x8", rows=8, length=2048),
    Case("sft-1b-h100x1", "sft", "1b", "h100x1", rows=8, length=2048),
    Case("sft-8b-v5p-8", "sft", "8b", "v5p:2x2x2", rows=4, length=4096),
    Case("sft-8b-v5p-64", "sft", "8b", "v5p:4x4x4", rows=4, length=4096),
    Case("sft-8b-v6e-16", "sft", "8b", "v6e:4x4", rows=4, length=4096),
    Case("reward-1b-v5p", "reward", "1b", "v5p:2x2x1", rows=8, length=1024),
    Case("ppo-1b-v5p", "ppo", "1b", "v5p:2x2x1", rows=64, length=1024, programs=PPO_PROGRAMS),
    Case("ppo-1b-v5e-16", "ppo", "1b", "v5e:4x4", rows=64, length=1024, programs=PPO_PROGRAMS),
    Case("ppo-1b-v6e-16", "ppo", "1b", "v6e:4x4", rows=64, length=1024, programs=PPO_PROGRAMS),
    Case("ppo-1b-h100x8", "ppo", "1b", "h100x8", rows=64, length=1024, programs=PPO_PROGRAMS),
    Case("ppo-8b-v5p-8", "ppo", "8b", "v5p:2x2x2", rows=64, length=1024, programs=PPO_PROGRAMS),
)


def write_models(folder: Path, name: str) -> tuple[str, str]:
    """Write the config.json of a language model and of a reward model of the same size; return their folders."""
    paths = []
    for kind in ("CausalLM", "SequenceClassification"):
        path = folder / kind
        path.mkdir()
        config = LLAMA3 | SIZES[name] | {"architectures": [f"LlamaFor{kind}"]}
        if kind == "SequenceClassification":
            config["num_labels"] = 1
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        paths.append(str(path))
    return paths[0], paths[1]


def planned_stage(case: Case, topology: Topology, folder: Path) -> StagePlan:
    """Return the programs of a case as jrlhf plans them, over all devices by ``fsdp``; models go to ``folder``."""
    target = Target(topology, make_mesh(data=1, fsdp=topology.size, tensor=1, devices=topology.devices()))
    sized = stage_named(case.stage).plan(config_of(case, target.groups, folder), target)
    return sized.build(sized.rows)


def config_of(case: Case, groups: int, folder: Path) -> PlanConfig:
    """Return the config of a case's stage; all else is at its default."""
    language, scorer = write_models(folder, case.model)
    model = ModelConfig(language, "bfloat16")
    rows, data = case.rows * groups, DataConfig(train="rows.jsonl", max_length=case.length, buckets=1)
    match case.stage:
        case "sft":
            return PlanConfig(sft=SFTConfig(model=model, data=data, batch_size=rows, pack_length=case.length))
        case "reward":
            return PlanConfig(reward=RewardConfig(model=model, data=data, batch_size=rows))
        case "ppo":
            half = case.length // 2
            ppo = PPOConfig(
                model=model,
                reward=replace(model, path=scorer),
                prompts=replace(data, max_length=half),
                sampling=SamplingConfig(max_new_tokens=half),
                episodes=rows,
                epochs=1,
                minibatches=1,
            )
            return PlanConfig(ppo=ppo)
    raise ValueError(case.stage)
