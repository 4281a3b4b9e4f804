"""The models of a PPO run: policy, reward model, and what the value network starts from."""

from dataclasses import replace
from typing import Literal, NamedTuple

import jax
from jax.sharding import Mesh

from jrlhf.config import ConfigError, LoRAConfig, RolloutConfig
from jrlhf.core import combine, partition
from jrlhf.data import Tokenizer
from jrlhf.models import ArchConfig, Pretrained, RewardModel
from jrlhf.models.reading import STOP_TOKEN
from jrlhf.rollout.models import ModelReader
from jrlhf.train.keys import stream_key
from jrlhf.train.lora import trainable
from jrlhf.train.positions import Positions
from jrlhf.types import Params, PPOParams, TrainState

ValueFrom = Literal["auto", "reward", "policy", "shared"]


class Judge(NamedTuple):
    """A further reward model."""

    model: RewardModel
    tokenizer: Tokenizer | None
    """Its own, where it reads texts and not the policy's tokens: see ``own_tokenizer``."""


class Actors(NamedTuple):
    """The models of a run, and their tokenizers."""

    policy: Pretrained
    """Its parameters stay the reference's; the policy that learns is in the state."""
    reward: RewardModel | None
    """None: scores come of rules alone."""
    value: RewardModel | None
    """Initial value network: the reward model itself, or the policy with a head of zeros; None without a critic."""
    tokenizer: Tokenizer
    reward_tokenizer: Tokenizer | None
    """The reward model's own, where it reads texts and not the policy's tokens: see ``own_tokenizer``."""
    others: tuple[Judge, ...] = ()
    shared: bool = False
    """The value network is a head on the policy: ``value`` has no more parameters than that."""

    @property
    def reward_models(self) -> tuple[RewardModel, ...]:
        """All that an answer is scored by."""
        return () if self.reward is None else (self.reward, *(judge.model for judge in self.others))

    @property
    def value_arch(self) -> ArchConfig | None:
        """Architecture of the value network, if it is a network of its own."""
        return None if self.shared or self.value is None else self.value.arch

    @property
    def packable(self) -> bool:
        """Whether all of them can read several sequences in a row."""
        models = (self.policy, self.value, self.reward)
        return all(model.arch.packable for model in models if model is not None)

    def positions(self, section: RolloutConfig, stage: str) -> list[Positions]:
        """Of all models that read the policy's tokens, the policy first; who reads texts has cuts of its own."""
        readers = {f"{stage}.model": self.policy.arch}
        if self.value is not None:
            readers["the value network"] = self.value.arch
        if self.reward is not None and self.reward_tokenizer is None:
            readers[f"{stage}.reward"] = self.reward.arch
        for path, judge in zip(section.rewards.models, self.others, strict=True):
            if judge.tokenizer is None:
                readers[f"{stage}.rewards.models: {path}"] = judge.model.arch
        key, answer_key = f"{stage}.prompts.max_length", f"{stage}.sampling"
        return [
            Positions(arch, key, model=model).answering(section.sampling, answer_key) for model, arch in readers.items()
        ]


