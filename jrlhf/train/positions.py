"""The positions of a model, which all rows that it reads, and the answers it gives to them, must fit in.

Positions beyond those that a model was trained for give figures of garbage without an error. So there is one before the
first step, for every file of rows and every model that reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jrlhf.config import ConfigError, SamplingConfig
from jrlhf.data import PromptRows, RankingRows, SFTRows, TextRows
from jrlhf.models import ArchConfig

Rows = SFTRows | RankingRows | PromptRows | TextRows


@dataclass(frozen=True)
class Positions:
    """A model's positions, and the settings that decide how many of them rows and answers take."""

    arch: ArchConfig
    length_key: str
    """The setting that rows are cut by, such as sft.data.max_length."""
    new_tokens: int = 0
    """Tokens of the longest answer, 0 where nothing is sampled."""
    answer_key: str = ""
    """The setting that answers are cut by, such as sft.sampling.max_new_tokens."""
    model: str = "the model"

    def answering(self, sampling: SamplingConfig, key: str) -> "Positions":
        """The same for prompts, which answers follow; ``key`` names ``sampling`` in the config."""
        return replace(self, new_tokens=sampling.max_new_tokens, answer_key=f"{key}.max_new_tokens")

    def check(self, rows: Mapping[str, Rows | None]) -> None:
        """ConfigError for rows that do not fit, by the setting that names them; None stands for rows that are not."""
        for key, some in rows.items():
            if some is not None:
                self.check_length(int(some.lengths.max()), key=key)

    def check_length(self, tokens: int, *, key: str) -> None:
        """ConfigError, which names ``key``, where the longest of its rows has too many ``tokens``."""
        limit = self.arch.max_positions
        if tokens + self.new_tokens <= limit:
            return
        answers = f" and answers of {self.new_tokens}" if self.new_tokens else ""
        remedies = []
        if limit > self.new_tokens:
            remedies.append(f"{self.length_key} to {limit - self.new_tokens}")
        if self.new_tokens and limit > tokens:
            remedies.append(f"{self.answer_key} to {limit - tokens}")
        if not remedies:
            remedies.append(f"{self.length_key} and {self.answer_key}, which add up, to {limit} together")
        raise ConfigError(
            f"{key}: sequences of {tokens} tokens{answers}, but {self.model} has {limit} positions; "
            f"set {' or '.join(remedies)}, or less"
        )
