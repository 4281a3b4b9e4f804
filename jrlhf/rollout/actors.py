"""The models of an on-policy stage: the policy, the reward models and, for PPO, the initial value network."""

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


class EnsembleMember(NamedTuple):
    """A reward model of the ensemble besides the first one."""

    model: RewardModel
    tokenizer: Tokenizer | None
    """Own tokenizer of a model that reads texts; None if it reads the policy's tokens. See ``own_tokenizer``."""


class Actors(NamedTuple):
    """The models of a run, and their tokenizers."""

    policy: Pretrained
    """The initial policy. Its parameters are the reference, which is constant; the state holds the trained policy."""
    reward: RewardModel | None
    """The first reward model; None if only rules score the answers."""
    value: RewardModel | None
    """Initial value network: the reward model itself, or the policy with a head of zeros; None without a critic."""
    tokenizer: Tokenizer
    reward_tokenizer: Tokenizer | None
    """Own tokenizer of a reward model that reads texts; None if it reads the policy's tokens. See ``own_tokenizer``."""
    ensemble: tuple[EnsembleMember, ...] = ()
    """Reward models besides the first one."""
    shared: bool = False
    """Whether the value network is a head on the policy; then ``value`` holds only the parameters of that head."""
    has_reference: bool = True
    """Whether the initial policy stays as the reference. If not, the state takes its parameters over, unless they are
    the frozen base of adapters."""

    @property
    def reference(self) -> Params | None:
        """The reference's parameters; None for a stage without one."""
        return self.policy.params if self.has_reference else None

    @property
    def reward_models(self) -> tuple[RewardModel, ...]:
        """All reward models that score an answer."""
        return () if self.reward is None else (self.reward, *(member.model for member in self.ensemble))

    @property
    def value_arch(self) -> ArchConfig | None:
        """Architecture of a separate value network; None without one."""
        return None if self.shared or self.value is None else self.value.arch

    @property
    def packable(self) -> bool:
        """Whether policy, value network and reward model all support several sequences in a row."""
        models = (self.policy, self.value, self.reward)
        return all(model.arch.packable for model in models if model is not None)

    def positions(self, section: RolloutConfig, stage: str) -> list[Positions]:
        """Return the positions of all models that read the policy's tokens, the policy first.

        Models that read texts are left out, because they cut texts to their own lengths.
        """
        readers = {f"{stage}.model": self.policy.arch}
        if self.value is not None:
            readers["the value network"] = self.value.arch
        if self.reward is not None and self.reward_tokenizer is None:
            readers[f"{stage}.reward"] = self.reward.arch
        for path, member in zip(section.rewards.models, self.ensemble, strict=True):
            if member.tokenizer is None:
                readers[f"{stage}.rewards.models: {path}"] = member.model.arch
        key, answer_key = f"{stage}.prompts.max_length", f"{stage}.sampling"
        return [
            Positions(arch, key, model=model).answering(section.sampling, answer_key) for model, arch in readers.items()
        ]


def load_actors(
    section: RolloutConfig, stage: str, models: ModelReader, *, value_from: ValueFrom | None, reference: bool = True
) -> Actors:
    """Load the models of a stage; ``value_from`` None means no critic.

    Without a ``reference`` the policy is loaded as it is trained, in float32 unless it is the base of adapters. Raise
    ConfigError if the value network would start from a reward model with another vocabulary.
    """
    source = models.source(section.model.path, key=f"{stage}.model.path", stage=stage, kind="language")
    tokenizer = models.tokenizer(source)
    shared = value_from == "shared"

    def load_policy() -> Pretrained:
        frozen = reference or section.lora.rank > 0
        return models.language(source, section.model, key=f"{stage}.model", frozen=frozen)

    def blank(policy: Pretrained) -> RewardModel | None:
        return None if value_from is None else blank_value(models, policy, shared=shared)

    if not section.rewards.uses_model:
        policy = load_policy()
        return Actors(policy, None, blank(policy), tokenizer, None, shared=shared, has_reference=reference)
    reward_source = models.source(section.reward.path, key=f"{stage}.reward.path", stage=stage, kind="reward")
    reward_tokenizer = models.tokenizer(reward_source)
    same = reward_tokenizer.get_vocab() == tokenizer.get_vocab()
    if value_from == "reward" and not same:
        raise ConfigError(
            f"{stage}.value_from: the value network reads the policy's tokens, but {reward_source} has another "
            f"vocabulary than {source}; set it to policy"
        )
    policy = load_policy()
    reward = models.reward(reward_source, section.reward, key=f"{stage}.reward")
    same = same and reward.arch.vocab_size >= policy.arch.vocab_size
    if value_from == "reward" and not same:
        raise ConfigError(
            f"{stage}.value_from: the value network reads the policy's tokens, but {source} has "
            f"{policy.arch.vocab_size} tokens and {reward_source} only {reward.arch.vocab_size}; set it to policy"
        )
    from_reward = value_from == "reward" or (value_from == "auto" and same)
    value = reward if from_reward else blank(policy)
    ensemble = tuple(_load_member(section, stage, path, models, policy, tokenizer) for path in section.rewards.models)
    own = own_tokenizer(reward, reward_tokenizer, policy, tokenizer)
    return Actors(policy, reward, value, tokenizer, own, ensemble, shared, reference)


