"""Measures one PPO iteration through the public steps: rollout, scoring, all updates; seconds in total and by phase."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Program, arch_of, arguments, batch_flops, beside_estimate, measure, peaks_of, report, shares

from jrlhf.core import answer_keys
from jrlhf.models import decoder_fns, init_params, reward_params
from jrlhf.steps import PPOSettings, make_experience, make_generate, make_ppo_step, score_sequences, separate
from jrlhf.types import PPOParams, TrainState


def main() -> None:
    args = arguments(__doc__, episodes=32, prompt=64, new=64, epochs=4, minibatches=1, accumulation=1)
    arch = arch_of(args)
    fns = decoder_fns(arch, dtype=args.dtype, remat=args.remat, attention=args.attention)
    policy = init_params(arch, jax.random.key(0))
    reward = reward_params(policy, arch, jax.random.key(1))
    tx = optax.adamw(1e-5, eps=1e-5)
    generate = Program(
        jax.jit(
            make_generate(
                fns.decode_fns,
                max_new_tokens=args.new,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                stop_tokens=(),
                pad_token=0,
            )
        )
    )
    score = Program(jax.jit(lambda params, tokens, mask: score_sequences(fns.score_fn, params, tokens, mask)))
    networks = separate(fns.logprob_fn, fns.score_fn)
    experience = Program(
        jax.jit(
            make_experience(
                networks,
                temperature=1.0,
                gamma=1.0,
                lam=0.95,
                kl_estimator="k1",
                missing_eos_penalty=0.0,
                whiten_rewards=False,
            )
        )
    )
    settings = PPOSettings(
        epochs=args.epochs,
        minibatches=args.minibatches,
        temperature=1.0,
        clip=0.2,
        value_clip=0.2,
        value_coef=0.1,
        accumulation=args.accumulation,
        drop_padding=args.accumulation > 1,
    )
    step = Program(jax.jit(make_ppo_step(networks, tx, settings), donate_argnums=0))
    prompts = np.random.default_rng(0).integers(0, arch.vocab_size, (args.episodes, args.prompt), np.int32)
    tokens, mask = jnp.asarray(prompts), jnp.ones(prompts.shape, jnp.bool_)
    # Copies: the step donates its state, and reference and reward model, which share arrays, are still needed.
    params = jax.tree.map(jnp.copy, PPOParams(policy=policy, value=reward))
    state, key = TrainState(params, tx.init(params), jnp.int32(0)), jax.random.key(2)
    kl_coef, keys = jnp.float32(0.05), answer_keys(key, jnp.arange(args.episodes), samples=1)

    def rollout():
        return generate(state.params.policy, tokens, mask, keys)

    def scoring(generation):
        scores = score(reward, generation.tokens, generation.mask)
        return experience(state.params.policy, policy, state.params.value, generation, scores, kl_coef)

    def update(batch):
        nonlocal state
        state, metrics = step(state, batch, key)
        return metrics["loss"]

    timing = measure(lambda: update(scoring(rollout())), repeats=args.repeats)
    generation = rollout()
    batch = scoring(generation)
    phases = {
        "rollout_seconds": measure(rollout, repeats=args.repeats).median,
        "scoring_seconds": measure(lambda: scoring(generation), repeats=args.repeats).median,
        "update_seconds": measure(lambda: update(batch), repeats=args.repeats).median,
    }
    estimates = (
        beside_estimate(phases["rollout_seconds"], generate, trips=args.new - 1, name="rollout_")
        | beside_estimate(phases["scoring_seconds"], score, experience, name="scoring_")
        | beside_estimate(phases["update_seconds"], step, trips=args.accumulation, name="update_")
    )
    used = shares(iteration_flops(arch, args), timing.median, peaks_of(args.dtype))
    report("ppo_iteration", timing.median, "s/iteration", timing, args, **phases, **used, **estimates)


def iteration_flops(arch, args, *, shared: bool = False) -> float:
    """Model FLOPs, log-probs counted at response positions only: what PPO needs, not what is computed.

    ``shared``: the critic is a head on the policy, which takes nothing to speak of.
    """
    length, responses = args.prompt + args.new, args.episodes * args.new
    sampling = batch_flops(arch, args.episodes, length, logits=responses)
    policy = batch_flops(arch, args.episodes, length, logits=responses)
    reward = batch_flops(arch, args.episodes, length, logits=0)
    value = 0.0 if shared else reward
    return sampling + 2 * policy + reward + value + args.epochs * 3 * (policy + value)


if __name__ == "__main__":
    main()
