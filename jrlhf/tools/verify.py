"""Checks the invariants of RLHF with PPO on the user's own model, and prints their figures."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from jrlhf import assets
from jrlhf.config import DataConfig, PPOConfig
from jrlhf.config.tools import VerifyConfig
from jrlhf.core import answer_keys, gae, kwise_ranking_loss, masked_whiten, positions_from_mask, ranking_loss
from jrlhf.data import load_prompts, load_tokenizer, stop_token_ids
from jrlhf.models import Pretrained, RewardModel, load_pretrained, reward_from_pretrained
from jrlhf.parallel import init_sharded, jit_step, make_mesh, shard_batch, tree_shardings
from jrlhf.parallel.step import Step
from jrlhf.runs.folder import last_export
from jrlhf.steps import PPOSettings, make_experience, make_generate, make_ppo_step, rollout_metrics, separate
from jrlhf.steps.ppo import critic_targets
from jrlhf.system.terminal import show_all_characters
from jrlhf.train.keys import stream_key
from jrlhf.train.positions import Positions
from jrlhf.types import Generation, Key, PPOParams, Rollout, TrainState

EXACT = 0.0
FLOAT32 = 1e-5
LOGITS = 1e-4
"""Bound for logits: cached and full attention add in different orders, and a logit is a sum over the whole width."""


class Invariant(NamedTuple):
    """Figure of one invariant, and its upper bound."""

    name: str
    figure: float
    bound: float

    @property
    def holds(self) -> bool:
        return bool(np.isfinite(self.figure) and self.figure <= self.bound)


class Subject(NamedTuple):
    """Model under test, a critic with a new head on it, and one rollout."""

    model: Pretrained
    critic: RewardModel
    generation: Generation
    rollout: Rollout
    step: Step
    """One update on the full rollout."""
    temperature: float
    key: Key
    """The key of every update: they differ in nothing else than what is compared."""


def run_verify(args: VerifyConfig) -> bool:
    """Print every invariant with its figure and bound; return whether all hold."""
    show_all_characters()
    subject = _prepare(args)
    table = Table("invariant", "figure", "bound", "", title=f"jrlhf verify {args.model}")
    invariants = list(_invariants(subject))
    for invariant in invariants:
        verdict = "[green]holds[/]" if invariant.holds else "[red]broken[/]"
        table.add_row(invariant.name, f"{invariant.figure:.3g}", f"{invariant.bound:.0e}", verdict)
    console = Console()
    console.print(table)
    if jax.device_count() == 1:
        console.print("One device: updates over several devices were not compared.")
    return all(invariant.holds for invariant in invariants)


def _prepare(args: VerifyConfig) -> Subject:
    source = last_export(assets.resolve(args.model), "language")
    tokenizer = load_tokenizer(source)
    model = load_pretrained(source, dtype=args.dtype, option="model")
    critic = reward_from_pretrained(model, stream_key(args.seed, "verify", "init"))
    prompt_source = args.prompts or "asset:prompts_heldout"
    prompts = load_prompts(DataConfig(max_length=args.max_length), prompt_source, tokenizer)
    positions = Positions(model.arch, "max_length", args.max_new_tokens, "max_new_tokens")
    positions.check({prompt_source: prompts})
    # An even number of rows divides into two slices.
    rows = max(2, min(args.batch_size, len(prompts)) // 2 * 2)
    tokens, mask = prompts.batch(np.resize(np.arange(len(prompts)), rows))
    generate = make_generate(
        model.decode_fns,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=0,
        top_p=1.0,
        stop_tokens=stop_token_ids(tokenizer, ()),
        pad_token=int(tokenizer.pad_token_id),
    )
    keys = answer_keys(stream_key(args.seed, "verify", "samples"), jnp.arange(rows), samples=1)
    generation = jax.jit(generate)(model.params, jnp.asarray(tokens), jnp.asarray(mask), keys)
    scores = jax.jit(critic.score)(critic.params, generation.tokens, generation.mask)
    rollout = _experience(model, critic, generation, scores, args)
    step = jax.jit(_make_step(model, critic, temperature=args.temperature, accumulation=1))
    key = stream_key(args.seed, "verify", "train")
    return Subject(model, critic, generation, rollout, step, args.temperature, key)


def _experience(
    model: Pretrained, critic: RewardModel, generation: Generation, scores: jax.Array, args: VerifyConfig
) -> Rollout:
    ppo = PPOConfig()
    experience = make_experience(
        separate(model.logprob_fn, critic.score_fn),
        temperature=args.temperature,
        gamma=ppo.gamma,
        lam=ppo.lam,
        kl_estimator="k1",
        missing_eos_penalty=0.0,
        whiten_rewards=False,
    )
    return jax.jit(experience)(model.params, model.params, critic.params, generation, scores, jnp.float32(ppo.kl.coef))


def _invariants(subject: Subject) -> Iterator[Invariant]:
    stats = jax.device_get(jax.jit(rollout_metrics)(subject.rollout))
    yield Invariant("KL(policy, reference) at step 0, nats a sequence", abs(float(stats["kl"])), EXACT)
    yield Invariant("sampler and trainer: max |Δ log-prob|", float(stats["sampler/max_abs_logprob_diff"]), LOGITS)
    state, metrics = _update(subject, rate=0.0, rollout=subject.rollout)
    # Float32 rounds in proportion to a number's size, so the ratio is held against the log-probs that it is made of.
    largest = max(1.0, float(np.max(np.abs(np.where(subject.rollout.response_mask, subject.rollout.logprobs, 0.0)))))
    ratio = float(metrics["policy/max_abs_log_ratio"])
    yield Invariant("first minibatch: max |log ratio| / max |log-prob|", ratio / largest, FLOAT32)
    yield Invariant("first minibatch: approximate KL", float(metrics["policy/approxkl"]), FLOAT32)
    yield Invariant("learning rate 0: max |Δ parameter|", _distance(state.params, _params(subject)), EXACT)
    full, _ = _update(subject, rate=1.0, rollout=subject.rollout)
    sliced = _sliced_update(subject)
    scale = _distance(full.params, _params(subject))
    yield Invariant("2 slices or 1: |Δ update| / |update|", _distance(sliced.params, full.params) / scale, FLOAT32)
    if jax.device_count() > 1:
        spread = _update_over_devices(subject)
        name = f"{jax.device_count()} devices or 1: |Δ update| / |update|"
        yield Invariant(name, _distance(spread.params, full.params) / scale, FLOAT32)
    yield Invariant("cached decode and full forward: max |Δ logit|", _cache_error(subject), LOGITS)
    yield Invariant("left or right padding: max |Δ log-prob|", _padding_error(subject), LOGITS)
    yield Invariant("alone or in a batch: max |Δ log-prob|", _batch_error(subject), LOGITS)
    yield Invariant("GAE against a loop: max |Δ advantage|", _gae_error(subject.rollout), FLOAT32)
    yield Invariant("whitening against NumPy: max |Δ|", _whiten_error(subject.rollout), FLOAT32)
    yield Invariant("ranking loss, K = 2 against pairs: max |Δ|", _pair_error(subject.rollout.scores), FLOAT32)
    for name, count in _degenerate(subject):
        yield Invariant(f"{name}: values that are not finite", count, EXACT)


def _params(subject: Subject) -> PPOParams:
    return PPOParams(policy=subject.model.params, value=subject.critic.params)


def _make_step(model: Pretrained, critic: RewardModel, *, temperature: float, accumulation: int) -> Step:
    ppo = PPOConfig()
    settings = PPOSettings(
        epochs=1,
        minibatches=1,
        temperature=temperature,
        clip=ppo.clip,
        value_clip=ppo.value_clip,
        value_coef=ppo.value_coef,
        accumulation=accumulation,
    )
    return make_ppo_step(separate(model.logprob_fn, critic.score_fn), _optimizer(1.0), settings)


def _optimizer(rate: float) -> optax.GradientTransformation:
    """Plain gradient descent, because Adam magnifies rounding wherever a gradient is almost 0.

    The rate is part of the state, so that one compiled step works for every rate.
    """
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


def _start(rate: float, params: PPOParams) -> TrainState:
    return TrainState(params, _optimizer(rate).init(params), jnp.int32(0))


def _update(subject: Subject, *, rate: float, rollout: Rollout) -> tuple[TrainState, Any]:
    return subject.step(_start(rate, _params(subject)), rollout, subject.key)


def _sliced_update(subject: Subject) -> TrainState:
    step = _make_step(subject.model, subject.critic, temperature=subject.temperature, accumulation=2)
    return jax.jit(step)(_start(1.0, _params(subject)), subject.rollout, subject.key)[0]


def _update_over_devices(subject: Subject) -> TrainState:
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    rules = subject.model.rules
    copies = jax.tree.map(jnp.copy, _params(subject))
    state = init_sharded(partial(_start, 1.0), copies, mesh=mesh, rules=rules)
    shardings = tree_shardings(jax.eval_shape(lambda: state), mesh, rules)
    # Copies of the batch make it divisible by the number of devices, and keep the mean.
    parts = mesh.shape["data"]
    rollout = jax.tree.map(lambda x: np.concatenate([np.asarray(x)] * parts), subject.rollout)
    step = _make_step(subject.model, subject.critic, temperature=subject.temperature, accumulation=1)
    return jit_step(step, mesh=mesh, state_shardings=shardings)(state, shard_batch(rollout, mesh), subject.key)[0]


def _distance(a: Any, b: Any) -> float:
    gaps = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0.0)), a, b)
    return max(jax.tree.leaves(gaps))


def _cache_error(subject: Subject) -> float:
    """Feed the sampled tokens one by one through the cache, and compare all logits."""
    tokens, mask = subject.generation.tokens, subject.generation.mask
    model = subject.model
    positions = positions_from_mask(mask)
    full = np.asarray(jax.jit(model.apply_fn)(model.params, tokens, mask))
    decode = jax.jit(model.decode_fns.decode)
    cache = model.decode_fns.init_cache(*tokens.shape)
    worst = 0.0
    for t in range(tokens.shape[1]):
        logits, cache = decode(model.params, tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        real = np.asarray(mask[:, t])
        worst = max(worst, float(np.max(np.abs(np.asarray(logits) - full[:, t])[real], initial=0.0)))
    return worst


def _padding_error(subject: Subject) -> float:
    """Compare the log-probs of left-padded rows with those of the same rows with right padding."""
    tokens, mask = np.asarray(subject.generation.tokens), np.asarray(subject.generation.mask)
    order = np.argsort(~mask, axis=1, kind="stable")
    shifted = jnp.asarray(np.take_along_axis(tokens, order, 1)), jnp.asarray(np.take_along_axis(mask, order, 1))
    logprobs = jax.jit(partial(subject.model.logprob_fn, temperature=subject.temperature))
    left = np.asarray(logprobs(subject.model.params, tokens, mask)[0])
    right = np.asarray(logprobs(subject.model.params, *shifted)[0])
    first = mask & (np.cumsum(mask, axis=1) == 1)  # nothing predicts a row's first token
    return float(
        np.max(np.abs(np.take_along_axis(left, order, 1) - right)[np.take_along_axis(mask & ~first, order, 1)])
    )


def _batch_error(subject: Subject) -> float:
    logprobs = jax.jit(partial(subject.model.logprob_fn, temperature=subject.temperature))
    tokens, mask, response = (
        x[:1] for x in (subject.generation.tokens, subject.generation.mask, subject.rollout.response_mask)
    )
    alone = np.asarray(logprobs(subject.model.params, tokens, mask)[0])
    return float(np.max(np.abs(alone - np.asarray(subject.rollout.logprobs[:1]))[np.asarray(response)], initial=0.0))


def _gae_error(rollout: Rollout) -> float:
    ppo = PPOConfig()
    rewards, values, mask = (np.asarray(x) for x in (rollout.rewards, rollout.values, rollout.response_mask))
    advantages = jax.vmap(lambda r, v, m: gae(r, v, m, gamma=ppo.gamma, lam=ppo.lam)[0])(rewards, values, mask)
    expected = np.zeros(rewards.shape, np.float64)
    for row in range(len(rewards)):
        advantage, value = 0.0, 0.0
        for t in np.flatnonzero(mask[row])[::-1]:
            advantage = rewards[row, t] + ppo.gamma * value - values[row, t] + ppo.gamma * ppo.lam * advantage
            value, expected[row, t] = values[row, t], advantage
    return float(np.max(np.abs(np.asarray(advantages) - expected)) / max(1.0, np.max(np.abs(expected))))


def _whiten_error(rollout: Rollout) -> float:
    mask, (_, returns) = np.asarray(rollout.response_mask), critic_targets(rollout)
    unmasked = np.asarray(returns, np.float64)[mask]
    expected = (unmasked - unmasked.mean()) / np.sqrt(unmasked.var() + 1e-8)
    whitened = masked_whiten(returns, rollout.response_mask, shift_mean=True)
    return float(np.max(np.abs(np.asarray(whitened)[mask] - expected)))


def _pair_error(scores: jax.Array) -> float:
    chosen, rejected = scores, jnp.roll(scores, 1)
    pairs = jnp.stack([chosen, rejected], axis=1)
    ranks = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), pairs.shape)
    kwise = kwise_ranking_loss(pairs, ranks, jnp.ones(pairs.shape, jnp.bool_))
    return float(jnp.max(jnp.abs(kwise - ranking_loss(chosen, rejected))))


def _degenerate(subject: Subject) -> Iterator[tuple[str, float]]:
    rollout = subject.rollout
    cases: dict[str, Callable[[], Rollout]] = {
        "constant rewards": lambda: rollout._replace(
            advantages=jnp.zeros_like(rollout.advantages), returns=jnp.ones_like(rollout.advantages)
        ),
        "a batch of one": lambda: jax.tree.map(lambda x: x[:1], rollout),
        "a row all masked": lambda: rollout._replace(response_mask=rollout.response_mask.at[0].set(False)),
    }
    for name, make in cases.items():
        state, metrics = _update(subject, rate=1.0, rollout=make())
        leaves = jax.tree.leaves((state.params, metrics))
        yield name, float(sum(np.sum(~np.isfinite(np.asarray(x))) for x in leaves))
