"""Groups of equal scores give way to groups of further prompts: which, from where, and how a run does it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from jrlhf.config import Config, GroupKLConfig, GRPOConfig, ModelConfig
from jrlhf.config.rewards import RequiredRuleConfig, RewardsConfig
from jrlhf.rollout.drawing import replacements, widened
from jrlhf.rollout.sampling import prompt_readings
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.grpo import run_grpo
from jrlhf.train.attempt import Event
from jrlhf.types import Generation
from tests.support.runs import compare_runs, small_config


@given(hnp.arrays(np.bool_, 6), hnp.arrays(np.bool_, 6))
def test_the_first_groups_with_a_difference_take_the_first_places_without(dull, further):
    expected, good = list(range(6)), [6 + j for j in range(6) if not further[j]]
    for i in range(6):
        if dull[i] and good:
            expected[i] = good.pop(0)
    np.testing.assert_array_equal(replacements(dull, further), expected)


def test_a_narrower_batch_is_padded_on_its_left():
    mask = jnp.array([[False, True, True], [True, True, True]])
    tokens, response = jnp.array([[9, 1, 2], [3, 4, 5]]), jnp.array([[False, False, True]] * 2)
    generation = Generation(tokens, mask, response, jnp.where(response, -1.0, 0.0), mask[:, 0])
    wide = widened(generation, 5, pad=9)
    np.testing.assert_array_equal(wide.tokens, [[9, 9, 9, 1, 2], [9, 9, 3, 4, 5]])
    np.testing.assert_array_equal(wide.mask[:, 2:], mask)
    assert not np.asarray(wide.mask[:, :2]).any()
    np.testing.assert_array_equal(wide.stopped, generation.stopped)
    assert widened(generation, 3, pad=9).tokens.shape == (2, 3)


@pytest.mark.parametrize(
    ("samples", "rows", "devices", "expected"),
    [(8, 64, 8, 1), (4, 16, 8, 2), (4, 24, 8, 4), (6, 36, 3, 1), (6, 12, 4, 2)],
)
def test_a_prompt_is_read_as_seldom_as_the_devices_allow(samples, rows, devices, expected):
    assert prompt_readings(samples, rows=rows, devices=devices) == expected


RARE = RewardsConfig(model_weight=0.0, required=RequiredRuleConfig(weight=1.0, patterns=("[.!]",)))
"""Whether an answer ends a sentence: about half of all groups have no such answer, or only such."""


def config_of(folder: Path, run: str, **changes: Any) -> Config:
    small = small_config(folder, run, save_every=1)
    prompts = replace(small.ppo.prompts, buckets=2)
    grpo = GRPOConfig(
        model=ModelConfig(path="asset:stories260k"),
        rewards=RARE,
        prompts=replace(prompts, eval=""),
        sampling=small.ppo.sampling,
        kl=GroupKLConfig(coef=0.0),
        iterations=3,
        episodes=16,
        samples=2,
        log=small.ppo.log,
        checkpoint=small.ppo.checkpoint,
    )
    return Config(run=small.run, seed=small.seed, grpo=replace(grpo, **changes))


def lines_of(config: Config) -> list[dict[str, float]]:
    return [line for line in read_metrics(Path(config.run) / "grpo" / "metrics.jsonl") if "loss" in line]


def test_a_run_replaces_groups_and_comes_back_to_the_same_ones(tmp_path: Path) -> None:
    plain, config = config_of(tmp_path, "plain"), config_of(tmp_path, "run", resample=2)
    run_grpo(plain)
    run_grpo(config)
    before, after = lines_of(plain)[0], lines_of(config)[0]
    assert after["groups/replaced"] > 0
    assert 1 < after["groups/draws"] <= 3
    # The same first draw: what is left is what was not replaced.
    assert after["groups/degenerate"] + after["groups/replaced"] == pytest.approx(before["groups/degenerate"])
    assert not {"groups/replaced", "groups/draws"} & before.keys()

    again = replace(config, run=str(tmp_path / "again"))

    def fail(event: Event) -> None:
        if (event.kind, event.step) == ("save", 1):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_grpo(again, on_event=fail)
    run_grpo(again)
    compare_runs(tmp_path / "run" / "grpo", tmp_path / "again" / "grpo")
