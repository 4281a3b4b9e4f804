"""The programs of ``run_sft``."""

from typing import Any

import jax
import jax.numpy as jnp

from jrlhf.config import PlanConfig
from jrlhf.core import combine
from jrlhf.plan.parts import (
    UPDATES,
    Site,
    Sized,
    StagePlan,
    abstract_trainable,
    planned_model,
    planned_training,
    sampling_program,
)
from jrlhf.plan.programs import Program, device_bytes
from jrlhf.steps import make_sft_eval, make_sft_step
from jrlhf.train.batches import device_multiple, device_share, reading_slices
from jrlhf.train.optim import make_optimizer
from jrlhf.train.performance import training_flops
from jrlhf.train.positions import Positions


def sft_stage(config: PlanConfig, site: Site) -> Sized:
    """Start, update, and where they are asked for evaluation and sample answers."""
    sft = config.sft
    length = sft.pack_length or sft.data.max_length
    share = device_share(sft.batch_size, site.mesh, key="sft.batch_size")
    slices = reading_slices(share, microbatch=sft.microbatch, tokens=float(length), platform=site.topology.platform())
    model = planned_model(site, config, sft.model, key="sft.model", kind="language")
    Positions(model.arch, key := "sft.data.max_length").check_length(sft.data.max_length, key=key)
    tx, _ = make_optimizer(sft.optim, updates=UPDATES)
    trained, frozen = abstract_trainable(model.params, model.arch, sft.lora, site, model.rules, path="sft.lora")
    step = make_sft_step(model.logprob_fn, tx, accumulation=slices)
    run = planned_training(step, tx, trained, frozen, site, model.rules, loaded=model.params)
    whole, moved = combine(run.state.params, frozen), 2 * device_bytes(run.state.params, run.state.opt_state)
    row_flops = training_flops(model.arch, frozen=frozen is not None)(
        jnp.ones((1, length), jnp.bool_), jnp.float32(length)
    )

    def build(rows: int) -> StagePlan:
        batch = rows * slices * site.groups
        text = site.text(batch, length, packed=bool(sft.pack_length))
        programs = [run.start, run.update(site, text, flops=float(row_flops) * batch, read=moved)]
        if sft.data.eval:
            args = whole, site.text(batch, sft.data.max_length)
            sums = jax.jit(make_sft_eval(model.logprob_fn))
            programs.append(Program("evaluation", sums, args, alive=(run.held, args), timed=False))
        asked = batch if sft.candidate_prompts else min(batch, sft.log.samples) if sft.data.eval else 0
        if asked:
            answers, prompt = device_multiple(asked, site.mesh), sft.data.max_length
            where: dict[str, Any] = {"rows": answers, "prompt": prompt, "site": site, "held": run.held}
            programs.append(sampling_program("answers", model, whole, sft.sampling, **where)._replace(timed=False))
        return StagePlan("sft", "sft.batch_size", batch, run.held, tuple(programs))

    return Sized(share // slices, sft.model.dtype, build)
