"""Tunix's side: its trainer, sampler and PPO learner, held at the end of each step. See protocol.py.

python -m peers.tunix_steps SPEC      (in benchmarks/; compare.py starts it)
"""

import itertools
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from peers.protocol import Rounds, open_rounds, read_spec, repeat
from peers.tokenizer import EOS, PAD, Numbers
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import utils as sft_utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

STEPS = 10**6
"""More than anybody waits for: the trainer is ended from inside."""
NO_TOKEN = -1
"""As an EOS, one that is never drawn."""


def main() -> None:
    spec, rounds = read_spec(), open_rounds()
    with Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp")) as mesh:
        match spec["work"]:
            case "sft":
                sft(rounds, spec)
            case "reward":
                reward(rounds, spec)
            case "generate" | "generate-stops":
                generate(rounds, spec)
            case "ppo":
                ppo(rounds, spec, mesh)
            case _:
                rollout(rounds, spec)


class Llama(llama3.Llama3):
    """Tunix's PPO passes segment numbers, which its Llama does not take: they are left out."""

    def __call__(self, input_tokens, positions, cache, attention_mask, segment_ids=None):
        return super().__call__(input_tokens, positions, cache, attention_mask)


class StopAt(nnx.Variable):
    """The position after the last token of each row."""


class StoppingLlama(llama3.Llama3):
    """Says EOS for the token at position ``stop_at`` - 1 of each row, and never before."""

    def __call__(self, input_tokens, positions, cache, attention_mask):
        logits, cache = super().__call__(input_tokens, positions, cache, attention_mask)
        ends = positions >= self.stop_at[...] - 2
        return logits.at[:, :, EOS].set(jnp.where(ends, 1e9, -1e9).astype(logits.dtype)), cache


def llama(spec: dict[str, Any], kind: type = Llama, seed: int = 0) -> Any:
    hidden, layers, heads, kv_heads, ffn, vocabulary, tied = spec["sizes"]
    config = llama3.ModelConfig(
        num_layers=layers,
        vocab_size=vocabulary,
        embed_dim=hidden,
        hidden_dim=ffn,
        num_heads=heads,
        head_dim=hidden // heads,
        num_kv_heads=kv_heads,
        rope_theta=10000,
        norm_eps=1e-5,
        weight_tying=tied,
    )
    model, numbers = kind(config, rngs=nnx.Rngs(seed)), itertools.count(1000 * seed)

    def fresh(x: jax.Array) -> jax.Array:
        """Tunix begins with zeros in some matrices; here all are normal with std 0.02, as on the other sides."""
        drawn = 0.02 * jax.random.normal(jax.random.key(next(numbers)), x.shape) if x.ndim > 1 else x
        return drawn.astype(spec["dtype"])

    nnx.update(model, jax.tree.map(fresh, nnx.state(model, nnx.Param)))
    return model


def size(*models: Any) -> int:
    return sum(leaf.size for model in models for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def facts(parameters: int, trained: int, spec: dict[str, Any], what: str) -> dict[str, Any]:
    versions = f"Python {platform.python_version()}, JAX {jax.__version__}, Tunix {version('google-tunix')}"
    setting = f"parameters, moments and all else in {spec['dtype']}; {what}"
    return {"parameters": parameters, "trained": trained, "versions": versions, "setting": setting}


def optimizer(spec: dict[str, Any]) -> optax.GradientTransformation:
    adam = dict(spec["optimizer"])
    clip, lr = optax.clip_by_global_norm(adam.pop("max_grad_norm")), adam.pop("lr")
    return optax.chain(clip, optax.adamw(lr, **adam))


def tokens(spec: dict[str, Any], rows: int, length: int) -> Iterator[np.ndarray]:
    draw = np.random.default_rng(0)
    while True:
        yield draw.integers(2, spec["sizes"][5], (rows, length), np.int32)


def attention(batch: TrainingInput) -> dict[str, jax.Array]:
    mask = batch.input_tokens != PAD
    return {
        "input_tokens": batch.input_tokens,
        "positions": sft_utils.build_positions_from_mask(mask),
        "attention_mask": sft_utils.make_causal_attn_mask(mask),
    }


def train(
    rounds: Rounds, spec: dict[str, Any], trainer: PeftTrainer, shape: tuple[int, int], start: dict[str, Any]
) -> None:
    """The trainer asks for the next batch once it has started a step; it gets it when that step is done."""

    def batches() -> Iterator[TrainingInput]:
        drawn, mask = tokens(spec, *shape), np.ones(shape, np.bool_)
        rounds.start(**start)
        while True:
            yield TrainingInput(input_tokens=next(drawn), input_mask=mask)
            jax.block_until_ready(nnx.state(trainer.model))
            rounds.tick()

    trainer.train(batches())


def trainer_config() -> TrainingConfig:
    return TrainingConfig(eval_every_n_steps=STEPS, max_steps=STEPS, max_inflight_computations=1)


def sft(rounds: Rounds, spec: dict[str, Any]) -> None:
    model = llama(spec)
    trainer = PeftTrainer(model, optimizer(spec), trainer_config())
    trainer = trainer.with_gen_model_input_fn(lambda batch: attention(batch) | {"input_mask": batch.input_mask})
    start = facts(size(model), size(model), spec, "`PeftTrainer` without adapters")
    train(rounds, spec, trainer, (spec["rows"], spec["length"]), start)


def reward(rounds: Rounds, spec: dict[str, Any]) -> None:
    """It has no trainer for it: a ranking loss of two lines in its trainer, on its critic."""

    def loss(model: Any, input_tokens: Any, positions: Any, attention_mask: Any) -> jax.Array:
        scores = model(input_tokens, positions, None, attention_mask)[0][:, -1, 0].astype(jnp.float32)
        chosen, rejected = jnp.split(scores, 2)
        return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected))

    model = rl_utils.create_critic_model(llama(spec))
    trainer = PeftTrainer(model, optimizer(spec), trainer_config())
    trainer = trainer.with_loss_fn(loss).with_gen_model_input_fn(attention)
    start = facts(size(model), size(model), spec, "`PeftTrainer` on a critic, with a ranking loss of ours")
    train(rounds, spec, trainer, (2 * spec["rows"], spec["length"]), start)


