"""Rankings as preference losses read them: which tokens are the answers', and how likely the reference finds them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jrlhf.data.order import Part
from jrlhf.data.packing import PackedRankingRows
from jrlhf.data.rows import RankingRows
from jrlhf.types import PackedRankingBatch, RankingBatch


@dataclass(frozen=True)
class PreferenceRows:
    """Rankings, one to a row or packed, whose batches have a ``loss_mask`` and the log-probs of a reference."""

    rows: RankingRows | PackedRankingRows
    ref_logprobs: Float[np.ndarray, "N"] | None
    """Log-prob of each completion, in the order of the rankings' ``tokens``. None: the batches have none."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        return self.rows.lengths

    @property
    def parts(self) -> Sequence[Part]:
        return self.rows.parts

    def batch(self, indices: Sequence[int] | np.ndarray) -> RankingBatch | PackedRankingBatch:
        """Return the batch of these rows."""
        reference = None
        if self.ref_logprobs is not None:
            places = self.rows.places(indices)
            reference = np.where(places >= 0, self.ref_logprobs[places], np.float32(0.0))
        marks = self.rows.batch_loss_mask(indices)
        return self.rows.batch(indices)._replace(loss_mask=marks, ref_logprobs=reference)
