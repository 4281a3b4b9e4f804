"""Frozen dataclasses for each stage, a whole run and a plan, with their defaults. Imports no JAX."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from jrlhf.config.grpo import GRPOConfig
from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.rollout import RolloutConfig
from jrlhf.config.schema import (
    DataConfig,
    DistributedConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
)
from jrlhf.config.stage import StageConfig
from jrlhf.config.watch import GuardsConfig, SafetyConfig
from jrlhf.system.paths import PathText, WithPaths


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
    """Direct preference optimisation (DPO) and its relatives: a policy trained on rankings, or with KTO on answers that
    are labelled one by one, without a reward model."""

    about: ClassVar[str] = "Train the policy on human rankings, without a reward model."

    model: ModelConfig = field(default_factory=ModelConfig)
    """Initial policy, and the reference, which is read once before the first step. Empty path: that of the nearest
    stage before."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rankings, as in the reward stage. For loss kto, answers with a label, or pairs of answers."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6, warmup=0.1))
    """AdamW. 5e-7 to 1e-6 is usual when all weights are trained, about ten times as much for LoRA."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of sample texts and of answers to prompts.eval and safety.prompts."""
    epochs: float = 1.0
    """Number of passes over the rankings or labelled answers."""
    batch_size: int = 64
    """Number of prompts in an update, each with all its completions, over all devices; with kto, of answers."""
    pack_length: int = 0
    """Length in tokens of packed rows, each of several short rows; batch_size and microbatch then count packed rows. 0:
    no packing."""
    microbatch: int = 0
    """Number of prompts that a device processes at once; 0: its whole share of the batch, or about 1,024 tokens on a
    CPU. The update is the same."""
    loss: Literal["sigmoid", "ipo", "simpo", "kto"] = "sigmoid"
    """Loss of a pair, or with kto of an answer. sigmoid: DPO (Rafailov et al. 2023). ipo: a squared loss on mean
    log-probs, which does not grow without bound where people always agree (Azar et al. 2023). simpo: mean log-probs
    without a reference (Meng et al. 2024). kto: answers that are labelled one by one (Ethayarajh et al. 2024)."""
    beta: float = 0.1
    """Scale β of the implicit reward; a smaller one moves the policy further from the reference. SimPO uses 2 to 10."""
    label_smoothing: float = 0.0
    """Share of pairs that people are taken to have ordered wrongly (conservative DPO), for loss sigmoid; 0 is off."""
    gamma: float = 0.0
    """Margin γ by which SimPO's better answer must win; half of beta is a usual start. 0 is off."""
    desirable_weight: float = 1.0
    """Weight λ_D of desirable answers in KTO. With fewer of them, raise it until both kinds weigh about as much: the
    number of answers times their weight, at most a third more for the desirable ones."""
    undesirable_weight: float = 1.0
    """Weight λ_U of undesirable answers in KTO."""
    prompts: DataConfig = field(default_factory=DataConfig)
    """Held-out prompts, in prompts.eval, which the policy answers at every evaluation, for scores, win rate and KL as
    in PPO; one more copy of the initial policy is then in memory. Empty: none."""
    reward: ModelConfig = field(default_factory=ModelConfig)
    """Reward model that scores answers to prompts.eval. Empty path: the reward stage."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """Rules in the score of answers to prompts.eval, as in PPO."""

    @property
    def answering(self) -> RolloutConfig:
        """The settings of answers to held-out prompts, in the form of an on-policy stage."""
        return RolloutConfig(
            model=self.model,
            lora=self.lora,
            reward=self.reward,
            rewards=self.rewards,
            prompts=self.prompts,
            sampling=self.sampling,
            episodes=self.batch_size,
            microbatch=self.microbatch,
            log=self.log,
            export_dtype=self.export_dtype,
        )


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
    guards: GuardsConfig = field(default_factory=GuardsConfig)
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
    """A whole run, in one YAML file: SFT, a reward model, DPO, PPO and GRPO, or some of them."""

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
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
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
