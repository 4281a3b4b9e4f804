"""No two consumers of random numbers meet at one key: a whole run is recorded, every draw of it."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
import pytest
from jax.extend.random import define_prng_impl

from jrlhf.config import Config, LoRAConfig
from jrlhf.config.watch import SafetyConfig
from jrlhf.stages.ppo import run_ppo
from jrlhf.stages.reward import run_reward
from jrlhf.stages.sft import run_sft
from jrlhf.train.keys import Stream, stream_key
from tests.support.runs import first_rows, small_config

ANSWER_TOKEN = (2,)
"""Shape of the random numbers of an answer's token."""


class Draw(NamedTuple):
    """The numbers that one consumer takes at once: its stage, and the shape that only it draws there."""

    stage: str
    shape: tuple[int, ...]


class Recorder:
    """A generator of JAX's own numbers that notes every key that is drawn from, and every key that others derive of."""

    def __init__(self) -> None:
        self.stage = ""
        self.drawn: dict[tuple[int, ...], list[Draw]] = defaultdict(list)
        self.parents: set[tuple[int, ...]] = set()
        self.parents_of: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
        self.impl = define_prng_impl(
            key_shape=(2,),
            seed=lambda seed: jax.random.key_data(jax.random.key(seed)),
            split=self._split,
            random_bits=self._random_bits,
            fold_in=self._fold_in,
            name="recorder",
        )

    def _note_parent(self, key: Any) -> None:
        self.parents.add(tuple(np.asarray(key).tolist()))

    def _note_child(self, key: Any, child: Any) -> None:
        self._note_parent(key)
        self.parents_of[tuple(np.asarray(child).tolist())].add(tuple(np.asarray(key).tolist()))

    def _note_draw(self, shape: tuple[int, ...], key: Any) -> None:
        self.drawn[tuple(np.asarray(key).tolist())].append(Draw(self.stage, shape))

    def _split(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        jax.debug.callback(self._note_parent, key)
        return jax.random.key_data(jax.random.split(jax.random.wrap_key_data(key), shape))

    def _fold_in(self, key: jax.Array, data: Any) -> jax.Array:
        child = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), data))
        jax.debug.callback(self._note_child, key, child)
        return child

    def _random_bits(self, key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
        jax.debug.callback(partial(self._note_draw, shape), key)
        return jax.random.bits(jax.random.wrap_key_data(key), shape, np.dtype(f"uint{bit_width}"))

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Everything that is drawn inside belongs to ``stage``."""
        own_key = jax.random.key
        self.stage = stage
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                jax.random,
                "key",
                lambda seed: jax.random.wrap_key_data(jax.random.key_data(own_key(seed)), impl=self.impl),
            )
            yield
            jax.effects_barrier()


def all_consumers(folder: Path) -> Config:
    """All three stages with adapters, samples, candidates and a safety set, whose batches have sizes of their own."""
    config = small_config(folder, "run")
    more = folder / "more"
    more.mkdir()
    train, safety = first_rows("prompts_train", 32, more), first_rows("prompts_heldout", 20, more)
    common: dict[str, Any] = {"lora": LoRAConfig(rank=2), "log": replace(config.sft.log, eval_every=1000)}
    return replace(
        config,
        safety=SafetyConfig(prompts=safety),
        sft=replace(config.sft, batch_size=32, **common),
        reward=replace(config.reward, epochs=1.0, **common),
        ppo=replace(config.ppo, prompts=replace(config.ppo.prompts, train=train), iterations=2, episodes=32, **common),
    )


def answered_prompts(recorder: Recorder) -> dict[str, list[int]]:
    """By stage, how many prompts were answered with each key that answers were drawn with, in order."""
    prompts: dict[tuple[str, tuple[int, ...]], set[tuple[int, ...]]] = defaultdict(set)
    for key, draws in recorder.drawn.items():
        if draws[0].shape == ANSWER_TOKEN:
            # From the token's key to its answer's, to its prompt's, to that of the whole draw.
            (answer,) = recorder.parents_of[key]
            (prompt,) = recorder.parents_of[answer]
            (whole,) = recorder.parents_of[prompt]
            prompts[draws[0].stage, whole].add(prompt)
    found: dict[str, list[int]] = defaultdict(list)
    for (stage, _), numbers in prompts.items():
        found[stage].append(len(numbers))
    return {stage: sorted(counts) for stage, counts in found.items()}


def test_no_two_draws_of_a_run_share_a_key(tmp_path: Path) -> None:
    config, recorder = all_consumers(tmp_path), Recorder()
    for stage, run in (("sft", run_sft), ("reward", run_reward), ("ppo", run_ppo)):
        with recorder.of(stage):
            run(config)

    for key, draws in recorder.drawn.items():
        assert key not in recorder.parents, f"{draws[0]} draws with a key that other keys come of"
        assert len(set(draws)) == 1, f"{set(draws)} draw with one key"
        # An answer that has ended goes on drawing, and an evaluation draws what the one before drew.
        assert draws[0].shape == ANSWER_TOKEN or len(draws) == 1, f"{draws[0]} draws {len(draws)} times with one key"
    # Samples, candidates and the safety set; held-out answers, the safety set, and a rollout of each iteration.
    assert answered_prompts(recorder) == {"sft": [2, 16, 20], "ppo": [16, 20, 32, 32]}
    draws = {draw for draws in recorder.drawn.values() for draw in draws}
    # Adapters of three models besides the value network's, whose matrices are as the policy's, and minibatches.
    assert {stage for stage, shape in draws if len(shape) == 3} == {"sft", "reward", "ppo"}
    assert Draw("ppo", (32,)) in draws


def test_streams_are_apart_from_each_other_and_from_every_step_number() -> None:
    stages, streams = ("sft", "reward", "dpo", "ppo", "generate", "verify"), get_args(Stream)
    keys = {tuple(jax.random.key_data(stream_key(0, *pair)).tolist()) for pair in product(stages, streams)}
    assert len(keys) == len(stages) * len(streams)
    steps = jax.vmap(lambda step: jax.random.key_data(jax.random.fold_in(jax.random.key(0), step)))(np.arange(100_000))
    assert keys.isdisjoint(map(tuple, steps.tolist())), "a checkpoint of before streams goes on with the seed's own key"


def test_a_stream_is_a_pure_function_of_its_name_and_seed() -> None:
    assert np.array_equal(
        jax.random.key_data(stream_key(3, "ppo", "train")), jax.random.key_data(stream_key(3, "ppo", "train"))
    )
    assert not np.array_equal(
        jax.random.key_data(stream_key(3, "ppo", "train")), jax.random.key_data(stream_key(4, "ppo", "train"))
    )