def prompts(spec: dict[str, Any], drawn: np.ndarray) -> list[str]:
    return [Numbers().decode(row[:length]) for row, length in zip(drawn, spec["prompts"], strict=True)]


def make_sampler(model: Any, spec: dict[str, Any]) -> Sampler:
    hidden, layers, heads, kv_heads, *_ = spec["sizes"]
    return Sampler(model, Numbers(), CacheConfig(spec["prompt"] + spec["new"], layers, kv_heads, hidden // heads))


def rollout(rounds: Rounds, spec: dict[str, Any]) -> None:
    """Batches of ``slots`` answers; a batch ends with its longest one."""
    model = llama(spec, StoppingLlama)
    batches = np.split(np.asarray(spec["lengths"], np.int32), len(spec["lengths"]) // spec["slots"])
    model.stop_at = StopAt(jnp.zeros((spec["slots"], 1), jnp.int32))
    drawn, seeds = tokens(spec, spec["rows"], spec["prompt"]), itertools.count()
    parameters, sampler = size(model), make_sampler(model, spec)

    def call() -> dict[str, Any]:
        rows, total = np.repeat(next(drawn), spec["samples"], axis=0), 0
        for lengths, prompts in zip(batches, np.split(rows, len(batches)), strict=True):
            model.stop_at.value = jnp.asarray(spec["prompt"] + lengths[:, None])
            sampler.transformer_state = nnx.variables(model)
            result = sampler(
                [Numbers().decode(row) for row in prompts],
                max_generation_steps=spec["new"],
                max_prompt_length=spec["prompt"],
                temperature=1.0,
                top_p=1.0,
                seed=next(seeds),
                eos_tokens=[EOS],
            )
            # What it returns is without the EOS; answers that reach the limit have none.
            total += sum(min(len(answer) + 1, spec["new"]) for answer in result.tokens)
        return {"tokens": total}

    rounds.start(**facts(parameters, 0, spec, "`Sampler`, a batch after the other"))
    repeat(rounds, call)


def generate(rounds: Rounds, spec: dict[str, Any]) -> None:
    model = llama(spec, StoppingLlama if spec["stop_at"] else Llama)
    model.stop_at = StopAt(jnp.int32(spec["stop_at"]))
    drawn, seeds = tokens(spec, spec["rows"], spec["prompt"]), itertools.count()
    sampler = make_sampler(model, spec)
    eos, unsaid = (EOS, spec["rows"]) if spec["stop_at"] else (NO_TOKEN, 0)

    def call() -> dict[str, Any]:
        result = sampler(
            prompts(spec, next(drawn)),
            max_generation_steps=spec["new"],
            max_prompt_length=spec["prompt"],
            temperature=1.0,
            top_p=1.0,
            seed=next(seeds),
            eos_tokens=[eos],
        )
        # What it returns is without the EOS.
        return {"tokens": sum(map(len, result.tokens)) + unsaid}

    rounds.start(**facts(size(model), 0, spec, "`Sampler`"))
    repeat(rounds, call)


def ppo(rounds: Rounds, spec: dict[str, Any], mesh: Mesh) -> None:
    cluster = ppo_cluster(spec, mesh)
    trained = [trainer.model for trainer in (cluster.actor_trainer, cluster.critic_trainer)]

    class Held(ppo_learner.PPOLearner):
        def _run_global_step(self, *args: Any, **options: Any) -> None:
            super()._run_global_step(*args, **options)
            jax.block_until_ready([nnx.state(model) for model in trained])
            rounds.tick()

    config = ppo_learner.PPOConfig(
        num_iterations=spec["epochs"], beta=0.05, gamma=1.0, gae_lambda=0.95, epsilon=0.2, clip_range_value=0.2
    )
    learner, drawn = Held(cluster, config), tokens(spec, spec["rows"], spec["prompt"])
    rounds.start(**facts(2 * size(*trained), size(*trained), spec, '`PPOLearner`, rollout engine "vanilla"'))
    learner.train({"prompts": np.array(prompts(spec, next(drawn)))} for _ in range(STEPS))


def ppo_cluster(spec: dict[str, Any], mesh: Mesh) -> rl_cluster.RLCluster:
    rows = spec["rows"]
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer(spec),
        critic_optimizer=optimizer(spec),
        eval_every_n_steps=STEPS,
        max_steps=STEPS,
        mini_batch_size=rows,
        train_micro_batch_size=rows,
        rollout_micro_batch_size=rows,
        compute_logps_micro_batch_size=rows,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=spec["new"],
        max_prompt_length=spec["prompt"],
        kv_cache_size=spec["prompt"] + spec["new"],
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[NO_TOKEN],
    )
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=training,
        rollout_config=rollout,
    )
    critic, scorer = (rl_utils.create_critic_model(llama(spec, seed=seed)) for seed in (1, 2))
    actor, reference = llama(spec), llama(spec)
    return rl_cluster.RLCluster(
        actor=actor, critic=critic, reference=reference, reward=scorer, tokenizer=Numbers(), cluster_config=config
    )


if __name__ == "__main__":
    main()
