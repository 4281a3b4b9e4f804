"""Frozen dataclasses for each stage, a whole run and a plan, with their defaults. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal

from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.schema import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    LogConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
)
from jrlhf.config.watch import GuardsConfig, SafetyConfig
from jrlhf.system.paths import PathText, WithPaths


@dataclass(frozen=True)
class SFTConfig(WithPaths):
    """Supervised fine-tuning."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the sample texts and the ranking candidates are drawn."""
    epochs: float = 1.0
    """Passes over the training rows."""
    batch_size: int = 32
    """Rows an update, over all devices."""
    pack_length: int = 0
    """Rows are packed into rows of so many tokens, and batch_size and microbatch count those; 0: not packed."""
    microbatch: int = 0
    """Rows a device takes at a time; 0: its whole share of the batch, on a CPU about 1,024 tokens. Same update."""
    max_skipped: int = 3
    """Steps in a row that are skipped, as a loss or gradient was not finite, before the run ends."""
    gates: tuple[str, ...] = ()
    """What the held-out figures must keep, as accuracy >= 0.6 (names of eval/*). A model that does not is not passed
    on, and the exit code is 3. Of the checkpoints that do, the best one is exported."""
    train_on: Literal["completion", "assistant", "all"] = "completion"
    """Tokens that are learnt. completion: the answer; assistant: also assistant turns inside a chat prompt; all: the
    prompt too. Plain text is learnt whole, an assistant's turn of weight 0 never."""
    export_dtype: Literal["float32", "source"] = "float32"
    """Dtype of the exported weights. float32 keeps all that was learnt, twice as large as a bfloat16 base. source takes
    the dtypes of the files that the model was read from, and then every evaluation, gate and sample is of the weights
    rounded to them."""
    candidate_prompts: PathText = ""
    """Prompts to sample ranking candidates for after training, as data.train. Empty: none."""
    candidates: int = 4
    """Answers sampled for each of candidate_prompts, written to candidates.jsonl for people to rank."""


@dataclass(frozen=True)
class RewardConfig(WithPaths):
    """The reward model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that training starts from: a language model, which gets a fresh head, or a reward model."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    epochs: float = 1.0
    """Passes over the rankings; more than one tends to overfit (Ouyang et al. 2022, appendix C.2)."""
    batch_size: int = 16
    """Prompts an update, each with all its completions, over all devices."""
    pack_length: int = 0
    """Rows are packed into rows of so many tokens, and batch_size and microbatch count those; 0: not packed."""
    microbatch: int = 0
    """Prompts a device takes at a time; 0: as in sft.microbatch. Same update."""
    max_skipped: int = 3
    """As in sft.max_skipped."""
    gates: tuple[str, ...] = ()
    """As in sft.gates."""
    center_coef: float = 0.0
    """Weight of (r_better + r_worse)², which keeps scores near 0."""
    export_dtype: Literal["float32", "source"] = "float32"
    """Dtype of the exported weights. float32 keeps all that was learnt, twice as large as a bfloat16 base. source takes
    the dtypes of the files that the model was read from, and then every evaluation, gate and sample is of the weights
    rounded to them."""
    normalise: PathText = ""
    """Texts, as data.train, on which scores get mean 0 and std 1. Empty: the SFT stage's candidates, else data.eval."""


@dataclass(frozen=True)
class KLConfig:
    """The leash to the SFT policy."""

    coef: float = 0.15
    """beta, or its first value where it adapts."""
    target: float = 6.0
    """Nats a sequence that an adaptive beta steers to (Ziegler et al. 2019); 0: beta is fixed."""
    horizon: int = 10000
    """Episodes over which beta adapts."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator in the reward."""


@dataclass(frozen=True)
class CanaryConfig:
    """Held-out answers, judged every log.eval_every iterations, against the best ones so far. The best checkpoint is
    exported, not the last."""

    action: Literal["off", "warn", "stop", "rollback"] = "off"
    """On a fall beyond chance. warn: an event. stop: also, the run ends. rollback: also, it goes back to the best
    checkpoint as guards do, and ends where guards.rollbacks are used up."""
    judge: ModelConfig = field(default_factory=ModelConfig)
    """A second reward model, which PPO is not trained on: it sees what the first one is talked into. Empty path: the
    first one itself."""
    errors: float = 2.0
    """Standard errors that a fall must exceed."""


