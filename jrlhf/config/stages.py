"""Frozen dataclasses for each stage, a whole run and a plan, with their defaults. Imports no JAX."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from jrlhf.config.grpo import GRPOConfig
from jrlhf.config.rollout import RolloutConfig
from jrlhf.config.schema import (
    DataConfig,
    DistributedConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
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
    """A whole run, in one YAML file: SFT, a reward model, and PPO or GRPO."""

    run: PathText = "runs/default"
    """Folder of the run; each stage writes to a folder inside it."""
    seed: int = 0
    """Seed of every random choice in the run."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
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
    """Number of completions of each prompt to assume in the reward stage; a plan reads no rows."""
    out: PathText = ""
    """JSON file for all figures. Empty: the figures are only printed."""


def stage_sections() -> dict[str, type[StageConfig]]:
    """The stages of a run in the order of a pipeline: the name of each section, and its class."""
    return {f.name: f.type for f in fields(Config) if isinstance(f.type, type) and issubclass(f.type, StageConfig)}


def stages_of_kind(kind: Literal["language", "reward"]) -> tuple[str, ...]:
    """The names of the stages that export a model of this kind, in reverse order of the pipeline."""
    return tuple(name for name, section in reversed(stage_sections().items()) if section.kind == kind)


def stage_section(config: Config, stage: str) -> StageConfig:
    """The section of one stage."""
    return vars(config)[stage]


def required_value(config: Config, stage: str) -> Any:
    """The value of the field without which a stage does not run; empty where the stage is not part of the run."""
    value: Any = stage_section(config, stage)
    for name in value.required.split("."):
        value = vars(value)[name]
    return value
