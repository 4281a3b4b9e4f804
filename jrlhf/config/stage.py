"""The fields of every stage. Imports no JAX."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jrlhf.config.schema import CheckpointConfig, LogConfig, LoRAConfig, ModelConfig, OptimConfig
from jrlhf.system.paths import WithPaths


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
