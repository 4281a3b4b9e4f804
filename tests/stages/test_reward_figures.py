"""Judges and baselines against counts by hand, brute force and a fit by plain Newton steps."""

import json
from pathlib import Path

import numpy as np
import pytest

from jrlhf import assets
from jrlhf.report.overoptimisation import overoptimisation_fit
from jrlhf.rollout.diversity import distinct_n, words
from jrlhf.stages.reward_figures import (
    Ranking,
    accuracy_by_length_difference,
    bag_of_words_accuracy,
    expected_calibration_error,
    longer_wins_accuracy,
    ordered_text_pairs,
    pair_accuracy,
    reliability_curve,
)
from jrlhf.tools.quickstart_judge import Lexicon, lexicon_scores, load_opinion_lexicon, paired_difference


def test_words_by_hand() -> None:
    assert words("Well-made, isn't it? A+") == ["well-made", "isn't", "it", "a+"]
    assert words("--good_bad-- 'fine' 2-day\tf**k") == ["good", "bad", "fine", "2-day", "f**k"]
    assert words(" ... ") == []


def test_the_entries_of_the_lexicon_are_words() -> None:
    lexicon = load_opinion_lexicon()
    assert (len(lexicon.positive), len(lexicon.negative)) == (2006, 4783)
    entries = lexicon.positive | lexicon.negative
    assert {entry for entry in entries if words(entry) != [entry]} == {"anti-", "bull----", "bull****"}


def test_lexicon_scores_count_every_occurrence() -> None:
    lexicon = Lexicon(frozenset({"good", "odd"}), frozenset({"bad", "odd"}))
    texts = ["Good, good and bad.", "odd", "", "Goodness", "BAD bad bad good"]
    np.testing.assert_array_equal(lexicon_scores(texts, lexicon), [1, 0, 0, 0, -2])
    shipped = lexicon_scores(["A wonderful film.", "A dull mess.", "The film is a film."], load_opinion_lexicon())
    assert shipped[0] > 0 > shipped[1]
    assert shipped[2] == 0


def test_distinct_n_by_hand() -> None:
    # Pairs: ab ba ab | ab; two kinds of four.
    assert distinct_n([list("abab"), list("ab")], n=2) == 0.5
    assert distinct_n([[1, 2, 3], [1, 2, 4]], n=1) == 4 / 6
    assert distinct_n([[1, 2, 3]], n=3) == 1.0
    assert distinct_n([[1], []], n=2) == 0.0


def test_an_equal_score_is_a_wrong_order() -> None:
    assert pair_accuracy(np.asarray([1.0, 0.0, -2.0, 3.0])) == 0.5


def test_reliability_against_a_loop_over_pairs() -> None:
    margins = np.random.default_rng(0).normal(0.5, 2.0, 500)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for margin in margins:
        confidence = 1.0 / (1.0 + np.exp(-abs(margin)))
        bins.setdefault(min(int((confidence - 0.5) / 0.05), 9), []).append((confidence, margin > 0))
    curve = reliability_curve(margins, bins=10)
    expected = [np.mean(bins[b], axis=0) for b in sorted(bins)]
    np.testing.assert_allclose(np.stack([curve.confidence, curve.accuracy], 1), expected, rtol=1e-12)
    np.testing.assert_array_equal(curve.pairs, [len(bins[b]) for b in sorted(bins)])
    gap = sum(len(part) * abs(np.mean([c for c, _ in part]) - np.mean([r for _, r in part])) for part in bins.values())
    assert expected_calibration_error(margins, bins=10) == pytest.approx(gap / 500, rel=1e-12)


def test_calibration_by_hand() -> None:
    # σ(±ln 3) = 3/4: three of four right is calibrated, four of four is off by a quarter.
    sure = np.log(3.0)
    assert expected_calibration_error(np.asarray([sure, sure, sure, -sure]), bins=10) == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error(np.full(4, sure), bins=10) == pytest.approx(0.25)
    # Zero margins sit in the first bin, and certainty in the last.
    curve = reliability_curve(np.asarray([0.0, 0.0, 100.0]), bins=2)
    assert [part.tolist() for part in curve] == [[0.5, 1.0], [0.0, 1.0], [2, 1]]


def test_accuracy_by_length_difference_by_hand() -> None:
    margins = np.asarray([1.0, -1.0, 2.0, 3.0, -1.0, 1.0])
    lengths = np.asarray([-5, -1, 0, 1, 1, 9])
    parts = accuracy_by_length_difference(margins, lengths, edges=(0, 1))
    inf = float("inf")
    assert parts == [(-inf, 0.0, 0.5, 2), (0.0, 1.0, 1.0, 1), (1.0, inf, pytest.approx(2 / 3), 3)]
    assert [part.pairs for part in accuracy_by_length_difference(margins, lengths, edges=(100,))] == [6]


