"""A stage as a developer would add it: test_toy_stage.py puts this one file into a copy of the package.

It trains the model that SFT exported on the rows of ``toy.data``, for two steps.
"""

from collections.abc import Mapping
from functools import cached_property

import jax

from jrlhf.config import Config, PlanConfig
from jrlhf.data import Order, SFTRows, load_sft
from jrlhf.models import load_pretrained
from jrlhf.parallel import shard_batch
from jrlhf.runs.folder import model_source
from jrlhf.runs.inputs import RowsInput, StageInputs, with_sources
from jrlhf.stages.stage import Export, Prepared, Stage, load_language
from jrlhf.steps import make_sft_step
from jrlhf.train.attempt import Loop, Outcome
from jrlhf.train.keys import stream_key
from jrlhf.train.optim import make_optimizer
from jrlhf.train.programs import (
    PLANNED_UPDATES,
    Sized,
    StagePlan,
    Target,
    planned_model,
    planned_source,
    planned_training,
)
from jrlhf.train.site import Site
from jrlhf.train.start import Training, begin, build_training, compute_options


class ToyInputs(StageInputs):
    def __init__(self, config: Config) -> None:
        super().__init__(config, "toy")

    @cached_property
    def source(self) -> str:
        return model_source(self.config, self.config.toy.model.path, key="toy.model.path", before=("sft",))

    @cached_property
    def train(self) -> SFTRows:
        data = self.config.toy.data
        return load_sft(data, data.train, self.tokenizer, train_on="all")

    def rows(self) -> Mapping[str, RowsInput]:
        return with_sources({"toy.data.train": RowsInput(self.config.toy.data.train, lambda: self.train)})


def build_toy(config, model, mesh, *, updates) -> Training:
    tx, _ = make_optimizer(config.toy.optim, updates=updates)
    step = make_sft_step(model.logprob_fn, tx, accumulation=1)
    return build_training(step, tx, model.params, None, mesh=mesh, rules=model.rules)


def prepare_toy(site: Site, inputs: ToyInputs) -> Prepared:
    config, mesh, toy, rows = site.config, site.mesh, site.config.toy, inputs.train
    model = load_pretrained(inputs.source, mesh=mesh, **compute_options(toy.model, mesh, key="toy.model"))
    order = Order(config.seed, batch_size=toy.batch_size, lengths=rows.lengths, parts=rows.parts)
    training = build_toy(config, model, mesh, updates=2)

    def advance(state, number):
        batch = shard_batch(rows.batch(order[number]), mesh)
        train, metrics = training.step(state.train, batch, jax.random.fold_in(state.key, number))
        return state._replace(train=train, cursor=state.cursor + 1), metrics

    def export(outcome: Outcome) -> Export:
        params = outcome.state.train.params
        return Export(model, params, params, {"steps": 2, "rows": len(rows)})

    loop = Loop(
        title="Toy",
        total=2,
        advance=advance,
        evaluate=lambda state, number: {},
        batch_of=lambda state, number: rows.batch(order[number])._asdict(),
        max_skipped=toy.max_skipped,
        guards=None,
        canary=None,
        gates=toy.gates,
        learning_rate=lambda step: 0.0,
        rates=(),
        best_metric="eval/nll",
        best_mode="min",
        shown=("loss",),
    )
    return Prepared(loop, begin(training, mesh=mesh, key=stream_key(config.seed, "toy", "train")), export)


def plan_toy(config: PlanConfig, target: Target) -> Sized:
    toy = config.toy
    source = planned_source(config, toy.model.path, key="toy.model.path", before=("sft",))
    model = planned_model(target, source, toy.model, key="toy.model", kind="language")
    run = planned_training(build_toy(config, model, target.mesh, updates=PLANNED_UPDATES), target, loaded=model.params)

    def build(rows: int) -> StagePlan:
        batch = target.text(rows * target.groups, toy.data.max_length)
        return StagePlan("toy", "toy.batch_size", rows * target.groups, run.held, (run.start, run.update(batch)))

    return Sized(toy.batch_size // target.groups, toy.model.dtype, build)


TOY = Stage(
    name="toy",
    label="A toy",
    charts={"Loss of a toy": ("loss",)},
    inputs=ToyInputs,
    check=lambda config, mesh: None,
    prepare=prepare_toy,
    start=load_language,
    trained_part=lambda config: "train/params",
    stop=lambda config: config.toy.sampling.stop,
    plan=plan_toy,
)