def load_actors(section: RolloutConfig, stage: str, models: ModelReader, *, value_from: ValueFrom | None) -> Actors:
    """Load the models of a stage; ``value_from`` None means no critic.

    ConfigError where the value network is to start from a reward model that reads other tokens.
    """
    source = models.source(section.model.path, key=f"{stage}.model.path", stage="sft")
    tokenizer = models.tokenizer(source)
    shared = value_from == "shared"

    def blank(policy: Pretrained) -> RewardModel | None:
        return None if value_from is None else blank_value(models, policy, shared=shared)

    if not section.rewards.uses_model:
        policy = models.language(source, section.model, key=f"{stage}.model")
        return Actors(policy, None, blank(policy), tokenizer, None, shared=shared)
    reward_source = models.source(section.reward.path, key=f"{stage}.reward.path", stage="reward")
    reward_tokenizer = models.tokenizer(reward_source)
    same = reward_tokenizer.get_vocab() == tokenizer.get_vocab()
    if value_from == "reward" and not same:
        raise ConfigError(
            f"{stage}.value_from: the value network reads the policy's tokens, but {reward_source} has another "
            f"vocabulary than {source}; take policy"
        )
    policy = models.language(source, section.model, key=f"{stage}.model")
    reward = models.reward(reward_source, section.reward, key=f"{stage}.reward")
    same = same and reward.arch.vocab_size >= policy.arch.vocab_size
    if value_from == "reward" and not same:
        raise ConfigError(
            f"{stage}.value_from: the value network reads the policy's tokens, of which {source} has "
            f"{policy.arch.vocab_size} and {reward_source} {reward.arch.vocab_size}; take policy"
        )
    from_reward = value_from == "reward" or (value_from == "auto" and same)
    value = reward if from_reward else blank(policy)
    others = tuple(_judge(section, stage, path, models, policy, tokenizer) for path in section.rewards.models)
    own = own_tokenizer(reward, reward_tokenizer, policy, tokenizer)
    return Actors(policy, reward, value, tokenizer, own, others, shared)


def own_tokenizer(reward: RewardModel, own: Tokenizer, policy: Pretrained, tokenizer: Tokenizer) -> Tokenizer | None:
    """``own`` where a reward model is to read texts, None where it reads the policy's very tokens.

    It reads texts where its tokens are others, where the policy may sample one that it has no embedding for, and where
    it is read by a recipe of its own: that is another's model, whose template goes over the whole chat.
    """
    same = own.get_vocab() == tokenizer.get_vocab() and reward.arch.vocab_size >= policy.arch.vocab_size
    return None if same and reward.reading == STOP_TOKEN else own


def _judge(
    section: RolloutConfig, stage: str, path: str, models: ModelReader, policy: Pretrained, tokenizer: Tokenizer
) -> Judge:
    """One of ``rewards.models``, with the compute options of the reward model."""
    key = f"{stage}.rewards.models"
    source = models.source(path, key=key, stage=None)
    own = models.tokenizer(source)
    model = models.reward(source, replace(section.reward, path=path), key=f"{stage}.reward", option=key)
    return Judge(model, own_tokenizer(model, own, policy, tokenizer))


def blank_value(models: ModelReader, policy: Pretrained, *, shared: bool) -> RewardModel:
    """The policy's decoder, and a head that calls every prefix worth 0; or, ``shared``, the head alone."""
    model = models.blank_value(policy)
    return replace(model, params={"head": model.params["head"]}) if shared else model


def trainable_actors(
    lora: LoRAConfig, seed: int, actors: Actors, mesh: Mesh, *, stage: str
) -> tuple[PPOParams, PPOParams | None]:
    """What is trained, and with LoRA the frozen bases: the very arrays of the models they start from."""
    keys = jax.random.split(stream_key(seed, stage, "lora"))
    critic, path = value_of(actors), f"{stage}.lora"
    policy, policy_base = trainable(actors.policy, lora, keys[0], mesh=mesh, path=path)
    if actors.shared:
        value, value_base = partition(critic.params, lambda path: True)
    else:
        value, value_base = trainable(critic, lora, keys[1], mesh=mesh, path=path)
    return PPOParams(policy, value), PPOParams(policy_base, value_base) if lora.rank else None


def value_of(actors: Actors) -> RewardModel:
    """The initial value network. ValueError for a stage without a critic."""
    if actors.value is None:
        raise ValueError("this stage has no value network")
    return actors.value


def learnt_policy(train: TrainState) -> Params:
    """The policy that is evaluated and exported: the average where one is kept."""
    policy = train.params.policy if train.ema is None else train.ema
    return combine(policy, None if train.frozen is None else train.frozen.policy)
