"""The record of a stage: all that commands, the pipeline, exports, reports and plans need to know of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jrlhf.config import Config, PlanConfig
from jrlhf.models import Pretrained, RewardModel, load_pretrained
from jrlhf.models.hf.adapter_folder import ModelKind
from jrlhf.runs.inputs import StageInputs
from jrlhf.train.attempt import Loop, Outcome
from jrlhf.train.programs import Sized, Target
from jrlhf.train.site import Site
from jrlhf.train.state import RunState
from jrlhf.types import Params


class Export(NamedTuple):
    """The model that a finished stage passes on, and its figures."""

    model: Pretrained | RewardModel
    params: Params
    """Weights of the export ``hf/``; adapters are merged when they are written."""
    adapter: Params
    """Weights of ``peft/``, which is written where the stage trains adapters."""
    figures: dict[str, Any]
    """The stage's own part of its summary."""


class Prepared(NamedTuple):
    """A stage that is ready to train."""

    loop: Loop
    state: RunState
    """State before the first step."""
    export: Callable[[Outcome], Export]
    """The model to pass on, from the outcome of the loop."""


class Stage(NamedTuple):
    """One stage. Its section of ``Config``, its command and its folder in the run all have its name."""

    name: str
    label: str
    """Name in reports."""
    kind: ModelKind
    """Kind of the exported model: a language model answers prompts, a reward model scores texts."""
    charts: Mapping[str, tuple[str, ...]]
    """Charts of the report: a title, and the metrics that share its axes."""
    inputs: Callable[[Config], StageInputs]
    """The models, rows and files that the stage is made from."""
    check: Callable[[Config, Mesh], None]
    """Quick checks, before any row or weight is read; ConfigError for a config that cannot run on this mesh."""
    prepare: Callable[[Site, Any], Prepared]
    """Load the models and build the programs; the second argument is the stage's ``inputs``."""
    start: Callable[..., Pretrained | RewardModel]
    """``(source, *, mesh, option) -> model``: the initial model in float32, which a checkpoint's weights replace."""
    trained_part: Callable[[Config], str]
    """Path of the exported weights in a checkpoint's state."""
    stop: Callable[[Config], tuple[str, ...] | None]
    """Stop tokens of the exported model besides the tokenizer's own; None for a reward model, which does not answer."""
    plan: Callable[[PlanConfig, Target], Sized]
    """The programs of the stage by shapes alone, for ``jrlhf plan``."""


def load_language(source: str, *, mesh: Mesh, option: str) -> Pretrained:
    """The initial model of a stage that trains a language model. ``option``: the config's name of it, for errors."""
    return load_pretrained(source, dtype="float32", mesh=mesh, option=option)
