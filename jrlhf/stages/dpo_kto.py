"""KTO in the DPO stage: a policy trained on answers that people have called desirable or not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jrlhf.config import ConfigError, DPOConfig
from jrlhf.core import kto_loss, reference_point
from jrlhf.data import PreferenceRows, UnpairedPreferenceRows, UnpairedRows, load_unpaired, pack_unpaired
from jrlhf.stages.dpo_method import Figures, Flops, Method, Reader
from jrlhf.stages.dpo_reference import read_logprobs
from jrlhf.stages.rankings import planned_preferences, token_mask
from jrlhf.steps import KTOSettings, Labelled, kto_figures, make_kto_step
from jrlhf.train.programs import Target
from jrlhf.types import Metrics, Params, UnpairedBatch


def kto_method(dpo: DPOConfig) -> Method:
    """Return the method of KTO."""
    settings = KTOSettings(dpo.beta, dpo.desirable_weight, dpo.undesirable_weight)
    return Method(
        load=load_unpaired,
        arrange=_arranged,
        has_reference=True,
        make_step=lambda logprob_fn, tx, slices: make_kto_step(logprob_fn, tx, settings, accumulation=slices),
        make_figures=lambda rows, reader: _answer_figures(rows, reader, settings),
        flops=_flops,
        completions=lambda completions: 1,
        planned=_planned,
        counted="answers",
    )


def _arranged(rows: UnpairedRows, pack_length: int) -> UnpairedPreferenceRows:
    """Return labelled answers in batches, packed to ``pack_length`` tokens or, if it is 0, one to a row."""
    if not pack_length:
        parts = (rows.answers, rows.mismatched)
    else:
        try:
            parts = pack_unpaired(rows, pack_length)
        except ValueError as error:
            raise ConfigError(f"dpo.pack_length: an answer stands in one row with its prompt: {error}") from error
    return UnpairedPreferenceRows(*(PreferenceRows(part, None) for part in parts))


def _flops(flops: Flops, passes: float, batch: UnpairedBatch, metrics: dict[str, Any]) -> jax.Array:
    """Count the mismatched pairs as one forward pass."""
    assert batch.mismatched.loss_mask is not None
    mismatched = jnp.sum(batch.mismatched.loss_mask, dtype=jnp.float32)
    forward = flops(token_mask(batch.mismatched), mismatched) / passes
    return flops(token_mask(batch.answers), metrics["tokens"]) + forward


def _planned(target: Target, rows: int, completions: int, longest: int, pack_length: int) -> UnpairedBatch:
    lead = target, rows, completions, longest, pack_length
    return UnpairedBatch(*(planned_preferences(*lead, reference=True) for _ in range(2)))


def _answer_figures(rows: UnpairedPreferenceRows, reader: Reader, settings: KTOSettings) -> Figures:
    """Return a function that computes loss, accuracy, rewards and log-probs of held-out answers, with their own z₀."""
    count = min(len(rows), reader.limit or len(rows))
    desirable = rows.answers.plain.batch(range(count)).ranks.reshape(-1) == 0
    references = [_first(some.ref_logprobs, count) for some in (rows.answers, rows.mismatched)]

    @jax.jit
    def figures_of(logprobs: list[Any]) -> Metrics:
        answers, mismatched = (
            Labelled(jnp.asarray(policy), jnp.asarray(reference), jnp.asarray(desirable), jnp.ones(count, bool))
            for policy, reference in zip(logprobs, references, strict=True)
        )
        point = reference_point(jnp.sum(mismatched.log_ratios()), jnp.float32(count))
        loss = jnp.mean(kto_loss(answers.log_ratios(), answers.desirable, point, **settings._asdict()))
        return {"loss": loss, "reference_point": point} | kto_figures(answers, settings)

    def figures(params: Params) -> dict[str, float]:
        def read(batch: Any) -> jax.Array:
            # The program of the reference, which has no log-probs yet.
            return reader.logprobs(params, batch._replace(ref_logprobs=None)).total

        logprobs = [
            read_logprobs(some, read, reader.mesh, reader.at_once, which=np.arange(count))
            for some in (rows.answers, rows.mismatched)
        ]
        found = figures_of([_first(values, count) for values in logprobs])
        return {f"eval/{name}": float(value) for name, value in found.items()}

    return figures


def _first(logprobs: Float[np.ndarray, "N"] | None, count: int) -> Float[np.ndarray, "M"]:
    """Return the log-probs of the first ``count`` answers, each of which is a row."""
    assert logprobs is not None
    return logprobs[:count]
