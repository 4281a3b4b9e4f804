"""Scores: of texts in files, and of what a policy has sampled, in its tokens or in the reward model's own."""

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
from jrlhf.rollout.actors import Actors
from jrlhf.rollout.sampling import texts_of
from jrlhf.runs.metrics import progress
from jrlhf.steps import without_padding
from jrlhf.train.batches import covering_batches, device_multiple
from jrlhf.types import Generation

log = logging.getLogger("jrlhf.rewards")

Scorer = Callable[[Generation, PromptRows, Int[np.ndarray, "B"]], jax.Array]
"""``(what was sampled, all prompts, which of them were encode_example) -> scores [B]``."""

NARROWEST = 32


def make_scorer(actors: Actors, mesh: Mesh, *, slices: int, option: str) -> Scorer:
    """The reward model on sampled answers; ``slices`` as in ``without_padding``. ``option`` names it in errors."""
    reward = reward_of(actors)
    if actors.reward_tokenizer is not None:
        return _by_text(reward, actors.tokenizer, actors.reward_tokenizer, mesh, option=option)
    score = jit_score(actors, mesh, slices=slices)
    return lambda generation, prompts, rows: score(reward.params, generation.tokens, generation.mask)


def reward_of(actors: Actors) -> RewardModel:
    """ValueError where there is none."""
    if actors.reward is None:
        raise ValueError("there is no reward model to score with")
    return actors.reward


def jit_score(actors: Actors, mesh: Mesh, *, slices: int) -> Any:
    """``(reward model's params, tokens, mask) -> scores [B]``, of the policy's tokens."""
    reward = reward_of(actors)
    score_fn = without_padding(reward.score_fn, slices=slices) if actors.packable else reward.score_fn
    return jax.jit(
        lambda params, tokens, mask: at_last_token(score_fn(params, tokens, mask), reward.reading.last(tokens, mask)),
        out_shardings=batch_sharding(mesh),
    )


def _by_text(
    reward: RewardModel, tokenizer: Tokenizer, reward_tokenizer: Tokenizer, mesh: Mesh, *, option: str
) -> Scorer:
    """Prompt and answer as text, in the reward model's own tokens and chat template. Only scores come of these.

    What is longer than its positions loses the start of the prompt, and that is said the first time.
    """
    encoder, pad = encoder_for(reward_tokenizer, reward.reading), int(reward_tokenizer.pad_token_id)
    limit = reward.arch.max_positions
    score = jax.jit(reward.score, out_shardings=batch_sharding(mesh))
    warned = False

    def ids(row: dict[str, Any], answer: str, stopped: bool) -> np.ndarray:
        nonlocal warned
        try:
            before, after = encoder.encode_sample(row["prompt"], answer, stopped=stopped, tools=row.get("tools"))
        except (BadRow, DataError) as error:
            raise DataError(f"{option}: its tokenizer cannot read a prompt: {error}") from error
        if len(before) + len(after) > limit and not warned:
            warned = True
            log.warning("%s: texts of more than its %d tokens are cut at the prompt's start", reward.source, limit)
        return encoder.truncate(before, after, limit)

    def score_texts(generation: Generation, prompts: PromptRows, rows: Int[np.ndarray, "B"]) -> jax.Array:
        answers, stopped = texts_of(tokenizer, generation), fetch(generation.stopped).tolist()
        shown = [prompts.shown[int(row)] for row in rows]
        texts = Ragged.from_rows([ids(*row) for row in zip(shown, (a for _, a in answers), stopped, strict=True)])
        width = padded_width(int(texts.lengths.max()), limit)
        return score(reward.params, *shard_batch(texts.padded(range(len(rows)), width, fill=pad), mesh))

    return score_texts


def padded_width(longest: int, limit: int) -> int:
    """The next of 32, 48, 64, 96, 128, ..., at most ``limit``: whatever lengths come, few widths are compiled for."""
    width = NARROWEST
    while width < longest:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return min(width, limit)


def score_texts(model: RewardModel, texts: TextRows, *, mesh: Mesh, batch_size: int, show_progress: bool) -> np.ndarray:
    """One score a text, in the order of the rows."""
    score = jax.jit(model.score)
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
