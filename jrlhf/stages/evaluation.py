"""What a run is judged by, in plain NumPy: accuracy on people's rankings, calibration, baselines, diversity."""

import re
from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit

from jrlhf import assets

Ranking = tuple[Sequence[str], Sequence[int]]
"""Completions and their ranks: 0 is best, equal ranks are ties."""

_WORD = re.compile(r"[^\W_]+(?:['*-]+[^\W_]+)*\+?")


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, with ``'``, ``-`` and ``*`` inside them and a ``+`` after them.

    ``"Well-made, isn't it? A+" -> ["well-made", "isn't", "it", "a+"]``. The opinion lexicon's entries are words too,
    but for ``anti-``, ``bull----`` and ``bull****``.
    """
    return _WORD.findall(text.lower())


class Lexicon(NamedTuple):
    """Words that speak for a text, and words that speak against it."""

    positive: frozenset[str]
    negative: frozenset[str]


def load_opinion_lexicon() -> Lexicon:
    """The shipped word lists. Hu & Liu 2004, "Mining and summarizing customer reviews"."""
    folder = Path(assets.resolve("asset:opinion_lexicon"))

    def read(name: str) -> frozenset[str]:
        lines = (folder / name).read_text(encoding="utf-8").split("\n")
        return frozenset(line.strip() for line in lines if line.strip() and not line.startswith(";"))

    return Lexicon(read("positive-words.txt"), read("negative-words.txt"))


def lexicon_scores(texts: Sequence[str], lexicon: Lexicon) -> Float[np.ndarray, "N"]:
    """Positive minus negative words of each text; every occurrence counts, a word on both lists counts as 0."""
    counts = [sum((w in lexicon.positive) - (w in lexicon.negative) for w in words(text)) for text in texts]
    return np.asarray(counts, np.float64)


def distinct_n(sequences: Sequence[Sequence[Hashable]], *, n: int) -> float:
    """Different n-grams / all n-grams, over all sequences together; 0 where there are none. Li et al. 2016, section 5.

    Sequences are token ids, or ``words`` of texts. It falls as a sample grows: compare samples of one size only.
    """
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def pair_accuracy(margins: Float[np.ndarray, "N"]) -> float:
    """Share of pairs with r_better - r_worse > 0; an equal score is wrong."""
    return float(np.mean(margins > 0.0))


class ReliabilityCurve(NamedTuple):
    """Per bin of confidence: mean confidence, share of right answers, pairs. Empty bins are left out."""

    confidence: Float[np.ndarray, "M"]
    accuracy: Float[np.ndarray, "M"]
    pairs: Int[np.ndarray, "M"]


def reliability_curve(margins: Float[np.ndarray, "N"], *, bins: int) -> ReliabilityCurve:
    """How often a pair is ordered right, against how sure the model was of it.

    Confidence is σ(|margin|), the model's probability of the order it believes in; ``bins`` divide [0.5, 1] evenly.
    """
    confidence = expit(np.abs(margins.astype(np.float64)))
    bin_of = np.minimum(((confidence - 0.5) * 2.0 * bins).astype(np.int64), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    filled = count > 0
    total = np.maximum(count, 1)
    mean_confidence = np.bincount(bin_of, confidence, bins) / total
    accuracy = np.bincount(bin_of, (margins > 0.0).astype(np.float64), bins) / total
    return ReliabilityCurve(mean_confidence[filled], accuracy[filled], count[filled])


def expected_calibration_error(margins: Float[np.ndarray, "N"], *, bins: int) -> float:
    """Σ_b n_b / N · |accuracy_b - confidence_b| over the bins of ``reliability_curve``. Guo et al. 2017, eq. 3."""
    curve = reliability_curve(margins, bins=bins)
    return float(np.sum(curve.pairs * np.abs(curve.accuracy - curve.confidence)) / np.sum(curve.pairs))


class LengthBin(NamedTuple):
    """Pairs whose better completion is longer than the worse one by ``low`` up to, not including, ``high``."""

    low: float
    high: float
    accuracy: float
    pairs: int


def accuracy_by_length_difference(
    margins: Float[np.ndarray, "N"], length_differences: Int[np.ndarray, "N"], *, edges: Sequence[int]
) -> list[LengthBin]:
    """Accuracy where the better completion is shorter, as long, longer: a model that has learnt length shows a slope.

    ``length_differences``: len(better) - len(worse). ``edges`` rise; an open bin is added at both ends. Empty bins are
    left out.
    """
    bounds = [-np.inf, *edges, np.inf]
    bin_of = np.digitize(length_differences, np.asarray(edges, np.float64))
    found = []
    for i, (low, high) in enumerate(pairwise(bounds)):
        inside = margins[bin_of == i]
        if inside.size:
            found.append(LengthBin(float(low), float(high), pair_accuracy(inside), int(inside.size)))
    return found


def longer_wins_accuracy(length_differences: Int[np.ndarray, "N"]) -> float:
    """Accuracy of "the longer one is better", with len(better) - len(worse) given; equal lengths are a coin flip, ½."""
    return float(np.mean(0.5 * (1.0 + np.sign(length_differences))))


def paired_difference(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """Mean of after - before and its standard error s / √N, s over N - 1; the error of a single pair is NaN."""
    difference = after.astype(np.float64) - before.astype(np.float64)
    if difference.size < 2:
        return float(np.mean(difference)), float("nan")
    return float(np.mean(difference)), float(np.std(difference, ddof=1) / np.sqrt(difference.size))


def ordered_text_pairs(rankings: Sequence[Ranking]) -> tuple[list[str], Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """All completions in one list, and the indices (better, worse) of every strictly ordered pair."""
    texts: list[str] = []
    better: list[int] = []
    worse: list[int] = []
    for completions, ranks in rankings:
        here = range(len(texts), len(texts) + len(completions))
        texts.extend(completions)
        pairs = [(i, j) for i, a in zip(here, ranks, strict=True) for j, b in zip(here, ranks, strict=True) if a < b]
        better.extend(i for i, _ in pairs)
        worse.extend(j for _, j in pairs)
    return texts, np.asarray(better, np.int64), np.asarray(worse, np.int64)


def _bag(texts: Sequence[str], index: dict[str, int]) -> csr_array:
    rows = [sorted({index[w] for w in words(text) if w in index}) for text in texts]
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.asarray([i for row in rows for i in row], np.int64)
    return csr_array((np.ones(indices.size), indices, indptr), shape=(len(texts), len(index)))


def bag_of_words_accuracy(train: Sequence[Ranking], heldout: Sequence[Ranking], *, l2: float) -> float:
    """Held-out pair accuracy of a logistic model on which words occur: what can be had without reading word order.

    Minimises the mean over pairs of -log σ(w · (x_better - x_worse)), plus ½ · l2 · ‖w‖², with L-BFGS; x is binary over
    the training words. A pair with equal scores is wrong.
    """
    texts, better, worse = ordered_text_pairs(train)
    index = {w: i for i, w in enumerate(sorted({w for text in texts for w in words(text)}))}
    bag = _bag(texts, index)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        scores = bag @ w
        difference = scores[better] - scores[worse]
        pull = -expit(-difference) / better.size
        per_text = np.bincount(better, pull, len(texts)) - np.bincount(worse, pull, len(texts))
        loss = np.mean(np.logaddexp(0.0, -difference)) + 0.5 * l2 * np.dot(w, w)
        return float(loss), bag.T @ per_text + l2 * w

    fit = minimize(objective, np.zeros(len(index)), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    texts, better, worse = ordered_text_pairs(heldout)
    scores = _bag(texts, index) @ fit.x
    return pair_accuracy(scores[better] - scores[worse])


class OveroptimisationFit(NamedTuple):
    """R(d) = start + d · (α - β · log d), d = √KL."""

    start: float
    alpha: float
    beta: float

    def at(self, distances: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """R at each d; R(0) is the start."""
        safe = np.where(distances > 0, distances, 1.0)
        return self.start + np.where(distances > 0, distances * (self.alpha - self.beta * np.log(safe)), 0.0)


def overoptimisation_fit(kl: Float[np.ndarray, "N"], rewards: Float[np.ndarray, "N"]) -> OveroptimisationFit | None:
    """Least squares over α, β and the start. Gao et al. 2022, "Scaling laws for reward model overoptimization", eq. 2.

    ``kl`` in nats a sequence; one below 0 counts as 0. None with fewer than four different distances, as three
    unknowns go through any three.
    """
    d = np.sqrt(np.maximum(kl.astype(np.float64), 0.0))
    known = np.isfinite(d) & np.isfinite(rewards)
    d, rewards = d[known], rewards[known]
    if np.unique(d).size < 4:
        return None
    log_d = np.log(np.where(d > 0, d, 1.0))
    columns = np.stack([np.ones_like(d), d, -d * log_d], axis=-1)
    start, alpha, beta = np.linalg.lstsq(columns, rewards.astype(np.float64), rcond=None)[0]
    return OveroptimisationFit(float(start), float(alpha), float(beta))
