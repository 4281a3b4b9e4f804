"""PPO on a Flax Linen model and a rule of your own: it learns to write token 7 as often as it can.

Any model will do that maps ``(params, tokens, mask)`` to logits, and another that maps them to one value a position.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen

from jrlhf.core import answer_keys, from_logits, uncached_decode_fns
from jrlhf.steps import PPOSettings, make_experience, make_generate, make_ppo_step, separate
from jrlhf.types import PPOParams, TrainState

VOCABULARY, WIDTH, TEMPERATURE = 16, 32, 1.0


class Tiny(linen.Module):
    """An MLP over a token and the mean of all up to it."""

    outputs: int

    @linen.compact
    def __call__(self, tokens, mask):
        x = jnp.where(mask[:, :, None], linen.Embed(VOCABULARY, WIDTH)(tokens), 0.0)
        count = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.float32), 1.0)[:, :, None]
        x = jnp.concatenate([x, jnp.cumsum(x, axis=1) / count], axis=-1)
        return linen.Dense(self.outputs)(linen.gelu(linen.Dense(4 * WIDTH)(x)))


def main():
    policy, critic = Tiny(VOCABULARY), Tiny(1)
    prompts = jax.random.randint(jax.random.key(0), (32, 4), 2, VOCABULARY)
    mask = jnp.ones(prompts.shape, bool)
    reference = policy.init(jax.random.key(1), prompts, mask)
    params = PPOParams(reference, critic.init(jax.random.key(2), prompts, mask))

    networks = separate(from_logits(policy.apply), lambda *args: critic.apply(*args)[..., 0])
    sampler = {"max_new_tokens": 8, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
    generate = jax.jit(make_generate(uncached_decode_fns(policy.apply), **sampler, stop_tokens=(1,), pad_token=0))
    targets = {"gamma": 1.0, "lam": 0.95, "kl_estimator": "k1", "missing_eos_penalty": 0.0, "whiten_rewards": False}
    experience = jax.jit(make_experience(networks, temperature=TEMPERATURE, **targets))
    tx = optax.adam(3e-3)
    settings = PPOSettings(epochs=4, minibatches=2, temperature=TEMPERATURE, clip=0.2, value_clip=0.2, value_coef=0.1)
    step = jax.jit(make_ppo_step(networks, tx, settings))

    numbers = jnp.arange(len(prompts))
    state, means = TrainState(params, tx.init(params), jnp.int32(0)), []
    for i in range(20):
        sample_key, update_key = jax.random.split(jax.random.key(i))
        generation = generate(state.params.policy, prompts, mask, answer_keys(sample_key, numbers, samples=1))
        scores = jnp.sum((generation.tokens == 7) & generation.response_mask, axis=-1)  # your rule
        rollout = experience(state.params.policy, reference, state.params.value, generation, scores, jnp.float32(0.02))
        state, metrics = step(state, rollout, update_key)
        means.append(float(scores.mean()))
        print(f"iteration {i}: score {means[-1]:.2f}, policy loss {metrics['loss/policy']:.3f}")
    print(f"score: {means[0]:.2f} -> {means[-1]:.2f}")


if __name__ == "__main__":
    main()
