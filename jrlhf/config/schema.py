"""Frozen dataclasses for the parts of a config that several stages share, with their defaults. Imports no JAX."""

from dataclasses import dataclass
from typing import Annotated, Literal

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
