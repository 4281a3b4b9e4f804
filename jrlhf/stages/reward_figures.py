"""Figures of a reward model in plain NumPy: accuracy on people's rankings, calibration and baselines."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit

from jrlhf.rollout.diversity import words

Ranking = tuple[Sequence[str], Sequence[int]]
"""Completions and their ranks: 0 is best, equal ranks are ties."""


def pair_accuracy(margins: Float[np.ndarray, "N"]) -> float:
    """Return the share of pairs with r_better - r_worse > 0; equal scores count as wrong."""
    return float(np.mean(margins > 0.0))


class ReliabilityCurve(NamedTuple):
    """Mean confidence, accuracy and number of pairs for each non-empty bin of confidence."""

    confidence: Float[np.ndarray, "M"]
    accuracy: Float[np.ndarray, "M"]
    pairs: Int[np.ndarray, "M"]


def reliability_curve(margins: Float[np.ndarray, "N"], *, bins: int) -> ReliabilityCurve:
    """Return the accuracy of pairs as a function of the model's confidence.

    Confidence is σ(|margin|), the model's probability of its predicted order; ``bins`` divide [0.5, 1] evenly.
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
    """Return Σ_b n_b / N · |accuracy_b - confidence_b| over ``reliability_curve`` (Guo et al. 2017, eq. 3)."""
    curve = reliability_curve(margins, bins=bins)
    return float(np.sum(curve.pairs * np.abs(curve.accuracy - curve.confidence)) / np.sum(curve.pairs))


class LengthBin(NamedTuple):
    """Accuracy on pairs with ``low`` <= len(better) - len(worse) < ``high``."""

    low: float
    high: float
    accuracy: float
    pairs: int


def accuracy_by_length_difference(
    margins: Float[np.ndarray, "N"], length_differences: Int[np.ndarray, "N"], *, edges: Sequence[int]
) -> list[LengthBin]:
    """Return the accuracy per bin of length difference; a model that scores by length shows a slope.

    A length difference is len(better) - len(worse). ``edges`` are in ascending order, and an open bin is added at each
    end. Empty bins are left out.
    """
    bounds = [-np.inf, *edges, np.inf]
    bin_of = np.digitize(length_differences, np.asarray(edges, np.float64))
    length_bins = []
    for i, (low, high) in enumerate(pairwise(bounds)):
        inside = margins[bin_of == i]
        if inside.size:
            length_bins.append(LengthBin(float(low), float(high), pair_accuracy(inside), int(inside.size)))
    return length_bins


def longer_wins_accuracy(length_differences: Int[np.ndarray, "N"]) -> float:
    """Return the accuracy of "the longer one is better" from len(better) - len(worse); equal lengths count ½."""
    return float(np.mean(0.5 * (1.0 + np.sign(length_differences))))


def ordered_text_pairs(rankings: Sequence[Ranking]) -> tuple[list[str], Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Return all completions in one list, and the indices (better, worse) of every strictly ordered pair."""
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
    """Return the held-out pair accuracy of a logistic model on the set of words, a baseline without word order.

    The model minimises the mean over pairs of -log σ(w · (x_better - x_worse)), plus ½ · l2 · ‖w‖², with L-BFGS; x is
    binary over the training words. Equal scores count as wrong.
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


def ordered_differences(
    ranks: Int[np.ndarray, "B K"], valid: Bool[np.ndarray, "B K"], *columns: Shaped[np.ndarray, "B K"]
) -> tuple[np.ndarray, ...]:
    """Return each column's value at the better completion minus that at the worse, for all strictly ordered pairs."""
    better = (ranks[:, :, None] < ranks[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    row, winner, loser = np.nonzero(better)
    return tuple(column[row, winner] - column[row, loser] for column in columns)


def pair_metrics(margins: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Return the metrics of all pairs from their differences in score and in length (better minus worse)."""
    by_length = accuracy_by_length_difference(margins, lengths, edges=(0, 1))
    names = {-np.inf: "shorter", 0.0: "as_long", 1.0: "longer"}
    return {
        "accuracy": pair_accuracy(margins),
        "loss": float(np.mean(np.logaddexp(0.0, -margins))),
        "margin": float(np.mean(margins)),
        "ece": expected_calibration_error(margins, bins=10),
        "longer_wins_accuracy": longer_wins_accuracy(lengths),
        "pairs": float(len(margins)),
    } | {f"accuracy_better_is_{names[part.low]}": part.accuracy for part in by_length}


def calibration_bins(margins: np.ndarray) -> list[dict[str, float]]:
    """Return ``reliability_curve`` for JSON, in the ten bins of the calibration error."""
    curve = reliability_curve(margins, bins=10)
    return [
        {"confidence": float(confidence), "accuracy": float(accuracy), "pairs": int(pairs)}
        for confidence, accuracy, pairs in zip(*curve, strict=True)
    ]
