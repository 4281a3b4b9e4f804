"""The schema of the GRPO stage. Imports no JAX."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jrlhf.config.rollout import KLConfig, RolloutConfig


@dataclass(frozen=True)
class GroupKLConfig(KLConfig):
    """KL penalty that keeps the policy near the SFT policy."""

    coef: float = 0.04
    """KL coefficient β; with target > 0 its initial value. 0: no KL, and no reference is loaded, read or logged."""
    target: float = 0.0
    """KL per sequence, in nats, that an adaptive β steers to (Ziegler et al. 2019); 0 keeps β fixed."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the per-token KL. k1 has no gradient of its own on average, so it belongs in the reward."""
    place: Literal["auto", "loss", "reward"] = "auto"
    """Place of the penalty. loss: a term of the loss (Shao et al. 2024). reward: the KL of an answer is taken from its
    score before answers are compared, as in PPO and RLOO. auto: the loss; with coef 0 there is nothing to place."""


@dataclass(frozen=True)
class GRPOConfig(RolloutConfig):
    """Group relative policy optimisation (GRPO) and its relatives RLOO, Dr. GRPO, DAPO, GSPO, CISPO and GDPO: several
    answers to each prompt are set against each other, and no value network is needed."""

    about: ClassVar[str] = "Optimise the policy on answers set against each other, without a value network."

    kl: GroupKLConfig = field(default_factory=GroupKLConfig)
    samples: int = 8
    """Number of answers to each prompt, the group that an answer is set against; must divide episodes."""
    episodes: int = 64
    """Number of answers in a rollout, over all devices: samples times as many as prompts."""
    epochs: int = 1
    """Number of passes over each rollout."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """Score that an answer is set against. mean: the mean of its group. leave_one_out: that of the others (RLOO)."""
    scale: bool = True
    """Divide advantages by the standard deviation of the group's scores (GRPO). False weighs prompts by how much their
    answers differ (RLOO, Dr. GRPO)."""
    normalise: Literal["sum", "each"] = "sum"
    """Treatment of several rewards. sum: their weighted sum is one score. each: each one is set against its group, and
    their weighted sum is whitened over the batch, so that none is drowned by another's scale (GDPO)."""
    aggregation: Literal["token", "sequence", "constant"] = "sequence"
    """Weight of a token in the loss. token: all tokens of a minibatch alike (DAPO). sequence: the mean of answers'
    means (GRPO), in which a token of a long answer counts less. constant: the sum over answers, divided by
    sampling.max_new_tokens (Dr. GRPO)."""
    loss: Literal["clip", "cispo"] = "clip"
    """Policy loss. clip: PPO's, in which a token beyond the clip range has no gradient. cispo: the clipped ratio is a
    constant weight of the log-prob, so every token keeps its gradient."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability that is compared with the old policy's: of each token, or of the whole answer, by the geometric mean
    over its tokens (GSPO, whose clip is about 3e-4 and clip_high 4e-4)."""
    clip: float = 0.2
    """Clip range of the ratio below 1; with cispo 1 is off."""
    clip_high: float = 0.0
    """Clip range above 1; 0: as clip. DAPO takes 0.28, so that rare tokens can grow."""
    dual_clip: float = 0.0
    """Bound c > 1 on the loss where the advantage is negative (Ye et al. 2020); 0 is off."""
    resample: int = 0
    """Maximum number of further draws of an iteration, each as large as a rollout, whose groups replace those of equal
    scores, from which nothing is learnt (DAPO's dynamic sampling); 0 is off."""
    overlong_buffer: int = 0
    """Number of last tokens before sampling.max_new_tokens over which overlong_penalty grows from 0; 0 is off."""
    overlong_penalty: float = 0.0
    """Penalty on the score of an answer at the length limit (DAPO's soft overlong punishment)."""
    leave_out_cut: bool = False
    """Leave answers that reached the length limit out of the loss (DAPO's overlong filtering). Their scores stay in the
    baselines."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    target_approx_kl: float = 0.0
    """Approximate KL of a minibatch above which the rest of the rollout is not trained on; 0 is off."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the policy over updates; the average is exported. 0 is off."""

    @property
    def has_reference(self) -> bool:
        """Whether there is a KL penalty, and so a reference."""
        return self.kl.coef > 0

    @property
    def kl_place(self) -> Literal["loss", "reward"] | None:
        """Where the KL penalty stands; None without one."""
        if not self.has_reference:
            return None
        return "loss" if self.kl.place == "auto" else self.kl.place
