"""Answers of a rollout, sampled and scored: those to a batch of prompts, and with resampling those to further ones."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from jrlhf.config import RolloutConfig
from jrlhf.core import equal_scores
from jrlhf.data import Order, PromptRows
from jrlhf.parallel import batch_sharding, fetch, shard_batch
from jrlhf.rollout.actors import policy_of
from jrlhf.rollout.sampling import GenerateFn, prompt_readings
from jrlhf.rollout.scores import PendingScores, Rewards, ScoredAnswers
from jrlhf.steps.groups import group_numbers
from jrlhf.train.batches import device_share, groups_of
from jrlhf.train.performance import timed
from jrlhf.train.site import Site
from jrlhf.types import Generation, Key, Params

SECOND_ORDER = 2**32
"""Distance between the seed of a run's order of prompts and that of the further prompts; seeds are smaller."""


class Drawn(NamedTuple):
    """Sampled answers, of which the rules already score all parts but the last."""

    generation: Generation
    rows: Int[np.ndarray, "B"]
    """The prompt of each answer."""
    last: Generation
    """The last part."""
    pending: list[PendingScores]


class Drawing(NamedTuple):
    """The functions that sample and score answers to a batch of prompts."""

    draw: Callable[[Params, Int[np.ndarray, "P"], Key, dict[str, Any]], Drawn]
    """``(all parameters, prompts, key, seconds of the phases) -> Drawn``."""
    score: Callable[[Drawn], ScoredAnswers]
    """Begin the rules on the last part, and wait for all scores."""
    readings: int
    """Number of times that each prompt is read."""


def jit_concatenate(mesh: Mesh) -> Callable[[Sequence[Generation]], Generation]:
    """Return a function that joins the parts of a rollout in order, sharded by rows."""
    join = jax.jit(
        lambda parts: jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts), out_shardings=batch_sharding(mesh)
    )
    return lambda parts: parts[0] if len(parts) == 1 else join(parts)


def make_drawing(
    site: Site, section: RolloutConfig, generate: GenerateFn, score: Rewards, prompts: PromptRows, *, samples: int
) -> Drawing:
    """Return the functions that sample ``samples`` answers to each prompt, in neighbouring rows, and score them."""
    mesh, rollout_parts = site.mesh, section.rollout_parts
    concatenate = jit_concatenate(mesh)
    key = f"{site.stage}.episodes / {site.stage}.rollout_parts"
    part = section.episodes // rollout_parts
    device_share(part, mesh, key=key)
    readings = prompt_readings(samples, rows=part, devices=groups_of(mesh))

    def draw(params: Params, questions: Int[np.ndarray, "P"], key: Key, seconds: dict[str, Any]) -> Drawn:
        with timed(seconds, "seconds/input"):
            rows = np.repeat(questions, samples)
            row_parts = np.split(rows, rollout_parts)
            # A prompt's place, and not its row in the data, which may occur twice: the answers would be the same.
            numbers = np.repeat(np.arange(len(questions), dtype=np.int32), readings)
            arrays = *prompts.batch(np.repeat(questions, readings)), numbers
            split = (np.split(array, rollout_parts) for array in arrays)
            batches = [shard_batch(part, mesh) for part in zip(*split, strict=True)]
        with timed(seconds, "seconds/rollout") as wait:
            # All parts are dispatched at once: the rules score a part while the devices sample the next one.
            parts = [generate(policy_of(params), *batch, key) for batch in batches]
            pending = [score.begin(part, prompts, at) for part, at in zip(parts[:-1], row_parts[:-1], strict=True)]
            return Drawn(wait(concatenate(parts)), rows, parts[-1], pending)

    def finish(drawn: Drawn) -> ScoredAnswers:
        last_rows = drawn.rows[len(drawn.rows) - len(drawn.last.tokens) :]
        pending = [*drawn.pending, score.begin(drawn.last, prompts, last_rows)]
        return score.finish(drawn.generation, prompts, drawn.rows, pending)

    return Drawing(draw, finish, readings)


