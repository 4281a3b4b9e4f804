"""Judge of the quick start, which is independent of all reward models: an opinion lexicon."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jrlhf import assets
from jrlhf.rollout.diversity import words


class Lexicon(NamedTuple):
    """Positive and negative words."""

    positive: frozenset[str]
    negative: frozenset[str]


def load_opinion_lexicon() -> Lexicon:
    """Load the shipped word lists. Hu & Liu 2004, "Mining and summarizing customer reviews"."""
    folder = Path(assets.resolve("asset:opinion_lexicon"))

    def read(name: str) -> frozenset[str]:
        lines = (folder / name).read_text(encoding="utf-8").split("\n")
        return frozenset(line.strip() for line in lines if line.strip() and not line.startswith(";"))

    return Lexicon(read("positive-words.txt"), read("negative-words.txt"))


def lexicon_scores(texts: Sequence[str], lexicon: Lexicon) -> Float[np.ndarray, "N"]:
    """Return the number of positive minus negative words of each text, with repetitions; a word on both lists counts as
    0."""
    counts = [sum((w in lexicon.positive) - (w in lexicon.negative) for w in words(text)) for text in texts]
    return np.asarray(counts, np.float64)


def paired_difference(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """Return the mean of after - before and its standard error s / √N, s over N - 1; NaN for a single pair."""
    difference = after.astype(np.float64) - before.astype(np.float64)
    if difference.size < 2:
        return float(np.mean(difference)), float("nan")
    return float(np.mean(difference)), float(np.std(difference, ddof=1) / np.sqrt(difference.size))
