"""The models of a PPO run: policy, reward model, and what the value network starts from."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jrlhf.config import Config, ConfigError, PPOConfig
from jrlhf.core import combine, partition
from jrlhf.data import Tokenizer, load_tokenizer
from jrlhf.models import (
    STOP_TOKEN,
    ArchConfig,
    Pretrained,
    RewardModel,
    load_pretrained,
    load_reward_model,
    reward_from_pretrained,
)
from jrlhf.runs.folder import model_source
from jrlhf.train.lora import trainable
from jrlhf.train.positions import Positions
from jrlhf.train.start import computed
from jrlhf.types import Params, PPOParams, TrainState


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
    value: RewardModel
    """What the value network starts from: the reward model itself, or the policy with a head of zeros."""
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
        """Of the value network, where it is one of its own."""
        return None if self.shared else self.value.arch

    @property
    def packable(self) -> bool:
        """Whether all of them can read several sequences in a row."""
        models = (self.policy, self.value, *(() if self.reward is None else (self.reward,)))
        return all(model.arch.packable for model in models)

    def positions(self, ppo: PPOConfig) -> list[Positions]:
        """Of all models that read the policy's tokens, the policy first; who reads texts has cuts of its own."""
        readers = {"ppo.model": self.policy.arch, "the value network": self.value.arch}
        if self.reward is not None and self.reward_tokenizer is None:
            readers["ppo.reward"] = self.reward.arch
        for path, judge in zip(ppo.rewards.models, self.others, strict=True):
            if judge.tokenizer is None:
                readers[f"ppo.rewards.models: {path}"] = judge.model.arch
        key = "ppo.prompts.max_length"
        return [
            Positions(arch, key, model=model).answering(ppo.sampling, "ppo.sampling") for model, arch in readers.items()
        ]


def load_actors(config: Config, mesh: Mesh) -> Actors:
    """ConfigError where the value network is to start from a reward model that reads other tokens."""
    ppo = config.ppo
    source = model_source(config, ppo.model.path, key="ppo.model.path", stage="sft")
    tokenizer = load_tokenizer(source)
    shared = ppo.value_from == "shared"
    if not ppo.rewards.uses_model:
        policy = load_pretrained(source, mesh=mesh, **computed(ppo.model, mesh, key="ppo.model"))
        return Actors(policy, None, blank_value(policy, shared=shared), tokenizer, None, shared=shared)
    reward_source = model_source(config, ppo.reward.path, key="ppo.reward.path", stage="reward")
    reward_tokenizer = load_tokenizer(reward_source)
    same = reward_tokenizer.get_vocab() == tokenizer.get_vocab()
    if ppo.value_from == "reward" and not same:
        raise ConfigError(
            f"ppo.value_from: the value network reads the policy's tokens, but {reward_source} has another vocabulary "
            f"than {source}; take policy"
        )
    policy = load_pretrained(source, mesh=mesh, **computed(ppo.model, mesh, key="ppo.model"))
    reward = load_reward_model(reward_source, mesh=mesh, **computed(ppo.reward, mesh, key="ppo.reward"))
    same = same and reward.arch.vocab_size >= policy.arch.vocab_size
    if ppo.value_from == "reward" and not same:
        raise ConfigError(
            f"ppo.value_from: the value network reads the policy's tokens, of which {source} has "
            f"{policy.arch.vocab_size} and {reward_source} {reward.arch.vocab_size}; take policy"
        )
    from_reward = ppo.value_from == "reward" or (ppo.value_from == "auto" and same)
    value = reward if from_reward else blank_value(policy, shared=shared)
    others = tuple(_judge(config, path, policy, tokenizer, mesh) for path in ppo.rewards.models)
    own = own_tokenizer(reward, reward_tokenizer, policy, tokenizer)
    return Actors(policy, reward, value, tokenizer, own, others, shared)


def own_tokenizer(reward: RewardModel, own: Tokenizer, policy: Pretrained, tokenizer: Tokenizer) -> Tokenizer | None:
    """``own`` where a reward model is to read texts, None where it reads the policy's very tokens.

    It reads texts where its tokens are others, where the policy may sample one that it has no embedding for, and where
    it is read by a recipe of its own: that is another's model, whose template goes over the whole chat.
    """
    same = own.get_vocab() == tokenizer.get_vocab() and reward.arch.vocab_size >= policy.arch.vocab_size
    return None if same and reward.reading == STOP_TOKEN else own


def _judge(config: Config, path: str, policy: Pretrained, tokenizer: Tokenizer, mesh: Mesh) -> Judge:
    """One of ``ppo.rewards.models``, computed with as ``ppo.reward`` is."""
    source = model_source(config, path, key="ppo.rewards.models", stage=None)
    own = load_tokenizer(source)
    how = computed(config.ppo.reward, mesh, key="ppo.reward")
    how["option"] = "ppo.rewards.models"
    model = load_reward_model(source, mesh=mesh, **how)
    return Judge(model, own_tokenizer(model, own, policy, tokenizer))


def blank_value(policy: Pretrained, *, shared: bool) -> RewardModel:
    """The policy's decoder, and a head that calls every prefix worth 0; or, ``shared``, the head alone."""
    model = reward_from_pretrained(policy, jax.random.key(0))
    head = {"head": jax.tree.map(jnp.zeros_like, model.params["head"])}
    return replace(model, params=head if shared else model.params | head)


def trainable_actors(config: Config, actors: Actors, mesh: Mesh) -> tuple[PPOParams, PPOParams | None]:
    """What is trained, and with LoRA the frozen bases: the very arrays of the models they start from."""
    keys, lora = jax.random.split(jax.random.key(config.seed)), config.ppo.lora
    policy, policy_base = trainable(actors.policy, lora, keys[0], mesh=mesh, path="ppo.lora")
    if actors.shared:
        value, value_base = partition(actors.value.params, lambda path: True)
    else:
        value, value_base = trainable(actors.value, lora, keys[1], mesh=mesh, path="ppo.lora")
    return PPOParams(policy, value), PPOParams(policy_base, value_base) if lora.rank else None


def learnt_policy(train: TrainState) -> Params:
    """The policy that is evaluated and exported: the average where one is kept."""
    policy = train.params.policy if train.ema is None else train.ema
    return combine(policy, None if train.frozen is None else train.frozen.policy)
