"""Stage 3: PPO on the reward model, under a KL penalty to the SFT policy."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jrlhf.config import Config, PPOConfig
from jrlhf.config_io import ConfigError
from jrlhf.core import combine, kl_penalty, update_kl_coef
from jrlhf.data import Order, PromptRows, SFTRows, load_prompts, load_sft, load_tokenizer
from jrlhf.models import Pretrained, RewardModel, load_pretrained, load_reward_model, merge_adapters, save_pretrained
from jrlhf.parallel import batch_sharding, shard_batch
from jrlhf.stages.adapters import trainable, write_adapter
from jrlhf.stages.batches import device_multiple, gradient_slices
from jrlhf.stages.evaluation import distinct_n, words
from jrlhf.stages.loop import Loop, RunState, run_loop
from jrlhf.stages.optim import make_actor_critic_optimizer
from jrlhf.stages.run import json_line, model_source, open_stage, read_summary, write_json
from jrlhf.stages.sampling import GenerateFn, generate_all, jit_generate, texts_of
from jrlhf.stages.start import JittedStep, check_length, export_tokenizer, mesh_of, provenance, start_training
from jrlhf.steps import make_experience, make_ppo_step, rollout_metrics
from jrlhf.types import Generation, LogprobFn, Params, PPOParams, Rollout, ScoreFn, TrainState

SHOWN = ("reward/score_mean", "kl", "entropy", "length/mean", "tokens_per_second")


class Actors(NamedTuple):
    """The models of a run, and the tokenizer they share."""

    policy: Pretrained
    """Its parameters stay the reference's; the policy that learns is in the state."""
    reward: RewardModel
    tokenizer: Any


def run_ppo(config: Config) -> dict[str, Any]:
    """Train, evaluate and export; returns the stage's summary. Goes on where an earlier call left, if it did.

    Writes ``<run>/ppo/{config.yaml, metrics.jsonl, evals/<iteration>.jsonl, checkpoints/, hf/, peft/,
    summary.json}``.
    """
    ppo = config.ppo
    with open_stage(config, "ppo") as folder:
        if summary := read_summary(folder):
            return summary
        mesh = mesh_of(config)
        minibatch = ppo.episodes // ppo.minibatches
        slices = gradient_slices(minibatch, mesh, microbatch=ppo.microbatch, key="ppo.episodes / ppo.minibatches")
        actors = _load_actors(config, mesh)
        prompts = load_prompts(ppo.prompts, ppo.prompts.train, actors.tokenizer)
        heldout = load_prompts(ppo.prompts, ppo.prompts.eval, actors.tokenizer) if ppo.prompts.eval else None
        ptx = load_sft(ppo.ptx, ppo.ptx.train, actors.tokenizer, train_on="completion") if ppo.ptx_coef else None
        longest = int(prompts.lengths.max()) + ppo.sampling.max_new_tokens
        check_length(actors.policy.arch, longest, key="ppo.sampling.max_new_tokens")

        tx, schedule = make_actor_critic_optimizer(
            ppo.optim, value_lr=ppo.value_lr, updates=ppo.iterations * ppo.epochs * ppo.minibatches
        )
        step = make_step(ppo, actors.policy.logprob_fn, actors.reward.score_fn, tx, accumulation=slices)
        trained, frozen = _trainable(config, actors, mesh)
        state, update = start_training(
            step,
            tx,
            trained,
            mesh=mesh,
            rules=actors.policy.rules,
            seed=config.seed,
            frozen=frozen,
            ema=trained.policy if ppo.ema_decay else None,
            kl_coef=ppo.kl.coef,
        )
        generate = jit_generate(actors.policy.decode_fns, ppo.sampling, actors.tokenizer, mesh)
        iterate = _make_iteration(config, actors, generate, update, prompts, ptx, mesh)
        loop = Loop(
            title="PPO",
            total=ppo.iterations,
            advance=iterate,
            evaluate=_evaluator(config, actors, generate, heldout, folder, mesh),
            learning_rate=schedule,
            rates={"length/tokens": "tokens_per_second"},
            best_metric="eval/score_mean",
            best_mode="max",
            shown=SHOWN,
        )
        outcome = run_loop(
            loop,
            state,
            folder=folder,
            log=ppo.log,
            checkpoint=ppo.checkpoint,
            metadata=provenance(config, actors.tokenizer),
        )
        train = outcome.state.train
        params = merge_adapters(learnt_policy(train))
        write_adapter(
            actors.policy,
            learnt_policy(train),
            ppo.lora,
            folder / "peft",
            base=str(actors.policy.source),
            tokenizer=actors.tokenizer,
        )
        save_pretrained(replace(actors.policy, params=params), folder / "hf")
        export_tokenizer(actors.tokenizer, folder / "hf")
        summary = {
            "before": outcome.first,
            "after": outcome.last,
            "iterations": ppo.iterations,
            "kl_coef": float(outcome.state.kl_coef),
            "seconds": outcome.seconds,
        }
        write_json(folder / "summary.json", summary)
        return summary


