"""Frozen dataclasses for the parts of a config that several stages share, with their defaults. Imports no JAX."""

from dataclasses import dataclass
from typing import Annotated, Literal

from jrlhf.system.paths import PATH, PathText, WithPaths

Sources = Annotated[str | dict[str, float], PATH]
"""Rows from one source, or from several sources that are mixed by their weights."""

Switch = bool | Literal["auto"]
"""True, false, or what suits the platform."""

WeightCap = float | Literal["auto"]
"""A bound, or what suits the sampler."""


@dataclass(frozen=True)
class MeshConfig:
    """Layout of the devices. The product of the three axes is the number of devices."""

    data: int = -1
    """Number of parameter replicas; -1 uses all devices that the other axes leave over."""
    fsdp: int = 1
    """Number of devices that share one copy of the parameters and split the batch."""
    tensor: int = 1
    """Number of devices that split each matrix product."""


@dataclass(frozen=True)
class DistributedConfig:
    """Processes of a run on several hosts. Slurm, Open MPI, Cloud TPU, Kubeflow Trainer's jax runtime and the recipes
    in configs/launch/ connect them without any of these settings."""

    coordinator: str = ""
    """Address (host:port) of process 0, which all others must reach. Empty: $JAX_COORDINATOR_ADDRESS, else the
    launcher's."""
    processes: int = 0
    """Number of processes. 0: $JAX_NUM_PROCESSES, else the launcher's value, else 1. 1: a single process, whatever the
    launcher says."""
    process: int = -1
    """Index of this process, from 0. -1: $JAX_PROCESS_ID, else the launcher's value."""
    start_timeout: int = 300
    """Seconds to wait at the start until all processes are connected."""
    heartbeat_timeout: int = 100
    """Seconds without a heartbeat after which a process counts as dead; the others then exit and name it."""
    stall_timeout: int = 3600
    """Seconds without progress in any process after which all of them exit. Allow for the longest compilation,
    tokenisation of a file, and sampling of a batch."""


@dataclass(frozen=True)
class ModelConfig(WithPaths):
    """Source of the weights and the tokenizer, and how the model computes."""

    path: PathText = ""
    """Hugging Face folder, hub id, run or stage folder, or asset:NAME, which ships with jrlhf. Empty: the model that
    the stage before exported; the first stage needs one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Trained weights and optimizer state are always float32."""
    remat: Switch = "auto"
    """Whether the backward pass recomputes whole layers, for a third of the memory of activations. If false, the
    outputs of weight matrices are stored, and only the rest is recomputed. auto: true on TPUs, where it takes no more
    time by their compiler's estimate, and false elsewhere, where it takes about a third more."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Implementation of attention in training and scoring. auto: the fastest that the devices and the model support.
    cudnn: NVIDIA's fused kernels, for GPUs in bfloat16 only. splash: JAX's Pallas kernel, for TPU v4 or newer only."""
    weights: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights that no optimizer moves: PPO's reference, reward models, judges, bases of LoRA. auto: the
    compute dtype; in bfloat16 that takes half the memory and changes no result, since computation rounds them anyway.
    bfloat16 with dtype float32 rounds them to save memory. Trained weights are always float32, and exports lose
    nothing."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW; as in optax and PyTorch, eps is added outside the square root."""

    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after the warm-up: none, or to 0 at the last update."""
    warmup: float = 0.05
    """Length of the linear warm-up as a fraction of all updates."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Constant that is added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, for matrices only."""
    max_grad_norm: float = 1.0
    """Maximum global norm of the gradients; larger ones are scaled down. 0 is off."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021). Only the adapters, and a reward model's head, are trained."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 16.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    targets: str = "."
    """Regular expression for the Hugging Face names of the linear maps that get adapters, such as q_proj|v_proj. It may
    match any part of a name; the default matches all."""


@dataclass(frozen=True)
class DataConfig(WithPaths):
    """Rows of text, and how they become batches of tokens."""

    train: Sources = ""
    """Training rows: a .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow file, several files by a pattern
    (data/*.jsonl), a folder of datasets' save_to_disk or a hub id (either may end in :split), or asset:NAME. Several
    sources have weights: with {a.jsonl: 3, b.jsonl: 1} three of four rows come from the first, whatever its length; an
    epoch has as many draws as the sources have rows together."""
    eval: PathText = ""
    """Held-out rows from a single source. Empty: no evaluation."""
    max_length: int = 1024
    """Maximum length of a sequence in tokens. Longer ones are cut at the end (prompts, and the prompts of rankings, at
    the start); the log and the stage's summary say how many."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Response to a row that cannot be used for training. error: end the run. skip: leave the row out and count it. SFT
    always leaves out rows with label: false."""
    buckets: int = 4
    """Number of padded lengths to compile for, evenly spaced up to max_length."""
    cache: PathText = "auto"
    """Folder for tokenised rows, which later runs map into memory. auto: $JRLHF_CACHE, else ~/.cache/jrlhf, for sources
    of 4 MB and more. Empty: no cache, all rows in memory."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the training state is saved, and which checkpoints stay."""

    every: int = 500
    """Number of steps between checkpoints (PPO: iterations); the last step is always saved."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 1
    """Number of further checkpoints to keep, those with the best held-out metric; 0 is off."""


@dataclass(frozen=True)
class LogConfig:
    """Logs, evaluations and sample texts that a stage writes while it runs."""

    every: int = 10
    """Number of steps between lines in metrics.jsonl and TensorBoard."""
    eval_every: int = 200
    """Number of steps between held-out evaluations; one always runs before the first and after the last step."""
    eval_rows: int = 0
    """Number of held-out rows in an evaluation; 0 uses all."""
    samples: int = 8
    """Number of sample texts written with each evaluation (PPO writes all held-out answers)."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that receive the same metrics; each needs its own package and login."""
    project: str = "jrlhf"
    """Name of the project in the trackers."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling of answers by a model."""

    max_new_tokens: int = 128
    """Maximum length of an answer in tokens."""
    temperature: float = 1.0
    """Divisor of the logits; 0 is greedy."""
    top_k: int = 0
    """Sample only from the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Sample only from the smallest set of tokens whose total probability reaches p; 1 is off."""
    stop: tuple[str, ...] = ()
    """Tokens that end an answer, in addition to the tokenizer's EOS."""
    kv_cache: Literal["compute", "int8"] = "compute"
    """Storage of keys and values while answers are sampled. compute: the compute dtype. int8: about half of bfloat16's
    memory, a quarter of float32's. With int8 the sampler's log-probs differ from the trainer's exact ones; PPO's log
    measures this (sampler/max_abs_logprob_diff, sampler/mean_ratio), and ppo.guards.sampler may need a higher bound."""
    slots: int = 0
    """Number of answers that a device decodes at once: where one has ended, the next prompt begins. The KV cache has
    that many rows, and what is sampled is the same. 0: 64 on a CPU, 256 elsewhere, fewer if the cache would take more
    than 30 % of a device's memory."""
