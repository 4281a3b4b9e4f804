"""The inputs of SFT, the reward model and PPO."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from jrlhf.config import Config
from jrlhf.data import (
    PromptRows,
    RankingRows,
    SFTRows,
    TextRows,
    load_prompts,
    load_rankings,
    load_sft,
    load_texts,
)
from jrlhf.rollout.evaluation import judged
from jrlhf.rollout.rules import columns_read
from jrlhf.rollout.safety import load_safety_prompts
from jrlhf.rules import function_file
from jrlhf.runs.folder import StageName, model_source, stage_folder
from jrlhf.runs.inputs import SAFETY, RowsInput, StageInputs, with_sources


class SFTInputs(StageInputs):
    """What SFT is made from."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "sft")
        self._sft = config.sft

    @cached_property
    def source(self) -> str:
        return model_source(self.config, self._sft.model.path, key="sft.model.path", stage=None)

    @cached_property
    def train(self) -> SFTRows:
        return load_sft(self._sft.data, self._sft.data.train, self.tokenizer, train_on=self._sft.train_on)

    @cached_property
    def heldout(self) -> SFTRows | None:
        data = self._sft.data
        return load_sft(data, data.eval, self.tokenizer, train_on=self._sft.train_on) if data.eval else None

    @cached_property
    def candidate_prompts(self) -> PromptRows | None:
        """Prompts that ranking candidates are drawn for."""
        source = self._sft.candidate_prompts
        return load_prompts(self._sft.data, source, self.tokenizer) if source else None

    @cached_property
    def safety_prompts(self) -> PromptRows | None:
        return load_safety_prompts(self.config, self._sft.data, self.tokenizer)

    def rows(self) -> Mapping[str, RowsInput]:
        data = self._sft.data
        return with_sources(
            {
                "sft.data.train": RowsInput(data.train, lambda: self.train),
                "sft.data.eval": RowsInput(data.eval, lambda: self.heldout),
                "sft.candidate_prompts": RowsInput(self._sft.candidate_prompts, lambda: self.candidate_prompts),
                SAFETY: RowsInput(self.config.safety.prompts, lambda: self.safety_prompts),
            }
        )


class RewardInputs(StageInputs):
    """What a reward model is made from."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "reward")
        self._reward = config.reward

    @cached_property
    def source(self) -> str:
        return model_source(self.config, self._reward.model.path, key="reward.model.path", stage="sft")

    @cached_property
    def train(self) -> RankingRows:
        return load_rankings(self._reward.data, self._reward.data.train, self.tokenizer)

    @cached_property
    def heldout(self) -> RankingRows | None:
        data = self._reward.data
        return load_rankings(data, data.eval, self.tokenizer) if data.eval else None

    @cached_property
    def texts_source(self) -> str:
        """Texts that scores are normalised on: the SFT policy's own answers, or what the config names."""
        candidates = stage_folder(self.config, "sft") / "candidates.jsonl"
        return self._reward.normalise or (str(candidates) if candidates.exists() else self._reward.data.eval)

    @cached_property
    def texts(self) -> TextRows | None:
        # A sampler may answer with nothing, or with a byte that is no text: such answers are counted and left out.
        data, source = replace(self._reward.data, on_bad_row="skip"), self.texts_source
        return load_texts(data, source, self.tokenizer) if source else None

    def rows(self) -> Mapping[str, RowsInput]:
        data = self._reward.data
        return with_sources(
            {
                "reward.data.train": RowsInput(data.train, lambda: self.train),
                "reward.data.eval": RowsInput(data.eval, lambda: self.heldout),
                "reward.normalise": RowsInput(self.texts_source, lambda: self.texts),
            }
        )


class PPOInputs(StageInputs):
    """What PPO is made from."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "ppo")
        self._ppo = config.ppo

    @cached_property
    def source(self) -> str:
        return model_source(self.config, self._ppo.model.path, key="ppo.model.path", stage="sft")

    @cached_property
    def prompts(self) -> PromptRows:
        data = self._ppo.prompts
        return load_prompts(data, data.train, self.tokenizer, columns_read(self._ppo.rewards))

    @cached_property
    def heldout(self) -> PromptRows | None:
        data = self._ppo.prompts
        columns = columns_read(self._ppo.rewards)
        return load_prompts(data, data.eval, self.tokenizer, columns) if data.eval else None

    @cached_property
    def ptx(self) -> SFTRows | None:
        """Text that is learnt beside the reward."""
        ptx = self._ppo.ptx
        return load_sft(ptx, ptx.train, self.tokenizer, train_on="completion") if self._ppo.ptx_coef else None

    @cached_property
    def safety_prompts(self) -> PromptRows | None:
        return load_safety_prompts(self.config, self._ppo.prompts, self.tokenizer)

    def models(self) -> Mapping[str, Callable[[], str]]:
        ppo, sources = self._ppo, {**super().models()}

        def add(name: str, path: str, key: str, stage: StageName | None) -> None:
            sources[name] = lambda: model_source(self.config, path, key=key, stage=stage)

        if ppo.rewards.uses_model:
            add("ppo.reward", ppo.reward.path, "ppo.reward.path", "reward")
            for number, path in enumerate(ppo.rewards.models, 1):
                add(f"ppo.rewards.models[{number}]", path, "ppo.rewards.models", None)
        if judged(ppo.canary) and ppo.prompts.eval:
            add("ppo.canary.judge", ppo.canary.judge.path, "ppo.canary.judge.path", "reward")
        return sources

    def rows(self) -> Mapping[str, RowsInput]:
        ppo = self._ppo
        return with_sources(
            {
                "ppo.prompts.train": RowsInput(ppo.prompts.train, lambda: self.prompts),
                "ppo.prompts.eval": RowsInput(ppo.prompts.eval, lambda: self.heldout),
                "ppo.ptx.train": RowsInput(ppo.ptx.train if ppo.ptx_coef else "", lambda: self.ptx),
                SAFETY: RowsInput(self.config.safety.prompts, lambda: self.safety_prompts),
            }
        )

    def files(self) -> Mapping[str, Callable[[], Path | None]]:
        rewards, paths = self._ppo.rewards, {}
        if rewards.json.weight and rewards.json.schema:
            paths["ppo.rewards.json.schema"] = lambda: Path(rewards.json.schema)
        if rewards.function.weight:
            paths["ppo.rewards.function.path"] = lambda: function_file(rewards.function.path)
        return paths


def stage_inputs(config: Config, stage: StageName) -> StageInputs:
    """The inputs of a stage by its name."""
    match stage:
        case "sft":
            return SFTInputs(config)
        case "reward":
            return RewardInputs(config)
        case "ppo":
            return PPOInputs(config)
