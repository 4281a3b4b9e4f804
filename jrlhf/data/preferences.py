"""Rows as preference losses read them: which tokens are the answers', and how likely the reference finds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float, Int

from jrlhf.data.order import Part
from jrlhf.data.packing import PackedRankingRows
from jrlhf.data.rows import RankingRows
from jrlhf.types import PackedRankingBatch, RankingBatch, UnpairedBatch

RefLogprobs = Float[np.ndarray, "N"]


@dataclass(frozen=True)
class PreferenceRows:
    """Rankings, one to a row or packed, whose batches have a ``loss_mask`` and the log-probs of a reference."""

    rows: RankingRows | PackedRankingRows
    ref_logprobs: RefLogprobs | None
    """Log-prob of each completion, in the order of the rankings' ``tokens``. None: the batches have none."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return self.rows.lengths

    @property
    def parts(self) -> Sequence[Part]:
        return self.rows.parts

    @property
    def plain(self) -> RankingRows:
        """The rankings, one to a row."""
        return self.rows.rows if isinstance(self.rows, PackedRankingRows) else self.rows

    def views(self) -> dict[str, "PreferenceRows"]:
        """All rows that the reference reads, by names that end those of its log-probs."""
        return {"": self}

    def with_reference(self, logprobs: Mapping[str, RefLogprobs]) -> "PreferenceRows":
        """The same rows with the log-probs of ``views``."""
        return replace(self, ref_logprobs=logprobs[""])

    def batch(self, indices: Sequence[int] | np.ndarray) -> RankingBatch | PackedRankingBatch:
        """Return the batch of these rows."""
        reference = None
        if self.ref_logprobs is not None:
            places = self.rows.places(indices)
            reference = np.where(places >= 0, self.ref_logprobs[places], np.float32(0.0))
        marks = self.rows.batch_loss_mask(indices)
        return self.rows.batch(indices)._replace(loss_mask=marks, ref_logprobs=reference)


R = TypeVar("R", RankingRows, PreferenceRows)


@dataclass(frozen=True)
class Unpaired(Generic[R]):
    """Labelled answers, and in row i of ``mismatched`` the prompts of row i, each with an answer to another prompt."""

    answers: R
    mismatched: R

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return self.answers.lengths

    @property
    def parts(self) -> Sequence[Part]:
        return self.answers.parts


class UnpairedPreferenceRows(Unpaired[PreferenceRows]):
    """Labelled answers and their mismatched pairs, one to a row or packed, as KTO's batches have them."""

    def views(self) -> dict[str, PreferenceRows]:
        """All rows that the reference reads, by names that end those of its log-probs."""
        return {"": self.answers, "_mismatched": self.mismatched}

    def with_reference(self, logprobs: Mapping[str, RefLogprobs]) -> "UnpairedPreferenceRows":
        """The same rows with the log-probs of ``views``."""
        views = self.views()
        return UnpairedPreferenceRows(*(replace(views[name], ref_logprobs=logprobs[name]) for name in views))

    def batch(self, indices: Sequence[int] | np.ndarray) -> UnpairedBatch:
        """Return the batch of these rows."""
        return UnpairedBatch(self.answers.batch(indices), self.mismatched.batch(indices))
