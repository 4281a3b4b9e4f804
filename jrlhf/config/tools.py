"""The schema of the commands that read no YAML. A field without a default is a positional argument. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal

from jrlhf.config.rewards import RewardsConfig
from jrlhf.config.schema import SamplingConfig
from jrlhf.system.paths import PathText, WithPaths


@dataclass(frozen=True)
class GenerateConfig(WithPaths):
    """Answers to a file of prompts, as JSONL."""

    model: PathText
    """Model: a Hugging Face folder, a hub id, or a run or stage folder."""
    prompts: PathText
    """Prompts: a file, folder or hub id in the forms of sft.data.train (docs/data.md), asset:NAME, or - (stdin, one
    prompt a line)."""
    out: PathText = "-"
    """JSONL file to write; - is stdout."""
    samples: int = 1
    """Number of answers to each prompt."""
    seed: int = 0
    """Seed of the sampler."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch_size: int = 16
    """Number of answers sampled at once, over all devices; where one has ended, the next begins."""
    max_length: int = 1024
    """Maximum length of a prompt in tokens; longer ones are cut at their start."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""


@dataclass(frozen=True)
class SampleConfig(GenerateConfig):
    """Sample several answers to each prompt, as tasks for people to rank, or keep the best of them."""

    out: PathText = "tasks.jsonl"
    """JSONL file to write; - is stdout."""
    samples: int = 4
    """Number of answers to each prompt, from 2 to 9 for tasks; identical answers are shown once."""
    keep: Literal["all", "best", "best-worst"] = "all"
    """Answers to write. all: each, as a task that jrlhf rank shows. best: the one with the highest score, as a row of
    sft.data.train (best of n). best-worst: those with the highest and the lowest score, as a row of
    reward.data.train."""
    score: PathText = ""
    """Reward model whose score decides, in the forms of jrlhf score. Empty: rules alone decide."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """Rules in the score, with the settings of ppo.rewards."""


@dataclass(frozen=True)
class RankConfig(WithPaths):
    """A page on this machine where people rank answers; or their decisions, as files and figures."""

    tasks: PathText = "tasks.jsonl"
    """Task file that jrlhf sample wrote, or a stage's candidates.jsonl."""
    rater: str = ""
    """Name of the rater whose page the printed address opens. Empty: the page asks for a name."""
    state: PathText = ""
    """SQLite file that stores the decisions. Empty: beside the task file, with the suffix .sqlite."""
    report: bool = False
    """Print the raters' agreement, accuracy and pace instead of serving the page."""
    export: PathText = ""
    """Write the decisions to this file (- is stdout) instead of serving the page."""
    import_from: PathText = ""
    """Read decisions made elsewhere from this file instead of serving the page."""
    format: Literal["ranking", "argilla", "label-studio"] = "ranking"
    """Format of the exported or imported file. ranking: JSONL that reward.data.train reads."""
    host: str = "127.0.0.1"
    """Address to serve the page at. Any address but 127.0.0.1 lets in everyone on the network who has the printed
    URL."""
    port: int = 0
    """Port to serve the page at; 0 takes a free one."""


