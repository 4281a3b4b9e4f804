"""jrlhf's side: its public steps on the bundled decoder, and `jrlhf ppo` as a user runs it. See protocol.py.

python -m peers.jrlhf_steps SPEC      (in benchmarks/; compare.py starts it)
"""

import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import arch_of_shape, peaks_of, save_random_model
from peers.protocol import Rounds, open_rounds, read_spec, repeat
from peers.tokenizer import EOS, PAD, save_tokenizer, words

import jrlhf.core
import jrlhf.train.loop as stage_loop
from jrlhf.config import Config, DataConfig, KLConfig, LogConfig, ModelConfig, OptimConfig, PPOConfig, SamplingConfig
from jrlhf.core import partition
from jrlhf.models import (
    ArchConfig,
    add_adapters,
    decoder_fns,
    init_params,
    is_trained,
    load_pretrained,
    reward_from_pretrained,
    reward_params,
    save_reward_model,
)
from jrlhf.models.hf.names import SHARDING_RULES
from jrlhf.parallel import make_mesh, shard_batch
from jrlhf.runs.metrics import MetricsLog
from jrlhf.stages.ppo import run_ppo
from jrlhf.steps import make_generate, make_reward_step, make_sft_step
from jrlhf.train.batches import gradient_slices, usual_microbatch
from jrlhf.train.keys import stream_key
from jrlhf.train.optim import make_optimizer
from jrlhf.train.start import begin, build_training
from jrlhf.types import DecodeFns, Params, RankingBatch, SFTBatch


def main() -> None:
    spec, rounds = read_spec(), open_rounds()
    arch = arch_of_shape(spec["shape"])
    match spec["work"]:
        case "peaks":
            peaks(rounds, spec)
        case "sft" | "sft-lora":
            sft(rounds, spec, arch)
        case "reward" | "reward-k4":
            reward(rounds, spec, arch)
        case "generate" | "generate-stops":
            generate(rounds, spec, arch)
        case "ppo" | "ppo-shared":
            ppo(rounds, spec, arch)


def facts(parameters: Params, trained: Params, setting: str) -> dict[str, Any]:
    return {
        "parameters": size(parameters),
        "trained": size(trained),
        "versions": f"Python {platform.python_version()}, JAX {jax.__version__}",
        "setting": setting,
    }


