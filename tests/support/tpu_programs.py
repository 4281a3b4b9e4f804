"""Compiles the programs of every stage for absent TPUs, in a process of its own, and prints facts of each as JSON.

python -m tests.support.tpu_programs '{"family": "llama", "topology": "v5p:2x2x1", "mesh": [1, 4, 1]}'
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from jrlhf.config import (
    DataConfig,
    DPOConfig,
    GRPOConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
)
from jrlhf.parallel.devices.collectives import Collective, collectives_of
from jrlhf.parallel.devices.executions import sum_over_executions
from jrlhf.parallel.devices.hlo import Module, parse_hlo
from jrlhf.plan.programs import compile_program
from jrlhf.plan.run import planned_target
from jrlhf.stages.table import STAGES, stage_named
from jrlhf.train.programs import Program, Target, device_bytes
from jrlhf.types import TrainState

LENGTH = 256
"""Tokens of a text; the attention kernel of a TPU reads blocks of 128."""

ROWS, HIDDEN = 8, 256
"""Rows of a device, and numbers of a hidden state."""

SIZES: dict[str, Any] = {"vocab_size": 512, "max_position_embeddings": LENGTH}
WIDE = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, **WIDE, **ENDS, "intermediate_size": 512, "head_dim": 64},
    "gemma3": {
        **{"model_type": "gemma3_text", **SIZES, **WIDE, **ENDS, "intermediate_size": 512, "head_dim": 64},
        **{"sliding_window": 64, "layer_types": LAYERS, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
        **{"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    },
    "gpt2": {
        **{"model_type": "gpt2", "vocab_size": 512, "n_positions": LENGTH, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4},
        **{"bos_token_id": 1, "eos_token_id": 2},
    },
}
"""config.json of a model of two layers, by family."""

CLASSES = {
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
}
"""Classes of the language model and of the reward model in transformers, by family."""


OWN = {"dpo": {"update"}, "grpo": {"update"}}
"""Programs of the stages whose other programs are those of SFT and PPO, which are compiled anyway."""


@dataclass(frozen=True)
class Scenario:
    """Settings of a run whose programs are compiled."""

    family: str
    topology: str
    mesh: tuple[int, int, int]
    """Sizes of ``data``, ``fsdp`` and ``tensor``."""
    packed: bool = False
    lora: bool = False
    shared: bool = False
    """Whether policy and value model share their layers."""
    int8: bool = False
    """Whether the sampler keeps keys and values in int8."""
    stages: tuple[str, ...] = tuple(stage.name for stage in STAGES)
    """Stages whose programs are compiled."""


def main(text: str) -> None:
    scenario = Scenario(**json.loads(text))
    with TemporaryDirectory() as folder:
        config = config_of(scenario, Path(folder))
        target = planned_target(config)
        for stage in map(stage_named, scenario.stages):
            sized = stage.plan(config, target)
            for program in sized.build(sized.rows).programs:
                if program.name not in OWN.get(stage.name, {program.name}):
                    continue
                print(json.dumps({"stage": stage.name} | facts(program, target)), flush=True)


def config_of(scenario: Scenario, folder: Path) -> PlanConfig:
    """Return the config of all stages; the models' config.json go to ``folder``."""
    paths = []
    for name in CLASSES[scenario.family]:
        source = FAMILIES[scenario.family] | {"architectures": [name], "num_labels": 1}
        paths.append(folder / name)
        paths[-1].mkdir()
        (paths[-1] / "config.json").write_text(json.dumps(source), encoding="utf-8")
    model = ModelConfig(str(paths[0]), "bfloat16")
    rows = ROWS * scenario.mesh[0] * scenario.mesh[1]
    data = DataConfig(train="rows.jsonl", eval="held_out.jsonl", max_length=LENGTH, buckets=1)
    common: dict[str, Any] = {"model": model, "lora": LoRAConfig(rank=4 if scenario.lora else 0)}
    training = common | {"data": data, "batch_size": rows, "pack_length": LENGTH if scenario.packed else 0}
    half = LENGTH // 2
    sampling = SamplingConfig(max_new_tokens=half, kv_cache="int8" if scenario.int8 else "compute")
    return PlanConfig(
        topology=scenario.topology,
        compile="device",
        mesh=MeshConfig(*scenario.mesh),
        sft=SFTConfig(**training, sampling=sampling),
        reward=RewardConfig(**training),
        ppo=PPOConfig(
            **common,
            reward=replace(model, path=str(paths[1])),
            prompts=replace(data, max_length=half),
            # Half of the answers wait for the slot of one that has ended.
            sampling=replace(sampling, slots=ROWS // 2),
            episodes=rows,
            epochs=1,
            minibatches=1,
            value_from="shared" if scenario.shared else "auto",
        ),
        dpo=DPOConfig(**training),
        grpo=GRPOConfig(
            **common,
            reward=replace(model, path=str(paths[1])),
            prompts=replace(data, max_length=half),
            sampling=sampling,
            episodes=rows,
            samples=4,
        ),
    )


def facts(program: Program, target: Target) -> dict[str, Any]:
    """Compile a program and return what its module says; bytes are those of a device."""
    compiled = compile_program(program, target.topology)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    module, given = parse_hlo(hlo), program.args[0]
    once, twice = (sent(module, target, trips=trips) for trips in (1, 2))
    entry = module._replace(computations={module.entry: module.computations[module.entry]})
    outside = sent(entry, target, trips=1)
    return {
        "program": program.name,
        "sent": sent(module, target, trips=program.trips),
        "sent_in_loops": {kind: size - outside.get(kind, 0.0) for kind, size in once.items()},
        "sent_again": {kind: size - once[kind] for kind, size in twice.items() if size > once[kind]},
        "trips": program.trips,
        "kernels": hlo.count('custom_call_target="tpu_custom_call"'),
        "weights": weight_bytes(program),
        "given": device_bytes(given),
        "aliased": float(memory.alias_size_in_bytes),
        "copied": copied_bytes(module, given),
    }


def weight_bytes(program: Program) -> float:
    """Return the bytes of all weights that an update reads, of all devices; 0 for another program."""
    state, *others = program.args
    trees = (state.params, others[0]) if isinstance(state, TrainState) else ()
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees)))


def copied_bytes(module: Module, tree: Any) -> float:
    """Return the bytes of leaves of a tree that a program copies within main memory, outside of its loops."""
    shapes = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(tree) if leaf.ndim > 1}
    copies = [i.arrays for i in module.computations[module.entry].values() if i.opcode in ("copy", "copy-start")]
    within = [arrays[0] for arrays in copies if all(array.in_main_memory for array in arrays[:2])]
    return float(sum(array.bytes for array in within if array.dtype == "f32" and array.dims in shapes))


def sent(module: Module, target: Target, *, trips: int) -> dict[str, float]:
    """Return the bytes that a device sends, by kind of collective and mesh axes."""

    def key(collective: Collective) -> str:
        return f"{collective.kind} {'+'.join(collective.axes(target.mesh.shape))}"

    return sum_over_executions(
        module,
        lambda _, instruction: (
            None
            if (collectives := collectives_of(module, instruction)) is None
            else {key(collective): collective.bytes for collective in collectives}
        ),
        weight=lambda amounts: sum(amounts.values()),
        trips=trips,
    )


if __name__ == "__main__":
    main(sys.argv[1])
