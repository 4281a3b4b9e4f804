"""The site of a running stage: its config, folder, devices and tokenizer."""

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from jrlhf.config import Config
from jrlhf.data import Tokenizer


class Site(NamedTuple):
    """The config, folder, devices and tokenizer that all parts of a stage share."""

    config: Config
    stage: str
    """Name of the stage: its section in the config, and its folder in the run."""
    folder: Path
    mesh: Mesh
    tokenizer: Tokenizer
    """Tokenizer of the trained model."""
