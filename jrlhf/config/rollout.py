"""The fields of every stage that learns from answers which its own policy samples. Imports no JAX."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.schema import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    WeightCap,
)
from jrlhf.config.stage import StageConfig
from jrlhf.config.watch import RolloutGuardsConfig


@dataclass(frozen=True)
class KLConfig:
    """KL penalty that keeps the policy near the SFT policy."""

    coef: float = 0.15
    """KL coefficient β; with target > 0 its initial value."""
    target: float = 6.0
    """KL per sequence, in nats, that an adaptive β steers to (Ziegler et al. 2019); 0 keeps β fixed."""
    horizon: int = 10000
    """Number of episodes over which β adapts."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL in the reward."""


@dataclass(frozen=True)
class CanaryConfig:
    """Early warning of over-optimisation: every log.eval_every iterations a reward model scores held-out answers, and
    the scores are compared with the best so far. The best checkpoint is exported, not the last."""

    action: Literal["off", "warn", "stop", "rollback"] = "off"
    """Response to a fall beyond chance. warn: write an event. stop: also end the run. rollback: write an event and
    return to the best checkpoint, as guards do; end the run once guards.rollbacks is used up."""
    judge: ModelConfig = field(default_factory=ModelConfig)
    """Second reward model, which the stage does not optimise: it exposes answers that only exploit the first. Empty
    path: the first reward model."""
    errors: float = 2.0
    """Size of a fall, in standard errors, that counts as beyond chance."""


@dataclass(frozen=True)
class RolloutConfig(StageConfig):
    """Fields of every stage that learns from answers which its own policy samples."""

    required: ClassVar[str] = "prompts.train"

    model: ModelConfig = field(default_factory=ModelConfig)
    """Initial policy, and the reference for the KL penalty. Empty path: that of the nearest stage before."""
    reward: ModelConfig = field(default_factory=ModelConfig)
    """Reward model. Empty path: the reward stage. One that jrlhf trained reads the sampled tokens if it has the
    policy's vocabulary; any other reads the text, as in jrlhf score."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """Rules in addition to the reward model or in its place, and further reward models."""
    prompts: DataConfig = field(default_factory=DataConfig)
    """Training and held-out prompts; max_length is the maximum length of a prompt (cut at its start)."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(eps=1e-5, b2=0.999, schedule="constant"))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=50))
    log: LogConfig = field(default_factory=lambda: LogConfig(every=1, eval_every=50))
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the answers. top_k and top_p must be off: the update uses the sampler's distribution."""
    kl: KLConfig = field(default_factory=KLConfig)
    iterations: int = 100
    """Number of rollouts."""
    episodes: int = 64
    """Number of prompts, and so of answers, in a rollout, over all devices."""
    rollout_parts: int = 1
    """Number of parts in which a rollout is sampled, one after the other; must divide episodes. Rules score one part
    while the same policy samples the next; what is sampled is the same. sampling.slots bounds the KV cache."""
    epochs: int = 4
    """Number of passes over each rollout."""
    minibatches: int = 1
    """Number of updates in a pass; must divide episodes."""
    old_logprobs: Literal["policy", "sampler"] = "policy"
    """Old log-probs in the policy ratio. policy: computed by a forward pass, as in the update. sampler: those from
    sampling, which saves a forward pass; entropy is then estimated as -log p of the sampled tokens. The two agree up to
    rounding in float32 only, which guards.sampler checks in the first minibatch."""
    sampler_weight_cap: WeightCap = "auto"
    """Upper bound of a weight on each token's policy loss, min(π_old / π_sampler, bound), which corrects for a sampler
    that is not the trainer's policy (truncated importance sampling). 0 is off. auto: 2 where the two differ by design,
    in bfloat16 or with sampling.kv_cache int8, and off in float32, where they differ by rounding alone."""
    microbatch: int = 0
    """Number of episodes that a device processes at once; 0: an eighth of its share. The update is the same; fewer at
    once need less memory."""
    missing_eos_penalty: float = 0.0
    """Penalty on the score of an answer that reached the length limit."""
    max_skipped: int = 3
    """Number of consecutive iterations without an update (loss or gradient not finite) that ends the run."""
    guards: RolloutGuardsConfig = field(default_factory=RolloutGuardsConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    best_of_n: int = 0
    """Number of answers of the initial policy to each held-out prompt, of which the report draws the reward of best of
    n beside the trained policy's, over the KL of both; 0: none."""

    @property
    def weight_cap(self) -> float:
        """The bound of ``sampler_weight_cap``, 0 where it is off; ``auto`` is 2 where the sampler differs by design."""
        if self.sampler_weight_cap != "auto":
            return self.sampler_weight_cap
        differs = self.model.dtype == "bfloat16" or self.sampling.kv_cache == "int8"
        return 2.0 if differs and self.old_logprobs == "policy" else 0.0
