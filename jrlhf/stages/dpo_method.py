"""The functions in which the losses of the DPO stage differ."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jrlhf.config import DataConfig, Sources
from jrlhf.data import PreferenceRows, RankingRows, Tokenizer, UnpairedPreferenceRows, UnpairedRows
from jrlhf.train.programs import Target
from jrlhf.types import LogprobFn, Params

LoadedRows = RankingRows | UnpairedRows
BatchRows = PreferenceRows | UnpairedPreferenceRows
Figures = Callable[[Params], dict[str, float]]
Flops = Callable[[Any, Any], jax.Array]
"""``(mask, number of tokens with logits) -> model FLOPs`` of a training step."""


class Reader(NamedTuple):
    """The program and the limits with which a method reads held-out rows."""

    logprobs: Any
    """``(params, batch) -> AnswerLogprobs``, jitted; the program that has read the reference."""
    mesh: Mesh
    at_once: int
    limit: int
    """Maximum number of rows; 0: all."""


class Method(NamedTuple):
    """The functions of a loss, or of a family of losses."""

    load: Callable[[DataConfig, Sources, Tokenizer], LoadedRows]
    arrange: Callable[[Any, int], BatchRows]
    """``(rows, pack_length) -> rows`` in batches, without the log-probs of a reference."""
    has_reference: bool
    make_step: Callable[[LogprobFn, optax.GradientTransformation, int], Any]
    """``(logprob_fn, tx, slices) -> step``."""
    make_figures: Callable[[Any, Reader], Figures]
    """``(rows, reader) -> function`` of the parameters that computes the figures of held-out rows."""
    flops: Callable[[Flops, float, Any, Any], jax.Array]
    """Model FLOPs of a step, from those of training, its cost in forward passes, the batch and its metrics."""
    completions: Callable[[int], int]
    """Number of completions of a row that is read, from that of a ranking."""
    planned: Callable[[Target, int, int, int, int], Any]
    """Shapes of the batch of a step, for ``(target, rows, completions, longest, pack_length)``."""
    counted: str
    """Name of the metric that counts a step's pairs or answers; their rate is logged."""
