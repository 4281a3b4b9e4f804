"""Frozen dataclasses for each stage, a whole run and a plan, with their defaults. Imports no JAX."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

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
class StageConfig(WithPaths):
    """Fields that every stage has. A section of ``Config`` with this base is a stage."""

    about: ClassVar[str]
    """Line of the stage in ``jrlhf --help``."""
    kind: ClassVar[Literal["language", "reward"]] = "language"
    """Kind of the exported model: a language model answers prompts, a reward model scores texts."""
    required: ClassVar[str] = "data.train"
    """Field that must be set, without which the stage does not run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    microbatch: int = 0
    """Number of rows that a device processes at once; 0: its whole share of the batch, or about 1,024 tokens on a CPU.
    The update is the same."""
    max_skipped: int = 3
    """Number of consecutive skipped steps (loss or gradient not finite) that ends the run."""
    gates: tuple[str, ...] = ()
    """Bounds that held-out figures must meet, such as accuracy >= 0.6 (names of eval/*). A model that misses one is not
    passed on, and the exit code is 3. The best of the checkpoints that meet all is exported."""
    export_dtype: Literal["float32", "source"] = "float32"
    """Dtype of the exported weights. float32 loses nothing of the training, and takes twice the space of bfloat16.
    source: the dtypes of the files that the model came from; every evaluation, gate and sample then uses the weights
    rounded to them."""


@dataclass(frozen=True)
class SFTConfig(StageConfig):
    """Supervised fine-tuning."""

    about: ClassVar[str] = "Fine-tune a model on example answers."

    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of sample texts and of candidates for ranking."""
    epochs: float = 1.0
    """Number of passes over the training rows."""
    batch_size: int = 32
    """Number of rows in an update, over all devices."""
    pack_length: int = 0
    """Length in tokens of packed rows, each of several short rows; batch_size and microbatch then count packed rows. 0:
    no packing."""
    train_on: Literal["completion", "assistant", "all"] = "completion"
    """Tokens in the loss. completion: the answer. assistant: also assistant turns inside a chat prompt. all: also the
    prompt. Plain text is always in the loss; an assistant turn with weight: 0 never is."""
    candidate_prompts: PathText = ""
    """Prompts whose answers people rank, in the forms of data.train; the answers are sampled after training. Empty:
    none."""
    candidates: int = 4
    """Number of answers sampled for each of candidate_prompts, written to candidates.jsonl for people to rank."""


@dataclass(frozen=True)
class RewardConfig(StageConfig):
    """Training of the reward model on rankings."""

    about: ClassVar[str] = "Train a reward model on human rankings."
    kind: ClassVar[Literal["language", "reward"]] = "reward"

    model: ModelConfig = field(default_factory=ModelConfig)
    """Initial model: a language model, which gets a new head, or a reward model."""
    data: DataConfig = field(default_factory=DataConfig)
    epochs: float = 1.0
    """Number of passes over the rankings; more than one tends to overfit (Ouyang et al. 2022, appendix C.2)."""
    batch_size: int = 16
    """Number of prompts in an update, each with all its completions, over all devices."""
    pack_length: int = 0
    """Length in tokens of packed rows, each of several short rows; batch_size and microbatch then count packed rows. 0:
    no packing."""
    microbatch: int = 0
    """Number of prompts that a device processes at once; 0: its whole share of the batch, or about 1,024 tokens on a
    CPU. The update is the same."""
    center_coef: float = 0.0
    """Weight of (r_better + r_worse)² in the loss, which keeps scores near 0."""
    normalise: PathText = ""
    """Texts, in the forms of data.train, on which scores are normalised to mean 0 and standard deviation 1. Empty: the
    SFT stage's candidates, else data.eval."""


