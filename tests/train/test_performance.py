"""What a log line says of time and work: against a clock that is set by hand and a loop over tokens."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.config import LoRAConfig, ModelConfig, PPOConfig, SamplingConfig
from jrlhf.models.cache import CacheKind
from jrlhf.models.flops import forward_flops
from jrlhf.parallel.devices.peaks import Peaks
from jrlhf.train.performance import phase_rates, rates, rollout_work, training_flops
from jrlhf.train.window import Rate, Window
from jrlhf.types import Generation, SFTBatch
from tests.support.archs import small_arch

ARCH = small_arch(vocab_size=32, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_has_means_maxima_rates_and_shares_of_the_time() -> None:
    clock = Clock()
    counts = Rate("tokens", "tokens_per_second"), Rate("work", "used", unit=2.0, during="seconds/fast")
    window = Window(counts, clock, maxima=("highest",))
    for loss, highest, seconds in ((1.0, 5.0, 0.5), (3.0, 4.0, 1.5)):
        step = {
            "loss": loss,
            "highest": highest,
            "max_length_rule": loss,
            "tokens": 40.0,
            "work": 8.0,
            "seconds/fast": seconds,
            "skipped": 0.0,
        }
        window.add({name: jnp.float32(value) for name, value in step.items()})
    with window.apart("evaluation", jnp.float32(0)):
        clock.now += 2.0
    clock.now += 8.0
    assert window.close() == {
        "loss": 2.0,
        "highest": 5.0,
        "max_length_rule": 2.0,
        "skipped": 0.0,
        "seconds/fast": 1.0,
        "tokens_per_second": 80.0 / 8.0,
        "used": 16.0 / 2.0 / 2.0,
        "share/fast": 2.0 / 10.0,
        "share/evaluation": 2.0 / 10.0,
    }
    window.add({name: jnp.float32(1) for name in step})
    clock.now += 4.0
    line = window.close()
    assert line["tokens_per_second"] == 1.0 / 4.0
    assert "share/evaluation" not in line


@pytest.mark.parametrize(("frozen", "passes"), [(False, 3.0), (True, 2.0)])
def test_a_training_step_takes_its_forward_passes_over_real_tokens(frozen: bool, passes: float) -> None:
    positions = np.array([[0, 1, 2, -1], [0, 1, -1, -1]])
    flops = training_flops(ARCH, frozen=frozen)
    assert float(flops(jnp.asarray(positions >= 0), 3.0)) == passes * float(forward_flops(ARCH, positions, logits=3))
    # Packed: the second sequence starts anew.
    packed = np.array([[0, 1, 2, 0, 1, -1]])
    assert float(flops(jnp.asarray([[1, 1, 1, 2, 2, 0]], jnp.int32), 3.0)) == passes * float(
        forward_flops(ARCH, packed, logits=3)
    )


@pytest.mark.parametrize(("kv_cache", "vector"), [("compute", 2 * 8), ("int8", 8 + 4)])
def test_an_iteration_s_work_is_that_of_its_tokens(kv_cache: CacheKind, vector: int) -> None:
    mask = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
    response = np.array([[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]], bool)
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)
    zeros = jnp.zeros(mask.shape, jnp.float32)
    generation = Generation(
        zeros.astype(jnp.int32), jnp.asarray(mask), jnp.asarray(response), zeros, jnp.zeros(2, jnp.bool_)
    )
    text = SFTBatch(jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), jnp.bool_), jnp.ones((1, 3), jnp.bool_))
    ppo = PPOConfig(model=ModelConfig(dtype="bfloat16"), epochs=4, sampling=SamplingConfig(kv_cache=kv_cache))
    found = rollout_work(ppo, ARCH, ARCH, [ARCH, ARCH])(generation, text)
    policy, value = (float(forward_flops(ARCH, positions, logits=logits)) for logits in (5, 0))
    ptx = float(forward_flops(ARCH, np.arange(3), logits=2))
    # Two steps of decoding feed the tokens at positions 2 (first row), 3 and 4 (second row).
    weights = ARCH.num_layers * (2 * 16 * 8 * 3 + 3 * 16 * 24) + 32 * 16
    cached = ARCH.num_layers * 2 * vector * sum(position + 1 for position in (2, 3, 4))
    assert {name: float(value) for name, value in found.items()} == {
        "flops/rollout": policy,
        "flops/scoring": 2 * policy + value + 2 * value,
        "flops/update": 12 * (policy + value + ptx),
        "bytes/rollout": 2 * 2 * weights + cached,
        "tokens/rollout": 5.0,
        "tokens/scoring": 10.0,
    }


@pytest.mark.parametrize(
    ("changes", "scoring", "update"),
    [({}, 3.0, 12.0), ({"old_logprobs": "sampler"}, 2.0, 12.0), ({"lora": LoRAConfig(rank=2), "epochs": 1}, 3.0, 4.0)],
)
def test_work_is_as_the_config_says(changes: dict[str, Any], scoring: float, update: float) -> None:
    """Without logits, and with a value network as large as the policy, all passes are alike."""
    mask = jnp.ones((1, 4), jnp.bool_)
    generation = Generation(mask.astype(jnp.int32), mask, ~mask, mask.astype(jnp.float32), mask[:, 0])
    found = rollout_work(PPOConfig(**{"epochs": 2} | changes), ARCH, ARCH, [])(generation, None)
    once = float(forward_flops(ARCH, np.arange(4), logits=0))
    assert float(found["flops/scoring"]) == scoring * once
    assert float(found["flops/update"]) == update * once


def test_each_part_of_a_rollout_reads_the_weights_anew() -> None:
    response = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]], bool)
    zeros, mask = jnp.zeros(response.shape, jnp.float32), jnp.ones(response.shape, jnp.bool_)
    generation = Generation(zeros.astype(jnp.int32), mask, jnp.asarray(response), zeros, jnp.zeros(4, jnp.bool_))

    def fetched(parts: int) -> float:
        work = rollout_work(PPOConfig(rollout_parts=parts, model=ModelConfig(dtype="bfloat16")), ARCH, ARCH, [])
        return float(work(generation, None)["bytes/rollout"])

    # Two steps of decoding for all rows; two for the first half of them and one for the second; 2 + 1 + 0 + 1.
    weights = 2 * (ARCH.num_layers * (2 * 16 * 8 * 3 + 3 * 16 * 24) + 32 * 16)
    assert fetched(2) - fetched(1) == weights
    assert fetched(4) - fetched(1) == 2 * weights


def test_shares_of_a_peak_are_left_out_where_none_is_known() -> None:
    names = {rate.name for rate in (*rates(None), *phase_rates(None))}
    assert not any("mfu" in name or "bandwidth" in name for name in names)
    known = {rate.name for rate in (*rates(Peaks(1.0, 1.0)), *phase_rates(Peaks(1.0, 1.0)))}
    assert known - names == {
        "perf/mfu",
        "perf/rollout_mfu",
        "perf/scoring_mfu",
        "perf/update_mfu",
        "perf/rollout_bandwidth_share",
    }
