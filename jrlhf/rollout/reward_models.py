"""Reward model scores of texts from files and of sampled answers, in the policy's or the model's own tokens."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jrlhf.core import at_last_token
from jrlhf.data import BadRow, DataError, PromptRows, TextRows, Tokenizer, encoder_for
from jrlhf.data.ragged import Ragged
from jrlhf.models import RewardModel
from jrlhf.parallel import batch_sharding, fetch, is_first, shard_batch
from jrlhf.parallel.step import jit_for
from jrlhf.rollout.actors import Actors
from jrlhf.rollout.sampling import texts_of
from jrlhf.runs.metrics import progress
from jrlhf.steps import without_padding
from jrlhf.train.batches import covering_batches, device_multiple
from jrlhf.types import Generation

log = logging.getLogger("jrlhf.rewards")

Scorer = Callable[[Generation, PromptRows, Int[np.ndarray, "B"]], jax.Array]
"""``(sampled answers, all prompts, indices of the answered prompts) -> scores [B]``."""

MIN_TEXT_WIDTH = 32
"""Minimum width of a batch of texts, in tokens."""


def make_scorer(actors: Actors, mesh: Mesh, *, slices: int, option: str) -> Scorer:
    """Return the scorer of sampled answers, which reads ``slices`` slices; ``option`` names the model in errors."""
    reward = reward_of(actors)
    if actors.reward_tokenizer is not None:
        return _text_scorer(reward, actors.tokenizer, actors.reward_tokenizer, mesh, option=option)
    score = jit_score(actors, mesh, slices=slices)
    return lambda generation, prompts, rows: score(reward.params, generation.tokens, generation.mask)


def reward_of(actors: Actors) -> RewardModel:
    """Return the reward model. Raise ValueError if there is none."""
    if actors.reward is None:
        raise ValueError("there is no reward model to score with")
    return actors.reward


def jit_score(actors: Actors, mesh: Mesh, *, slices: int) -> Any:
    """Jit ``(reward model's params, tokens, mask) -> scores [B]`` for the policy's tokens."""
    reward = reward_of(actors)
    score_fn = without_padding(reward.score_fn, slices=slices) if actors.packable else reward.score_fn
    return jit_for(
        mesh,
        lambda params, tokens, mask: at_last_token(score_fn(params, tokens, mask), reward.reading.last(tokens, mask)),
        out_shardings=batch_sharding(mesh),
    )


def _text_scorer(
    reward: RewardModel, tokenizer: Tokenizer, reward_tokenizer: Tokenizer, mesh: Mesh, *, option: str
) -> Scorer:
    """Return a scorer that encodes prompt and answer with the reward model's own tokenizer and chat template.

    A text that exceeds the model's positions loses the start of its prompt, and the first one logs a warning.
    """
    encoder, pad = encoder_for(reward_tokenizer, reward.reading), int(reward_tokenizer.pad_token_id)
    limit = reward.arch.max_positions
    score = jit_for(mesh, reward.score, out_shardings=batch_sharding(mesh))
    warned = False

    def ids(row: dict[str, Any], answer: str, stopped: bool) -> np.ndarray:
        nonlocal warned
        try:
            before, after = encoder.encode_sample(row["prompt"], answer, stopped=stopped, tools=row.get("tools"))
        except (BadRow, DataError) as error:
            raise DataError(f"{option}: its tokenizer cannot read a prompt: {error}") from error
        if len(before) + len(after) > limit and not warned:
            warned = True
            log.warning("%s: longer texts than its %d positions lose the start of the prompt", reward.source, limit)
        return encoder.truncate(before, after, limit)

    def score_texts(generation: Generation, prompts: PromptRows, rows: Int[np.ndarray, "B"]) -> jax.Array:
        answers, stopped = texts_of(tokenizer, generation), fetch(generation.stopped).tolist()
        shown = [prompts.shown[int(row)] for row in rows]
        texts = Ragged.from_rows([ids(*row) for row in zip(shown, (a for _, a in answers), stopped, strict=True)])
        width = padded_width(int(texts.lengths.max()), limit)
        return score(reward.params, *shard_batch(texts.padded(range(len(rows)), width, fill=pad), mesh))

    return score_texts


def padded_width(longest: int, limit: int) -> int:
    """Round up to 32, 48, 64, 96, 128, ..., but at most ``limit``, so that few widths are compiled."""
    width = MIN_TEXT_WIDTH
    while width < longest:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return min(width, limit)


def score_texts(model: RewardModel, texts: TextRows, *, mesh: Mesh, batch_size: int, show_progress: bool) -> np.ndarray:
    """Return one score per text, in the order of the rows."""
    score = jit_for(mesh, model.score)
    scores = np.zeros(len(texts), np.float64)
    batch_size = device_multiple(min(batch_size, len(texts)), mesh)
    total, done = len(texts), 0
    with progress(total, "Scores", start=0, enabled=show_progress and is_first(), unit="texts", to_stderr=True) as bar:
        for indices, real in covering_batches(texts.lengths, batch_size=batch_size, limit=0):
            tokens, mask = shard_batch(texts.batch(indices), mesh)
            scores[indices[real]] = fetch(score(model.params, tokens, mask))[real]
            done += int(real.sum())
            bar.update(done)
    return scores