@dataclass(frozen=True)
class DPOConfig(StageConfig):
    """Direct preference optimisation (DPO) and its relatives: a policy trained on rankings, without a reward model."""

    about: ClassVar[str] = "Train the policy on human rankings, without a reward model."

    model: ModelConfig = field(default_factory=ModelConfig)
    """Initial policy, and the reference, which is read once before the first step. Empty path: the SFT stage."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rankings, as in the reward stage."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6, warmup=0.1))
    """AdamW. 5e-7 to 1e-6 is usual when all weights are trained, about ten times as much for LoRA."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of sample texts and of answers to safety.prompts."""
    epochs: float = 1.0
    """Number of passes over the rankings."""
    batch_size: int = 64
    """Number of prompts in an update, each with all its completions, over all devices."""
    pack_length: int = 0
    """Length in tokens of packed rows, each of several short rows; batch_size and microbatch then count packed rows. 0:
    no packing."""
    microbatch: int = 0
    """Number of prompts that a device processes at once; 0: its whole share of the batch, or about 1,024 tokens on a
    CPU. The update is the same."""
    loss: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"
    """Loss of a pair. sigmoid: DPO (Rafailov et al. 2023). ipo: a squared loss on mean log-probs, which does not grow
    without bound where people always agree (Azar et al. 2023). simpo: mean log-probs without a reference (Meng et al.
    2024)."""
    beta: float = 0.1
    """Scale β of the implicit reward; a smaller one moves the policy further from the reference. SimPO uses 2 to 10."""
    label_smoothing: float = 0.0
    """Share of pairs that people are taken to have ordered wrongly (conservative DPO), for loss sigmoid; 0 is off."""
    gamma: float = 0.0
    """Margin γ by which SimPO's better answer must win; half of beta is a usual start. 0 is off."""


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
    """Second reward model, which PPO does not optimise: it exposes answers that only exploit the first. Empty path: the
    first reward model."""
    errors: float = 2.0
    """Size of a fall, in standard errors, that counts as beyond chance."""


@dataclass(frozen=True)
class RolloutConfig(StageConfig):
    """Fields of every stage that learns from answers which its own policy samples."""

    required: ClassVar[str] = "prompts.train"

    model: ModelConfig = field(default_factory=ModelConfig)
    """Initial policy, and the reference for the KL penalty. Empty path: the SFT stage."""
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
    while the same policy samples the next, and the KV cache shrinks by this factor."""
    epochs: int = 4
    """Number of passes over each rollout."""
    minibatches: int = 1
    """Number of updates in a pass; must divide episodes."""
    old_logprobs: Literal["policy", "sampler"] = "policy"
    """Old log-probs in the policy ratio. policy: computed by a forward pass, as in the update. sampler: those from
    sampling, which saves a forward pass; entropy is then estimated as -log p of the sampled tokens. The two agree up to
    rounding in float32 only, which guards.sampler checks in the first minibatch."""
    microbatch: int = 0
    """Number of episodes that a device processes at once; 0: an eighth of its share. The update is the same; fewer at
    once need less memory."""
    missing_eos_penalty: float = 0.0
    """Penalty on the score of an answer that reached the length limit."""
    max_skipped: int = 3
    """Number of consecutive iterations without an update (loss or gradient not finite) that ends the run."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    best_of_n: int = 0
    """Number of answers of the initial policy to each held-out prompt, of which the report draws the reward of best of
    n beside the trained policy's, over the KL of both; 0: none."""


@dataclass(frozen=True)
class PPOConfig(RolloutConfig):
    """Proximal policy optimisation (PPO) of the policy against the reward model."""

    about: ClassVar[str] = "Optimise the policy on the reward under a KL penalty."

    value_from: Literal["auto", "reward", "policy", "shared"] = "auto"
    """Initial value network. reward: the reward model (Ouyang et al. 2022). policy: the policy with a head of zeros.
    auto: the reward model if it has the policy's vocabulary, else the policy. shared: a head of zeros on the policy's
    own network, half the work of an update; value_coef then sets how far the value loss moves the policy."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters of the policy and the value network. The reference is then the policy's own base, so no base is
    in memory twice."""
    value_lr: float = 0.0
    """Peak learning rate of the value network; 0: optim.lr."""
    gamma: float = 1.0
    """Discount factor γ."""
    lam: float = 0.95
    """GAE's λ."""
    clip: float = 0.2
    """Clip range of the policy ratio."""
    dual_clip: float = 0.0
    """Bound c > 1 on the loss where the advantage is negative (Ye et al. 2020); 0 is off."""
    value_clip: float = 0.2
    """Clip range of the value."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation before GAE."""
    target_approx_kl: float = 0.0
    """Approximate KL of a minibatch above which the rest of the rollout is not trained on; 0 is off."""
    critic_warmup: int = 0
    """Number of first iterations that train the value network alone."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the policy over updates; the average is exported. 0 is off."""
    ptx_coef: float = 0.0
    """Weight of the SFT loss mixed into the update (PPO-ptx); 0 is off."""
    ptx: DataConfig = field(default_factory=DataConfig)
    """Text for the SFT loss of ptx_coef."""