def _trainable(config: Config, actors: Actors, mesh: Mesh) -> tuple[PPOParams, PPOParams | None]:
    """What is trained, and with LoRA the frozen bases: the reference's and the reward model's own arrays."""
    keys, lora = jax.random.split(jax.random.key(config.seed)), config.ppo.lora
    policy, policy_base = trainable(actors.policy, lora, keys[0], mesh=mesh, path="ppo.lora")
    value, value_base = trainable(actors.reward, lora, keys[1], mesh=mesh, path="ppo.lora")
    return PPOParams(policy, value), PPOParams(policy_base, value_base) if lora.rank else None


def learnt_policy(train: TrainState) -> Params:
    """The policy that is evaluated and exported: the average where one is kept."""
    policy = train.params.policy if train.ema is None else train.ema
    return combine(policy, None if train.frozen is None else train.frozen.policy)


def _load_actors(config: Config, mesh: Mesh) -> Actors:
    ppo = config.ppo
    source = model_source(config, ppo.model.path, key="ppo.model.path", stage="sft")
    reward_source = model_source(config, ppo.reward.path, key="ppo.reward.path", stage="reward")
    tokenizer = load_tokenizer(source)
    if load_tokenizer(reward_source).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"ppo.reward.path: {reward_source} has another vocabulary than {source}; "
            "tokens are scored as they were sampled, so policy and reward model must share one"
        )
    policy = load_pretrained(source, dtype=ppo.model.dtype, mesh=mesh, remat=ppo.model.remat)
    reward = load_reward_model(reward_source, dtype=ppo.reward.dtype, mesh=mesh, remat=ppo.reward.remat)
    return Actors(policy, reward, tokenizer)


def make_step(
    ppo: PPOConfig, logprob_fn: LogprobFn, value_fn: ScoreFn, tx: optax.GradientTransformation, *, accumulation: int
) -> JittedStep:
    """``make_ppo_step`` with a config's settings: 0 is off there, None here."""
    return make_ppo_step(
        logprob_fn,
        value_fn,
        tx,
        epochs=ppo.epochs,
        minibatches=ppo.minibatches,
        accumulation=accumulation,
        temperature=ppo.sampling.temperature,
        clip=ppo.clip,
        dual_clip=ppo.dual_clip or None,
        value_clip=ppo.value_clip,
        value_coef=ppo.value_coef,
        entropy_coef=ppo.entropy_coef,
        ptx_coef=ppo.ptx_coef,
        target_approx_kl=ppo.target_approx_kl or None,
        critic_warmup_updates=ppo.critic_warmup * ppo.epochs * ppo.minibatches,
        ema_decay=ppo.ema_decay or None,
    )


