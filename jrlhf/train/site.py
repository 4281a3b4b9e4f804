"""The place of a running stage: what its parts share and pass on together."""

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from jrlhf.config import Config
from jrlhf.data import Tokenizer


class Site(NamedTuple):
    """A stage's config, folder, devices and tokenizer."""

    config: Config
    stage: str
    """Name of the stage: its section in the config, and its folder in the run."""
    folder: Path
    mesh: Mesh
    tokenizer: Tokenizer
    """Tokenizer of the model that is trained."""
