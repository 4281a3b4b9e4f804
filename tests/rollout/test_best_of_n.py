"""The curve of best of n against all choices, and in the folder and the report of a run."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from jrlhf.config.rewards import LengthRuleConfig, RewardsConfig
from jrlhf.report.charts import overoptimisation_chart
from jrlhf.report.record import read_run
from jrlhf.rollout.best_of_n import best_mean, best_of_n_curve, best_of_n_kl, curve_sizes
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.table import STAGES
from tests.support.runs import small_config
from tests.support.short_model import SHORT_MODEL


@pytest.mark.parametrize("n", range(1, 8))
def test_a_mean_is_that_over_all_choices(n: int) -> None:
    rng = np.random.default_rng(n)
    scores, values = rng.normal(size=7), rng.normal(size=7)
    choices = [max(choice, key=lambda i: scores[i]) for choice in combinations(range(7), n)]
    np.testing.assert_allclose(best_mean(scores, n), np.mean(scores[choices]), rtol=1e-12)
    np.testing.assert_allclose(best_mean(scores, n, values), np.mean(values[choices]), rtol=1e-12)


def test_equal_scores_are_any_choice() -> None:
    scores = np.array([1.0, 3.0, 3.0, 0.0])
    assert best_mean(scores, 2) == pytest.approx(np.mean([max(choice) for choice in combinations(scores, 2)]))


def test_a_curve_leaves_out_answers_without_a_score() -> None:
    scores = np.array([[1.0, 2.0, np.nan, 0.0], [5.0, 4.0, 7.0, 6.0], [np.nan] * 4])
    one, two, four = best_of_n_curve(scores, None)
    assert one == {"n": 1, "kl": 0.0, "score": pytest.approx((1.0 + 5.5) / 2)}
    first, second = (np.mean([max(c) for c in combinations(row, 2)]) for row in ([1.0, 2.0, 0.0], [5.0, 4.0, 7.0, 6.0]))
    assert two == {"n": 2, "kl": pytest.approx(math.log(2) - 1 / 2), "score": pytest.approx((first + second) / 2)}
    assert four == {"n": 4, "kl": best_of_n_kl(4), "score": 7.0}
    judge = np.where(np.isfinite(scores), -scores, np.nan)
    assert [point["judge"] for point in best_of_n_curve(scores, judge)] == [-p["score"] for p in (one, two, four)]


def test_the_sizes_of_a_curve_double() -> None:
    assert [curve_sizes(n) for n in (2, 3, 8)] == [[1, 2], [1, 2, 3], [1, 2, 4, 8]]


def test_a_run_writes_the_curve_of_its_first_policy_and_the_report_draws_it(tmp_path: Path) -> None:
    rules = RewardsConfig(model_weight=0.0, length=LengthRuleConfig(weight=1.0, unit="words", min=12, max=13))
    config = small_config(tmp_path, "run")
    model = replace(config.ppo.model, path=SHORT_MODEL)
    config = replace(config, ppo=replace(config.ppo, model=model, rewards=rules, iterations=1, best_of_n=3))
    run_ppo(config)
    curve = json.loads((Path(config.run) / "ppo" / "best_of_n.json").read_text())["curve"]
    assert [point["n"] for point in curve] == [1, 2, 3]
    scores = [point["score"] for point in curve]
    assert scores == sorted(scores)
    assert 0.0 < scores[0] < scores[-1] < 1.0
    run = read_run(Path(config.run), None, STAGES)
    assert run.best_of_n["ppo"] == curve
    chart, _ = overoptimisation_chart("ppo", run, "")
    assert "best of n: reward" in [renderer.name for renderer in chart.renderers]