@dataclass(frozen=True)
class PPOConfig:
    """PPO against the reward model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy at the start, and the reference it is held to. Empty path: the SFT stage."""
    reward: ModelConfig = field(default_factory=ModelConfig)
    """The reward model. Empty path: the reward stage. jrlhf's own read the sampled tokens where they have the policy's
    vocabulary; with another, and models that jrlhf did not train, read the text, as in jrlhf score."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """Rules beside the reward model or in its place, and other reward models."""
    value_from: Literal["auto", "reward", "policy", "shared"] = "auto"
    """What the value network starts from: the reward model (Ouyang et al. 2022), or the policy with a head of zeros.
    auto: the reward model where it has the policy's tokens. shared: it is a head of zeros on the policy's own network,
    half the work of an update; value_coef then weighs how far the value loss moves the policy."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Of policy and value network. The reference is then the policy's own base, and no base is held twice."""
    prompts: DataConfig = field(default_factory=DataConfig)
    """Prompts to train on and held-out ones; max_length is the longest prompt (cut at its start)."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(eps=1e-5, b2=0.999, schedule="constant"))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=50))
    log: LogConfig = field(default_factory=lambda: LogConfig(every=1, eval_every=50))
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """top_k and top_p must stay off: the update uses the same distribution as the sampler."""
    kl: KLConfig = field(default_factory=KLConfig)
    iterations: int = 100
    """Rollouts."""
    episodes: int = 64
    """Prompts, and so answers, a rollout, over all devices."""
    rollout_parts: int = 1
    """An iteration's answers are drawn in so many parts, one after the other: rules score one while the next is drawn,
    by the same policy, and the cache is that much smaller. Divides episodes."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatches: int = 1
    """Updates a pass; divides episodes."""
    old_logprobs: Literal["policy", "sampler"] = "policy"
    """What an update is held against. policy: the answers' log-probs, read once more as the update reads them. sampler:
    those they were drawn with, a forward pass less; in float32 alone they are the same up to rounding, which the guard
    sampler then watches in the first minibatch. Entropy is then estimated, as -log p of what was drawn."""
    microbatch: int = 0
    """Episodes a device takes at a time; 0: an eighth of its share. Same update, less memory and less padding: several
    share a row, and rows that are left empty are not computed."""
    value_lr: float = 0.0
    """Peak learning rate of the critic; 0: optim.lr."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's lambda."""
    clip: float = 0.2
    """Policy ratio clip."""
    dual_clip: float = 0.0
    """Bound c > 1 on the loss where the advantage is negative (Ye et al. 2020); 0 is off."""
    value_clip: float = 0.2
    """Value clip."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation before GAE."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of an answer that the length limit ended."""
    target_approx_kl: float = 0.0
    """Leave a rollout once a minibatch's approximate KL exceeds this; 0 is off."""
    critic_warmup: int = 0
    """First iterations in which only the critic learns."""
    ema_decay: float = 0.0
    """Average the policy over updates, and export the average; 0 is off."""
    ptx_coef: float = 0.0
    """Weight of the SFT loss mixed into the update (PPO-ptx); 0 is off."""
    ptx: DataConfig = field(default_factory=DataConfig)
    """The text for it."""
    export_dtype: Literal["float32", "source"] = "float32"
    """Dtype of the exported weights. float32 keeps all that was learnt, twice as large as a bfloat16 base. source takes
    the dtypes of the files that the model was read from, and then every evaluation, gate and sample is of the weights
    rounded to them."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    gates: tuple[str, ...] = ()
    """As in sft.gates."""
    max_skipped: int = 3
    """Iterations in a row without an update, as a loss or gradient was not finite, before the run ends."""


@dataclass(frozen=True)
class Config(WithPaths):
    """One YAML file: a whole run of up to three stages."""

    run: PathText = "runs/default"
    """The run's folder; each stage writes below it."""
    seed: int = 0
    """Of every random choice in the run."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    accept_changes: bool = False
    """Go on with, or keep as done, a stage whose weights, tokenizer or rows are no longer those that it was made from.
    Otherwise it is refused, and what differs is named. The stage's events and summary and the report say what was
    accepted."""


@dataclass(frozen=True)
class PlanConfig(Config):
    """A run, and the devices it is planned for."""

    topology: str = ""
    """Devices: v5p-128 (cores, as Google counts), v5e-16, h100x64, h200x8, a100x16, cpu:8. Empty: this machine's."""
    completions: int = 2
    """Of a prompt in the rows of the reward stage, which are not read."""
    out: PathText = ""
    """A JSON file for all figures. Empty: they are only printed."""