def own_tokenizer(reward: RewardModel, own: Tokenizer, policy: Pretrained, tokenizer: Tokenizer) -> Tokenizer | None:
    """Return ``own`` if a reward model must read texts, None if it reads the policy's tokens.

    It must read texts if its vocabulary differs, if it lacks an embedding of a token that the policy can sample, or if
    it has its own way of reading: that is a foreign model, whose chat template covers the whole chat.
    """
    same = own.get_vocab() == tokenizer.get_vocab() and reward.arch.vocab_size >= policy.arch.vocab_size
    return None if same and reward.reading == STOP_TOKEN else own


def _load_member(
    section: RolloutConfig, stage: str, path: str, models: ModelReader, policy: Pretrained, tokenizer: Tokenizer
) -> EnsembleMember:
    """Load one of ``rewards.models`` with the compute options of the reward model."""
    key = f"{stage}.rewards.models"
    source = models.source(path, key=key, stage=stage, kind=None)
    own = models.tokenizer(source)
    model = models.reward(source, replace(section.reward, path=path), key=f"{stage}.reward", option=key)
    return EnsembleMember(model, own_tokenizer(model, own, policy, tokenizer))


def blank_value(models: ModelReader, policy: Pretrained, *, shared: bool) -> RewardModel:
    """Return the policy's decoder with a value head of zeros; with ``shared`` only the head."""
    model = models.blank_value(policy)
    return replace(model, params={"head": model.params["head"]}) if shared else model


def trainable_actors(
    lora: LoRAConfig, seed: int, actors: Actors, mesh: Mesh, *, stage: str
) -> tuple[PPOParams, PPOParams | None]:
    """Return the trained parameters, and with LoRA the frozen ones, which are the models' own arrays.

    Without LoRA the trained arrays are other ones than those of the reference and of the reward model.
    """
    keys = jax.random.split(stream_key(seed, stage, "lora"))
    critic, path = value_of(actors), f"{stage}.lora"
    policy, policy_base = trainable(actors.policy, lora, keys[0], mesh=mesh, path=path, shared=True)
    if actors.shared:
        value, value_base = partition(critic.params, lambda path: True)
    else:
        value, value_base = trainable(critic, lora, keys[1], mesh=mesh, path=path, shared=True)
    return PPOParams(policy, value), PPOParams(policy_base, value_base) if lora.rank else None


def trainable_policy(
    lora: LoRAConfig, seed: int, actors: Actors, mesh: Mesh, *, stage: str
) -> tuple[Params, Params | None]:
    """Return the trained parameters of a policy without a critic, and with LoRA the frozen ones.

    The frozen ones are the model's own arrays, and so are the trained ones if there is no reference.
    """
    key = stream_key(seed, stage, "lora")
    return trainable(actors.policy, lora, key, mesh=mesh, path=f"{stage}.lora", shared=actors.has_reference)


def policy_of(params: Params) -> Params:
    """Return the policy's part of a stage's parameters: all of them without a critic."""
    return params.policy if isinstance(params, PPOParams) else params


def value_of(actors: Actors) -> RewardModel:
    """Return the initial value network. Raise ValueError for a stage without a critic."""
    if actors.value is None:
        raise ValueError("this stage has no value network")
    return actors.value


def learnt_policy(train: TrainState) -> Params:
    """Return the policy to evaluate and export, which is the moving average if the state has one."""
    policy = policy_of(train.params) if train.ema is None else train.ema
    return combine(policy, policy_of(train.frozen))
