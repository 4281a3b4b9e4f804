"""The schema of a run: frozen dataclasses, and the one place where a default lives. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.watch import GuardsConfig, SafetyConfig
from jrlhf.system.paths import PATH, PathText, WithPaths

Sources = Annotated[str | dict[str, float], PATH]
"""Rows of one source, or of several with the weights they are mixed by."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out. The product of the three axes is the number of devices."""

    data: int = -1
    """Replicas of the parameters; -1 takes all devices that the other axes leave."""
    fsdp: int = 1
    """Devices that share one copy of the parameters and split the batch."""
    tensor: int = 1
    """Devices that split each matrix product."""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run over several hosts. Slurm, Open MPI, Cloud TPU, Kubeflow Trainer's jax runtime and the
    recipes in configs/launch/ tell how they find each other: then nothing is set here."""

    coordinator: str = ""
    """host:port of process 0, which all others must reach. Empty: $JAX_COORDINATOR_ADDRESS, else the engine's."""
    processes: int = 0
    """How many there are. 0: $JAX_NUM_PROCESSES, else as the engine says, 1 without one. 1: alone, whatever it says."""
    process: int = -1
    """The number of this one, from 0. -1: $JAX_PROCESS_ID, else as the engine says."""
    start_timeout: int = 300
    """Seconds until all must have found each other."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as dead, and the others end and name it."""
    stall_timeout: int = 3600
    """Seconds in which some process must finish a batch or what the others wait for; else all end. It covers the
    longest compilation, tokenising of a file, and answering of a batch."""


@dataclass(frozen=True)
class ModelConfig(WithPaths):
    """Where weights and tokenizer come from, and how they are computed with."""

    path: PathText = ""
    """A Hugging Face folder, hub id, run or stage folder, or asset:NAME, which ships with jrlhf. Empty: the stage
    before."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Master weights and optimizer state are float32 always."""
    remat: bool = False
    """Compute whole layers again in the backward pass: less memory, about a third more time. Otherwise products with a
    weight are kept, and only the rest is computed again."""
    attention: Literal["xla", "cudnn", "splash"] = "xla"
    """What computes attention in training and scoring. cudnn: NVIDIA's fused kernels, on a GPU in bfloat16 only.
    splash: JAX's Pallas kernel, on a TPU only, v4 or newer."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, in optax's form (eps is added outside the square root, as in PyTorch)."""

    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """What follows the warm-up: no decay, or decay to 0 at the last update."""
    warmup: float = 0.05
    """Linear warm-up, as a share of all updates."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 is off."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021): only they, and a reward model's head, are trained."""

    rank: int = 0
    """Of the adapters; 0: all weights are trained."""
    alpha: float = 16.0
    """An adapter's product is scaled by alpha / rank."""
    targets: str = "."
    """Regular expression: adapters go to the linear maps in whose Hugging Face name it is found (q_proj|v_proj). The
    default finds all of them."""


@dataclass(frozen=True)
class DataConfig(WithPaths):
    """Rows in, token batches out."""

    train: Sources = ""
    """Training rows: a .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow file, several by a pattern
    (data/*.jsonl), a folder of save_to_disk or a hub id (either may end in :split), or asset:NAME. Several sources with
    weights, as {a.jsonl: 3, b.jsonl: 1}: three of four rows come from the first, however long each is; an epoch is as
    many draws as they have rows together."""
    eval: PathText = ""
    """Held-out rows, a single source. Empty: no evaluation."""
    max_length: int = 1024
    """Longest sequence in tokens; longer ones are cut at the end (preferences: at the prompt's start). How many rows
    were cut is said once a source, and stands in the stage's summary."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be trained on ends the run, or is counted and left out. SFT leaves out answers whose label is
    false in either case."""
    buckets: int = 4
    """Padded lengths that are compiled for, evenly spaced up to max_length."""
    cache: PathText = "auto"
    """Folder for tokenised rows, made once and mapped into memory by later runs. auto: $JRLHF_CACHE, else
    ~/.cache/jrlhf, for sources of 4 MB and more. Empty: none, all rows in memory."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved, and which steps are kept."""

    every: int = 500
    """Steps between checkpoints (PPO: iterations); the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints kept besides for the best held-out metric; 0 is off."""


@dataclass(frozen=True)
class LogConfig:
    """What a stage writes while it runs."""

    every: int = 10
    """Steps between lines in metrics.jsonl and TensorBoard."""
    eval_every: int = 200
    """Steps between held-out evaluations; one is always made before the first and after the last step."""
    eval_rows: int = 0
    """Held-out rows an evaluation reads; 0: all of them."""
    samples: int = 8
    """Sample texts written with each evaluation (PPO writes all held-out answers)."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that are told the same, each by its own package and its own login."""
    project: str = "jrlhf"
    """Under what the run stands there."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn."""

    max_new_tokens: int = 128
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose mass reaches p; 1 is off."""
    stop: tuple[str, ...] = ()
    """Tokens that end an answer besides the tokenizer's EOS."""
    kv_cache: Literal["compute", "int8"] = "compute"
    """What keys and values are kept in while answers are drawn. compute: the compute dtype. int8: about half of
    bfloat16's memory, a quarter of float32's. Only the sampler rounds so: its distance from the trainer's exact
    log-probs, sampler/max_abs_logprob_diff and sampler/mean_ratio in PPO's log, is then no longer nothing, and
    ppo.guards.sampler may need a higher bound."""


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
