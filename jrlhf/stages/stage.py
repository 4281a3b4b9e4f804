"""The record of a stage, which commands, the pipeline, exports, reports and plans read."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jrlhf.config import Config, PlanConfig
from jrlhf.models import Pretrained, RewardModel, load_pretrained
from jrlhf.runs.inputs import StageInputs
from jrlhf.train.attempt import Loop, Outcome
from jrlhf.train.programs import Sized, Target
from jrlhf.train.site import Site
from jrlhf.train.state import RunState
from jrlhf.types import Params


class Export(NamedTuple):
    """The model that a stage exports, and its figures."""

    model: Pretrained | RewardModel
    params: Params
    """Weights of the export ``hf/``; the writer merges adapters into them."""
    adapter: Params
    """Weights of the export ``peft/``, which exists only if the stage trains adapters."""
    figures: dict[str, Any]
    """The stage's own part of its summary."""


class Prepared(NamedTuple):
    """A stage that is ready to train."""

    loop: Loop
    state: RunState
    """State before the first step."""
    export: Callable[[Outcome], Export]
    """Return the model to export, from the outcome of the loop."""


class Stage(NamedTuple):
    """A stage; its section of ``Config``, its command and its folder in the run have its name."""

    name: str
    label: str
    """Name of the stage in reports."""
    charts: Mapping[str, tuple[str, ...]]
    """Charts of the report: a title, and the metrics that share its axes."""
    inputs: Callable[[Config], StageInputs]
    """Return the models, rows and files that the stage reads."""
    check: Callable[[Config, Mesh], None]
    """Raise ConfigError for a config that cannot run on this mesh, before any row or weight is read."""
    prepare: Callable[[Site, Any], Prepared]
    """Load the models and build the programs; the second argument is the stage's ``inputs``."""
    start: Callable[..., Pretrained | RewardModel]
    """``(source, *, mesh, option) -> model``: the initial model in float32, which a checkpoint's weights replace."""
    trained_part: Callable[[Config], str]
    """Path of the exported weights in a checkpoint's state."""
    stop: Callable[[Config], tuple[str, ...] | None]
    """Stop tokens of the exported model besides the tokenizer's own; None for a reward model, which does not answer."""
    plan: Callable[[PlanConfig, Target], Sized]
    """Return the programs of the stage as shapes, for ``jrlhf plan``."""


def load_language(source: str, *, mesh: Mesh, option: str) -> Pretrained:
    """Load the initial language model of a stage in float32; ``option`` names it in errors."""
    return load_pretrained(source, dtype="float32", mesh=mesh, option=option)
