"""Best of n: which answers of a prompt are kept, and which settings make sense."""

import math

import pytest

from jrlhf.config import ConfigError, check
from jrlhf.config.rewards import LengthRuleConfig, RewardsConfig
from jrlhf.config.tools import SampleConfig
from jrlhf.tools.best_of_n import ScoredAnswer, chosen_row

RULE = RewardsConfig(length=LengthRuleConfig(weight=1.0))


def test_blank_answers_and_those_without_a_score_are_not_kept() -> None:
    row = {"prompt": "p", "tools": [], "answer": "4"}
    answers = [
        ScoredAnswer("", 9.0),
        ScoredAnswer("none", math.nan),
        ScoredAnswer("b", 1.0),
        ScoredAnswer("c", 2.0),
        ScoredAnswer("d", 2.0),
        ScoredAnswer("e", 1.0),
        ScoredAnswer(" ", -9.0),
    ]
    about = {"prompt": "p", "tools": []}
    assert chosen_row(row, answers, with_worst=False) == about | {"completion": "c"}
    assert chosen_row(row, answers, with_worst=True) == about | {"chosen": "c", "rejected": "b"}
    assert chosen_row(row, answers[:2], with_worst=False) is None
    assert chosen_row(row, answers[3:5], with_worst=True) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 10}, "samples: must be from 2 to 9, got 10"),
        ({"samples": 1, "keep": "best", "score": "r"}, "samples: must be 2 or more, got 1"),
        ({"score": "r"}, "keep: must be best or best-worst, because score or rewards is set, got 'all'"),
        ({"rewards": RULE}, "keep: must be best or best-worst, because score or rewards is set, got 'all'"),
        ({"keep": "best"}, "score: must be set, or a rule of rewards have a weight, because keep is best, got ''"),
        (
            {"keep": "best", "score": "r", "rewards": RewardsConfig(models=("s",))},
            "rewards.models: must be empty; score names the reward model, got ('s',)",
        ),
        (
            {"keep": "best", "rewards": RewardsConfig(length=LengthRuleConfig(weight=1.0, min=9, max=2))},
            "rewards.length.max: must be at least rewards.length.min (9), got 2",
        ),
    ],
)
def test_what_makes_no_sense_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(SampleConfig("m", "p", **settings))
    assert str(caught.value) == message


def test_more_answers_than_keys_are_for_the_best_alone() -> None:
    check(SampleConfig("m", "p", samples=16, keep="best", rewards=RULE))