def _make_iteration(
    config: Config,
    actors: Actors,
    generate: GenerateFn,
    update: JittedStep,
    prompts: PromptRows,
    ptx: SFTRows | None,
    mesh: Mesh,
) -> Callable[[RunState, int], tuple[RunState, dict[str, Any]]]:
    """Rollout, scoring, update: one iteration as a function of the state and its number."""
    ppo = config.ppo

    def in_order(rows: PromptRows | SFTRows) -> Order:
        return Order(config.seed, batch_size=ppo.episodes, lengths=rows.lengths, parts=rows.parts)

    order, text_order = in_order(prompts), None if ptx is None else in_order(ptx)
    score = jax.jit(actors.reward.score)
    experience = jax.jit(
        make_experience(
            actors.policy.logprob_fn,
            actors.reward.score_fn,
            temperature=ppo.sampling.temperature,
            gamma=ppo.gamma,
            lam=ppo.lam,
            kl_estimator=ppo.kl.estimator,
            missing_eos_penalty=ppo.missing_eos_penalty,
            whiten_rewards=ppo.whiten_rewards,
        ),
        out_shardings=batch_sharding(mesh),
    )
    measure = jax.jit(rollout_metrics)

    def next_beta(coef: jax.Array, kl: jax.Array) -> jax.Array:
        if not ppo.kl.target:
            return coef
        return update_kl_coef(coef, kl, ppo.episodes, target=ppo.kl.target, horizon=ppo.kl.horizon)

    def with_text(rollout: Rollout, number: int) -> Rollout:
        if ptx is None or text_order is None:
            return rollout
        return rollout._replace(ptx=shard_batch(ptx.batch(text_order[number]), mesh))

    def iterate(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
        seconds: dict[str, Any] = {}
        sample_key, update_key = jax.random.split(jax.random.fold_in(state.key, number))
        params, beta = combine(state.train.params, state.train.frozen), state.kl_coef
        with _timed(seconds, "seconds/rollout") as wait:
            tokens, mask = shard_batch(prompts.batch(order[number]), mesh)
            generation = wait(generate(params.policy, tokens, mask, sample_key))
        with _timed(seconds, "seconds/scoring") as wait:
            scores = score(actors.reward.params, generation.tokens, generation.mask)
            rollout = experience(params.policy, actors.policy.params, params.value, generation, scores, beta)
            metrics = wait(measure(rollout))
        with _timed(seconds, "seconds/update") as wait:
            train, updated = wait(update(state.train, with_text(rollout, number), update_key))
        metrics |= updated | seconds | {"kl_coef": beta}
        beta = next_beta(beta, metrics["kl"])
        return RunState(train, state.key, jnp.int32(number + 1), beta), metrics

    return iterate


@contextmanager
def _timed(seconds: dict[str, Any], name: str) -> Iterator[Callable[[Any], Any]]:
    """Wall time of a phase; what is passed to ``wait`` is awaited, so that no phase pays for another."""
    start = time.perf_counter()
    yield jax.block_until_ready
    seconds[name] = np.float32(time.perf_counter() - start)


def _evaluator(
    config: Config, actors: Actors, generate: GenerateFn, heldout: PromptRows | None, folder: Path, mesh: Mesh
) -> Callable[[RunState, int], dict[str, float]]:
    """Answers to the held-out prompts, the same draws every time, scored and written to evals/<iteration>.jsonl."""
    if heldout is None:
        return lambda state, number: {}
    ppo, prompts, reference = config.ppo, heldout, actors.policy.params
    limit = ppo.log.eval_rows
    batch_size = device_multiple(min(ppo.episodes, len(prompts)), mesh)
    key = jax.random.key(config.seed)

    @jax.jit
    def measure(policy: Params, reference: Params, reward: Params, generation: Generation) -> dict[str, jax.Array]:
        at = {"temperature": ppo.sampling.temperature}
        tokens, mask, response = generation.tokens, generation.mask, generation.response_mask
        logprobs, entropy = actors.policy.logprob_fn(policy, tokens, mask, **at)
        ref_logprobs, _ = actors.policy.logprob_fn(reference, tokens, mask, **at)
        kl = kl_penalty(logprobs, ref_logprobs, estimator="k1")
        return {
            "score": actors.reward.score(reward, tokens, mask),
            "kl": jnp.sum(jnp.where(response, kl, 0.0), axis=-1),
            "entropy": jnp.sum(jnp.where(response, entropy, 0.0), axis=-1),
            "length": jnp.sum(response, axis=-1, dtype=jnp.float32),
            "stopped": generation.stopped,
        }

    def evaluate(state: RunState, number: int) -> dict[str, float]:
        policy = learnt_policy(state.train)
        rows: dict[int, dict[str, Any]] = {}
        batches = generate_all(generate, policy, prompts, key=key, mesh=mesh, batch_size=batch_size, limit=limit)
        for indices, real, generation in batches:
            figures = jax.device_get(measure(policy, reference, actors.reward.params, generation))
            for place, (prompt, answer) in enumerate(texts_of(actors.tokenizer, generation)):
                if real[place]:
                    numbers = {name: values[place].item() for name, values in figures.items()}
                    rows[int(indices[place])] = {"prompt": prompt, "completion": answer} | numbers
        answers = [rows[index] for index in sorted(rows)]
        _write_rows(folder / "evals" / f"{number:06d}.jsonl", answers)
        return evaluation_metrics(answers)

    return evaluate


def evaluation_metrics(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Means over answers; entropy is a token's, kl a sequence's, both in nats."""
    column = {name: np.asarray([row[name] for row in answers], np.float64) for name in answers[0] if name not in TEXTS}
    return {
        "eval/score_mean": float(column["score"].mean()),
        "eval/score_std": float(column["score"].std()),
        "eval/kl": float(column["kl"].mean()),
        "eval/entropy": float(column["entropy"].sum() / max(column["length"].sum(), 1.0)),
        "eval/length": float(column["length"].mean()),
        "eval/eos_fraction": float(column["stopped"].mean()),
        "eval/distinct2": distinct_n([words(row["completion"]) for row in answers], n=2),
    }


TEXTS = ("prompt", "completion")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json_line(row) for row in rows), encoding="utf-8")
