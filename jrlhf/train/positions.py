"""A check that all rows, with the answers to them, fit into the positions of the models that read them.

A model computes garbage beyond its maximum position without an error, so the check runs before the first step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jrlhf.config import ConfigError, SamplingConfig
from jrlhf.data import PromptRows, RankingRows, SFTRows, TextRows, UnpairedRows
from jrlhf.models import ArchConfig

Rows = SFTRows | RankingRows | UnpairedRows | PromptRows | TextRows


@dataclass(frozen=True)
class Positions:
    """A model's positions, and the settings that limit the lengths of rows and answers."""

    arch: ArchConfig
    length_key: str
    """Setting of the maximum length of a row, such as sft.data.max_length."""
    new_tokens: int = 0
    """Maximum number of tokens of an answer; 0 if the model does not answer."""
    answer_key: str = ""
    """Setting of the maximum length of an answer, such as sft.sampling.max_new_tokens."""
    model: str = "the model"

    def answering(self, sampling: SamplingConfig, key: str) -> "Positions":
        """Return the check for prompts that answers follow; ``key`` names ``sampling`` in the config."""
        return replace(self, new_tokens=sampling.max_new_tokens, answer_key=f"{key}.max_new_tokens")

    def check(self, rows: Mapping[str, Rows | None]) -> None:
        """Raise ConfigError for rows that do not fit. Keys are the settings that name the rows; None is skipped."""
        for key, some_rows in rows.items():
            if some_rows is not None:
                self.check_length(int(some_rows.lengths.max()), key=key)

    def check_length(self, tokens: int, *, key: str) -> None:
        """Raise ConfigError, which names ``key``, if ``tokens``, the length of its longest row, are too many."""
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
