"""Runs whose frozen weights are bfloat16 beside runs whose frozen weights are float32: the same logs and exports."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

from jrlhf.config import Config, ConfigError, LoRAConfig, ModelConfig
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.reward import run_reward
from jrlhf.stages.sft import run_sft
from jrlhf.train.attempt import Event
from jrlhf.types import TrainState
from tests.support.runs import compare_runs, small_config
from tests.support.short_model import SHORT_MODEL

Weights = Literal["auto", "float32", "bfloat16"]


def config_of(folder: Path, run: str, weights: Weights, **ppo: Any) -> Config:
    """A step of each stage in bfloat16."""
    config = small_config(folder, run)
    log = replace(config.sft.log, eval_every=100, samples=0, tensorboard=False)
    model = ModelConfig(dtype="bfloat16", weights=weights)
    base = replace(model, path=SHORT_MODEL)
    lora = LoRAConfig(rank=2, alpha=8.0, targets="q_proj|v_proj|mlp")
    ppo = {"iterations": 1, "epochs": 1, "minibatches": 1, "ema_decay": 0.0, "ptx_coef": 0.0, "lora": lora} | ppo
    return replace(
        config,
        sft=replace(config.sft, model=base, lora=lora, epochs=0.5, log=log, candidate_prompts=""),
        reward=replace(config.reward, model=model, lora=lora, epochs=0.5, log=log),
        ppo=replace(config.ppo, model=model, reward=model, log=log, **ppo),
    )


def matrices(tree: Any) -> set[Any]:
    """The dtypes of a tree's matrices, but for adapters."""
    named = ((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
    return {leaf.dtype for name, leaf in named if "head" not in name and name.endswith(("kernel']", "embed']"))}


def test_all_stages_with_adapters_are_the_same_to_the_bit(tmp_path: Path) -> None:
    states: dict[str, list[TrainState]] = {"float32": [], "auto": []}
    configs = {}
    for weights, seen in states.items():

        def note(event: Event, seen: list[TrainState] = seen) -> None:
            if event.kind == "begin":
                seen.append(event.state.train)

        configs[weights] = config_of(tmp_path, f"run-{weights}", weights)  # pyright: ignore[reportArgumentType]
        for run in (run_sft, run_reward, run_ppo):
            run(configs[weights], on_event=note)
    for stage in ("sft", "reward", "ppo"):
        compare_runs(*(Path(config.run) / stage for config in configs.values()))
        # The order of a file's metadata is by chance, so the files are not compared.
        first, second = (
            load_file(Path(c.run) / stage / "peft" / "adapter_model.safetensors") for c in configs.values()
        )
        assert first.keys() == second.keys()
        for name, adapter in first.items():
            assert adapter.tobytes() == second[name].tobytes(), name
    assert [matrices(state.frozen) for state in states["auto"]] == [{jnp.dtype(jnp.bfloat16)}] * 3
    assert [matrices(state.frozen) for state in states["float32"]] == [{jnp.dtype(jnp.float32)}] * 3
    assert {leaf.dtype for state in states["auto"] for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    # It is the same run, so another dtype of frozen weights does not begin a new one.
    ended = run_sft(replace(configs["auto"], sft=replace(configs["auto"].sft, model=configs["float32"].sft.model)))
    assert ended["steps"] == 1
    rounds = replace(configs["auto"].sft.model, dtype="float32", weights="bfloat16")
    with pytest.raises(ConfigError, match="holds a run with another config"):
        run_sft(replace(configs["auto"], sft=replace(configs["auto"].sft, model=rounds)))


def test_ppo_of_all_weights_is_the_same_to_the_bit(finished: tuple[Config, dict], tmp_path: Path) -> None:
    """The policy and the value network start from files in float32 whose reference and reward model are rounded."""
    whole, folders = Path(finished[0].run), []
    for weights in ("float32", "auto"):
        config = config_of(tmp_path, f"run-{weights}", weights, lora=LoRAConfig(), ema_decay=0.9, iterations=2)
        model = replace(config.ppo.model, path=str(whole / "sft"))
        canary = replace(config.ppo.canary, action="warn", judge=replace(model, path=str(whole / "reward")))
        reward = replace(model, path=str(whole / "reward"))
        rewards = replace(config.ppo.rewards, models=(str(whole / "reward"),))
        checkpoint = replace(config.ppo.checkpoint, every=1)
        ppo = replace(config.ppo, model=model, reward=reward, rewards=rewards, canary=canary, checkpoint=checkpoint)
        run_ppo(replace(config, ppo=ppo))
        folders.append(Path(config.run) / "ppo")
    compare_runs(*folders)