def test_longer_wins_by_hand() -> None:
    assert longer_wins_accuracy(np.asarray([3, -1, 0, 8])) == (1 + 0 + 0.5 + 1) / 4


def test_paired_difference_by_hand() -> None:
    mean, error = paired_difference(np.asarray([1.0, 2.0, 3.0]), np.asarray([2.0, 4.0, 6.0]))
    assert mean == 2.0
    assert error == pytest.approx(1.0 / np.sqrt(3.0))
    mean, error = paired_difference(np.asarray([1.0]), np.asarray([4.0]))
    assert mean == 3.0
    assert np.isnan(error)


def test_ordered_pairs_leave_ties_out() -> None:
    texts, better, worse = ordered_text_pairs([("abc", [1, 0, 1]), ("de", [0, 0]), ("fg", [0, 2])])
    assert texts == list("abcdefg")
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == [(1, 0), (1, 2), (5, 6)]


def fit_by_newton(pairs: list[tuple[str, str]], vocabulary: list[str], l2: float) -> np.ndarray:
    """The weights of the bag-of-words model from dense differences x_better - x_worse."""
    has = [[np.asarray([word in words(text) for word in vocabulary], float) for text in pair] for pair in pairs]
    x = np.stack([better - worse for better, worse in has])
    w = np.zeros(len(vocabulary))
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(x @ w))
        gradient = -(x.T @ p) / len(x) + l2 * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x) + l2 * np.eye(len(w))
        w -= np.linalg.solve(hessian, gradient)
    return w


def test_the_bag_of_words_model_is_the_penalised_logistic_fit() -> None:
    rng = np.random.default_rng(1)
    vocabulary = sorted("abcdefgh")
    value = dict(zip(vocabulary, range(-4, 4), strict=True))

    def draw(n: int) -> list[tuple[str, str]]:
        """Pairs whose order follows the words' values, up to noise."""
        found = []
        for _ in range(n):
            texts = [" ".join(rng.choice(vocabulary, 3)) for _ in range(2)]
            scores = [sum(value[w] for w in set(text.split())) + rng.normal(0, 2) for text in texts]
            found.append((texts[int(np.argmax(scores))], texts[int(np.argmin(scores))]))
        return found

    def as_rankings(pairs: list[tuple[str, str]]) -> list[Ranking]:
        return [([worse, better], [1, 0]) for better, worse in pairs]

    train, heldout = draw(200), draw(300)
    w = fit_by_newton(train, vocabulary, 0.03)
    weight = dict(zip(vocabulary, w, strict=True))
    margins = [sum(weight[v] for v in set(b.split())) - sum(weight[v] for v in set(a.split())) for b, a in heldout]
    # Scores closer than the optimiser's tolerance may fall either way.
    assert np.sum(np.abs(margins) < 1e-3) == sum(set(b.split()) == set(a.split()) for b, a in heldout)
    expected = float(np.mean(np.asarray(margins) > 1e-3))
    found = bag_of_words_accuracy(as_rankings(train), as_rankings(heldout), l2=0.03)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.6 < expected < 1.0


def test_the_bag_of_words_model_on_the_shipped_rankings() -> None:
    def read(name: str) -> list[Ranking]:
        text = Path(assets.resolve(f"asset:{name}")).read_text(encoding="utf-8")
        return [(row["completions"], row["ranks"]) for row in map(json.loads, text.splitlines())]

    accuracy = bag_of_words_accuracy(read("rankings_train"), read("rankings_heldout"), l2=3e-4)
    assert accuracy == pytest.approx(0.817, abs=0.005)


def test_the_form_of_overoptimisation_is_found_again() -> None:
    kl = np.asarray([0.0, 0.5, 1.0, 4.0, 9.0, 30.0, 100.0])
    d = np.sqrt(kl)
    rewards = 0.25 + d * (0.8 - 0.3 * np.log(np.maximum(d, 1e-30)))
    fit = overoptimisation_fit(kl, rewards)
    assert fit is not None
    np.testing.assert_allclose([fit.start, fit.alpha, fit.beta], [0.25, 0.8, 0.3], atol=1e-12)
    np.testing.assert_allclose(fit.at(d), rewards, atol=1e-12)
    # A KL below 0 is an estimate of 0, and what is not finite is no point.
    noisy = overoptimisation_fit(np.append(kl, [-0.01, np.nan]), np.append(rewards, [0.25, 1.0]))
    assert noisy is not None
    assert noisy.alpha == pytest.approx(0.8)


def test_too_few_distances_have_no_fit() -> None:
    kl = np.asarray([0.0, 1.0, 4.0, 4.0])
    assert overoptimisation_fit(kl, np.asarray([0.0, 1.0, 1.5, 1.4])) is None
    assert overoptimisation_fit(np.zeros(0), np.zeros(0)) is None