@dataclass(frozen=True)
class ScoreConfig(WithPaths):
    """Score a file of texts with a reward model, as JSONL."""

    model: PathText
    """Reward model: a Hugging Face folder, a hub id, or a run or stage folder. One that jrlhf trained scores a text at
    the token that ends the answer. Any other scores as transformers does: at the last token that is not its
    pad_token_id, of the chat template over the whole chat, or of plain text."""
    data: PathText
    """Rows in the forms of sft.data.train (docs/data.md), with prompt (optional) and completion, completions, or chosen
    and rejected; or with text."""
    out: PathText = "-"
    """JSONL file to write; - is stdout."""
    batch_size: int = 32
    """Number of texts scored at once."""
    max_length: int = 1024
    """Maximum length of a sequence in tokens; longer ones are cut at the prompt's start."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""


@dataclass(frozen=True)
class ShowConfig(WithPaths):
    """Show rows as the model sees them, and counts of odd ones."""

    model: PathText
    """Source of the tokenizer: a Hugging Face folder, a hub id, asset:NAME, or a run or stage folder."""
    data: PathText
    """Rows from one source, in the forms of sft.data.train (docs/data.md)."""
    kind: Literal["auto", "sft", "reward", "dpo", "kto", "prompts", "ppo", "grpo"] = "auto"
    """Purpose of the rows. dpo: rankings, as for reward. kto: answers with a label, for dpo.loss kto. ppo and grpo: as
    prompts. auto: sft, reward or prompts, decided by the columns of the first row."""
    rows: int = 3
    """Number of first rows to show; the counts cover all rows."""
    max_length: int = 1024
    """Maximum length of a sequence in tokens, as in the data section of the stage."""
    train_on: Literal["completion", "assistant", "all"] = "completion"
    """Tokens in the loss. completion: the answer. assistant: also assistant turns inside a chat prompt. all: also the
    prompt."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Response to rows that cannot be used for training. error: exit code 2, as training would end there. skip: exit
    code 0. Both count all of them."""


@dataclass(frozen=True)
class ExportConfig(WithPaths):
    """Write a checkpoint as a Hugging Face folder."""

    run: PathText
    """Run folder, or the folder of a stage in it."""
    out: PathText
    """Folder to write."""
    stage: str = "last"
    """Stage of a run folder, such as sft; last: the furthest stage that has a checkpoint."""
    step: int = -1
    """Step of the checkpoint; -1 is the newest."""
    dtype: Literal["stage", "float32", "source"] = "stage"
    """Dtype of the weights. stage: the stage's own export_dtype. float32: every bit of the checkpoint. source: the
    dtypes of the files that the stage's model came from."""


@dataclass(frozen=True)
class VerifyConfig(WithPaths):
    """Check the invariants of RLHF with PPO on one model."""

    model: PathText
    """Model: a Hugging Face folder, a hub id, or a run or stage folder."""
    prompts: PathText = ""
    """Prompts: a file, folder or hub id in the forms of sft.data.train (docs/data.md), asset:NAME, or - (stdin, one
    prompt a line). Empty: a few that ship with jrlhf."""
    temperature: float = 0.7
    """Temperature of the sampler and of every log-prob. Not 1 by default, so that a forgotten division by it shows."""
    max_new_tokens: int = 32
    """Maximum length of an answer in tokens."""
    batch_size: int = 8
    """Number of prompts to use."""
    max_length: int = 128
    """Maximum length of a prompt in tokens; longer ones are cut at their start."""
    seed: int = 0
    """Seed of the sampler."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; the tolerances are for float32."""


@dataclass(frozen=True)
class ReportConfig(WithPaths):
    """Write a run's figures, curves and answers to one page that opens without a network."""

    run: PathText
    """Folder of a run, finished or not. The page is written into it: report.html, or comparison.html beside another
    run."""
    other: PathText = field(default="", metadata={"positional": True})
    """Folder of a second run to compare with; it may follow the first as a positional argument."""


@dataclass(frozen=True)
class QuickstartConfig(WithPaths):
    """Run SFT, a reward model and PPO, GRPO or DPO on the small model and the film reviews that ship with jrlhf."""

    out: PathText = "jrlhf-quickstart"
    """Folder of the run."""
    seed: int = 0
    """Seed of every random choice in the run."""
    algorithm: Literal["ppo", "grpo", "dpo"] = "ppo"
    """Last stage. ppo and grpo learn from scores of the reward model. dpo learns from the rankings alone, and the
    reward model only scores its answers."""
    preset: Literal["full", "smoke"] = "full"
    """Length of the run. full: reaches the reported figures, in up to ten minutes on two CPU cores. smoke: every stage,
    briefly."""
