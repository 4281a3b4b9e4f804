"""Rankings in the stages that train on them: packed rows, and the shapes of batches for plans."""

import jax.numpy as jnp
from jax import Array

from jrlhf.config import ConfigError
from jrlhf.data import PackedRankingRows, RankingRows, pack_rankings
from jrlhf.train.programs import Target
from jrlhf.types import PackedRankingBatch, RankingBatch


def packed_or_plain(rows: RankingRows, pack_length: int, *, key: str) -> RankingRows | PackedRankingRows:
    """Pack rankings to ``pack_length`` tokens; 0 leaves them as they are. ``key`` names the stage in errors."""
    if not pack_length:
        return rows
    try:
        return pack_rankings(rows, pack_length)
    except ValueError as error:
        raise ConfigError(f"{key}.pack_length: all completions of a prompt stand in one row: {error}") from error


def row_tokens(rows: RankingRows, pack_length: int) -> float:
    """Return the mean number of tokens of a row, padding between its completions included."""
    return float(pack_length or rows.max_completions * rows.lengths.mean())


def rankings(target: Target, lead: tuple[int, int], length: int) -> RankingBatch:
    """Return the shapes of ``[B, K]`` completions of ``length`` tokens."""
    tokens, marks = target.rows((*lead, length), jnp.int32), target.rows((*lead, length), jnp.bool_)
    ranks, valid = target.rows(lead, jnp.int32), target.rows(lead, jnp.bool_)
    return RankingBatch(tokens, marks, ranks, valid, target.rows(lead[:1], jnp.float32))


def packed_rankings(target: Target, lead: tuple[int, int, int], length: int) -> PackedRankingBatch:
    """Return the shapes of ``[B, G, K]`` completions in ``B`` rows of ``length`` tokens."""
    tokens, segments = (target.rows((lead[0], length), jnp.int32) for _ in range(2))
    ends, ranks, valid = (target.rows(lead, dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool_))
    return PackedRankingBatch(tokens, segments, ends, ranks, valid, target.rows(lead[:2], jnp.float32))


def planned_rankings(
    target: Target, rows: int, completions: int, longest: int, pack_length: int
) -> RankingBatch | PackedRankingBatch:
    """Return the shapes of a batch of ``rows``; a packed row holds as many prompts as fit at their maximum length."""
    if not pack_length:
        return rankings(target, (rows, completions), longest)
    in_row = max(1, pack_length // (completions * longest))
    return packed_rankings(target, (rows, in_row, completions), pack_length)


def planned_preferences(
    target: Target, rows: int, completions: int, longest: int, pack_length: int, *, reference: bool
) -> RankingBatch | PackedRankingBatch:
    """Return the shapes of a batch for a preference loss, with those of ``ref_logprobs`` if there is a reference."""
    batch = planned_rankings(target, rows, completions, longest, pack_length)
    logprobs = target.rows(batch.ranks.shape, jnp.float32) if reference else None
    return batch._replace(loss_mask=target.rows(batch.tokens.shape, jnp.bool_), ref_logprobs=logprobs)


def token_mask(batch: RankingBatch | PackedRankingBatch) -> Array:
    """Return the mask of a batch's real tokens, or the numbers of their completions in packed rows."""
    return batch.segments if isinstance(batch, PackedRankingBatch) else batch.mask
