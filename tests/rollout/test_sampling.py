"""Several answers to each prompt of a file, however they are cut into batches; and from a cache in int8."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf import assets
from jrlhf.config import ModelConfig, SamplingConfig
from jrlhf.config.rewards import LengthRuleConfig, RewardsConfig
from jrlhf.config.tools import GenerateConfig
from jrlhf.models import load_pretrained
from jrlhf.models.cache import CacheKind
from jrlhf.parallel import make_mesh, shard_batch
from jrlhf.rollout import sampling
from jrlhf.rollout.sampling import jit_sampler
from jrlhf.runs.metrics import read_metrics
from jrlhf.stages.ppo import run_ppo
from jrlhf.tools.inference import run_generate
from jrlhf.types import DecodeFns
from tests.support.runs import small_config

PROMPTS = ["Once", "Lily and Tom went to the", "One day, a little girl", "The dog", "Tim saw a big"]


def drawn(
    tmp_path: Path, *, samples: int, batch_size: int, temperature: float, kv_cache: CacheKind = "compute"
) -> list[list[str]]:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    how = SamplingConfig(max_new_tokens=8, temperature=temperature, kv_cache=kv_cache)
    run_generate(
        GenerateConfig(
            "asset:stories260k", str(prompts), out=str(out), samples=samples, batch_size=batch_size, sampling=how
        )
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    return [row["completions"] for row in rows]


def test_each_prompt_gets_its_own_answers_however_many_are_sampled_at_once(tmp_path: Path) -> None:
    greedy = drawn(tmp_path, samples=2, batch_size=8, temperature=0.0)
    assert all(one == other for one, other in greedy)
    assert len({answer for answer, _ in greedy}) == len(PROMPTS)
    # One slot a device, where an answer waits for the one before it, and a slot for each answer.
    free = drawn(tmp_path, samples=5, batch_size=8, temperature=1.0)
    assert all(len(set(answers)) > 1 for answers in free), "each is a draw of its own"
    assert drawn(tmp_path, samples=3, batch_size=64, temperature=1.0) == [answers[:3] for answers in free]


@pytest.mark.parametrize(("kv_cache", "dtype"), [("compute", "float32"), ("int8", "int8")])
def test_generate_keeps_keys_and_values_in_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_cache: CacheKind, dtype: str
) -> None:
    caches, usual = [], sampling.make_generate

    def watched(decode_fns: DecodeFns, **settings: Any) -> Any:
        caches.append(jax.eval_shape(lambda: decode_fns.init_cache(2, 9)))
        return usual(decode_fns, **settings)

    monkeypatch.setattr(sampling, "make_generate", watched)
    answers = drawn(tmp_path, samples=2, batch_size=16, temperature=0.0, kv_cache=kv_cache)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(caches[0].keys) if leaf.ndim == 4} == {dtype}
    assert all(one == other for one, other in answers)
    assert len({answer for answer, _ in answers}) == len(PROMPTS)


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)])
def test_answers_from_a_cache_in_int8_do_not_depend_on_the_devices(axes: tuple[int, int, int]) -> None:
    """Rows, and with "tensor" heads, lie on several of them; also where answers leave early, which one device's do."""
    config = SamplingConfig(max_new_tokens=8, temperature=0.7, kv_cache="int8")
    tokens, mask = np.random.default_rng(0).integers(3, 500, (8, 6), np.int32), np.ones((8, 6), bool)
    mask[3, :4] = mask[5, :2] = False

    def answers(data: int, fsdp: int, tensor: int) -> Any:
        mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: data * fsdp * tensor])
        model = load_pretrained(assets.resolve("asset:stories260k"), dtype="float32", mesh=mesh)
        generate = jit_sampler(model.decode_fns, config, mesh, stop_tokens=(*range(300, 400),), pad_token=0)
        prompts = *shard_batch((tokens, mask, np.arange(8, dtype=np.int32)), mesh), jax.random.key(1)
        return generate(model.params, *prompts)

    found, expected = answers(*axes), answers(1, 1, 1)
    for name in ("tokens", "mask", "response_mask", "stopped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    # Sums in another order may take a number across a half, to the next one.
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=0.05)


def test_a_run_on_a_cache_in_int8_says_how_far_the_sampler_is_from_the_trainer(tmp_path: Path) -> None:
    """And from the policy that answers the update is as far as ever: not at all."""
    config = small_config(tmp_path, "run")
    ppo = replace(
        config.ppo,
        model=ModelConfig(path="asset:stories260k"),
        rewards=RewardsConfig(model_weight=0.0, length=LengthRuleConfig(weight=1.0, min=3, max=5)),
        value_from="shared",
        ptx_coef=0.0,
        sampling=replace(config.ppo.sampling, kv_cache="int8"),
        iterations=1,
    )
    run_ppo(replace(config, ppo=ppo))
    (line,) = (line for line in read_metrics(Path(config.run) / "ppo" / "metrics.jsonl") if "kl" in line)
    # The largest of 64 answers is 0.5 to 1.9 with eight keys each, their mean 0.05: a few tokens decide it.
    assert 1e-3 < line["sampler/max_abs_logprob_diff"] < 2.0
    assert 1e-6 < abs(line["sampler/mean_ratio"] - 1.0) < 0.05
    assert line["policy/first_minibatch_max_abs_log_ratio"] <= 5e-5
    assert line["kl"] == 0.0