def size(tree: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def peaks(rounds: Rounds, spec: dict[str, Any]) -> None:
    """What XLA makes of a matrix product and of an array read and written."""

    def call() -> dict[str, Any]:
        found = {dtype: peaks_of(dtype) for dtype in spec["dtypes"]}
        return {"flops": {dtype: peak.flops for dtype, peak in found.items()}, "bytes": found[spec["dtypes"][0]].bytes}

    rounds.start(**facts((), (), "jit"))
    repeat(rounds, call)


def optimizer(spec: dict[str, Any]) -> OptimConfig:
    return OptimConfig(**spec["optimizer"], schedule="constant", warmup=0.0)


def train(
    rounds: Rounds, spec: dict[str, Any], step: Any, tx: Any, split: tuple[Params, Params | None], make_batch: Callable
) -> None:
    """A step as the stages run it: jitted over a mesh, its state donated, a new batch put on the device each time."""
    mesh, (trained, frozen) = make_mesh(data=-1, fsdp=1, tensor=1), split
    training = build_training(step, tx, trained, frozen, mesh=mesh, rules=SHARDING_RULES)
    state, update = begin(training, mesh=mesh, key=stream_key(0, "sft", "train")), training.step
    train, key = state.train, state.key

    def call() -> dict[str, Any]:
        nonlocal train
        train, metrics = update(train, shard_batch(make_batch(), mesh), key)
        jax.block_until_ready(train.params)
        return {"loss": float(metrics["loss"])}

    setting = f"float32 parameters, computed in {spec['dtype']}; `jit_step`, state donated"
    rounds.start(**facts((trained, frozen), trained, setting))
    repeat(rounds, call)


def token_batches(spec: dict[str, Any], vocabulary: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    draw = np.random.default_rng(0)
    while True:
        yield draw.integers(2, vocabulary, shape, np.int32)


def slices(spec: dict[str, Any], tokens: int) -> int:
    """What the stages take where the config does not say: ``microbatch: 0``."""
    microbatch = usual_microbatch(spec["rows"], tokens=tokens, platform=jax.default_backend())
    return gradient_slices(spec["rows"], microbatch=microbatch)


def sft(rounds: Rounds, spec: dict[str, Any], arch: ArchConfig) -> None:
    fns = decoder_fns(arch, dtype=spec["dtype"], remat=False)
    params, split = init_params(arch, jax.random.key(0)), None
    if spec["rank"]:
        # Every linear map of the blocks, as PEFT's "all-linear".
        params = add_adapters(params, arch, jax.random.key(1), rank=spec["rank"], alpha=spec["alpha"], targets=".")
        split = partition(params, is_trained)
    tx, _ = make_optimizer(optimizer(spec), updates=1)
    tokens = token_batches(spec, arch.vocab_size, (spec["rows"], spec["length"]))
    mask = np.ones((spec["rows"], spec["length"]), np.bool_)
    step = make_sft_step(fns.logprob_fn, tx, accumulation=slices(spec, spec["length"]))
    train(rounds, spec, step, tx, split or (params, None), lambda: SFTBatch(next(tokens), mask, mask))


def reward(rounds: Rounds, spec: dict[str, Any], arch: ArchConfig) -> None:
    fns = decoder_fns(arch, dtype=spec["dtype"], remat=False)
    params = reward_params(init_params(arch, jax.random.key(0)), arch, jax.random.key(1))
    tx, _ = make_optimizer(optimizer(spec), updates=1)
    shape = (spec["rows"], spec["completions"], spec["length"])
    tokens = token_batches(spec, arch.vocab_size, shape)
    ranks = np.broadcast_to(np.arange(spec["completions"], dtype=np.int32), shape[:2])
    fixed = (np.ones(shape, np.bool_), ranks, np.ones(shape[:2], np.bool_), np.zeros(spec["rows"], np.float32))
    step = make_reward_step(
        fns.score_fn, tx, center_coef=0.0, accumulation=slices(spec, spec["completions"] * spec["length"])
    )
    train(rounds, spec, step, tx, (params, None), lambda: RankingBatch(next(tokens), *fixed))


def generate(rounds: Rounds, spec: dict[str, Any], arch: ArchConfig) -> None:
    fns, stop = decoder_fns(arch, dtype=spec["dtype"], remat=False).decode_fns, spec["stop_at"]
    sampler = jax.jit(
        make_generate(
            stopping(fns, stop) if stop else fns,
            max_new_tokens=spec["new"],
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            stop_tokens=(EOS,) if stop else (),
            pad_token=PAD,
            # As the stages have it on one device.
            drop_ended=bool(stop),
        )
    )
    params, key = init_params(arch, jax.random.key(0)), jax.random.key(1)
    columns = np.arange(spec["prompt"])
    mask = columns >= spec["prompt"] - np.asarray(spec["prompts"])[:, None]
    tokens, number = token_batches(spec, arch.vocab_size, mask.shape), 0

    def call() -> dict[str, Any]:
        nonlocal number
        number += 1
        keys = jrlhf.core.answer_keys(jax.random.fold_in(key, number), np.arange(len(mask)), samples=1)
        drawn = sampler(params, np.where(mask, next(tokens), PAD), mask, keys)
        return {"tokens": int(drawn.response_mask.sum())}

    rounds.start(**facts(params, (), f"float32 parameters, computed in {spec['dtype']}; `make_generate` under `jit`"))
    repeat(rounds, call)


def stopping(fns: DecodeFns, stop_at: int) -> DecodeFns:
    """The same decoder, which says EOS for the token at position ``stop_at`` - 1, and never before."""

    def decode(params: Params, tokens: jax.Array, positions: jax.Array, cache: Any, /) -> tuple[jax.Array, Any]:
        logits, cache = fns.decode(params, tokens, positions, cache)
        ends = positions[:, -1] >= stop_at - 2
        return logits.at[:, EOS].set(jnp.where(ends, 1e9, -1e9).astype(logits.dtype)), cache

    return fns._replace(decode=decode)


def ppo(rounds: Rounds, spec: dict[str, Any], arch: ArchConfig) -> None:
    """`jrlhf ppo` on random weights in Hugging Face folders, evaluation off, held at the end of each iteration."""

    class HeldLog(MetricsLog):
        def write(self, step: int, metrics: Any) -> None:
            super().write(step, metrics)
            if "seconds/update" in metrics:
                rounds.tick(
                    phases={name: float(metrics[f"seconds/{name}"]) for name in ("rollout", "scoring", "update")},
                )

    stage_loop.MetricsLog = HeldLog
    with TemporaryDirectory() as folder:
        config = ppo_config(spec, arch, Path(folder))
        models = jax.eval_shape(lambda: init_params(arch, jax.random.key(0)))
        scored = jax.eval_shape(lambda: reward_params(init_params(arch, jax.random.key(0)), arch, jax.random.key(0)))
        setting = f"float32 parameters, computed in {spec['dtype']}; the whole stage loop of `jrlhf ppo`"
        critic = scored["head"] if spec["value_from"] == "shared" else scored
        rounds.start(**facts((models, models, scored, critic), (models, critic), setting))
        run_ppo(config)


def ppo_config(spec: dict[str, Any], arch: ArchConfig, folder: Path) -> Config:
    """The three inputs of the stage, written below ``folder``, and a config of many iterations on them."""
    policy, scorer, prompts = folder / "policy", folder / "reward", folder / "prompts.jsonl"
    save_random_model(policy, arch)
    save_tokenizer(policy, arch.vocab_size)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    model = load_pretrained(str(policy), dtype=spec["dtype"], mesh=mesh)
    save_reward_model(reward_from_pretrained(model, jax.random.key(1)), scorer)
    save_tokenizer(scorer, arch.vocab_size)
    rows = np.random.default_rng(0).integers(2, arch.vocab_size, (8 * spec["rows"], spec["prompt"]))
    prompts.write_text("".join(json.dumps({"prompt": words(row)}) + "\n" for row in rows), encoding="utf-8")
    return Config(
        run=str(folder / "run"),
        ppo=PPOConfig(
            model=ModelConfig(path=str(policy), dtype=spec["dtype"]),
            reward=ModelConfig(path=str(scorer), dtype=spec["dtype"]),
            prompts=DataConfig(train=str(prompts), max_length=spec["prompt"], buckets=1, cache=""),
            optim=optimizer(spec),
            log=LogConfig(every=1, eval_every=10**6, progress=False),
            sampling=SamplingConfig(max_new_tokens=spec["new"], temperature=1.0, **spec.get("sampling", {})),
            kl=KLConfig(coef=0.05, target=0.0),
            iterations=10**6,
            episodes=spec["rows"],
            value_from=spec["value_from"],
            epochs=spec["epochs"],
            minibatches=1,
        ),
    )


if __name__ == "__main__":
    main()
