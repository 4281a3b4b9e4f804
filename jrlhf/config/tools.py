"""The schema of the commands that read no YAML: what has no default is a positional argument. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal

from jrlhf.config.schema import SamplingConfig
from jrlhf.system.paths import PathText, WithPaths


@dataclass(frozen=True)
class GenerateConfig(WithPaths):
    """Answers to a file of prompts, as JSONL."""

    model: PathText
    """A Hugging Face folder, a hub id, or a run or stage folder."""
    prompts: PathText
    """A file, folder or hub id in the forms of data.train, asset:NAME, or - (stdin, one a line)."""
    out: PathText = "-"
    """The JSONL file to write; - is stdout."""
    samples: int = 1
    """Answers to each prompt."""
    seed: int = 0
    """Of the draws."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch_size: int = 16
    """Answers drawn at once."""
    max_length: int = 1024
    """Longest prompt in tokens; longer ones are cut at their start."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""


@dataclass(frozen=True)
class SampleConfig(GenerateConfig):
    """Several answers to each prompt, as tasks for people to rank."""

    out: PathText = "tasks.jsonl"
    """The task file to write; - is stdout."""
    samples: int = 4
    """Answers to each prompt, from 2 to 9; those that are the same are shown once."""


@dataclass(frozen=True)
class RankConfig(WithPaths):
    """A page on this machine where people order answers; or what they have decided, as files and figures."""

    tasks: PathText = "tasks.jsonl"
    """The task file that jrlhf sample wrote, or a stage's candidates.jsonl."""
    rater: str = ""
    """Whose page the printed address opens. Empty: the page asks for a name."""
    state: PathText = ""
    """The SQLite file that keeps the decisions. Empty: beside the tasks, with .sqlite for its suffix."""
    report: bool = False
    """Print agreement, accuracy and pace of the raters, and serve no page."""
    export: PathText = ""
    """Write the decisions to this file (- is stdout), and serve no page."""
    import_from: PathText = ""
    """Take decisions made elsewhere from this file, and serve no page."""
    format: Literal["ranking", "argilla", "label-studio"] = "ranking"
    """Of what is exported or imported. ranking: JSONL that reward.data.train reads."""
    host: str = "127.0.0.1"
    """The address the page is served at; any but this machine's own lets others in who know the printed address."""
    port: int = 0
    """0: a free one."""


@dataclass(frozen=True)
class ScoreConfig(WithPaths):
    """A reward model's scores of a file of texts, as JSONL."""

    model: PathText
    """A reward model: a Hugging Face folder, a hub id, or a run or stage folder. jrlhf's own score a text at the token
    that ends the answer. Any other is read as by transformers: the chat template over the whole chat, or plain text as
    it is tokenised, scored at the last token that is not its pad_token_id."""
    data: PathText
    """Rows, in generate's forms: prompt (optional) and completion, completions, or chosen and rejected; or text."""
    out: PathText = "-"
    """The JSONL file to write; - is stdout."""
    batch_size: int = 32
    """Texts scored at once."""
    max_length: int = 1024
    """Longest sequence in tokens; longer ones are cut at the prompt's start."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""


@dataclass(frozen=True)
class ShowConfig(WithPaths):
    """Rows as the model sees them, and counts of what is odd about them."""

    model: PathText
    """Whose tokenizer is used: a Hugging Face folder, a hub id, asset:NAME, or a run or stage folder."""
    data: PathText
    """Rows, in the forms of data.train: one source."""
    kind: Literal["auto", "sft", "reward", "prompts"] = "auto"
    """What the rows are for. auto: by the columns of the first one."""
    rows: int = 3
    """First rows that are shown; the counts are of all."""
    max_length: int = 1024
    """Longest sequence in tokens, as in the stage's data block."""
    train_on: Literal["completion", "assistant", "all"] = "completion"
    """What is learnt, as in sft.train_on."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be trained on makes the exit code 2, as training would end there, or not. All are counted."""


@dataclass(frozen=True)
class ExportConfig(WithPaths):
    """A checkpoint as a Hugging Face folder."""

    run: PathText
    """A run folder, or a stage's folder in it."""
    out: PathText
    """The folder to write."""
    stage: Literal["last", "sft", "reward", "ppo"] = "last"
    """Which stage of a run folder; last: the furthest one that has a checkpoint."""
    step: int = -1
    """Which checkpoint; -1 is the newest."""
    dtype: Literal["stage", "float32", "source"] = "stage"
    """Dtype of the weights. stage takes the stage's own export_dtype. float32 keeps all that the checkpoint holds.
    source takes the dtypes of the files that the stage's model was read from."""


@dataclass(frozen=True)
class VerifyConfig(WithPaths):
    """The invariants of RLHF with PPO, checked on one model."""

    model: PathText
    """A Hugging Face folder, a hub id, or a run or stage folder."""
    prompts: PathText = ""
    """Prompts, in the forms of generate's. Empty: a few that come with jrlhf."""
    temperature: float = 0.7
    """Of the draws and of every log-prob; other than 1, so that a forgotten division shows."""
    max_new_tokens: int = 32
    """Longest answer in tokens."""
    batch_size: int = 8
    """Prompts used."""
    max_length: int = 128
    """Longest prompt in tokens; longer ones are cut at their start."""
    seed: int = 0
    """Of the draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; the tolerances are those of float32."""


@dataclass(frozen=True)
class ReportConfig(WithPaths):
    """A run's figures, curves and answers on one page that opens without a network."""

    run: PathText
    """A run's folder, done or not. The page is written into it: report.html, or comparison.html beside another run."""
    other: PathText = field(default="", metadata={"positional": True})
    """A second run's folder, to compare with; it may stand behind the first one."""


@dataclass(frozen=True)
class QuickstartConfig(WithPaths):
    """All three stages on the small model and the film reviews that come with jrlhf."""

    out: PathText = "jrlhf-quickstart"
    """The run's folder."""
    seed: int = 0
    """Of every random choice in the run."""
    preset: Literal["full", "smoke"] = "full"
    """full: to the reported figures, up to ten minutes on two CPU cores. smoke: every stage, briefly."""
