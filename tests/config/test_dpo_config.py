"""The section of DPO: its defaults, and what makes no sense."""

from dataclasses import replace

import pytest

from jrlhf.config import Config, ConfigError, DPOConfig, check, stage_sections
from jrlhf.config.dpo_check import dpo_advice


def test_the_stage_stands_between_the_reward_model_and_ppo():
    names = [*stage_sections()]
    assert names.index("reward") < names.index("dpo") < names.index("ppo")
    assert stage_sections()["dpo"].kind == "language"


@pytest.mark.parametrize(
    "dpo",
    [
        DPOConfig(),
        DPOConfig(label_smoothing=0.49),
        DPOConfig(loss="ipo", beta=0.5),
        DPOConfig(loss="simpo", beta=2.0, gamma=1.0),
        DPOConfig(loss="simpo", beta=2.0),
        DPOConfig(loss="kto", desirable_weight=1.3, undesirable_weight=0.5),
        DPOConfig(pack_length=4096),
    ],
)
def test_what_makes_sense_is_accepted(dpo):
    check(Config(dpo=dpo))
    assert dpo_advice("dpo", dpo) == ""


def test_a_beta_of_dpo_in_simpo_is_warned_of():
    dpo = DPOConfig(loss="simpo")
    check(Config(dpo=dpo))
    said = dpo_advice("dpo", dpo)
    assert said.startswith("dpo.beta: 0.1 is low for loss simpo, ")
    assert said.endswith("Meng et al. (2024, arXiv 2405.14734) use 2 to 2.5, and up to 10 with larger models")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"beta": 0.0}, "dpo.beta: must be above 0, else nothing is learnt from the order of answers, got 0.0"),
        ({"beta": -0.1}, "dpo.beta: must be above 0, else nothing is learnt from the order of answers, got -0.1"),
        ({"label_smoothing": 0.5}, "dpo.label_smoothing: must be from 0 to below 0.5, got 0.5"),
        ({"label_smoothing": -0.1}, "dpo.label_smoothing: must be from 0 to below 0.5, got -0.1"),
        ({"loss": "ipo", "label_smoothing": 0.1},
         "dpo.label_smoothing: must be 0, because dpo.loss is ipo and only sigmoid has smooth labels, got 0.1"),
        ({"loss": "simpo", "label_smoothing": 0.1},
         "dpo.label_smoothing: must be 0, because dpo.loss is simpo and only sigmoid has smooth labels, got 0.1"),
        ({"gamma": 0.5}, "dpo.gamma: must be 0, because dpo.loss is sigmoid and only simpo has this margin, got 0.5"),
        ({"loss": "simpo", "gamma": -1.0}, "dpo.gamma: must be 0 or more, got -1.0"),
        ({"loss": "kto", "gamma": 0.5},
         "dpo.gamma: must be 0, because dpo.loss is kto and only simpo has this margin, got 0.5"),
        ({"loss": "kto", "desirable_weight": 0.0},
         "dpo.desirable_weight: must be above 0, because kto learns from both kinds of answers, got 0.0"),
        ({"undesirable_weight": 2.0},
         "dpo.undesirable_weight: must be 1, because dpo.loss is sigmoid and only kto has this weight, got 2.0"),
        ({"epochs": 0.0}, "dpo.epochs: must be above 0, got 0.0"),
        ({"batch_size": 0}, "dpo.batch_size: must be 1 or more, got 0"),
        ({"pack_length": 8}, "dpo.pack_length: must be 0 (off), or at least dpo.data.max_length (1024), got 8"),
        ({"gates": ("accuracy >= 0.6",)},
         "dpo.data.eval: must be set, because dpo.gates are bounds on held-out figures, got ''"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_names_key_and_reason(changes, problem):
    with pytest.raises(ConfigError) as caught:
        check(Config(dpo=replace(DPOConfig(), **changes)))
    assert str(caught.value).splitlines() == [problem]
