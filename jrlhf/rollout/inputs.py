"""The inputs of an on-policy stage, which learns from answers of its own policy."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from jrlhf.config import Config, RolloutConfig, stages_before
from jrlhf.data import PromptRows, load_prompts
from jrlhf.rollout.evaluation import has_judge
from jrlhf.rollout.rules import columns_read
from jrlhf.rollout.safety import load_safety_prompts
from jrlhf.rules import function_file
from jrlhf.runs.folder import model_source
from jrlhf.runs.inputs import SAFETY, RowsInput, StageInputs, with_sources


class RolloutInputs(StageInputs):
    """The prompts, safety prompts, policy, reward models and rule files of an on-policy stage."""

    def __init__(self, config: Config, section: RolloutConfig, stage: str) -> None:
        super().__init__(config, stage)
        self._section = section

    @cached_property
    def source(self) -> str:
        before = stages_before(self.config, self.stage, "language")
        return model_source(self.config, self._section.model.path, key=f"{self.stage}.model.path", before=before)

    @cached_property
    def prompts(self) -> PromptRows:
        data = self._section.prompts
        return load_prompts(data, data.train, self.tokenizer, columns_read(self._section.rewards, stage=self.stage))

    @cached_property
    def heldout(self) -> PromptRows | None:
        data = self._section.prompts
        columns = columns_read(self._section.rewards, stage=self.stage)
        return load_prompts(data, data.eval, self.tokenizer, columns) if data.eval else None

    @cached_property
    def safety_prompts(self) -> PromptRows | None:
        return load_safety_prompts(self.config, self._section.prompts, self.tokenizer)

    def models(self) -> Mapping[str, Callable[[], str]]:
        section, stage, sources = self._section, self.stage, {**super().models()}
        scorers = stages_before(self.config, stage, "reward")

        def add(name: str, path: str, key: str, before: Sequence[str], otherwise: str = "") -> None:
            sources[name] = lambda: model_source(self.config, path, key=key, before=before, otherwise=otherwise)

        if section.rewards.uses_model:
            alone = f", or set {stage}.rewards.model_weight to 0 to score by rules alone"
            add(f"{stage}.reward", section.reward.path, f"{stage}.reward.path", scorers, alone)
            for number, path in enumerate(section.rewards.models, 1):
                add(f"{stage}.rewards.models[{number}]", path, f"{stage}.rewards.models", ())
        if has_judge(section.canary) and section.prompts.eval:
            add(f"{stage}.canary.judge", section.canary.judge.path, f"{stage}.canary.judge.path", scorers)
        return sources

    def rows(self) -> Mapping[str, RowsInput]:
        prompts, stage = self._section.prompts, self.stage
        return with_sources(
            {
                f"{stage}.prompts.train": RowsInput(prompts.train, lambda: self.prompts),
                f"{stage}.prompts.eval": RowsInput(prompts.eval, lambda: self.heldout),
                SAFETY: RowsInput(self.config.safety.prompts, lambda: self.safety_prompts),
            }
        )

    def files(self) -> Mapping[str, Callable[[], Path | None]]:
        rewards, paths = self._section.rewards, {}
        if rewards.json.weight and rewards.json.schema:
            paths[f"{self.stage}.rewards.json.schema"] = lambda: Path(rewards.json.schema)
        if rewards.function.weight:
            paths[f"{self.stage}.rewards.function.path"] = lambda: function_file(rewards.function.path)
        return paths