class Resampled(NamedTuple):
    """A rollout's answers after resampling."""

    answers: ScoredAnswers
    further: list[Generation]
    """All answers of the further draws, whether they were used or not."""
    replaced: float
    """The share of groups that were replaced."""


Resampling = Callable[[ScoredAnswers, Params, Key, int, dict[str, Any]], Resampled]
"""``(answers, all parameters, key, number of the iteration, seconds of the phases) -> Resampled``."""


def make_resampling(
    site: Site, section: RolloutConfig, drawing: Drawing, prompts: PromptRows, *, samples: int, draws: int
) -> Resampling:
    """Return a function that replaces groups of equal scores by groups of further prompts, in at most ``draws`` draws.

    That is DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2), with a bound. A draw is as large as
    the rollout, so that no program is compiled for it, and its prompts come from an order of their own: which prompts
    the next rollout has does not depend on what was replaced.
    """
    seed, groups = site.config.seed + SECOND_ORDER, section.episodes // samples
    order = Order(seed, batch_size=groups, lengths=prompts.lengths, parts=prompts.parts)
    pad = prompts.pad

    @jax.jit
    def degenerate(answers: ScoredAnswers) -> jax.Array:
        answered = jnp.any(answers.generation.response_mask, axis=-1)
        numbers = group_numbers(section.episodes, samples)
        return equal_scores(answers.scores, numbers, valid=answered).reshape(groups, samples)[:, 0]

    def choose(old: ScoredAnswers, new: ScoredAnswers, rows: jax.Array) -> ScoredAnswers:
        width = max(old.generation.tokens.shape[1], new.generation.tokens.shape[1])
        old, new = (x._replace(generation=widened(x.generation, width, pad=pad)) for x in (old, new))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows], old, new)

    replace_rows = jax.jit(choose, out_shardings=batch_sharding(site.mesh))

    def resample(answers: ScoredAnswers, params: Params, key: Key, number: int, seconds: dict[str, Any]) -> Resampled:
        further, replaced = [], 0
        dull = fetch(degenerate(answers))
        for draw in range(draws):
            if not dull.any():
                break
            # The rollout's own keys are 0 and 1 of this root.
            own = jax.random.fold_in(key, 2 + draw)
            drawn = drawing.draw(params, order[number * draws + draw], own, seconds)
            with timed(seconds, "seconds/scoring") as wait:
                new = wait(drawing.score(drawn))
                source = replacements(dull, fetch(degenerate(new)))
                rows = (source[:, None] * samples + np.arange(samples)).reshape(-1)
                answers = replace_rows(answers, new, jnp.asarray(rows, jnp.int32))
            further.append(drawn.generation)
            replaced += int((source >= groups).sum())
            dull = dull & (source < groups)
        return Resampled(answers, further, replaced / groups)

    return resample


def replacements(dull: Bool[np.ndarray, "P"], further: Bool[np.ndarray, "P"]) -> Int[np.ndarray, "P"]:
    """Return where each group comes from: its own place, or P + that of a further group.

    The first groups that are ``dull`` get the first further groups that are not: ``[F, T, T]`` and ``[T, F, T]`` give
    ``[0, 4, 2]``.
    """
    groups = len(dull)
    source, good = np.arange(groups), np.flatnonzero(~further)
    places = np.flatnonzero(dull)[: len(good)]
    source[places] = groups + good[: len(places)]
    return source


def widened(generation: Generation, width: int, *, pad: int) -> Generation:
    """Return a generation whose prompts have more padding on their left, up to ``width`` tokens in all."""
    more = ((0, 0), (width - generation.tokens.shape[1], 0))
    return generation._replace(
        tokens=jnp.pad(generation.tokens, more, constant_values=pad),
        mask=jnp.pad(generation.mask, more),
        response_mask=jnp.pad(generation.response_mask, more),
        logprobs=jnp.pad(generation.logprobs, more),
    )
