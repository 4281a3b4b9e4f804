"""What a GRPO section may not say, each with the key and the reason; and what its automatic values are."""

from dataclasses import replace
from typing import Any

import pytest

from jrlhf.config import (
    Config,
    ConfigError,
    GroupKLConfig,
    GRPOConfig,
    ModelConfig,
    PPOConfig,
    SamplingConfig,
    check,
    load_config,
    to_yaml,
)
from jrlhf.config.files import apply_flags
from jrlhf.config.rewards import RewardsConfig, StopRuleConfig
from jrlhf.config.watch import GuardsConfig, RolloutGuardsConfig

RULE = RewardsConfig(stop=StopRuleConfig(weight=1.0))
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"samples": 1}, "samples: must be 2 or more, because an answer is set against the others of its group, got 1"),
    ({"samples": 6}, r"samples: must be a divisor of grpo\.episodes \(64\), got 6"),
    ({"rollout_parts": 16}, r"rollout_parts: must be a divisor of the rollout's prompts, .* \(8\), got 16"),
    ({"kl": GroupKLConfig(coef=0.0, target=1.0)}, r"kl\.target: must be 0, because grpo\.kl\.coef is 0"),
    (
        {"kl": GroupKLConfig(coef=0.0, place="loss")},
        r"kl\.place: must be auto, because .* is 0, .* got 'loss'",
    ),
    ({"kl": GroupKLConfig(coef=0.0, place="reward")}, r"kl\.place: must be auto, because grpo\.kl\.coef is 0"),
    ({"kl": GroupKLConfig(estimator="k1")}, r"kl\.estimator: must be k2 or k3, because grpo\.kl\.place is auto"),
    ({"kl": GroupKLConfig(estimator="k1", place="loss")}, r"kl\.estimator: must be k2 or k3, because .*place is loss"),
    ({"loss": "cispo", "dual_clip": 2.0}, r"dual_clip: must be 0 \(off\), because grpo\.loss cispo"),
    ({"loss": "cispo", "ratio": "sequence"}, r"ratio: must be token, because grpo\.loss cispo"),
    ({"loss": "cispo", "clip": 1.5}, r"clip: must be above 0 and at most 1 \(off\)"),
    ({"clip": 1.0}, r"clip: must be above 0 and below 1"),
    ({"clip_high": -0.1}, r"clip_high: must be 0 \(as clip\) or more"),
    ({"overlong_penalty": 1.0}, r"overlong_penalty: must be above 0 if and only if grpo\.overlong_buffer is"),
    ({"overlong_buffer": 8}, r"overlong_penalty: must be above 0 if and only if grpo\.overlong_buffer is"),
    ({"overlong_buffer": 200, "overlong_penalty": 1.0}, r"overlong_buffer: must be from 0 \(off\) to .* \(128\)"),
    ({"normalise": "each"}, r"normalise: must be sum, unless several rewards"),
    ({"normalise": "each", "rewards": RULE, "scale": False}, r"scale: must be true, because grpo\.normalise each"),
    (
        {"normalise": "each", "rewards": RULE, "missing_eos_penalty": 1.0},
        r"missing_eos_penalty: must be 0, because grpo\.normalise each has no sum",
    ),
    (
        {"normalise": "each", "rewards": RULE, "kl": GroupKLConfig(place="reward")},
        r"kl\.place: must be loss, because grpo\.normalise each",
    ),
    ({"sampler_weight_cap": -1.0}, r"sampler_weight_cap: must be auto, or 0 \(off\) or more"),
    (
        {"sampler_weight_cap": 2.0, "old_logprobs": "sampler"},
        r"sampler_weight_cap: must be 0 or auto, because grpo\.old_logprobs sampler",
    ),
    (
        {"old_logprobs": "sampler", "model": ModelConfig(dtype="bfloat16")},
        r"old_logprobs: must be policy, unless grpo\.model\.dtype is float32 and grpo\.sampling\.kv_cache compute",
    ),
    (
        {"kl": GroupKLConfig(coef=0.0), "model": ModelConfig(weights="bfloat16")},
        r"model\.weights: must be auto or float32, because without grpo\.lora all weights are trained",
    ),
]


@pytest.mark.parametrize(("changes", "problem"), WRONG, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(WRONG)])
def test_nonsense_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^grpo\.{problem}"):
        check(Config(grpo=replace(GRPOConfig(), **changes)))


def test_what_makes_sense_is_not_refused() -> None:
    for changes in (
        {"normalise": "each", "rewards": RULE},
        {"loss": "cispo", "clip": 1.0, "clip_high": 4.0},
        {"overlong_buffer": 8, "overlong_penalty": 1.0, "leave_out_cut": True},
        {"kl": GroupKLConfig(estimator="k1", place="reward", target=6.0)},
        {"kl": GroupKLConfig(coef=0.0), "samples": 2},
    ):
        check(Config(grpo=replace(GRPOConfig(), **changes)))


def test_there_is_nothing_of_a_critic() -> None:
    names = {*vars(GRPOConfig()), *vars(GRPOConfig().guards)}
    assert not names & {"value_from", "value_lr", "value_clip", "value_coef", "gamma", "lam", "explained_variance"}
    assert isinstance(PPOConfig().guards, GuardsConfig)
    assert not isinstance(GRPOConfig().guards, GuardsConfig)
    assert isinstance(GRPOConfig().guards, RolloutGuardsConfig)


@pytest.mark.parametrize("section", [PPOConfig(), GRPOConfig()])
def test_the_sampler_is_weighed_where_it_differs_by_design(section: PPOConfig | GRPOConfig) -> None:
    assert section.weight_cap == 0.0
    assert replace(section, model=ModelConfig(dtype="bfloat16")).weight_cap == 2.0
    assert replace(section, sampling=SamplingConfig(kv_cache="int8")).weight_cap == 2.0
    assert replace(section, sampler_weight_cap=3.0).weight_cap == 3.0
    assert replace(section, model=ModelConfig(dtype="bfloat16"), sampler_weight_cap=0.0).weight_cap == 0.0


def test_a_cap_is_read_as_a_number_or_auto(tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    for text, value in (("auto", "auto"), ("3", 3.0), ("2.5", 2.5)):
        path.write_text(f"grpo: {{sampler_weight_cap: {text}}}")
        config = load_config(path)
        assert config.grpo.sampler_weight_cap == value
        path.write_text(to_yaml(config))
        assert load_config(path) == config
        assert apply_flags(Config(), {"grpo.sampler_weight_cap": [text]}).grpo.sampler_weight_cap == value
    path.write_text("grpo: {sampler_weight_cap: much}")
    with pytest.raises(ConfigError, match=r"sampler_weight_cap: expected a finite number or auto, got 'much'"):
        load_config(path)
