"""All three stages with adapters: what is saved, what is shared, what comes out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf.config import CheckpointConfig, Config, ConfigError, LoRAConfig
from jrlhf.config.tools import ExportConfig
from jrlhf.models import load_pretrained, load_reward_model
from jrlhf.runs.checkpoints import Checkpoints
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages import sft
from jrlhf.stages.pipeline import run_pipeline
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.reward import run_reward
from jrlhf.stages.sft import run_sft
from jrlhf.tools.export import run_export
from jrlhf.train.attempt import Event
from tests.support.runs import small_config

LORA = LoRAConfig(rank=4, alpha=8.0, targets="q_proj|v_proj|mlp")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any], list[Any]]:
    """The run's config, its summary, and the state at every event of the PPO stage."""
    config = small_config(tmp_path_factory.mktemp("lora"), "run")
    config = replace(
        config,
        sft=replace(config.sft, lora=LORA, candidate_prompts="", checkpoint=CheckpointConfig(every=1)),
        reward=replace(config.reward, lora=LORA),
        ppo=replace(config.ppo, lora=LORA, iterations=2),
    )
    states: list[Any] = []

    def note(event: Event) -> None:
        states.append(event.state.train)

    run_sft(config)
    run_reward(config)
    run_ppo(config, on_event=note)
    summary = run_pipeline(config)
    return config, summary, states


def test_it_learns_and_starts_from_the_reference(adapted: tuple[Config, dict[str, Any], list[Any]]) -> None:
    config, summary, _ = adapted
    assert summary["sft"]["heldout_nll"] < summary["sft"]["base_nll"]
    lines = [line for line in read_metrics(Path(config.run) / "ppo" / "metrics.jsonl") if "kl" in line]
    assert abs(lines[0]["kl"]) < 1e-4
    assert abs(lines[1]["kl"]) > abs(lines[0]["kl"])


def test_ppo_holds_one_copy_of_each_base(adapted: tuple[Config, dict[str, Any], list[Any]]) -> None:
    _, _, states = adapted
    buffers = [{x.unsafe_buffer_pointer() for leaf in jax.tree.leaves(s.frozen) for x in _shards(leaf)} for s in states]
    assert buffers[0] == buffers[-1], "an update copied the frozen weights"
    trained = sum(x.size for x in jax.tree.leaves(states[-1].opt_state))
    whole = sum(x.size for x in jax.tree.leaves(states[-1].frozen))
    assert trained < 0.4 * whole  # two moments of every adapter; of all weights they would be twice the whole


def _shards(leaf: jax.Array) -> list[Any]:
    return [shard.data for shard in leaf.addressable_shards]


def test_checkpoints_hold_adapters_only_and_export_to_the_same_model(
    adapted: tuple[Config, dict[str, Any], list[Any]], tmp_path: Path
) -> None:
    config, _, _ = adapted
    for stage, load in (("sft", load_pretrained), ("reward", load_reward_model), ("ppo", load_pretrained)):
        folder = Path(config.run) / stage
        with Checkpoints(folder / "checkpoints", keep=1, keep_best=0, best_metric=None, best_mode="min") as saved:
            newest = saved.latest_step()
        run_export(ExportConfig(run=config.run, out=str(tmp_path / stage), stage=stage, step=newest))
        exported, finished = (load(place, dtype="float32") for place in (tmp_path / stage, folder / "hf"))
        decoders = [m.params.get("decoder", m.params) for m in (exported, finished)]
        jax.tree.map(np.testing.assert_array_equal, *decoders)
        peft = load(folder / "peft", dtype="float32")
        decoder = peft.params.get("decoder", peft.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), decoder, decoders[1])
        if stage == "reward":
            np.testing.assert_array_equal(peft.params["head"]["kernel"], finished.params["head"]["kernel"])


def test_an_interrupted_run_ends_as_the_unbroken_one(
    adapted: tuple[Config, dict[str, Any], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = adapted
    config = replace(whole, run=str(tmp_path / "run"))
    save, saved = Checkpoints.save, []

    def save_and_fail(self: Checkpoints, step: int, *args: Any, **kwargs: Any) -> None:
        save(self, step, *args, **kwargs)
        saved.append(step)
        if len(saved) == 2:
            self.wait()
            raise RuntimeError("power cut")

    monkeypatch.setattr(Checkpoints, "save", save_and_fail)
    with pytest.raises(RuntimeError, match="power cut"):
        run_sft(config)
    run_sft(config)
    weights = [Path(c.run) / "sft" / "hf" / "model.safetensors" for c in (whole, config)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_targets_that_are_found_nowhere_are_named(tmp_path: Path) -> None:
    config = small_config(tmp_path, "run")
    config = replace(config, sft=replace(config.sft, lora=LoRAConfig(rank=4, targets="c_attn")))
    with pytest.raises(ConfigError, match=r"sft\.lora\.targets: 'c_attn' matches none of self_attn\.q_proj"):
        sft.run_sft(config)