@dataclass(frozen=True)
class Config(WithPaths):
    """A whole run of up to four stages, in one YAML file."""

    run: PathText = "runs/default"
    """Folder of the run; each stage writes to a folder inside it."""
    seed: int = 0
    """Seed of every random choice in the run."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    stages: tuple[str, ...] = ()
    """Stages of a pipeline in their order, such as sft, reward, ppo. An empty model path stands for the model that the
    nearest stage before it exported. Empty: all stages that have training data, in the order of the sections."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    accept_changes: bool = False
    """Resume a stage, or accept it as done, although its weights, tokenizer or rows have changed since it began. If
    false, such a stage is an error that names the changes. Accepted changes are recorded in the stage's events and
    summary, and in the report."""


@dataclass(frozen=True)
class PlanConfig(Config):
    """A run, and the devices to plan it for."""

    topology: str = ""
    """Devices: v5p-128 (cores, as Google counts), v5p:2x2x1 (a slice by its sides in chips), v5e-16, h100x64, h200x8,
    a100x16, cpu:8. Empty: those of this machine."""
    compile: Literal["auto", "device", "simulated"] = "auto"
    """Compiler of the programs. device: that of the topology's devices, which needs no device: for a TPU, pip install
    "jrlhf[tpu-compiler]"; for H100s, pip install "jax[cuda13]". simulated: the CPU's, for simulated devices; memory is
    then too high by a sixth to a half, and seconds follow from FLOPs and bytes alone. auto: the devices' own where it
    is installed."""
    completions: int = 2
    """Number of completions of each prompt to assume in the reward and DPO stages; a plan reads no rows."""
    out: PathText = ""
    """JSON file for all figures. Empty: the figures are only printed."""


def stage_sections() -> dict[str, type[StageConfig]]:
    """The stages of a run in the order of a pipeline: the name of each section, and its class."""
    return {f.name: f.type for f in fields(Config) if isinstance(f.type, type) and issubclass(f.type, StageConfig)}


def stage_order(config: Config) -> tuple[str, ...]:
    """All stages in the order of a run: those of ``config.stages`` last, before them the others in their own order."""
    return *(name for name in stage_sections() if name not in config.stages), *config.stages


def stages_of_kind(order: Sequence[str], kind: Literal["language", "reward"]) -> tuple[str, ...]:
    """Those of the stages that export a model of this kind, the last one first."""
    sections = stage_sections()
    return tuple(name for name in reversed(order) if sections[name].kind == kind)


def stages_before(config: Config, stage: str, kind: Literal["language", "reward"]) -> tuple[str, ...]:
    """The stages before one that export a model of this kind, the nearest one first."""
    order = stage_order(config)
    return stages_of_kind(order[: order.index(stage)], kind)


def pipeline_stages(config: Config) -> tuple[str, ...]:
    """The stages that a pipeline runs, in order: ``config.stages``, or all that have training data."""
    return config.stages or tuple(name for name in stage_sections() if required_value(config, name))


def stage_section(config: Config, stage: str) -> StageConfig:
    """The section of one stage."""
    return vars(config)[stage]


def required_value(config: Config, stage: str) -> Any:
    """The value of the field without which a stage does not run; empty where the stage is not part of the run."""
    value: Any = stage_section(config, stage)
    for name in value.required.split("."):
        value = vars(value)[name]
    return value
