"""The inputs of a stage: its models, its rows, and the files that its rules read. Each is read once, on first use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jrlhf.config import Config, Sources
from jrlhf.data import PromptRows, RankingRows, SFTRows, TextRows, Tokenizer, UnpairedRows, load_tokenizer

Rows = SFTRows | RankingRows | UnpairedRows | PromptRows | TextRows
SAFETY = "safety.prompts"


class RowsInput(NamedTuple):
    """Rows that a stage reads: their sources, and a function that loads them."""

    sources: Sources
    load: Callable[[], Rows | None]


class StageInputs(ABC):
    """The inputs of a stage by their config paths; the tokenizer of ``model`` reads the rows."""

    def __init__(self, config: Config, stage: str) -> None:
        self.config, self.stage = config, stage
        self.model = f"{stage}.model"

    @cached_property
    @abstractmethod
    def source(self) -> str:
        """Folder or hub id of the trained model."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the trained model."""
        return load_tokenizer(self.source)

    def models(self) -> Mapping[str, Callable[[], str]]:
        """Return functions that find each model's folder or hub id."""
        return {self.model: lambda: self.source}

    @abstractmethod
    def rows(self) -> Mapping[str, RowsInput]:
        """Return all rows that the stage reads."""

    def files(self) -> Mapping[str, Callable[[], Path | None]]:
        """Return functions that find all other files; None stands for a file that cannot be found."""
        return {}


def with_sources(rows: Mapping[str, RowsInput]) -> dict[str, RowsInput]:
    """Return only the rows that have a source."""
    return {key: rows_input for key, rows_input in rows.items() if rows_input.sources}
