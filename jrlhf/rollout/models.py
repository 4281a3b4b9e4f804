"""Readers for the models of an on-policy stage: with weights for a run, as shapes for a plan."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jrlhf.config import Config, ModelConfig, PlanConfig, stages_before
from jrlhf.data import Tokenizer, load_tokenizer
from jrlhf.models import Pretrained, RewardModel, load_pretrained, load_reward_model, reward_from_pretrained
from jrlhf.models.abstract import abstract_reward
from jrlhf.models.hf.adapter_folder import ModelKind, model_folder
from jrlhf.models.hf.families import arch_from_hf
from jrlhf.models.hf.folder import read_config
from jrlhf.runs.folder import model_source
from jrlhf.train.keys import stream_key
from jrlhf.train.programs import Target, planned_model, planned_source
from jrlhf.train.start import compute_options

M = TypeVar("M", covariant=True)


@runtime_checkable
class SourceOf(Protocol):
    """A function that returns the folder or hub id of a model."""

    def __call__(self, path: str, *, key: str, stage: str, kind: ModelKind | None) -> str: ...


@runtime_checkable
class ModelOf(Protocol[M]):
    """A function that reads a model from its source; ``frozen`` says that the stage does not train the weights."""

    def __call__(self, source: str, model: ModelConfig, *, key: str, option: str = "", frozen: bool = True) -> M: ...


class ModelReader(NamedTuple):
    """The functions that read a stage's models, for the mesh of a run or of a plan.

    Weights are frozen unless ``language`` is told otherwise: the trained ones are read from the same sources, see
    ``trainable_actors``.
    """

    source: SourceOf
    """Return the folder or hub id of a model of ``stage``; an empty path stands for the nearest export of this kind
    before it, or for none if ``kind`` is None."""
    tokenizer: Callable[[str], Tokenizer]
    language: ModelOf[Pretrained]
    reward: ModelOf[RewardModel]
    blank_value: Callable[[Pretrained], RewardModel]
    """Return the policy's decoder with a value head of zeros."""


def weight_reader(config: Config, mesh: Mesh) -> ModelReader:
    """Return the reader of a run, which loads models with their weights."""

    def options(model: ModelConfig, key: str, option: str, frozen: bool) -> dict[str, Any]:
        keywords = compute_options(model, mesh, key=key, frozen=frozen)
        return keywords | {"option": option} if option else keywords

    def source(path: str, *, key: str, stage: str, kind: ModelKind | None) -> str:
        before = () if kind is None else stages_before(config, stage, kind)
        return model_source(config, path, key=key, before=before)

    def language(source: str, model: ModelConfig, *, key: str, option: str = "", frozen: bool = True) -> Pretrained:
        return load_pretrained(source, mesh=mesh, **options(model, key, option, frozen))

    def reward(source: str, model: ModelConfig, *, key: str, option: str = "", frozen: bool = True) -> RewardModel:
        return load_reward_model(source, mesh=mesh, **options(model, key, option, frozen))

    def blank_value(policy: Pretrained) -> RewardModel:
        model = reward_from_pretrained(policy, stream_key(0, "ppo", "init"))
        return replace(model, params=model.params | {"head": jax.tree.map(jnp.zeros_like, model.params["head"])})

    return ModelReader(source, load_tokenizer, language, reward, blank_value)


class SizedVocabulary(Tokenizer):
    """Replaces a tokenizer in a plan; two of them are the same if they have the same size."""

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        """Return as many tokens as the model has embeddings."""
        return {str(token): token for token in range(self._size)}


def shape_reader(config: PlanConfig, target: Target) -> ModelReader:
    """Return the reader of a plan, which makes models of shapes and reads only config.json."""

    def source(path: str, *, key: str, stage: str, kind: ModelKind | None) -> str:
        before = () if kind is None else stages_before(config, stage, kind)
        return planned_source(config, path, key=key, before=before)

    def tokenizer(source: str) -> Tokenizer:
        folder = model_folder(source, weights=False).base
        return SizedVocabulary(arch_from_hf(read_config(folder)).vocab_size)  # pyright: ignore[reportAbstractUsage]

    def language(source: str, model: ModelConfig, *, key: str, option: str = "", frozen: bool = True) -> Pretrained:
        return planned_model(target, source, model, key=key, kind="language", option=option, frozen=frozen)

    def reward(source: str, model: ModelConfig, *, key: str, option: str = "", frozen: bool = True) -> RewardModel:
        decoder = planned_model(target, source, model, key=key, kind="reward", option=option, frozen=frozen)
        return abstract_reward(decoder, target.mesh)

    return ModelReader(source, tokenizer, language, reward, lambda policy: abstract_reward(policy, target.mesh))
