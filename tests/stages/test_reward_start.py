"""A reward stage that starts from a reward model; and what a command says that was given the other kind of model."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf import assets
from jrlhf.cli import main
from jrlhf.config import Config, LoRAConfig, ModelConfig, PlanConfig
from jrlhf.config.tools import ExportConfig
from jrlhf.data import load_tokenizer
from jrlhf.models import RewardModel, load_pretrained, load_reward_model, reward_from_pretrained, save_reward_model
from jrlhf.models.reward import normalise_reward
from jrlhf.plan.run import planned_target
from jrlhf.stages.reward import plan_reward, run_reward
from jrlhf.tools.export import run_export
from tests.support.runs import small_config

MODEL = "asset:stories260k"


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A normalised reward model, with a bias."""
    folder, source = tmp_path_factory.mktemp("reward"), assets.resolve(MODEL)
    model = reward_from_pretrained(load_pretrained(source, dtype="float32"), jax.random.key(0))
    save_reward_model(normalise_reward(model, gain=3.0, bias=-1.25), folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


def scores(model: RewardModel) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(3, 512, (8, 12)).astype(np.int32)
    return np.asarray(model.score(model.params, jnp.asarray(tokens), jnp.ones((8, 12), bool)))


def from_folder(folder: Path, tmp_path: Path, lora: LoRAConfig) -> Config:
    """Steps so small that nothing is learnt: what is exported is what was read."""
    config = small_config(tmp_path, "run", save_every=1)
    stage = replace(config.reward, model=ModelConfig(path=str(folder)), lora=lora, epochs=1.0, normalise="")
    return replace(config, reward=replace(stage, optim=replace(stage.optim, lr=1e-12)))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_training_goes_on_from_the_head(reward_folder: Path, tmp_path: Path, rank: int) -> None:
    start = load_reward_model(reward_folder, dtype="float32")
    config = from_folder(reward_folder, tmp_path, LoRAConfig(rank=rank, targets="q_proj"))
    summary, stage = run_reward(config), Path(config.run) / "reward"
    expected = summary["gain"] * scores(start) + summary["bias"]
    assert scores(start).std() > 0.05
    for folder in (stage / "hf", *([stage / "peft"] if rank else [])):
        np.testing.assert_allclose(scores(load_reward_model(folder, dtype="float32")), expected, atol=1e-4)
    exported = load_reward_model(stage / "hf", dtype="float32")
    assert (exported.gain, exported.bias) == (summary["gain"], summary["bias"])
    assert exported.config["architectures"] == ["LlamaForSequenceClassification"]

    run_export(ExportConfig(run=config.run, out=str(tmp_path / "step"), stage="reward", step=1))
    raw = load_reward_model(tmp_path / "step", dtype="float32")
    assert (raw.gain, raw.bias) == (1.0, 0.0)
    np.testing.assert_allclose(scores(raw), scores(start), atol=1e-4)


def test_it_is_planned_with_the_bytes_of_its_own(reward_folder: Path, tmp_path: Path) -> None:
    def held(path: str) -> dict[str, list[tuple[int, ...]]]:
        config = from_folder(Path(path), tmp_path, LoRAConfig())
        plan = PlanConfig(topology="cpu:8", reward=config.reward, sft=config.sft, ppo=config.ppo)
        trees = plan_reward(plan, planned_target(plan)).build(1).held
        return {name: [leaf.shape for leaf in jax.tree.leaves(tree)] for name, tree in trees.items()}

    assert held(str(reward_folder)) == held(assets.resolve(MODEL))


def test_a_command_with_the_other_kind_of_model_says_so_in_its_own_words(
    reward_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = small_config(tmp_path, "run")
    prompts, texts, folder = rows.ppo.prompts.train, rows.sft.data.train, str(reward_folder)
    language = "a language model (LlamaForCausalLM); {} needs a reward model"
    reward = folder + ": is a reward model (LlamaForSequenceClassification); {} needs a language model"
    run = ["--run", str(tmp_path / "other")]
    cases = {
        reward.format("model"): [
            ["generate", "--model", folder, "--prompts", str(prompts)],
            ["verify", "--model", folder],
        ],
        language.format("model"): [["score", "--model", MODEL, "--data", str(texts)]],
        reward.format("sft.model.path"): [
            ["sft", *run, "--sft.model.path", folder, "--sft.data.train", str(texts)],
            ["plan", "--topology", "cpu:8", "--sft.model.path", folder, "--sft.data.train", str(texts)],
        ],
        language.format("ppo.reward.path"): [
            ["ppo", *run, "--ppo.model.path", MODEL, "--ppo.reward.path", MODEL, "--ppo.prompts.train", str(prompts)]
        ],
    }
    for message, commands in cases.items():
        for command in commands:
            assert main(command) == 2, command
            assert message in capsys.readouterr().err, command
