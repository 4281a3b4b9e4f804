"""The inputs of a stage: its models, its rows, and the files that its rules read.

Each is read once, when it is first needed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jrlhf.config import Config, Sources
from jrlhf.data import PromptRows, RankingRows, SFTRows, TextRows, Tokenizer, load_tokenizer
from jrlhf.runs.folder import StageName

Rows = SFTRows | RankingRows | PromptRows | TextRows
SAFETY = "safety.prompts"


class RowsInput(NamedTuple):
    """Rows that a stage reads."""

    sources: Sources
    load: Callable[[], Rows | None]


class StageInputs(ABC):
    """The inputs of a stage by the config path that names them. ``model`` is the one whose tokenizer reads the rows."""

    def __init__(self, config: Config, stage: StageName) -> None:
        self.config, self.stage = config, stage
        self.model = f"{stage}.model"

    @cached_property
    @abstractmethod
    def source(self) -> str:
        """The folder or hub id of the model that is trained."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of that model."""
        return load_tokenizer(self.source)

    def models(self) -> Mapping[str, Callable[[], str]]:
        """Where each model is read from."""
        return {self.model: lambda: self.source}

    @abstractmethod
    def rows(self) -> Mapping[str, RowsInput]:
        """All rows that are read."""

    def files(self) -> Mapping[str, Callable[[], Path | None]]:
        """The other files; None for one that cannot be sources."""
        return {}


def with_sources(rows: Mapping[str, RowsInput]) -> dict[str, RowsInput]:
    """Those that have a source."""
    return {key: of_key for key, of_key in rows.items() if of_key.sources}
