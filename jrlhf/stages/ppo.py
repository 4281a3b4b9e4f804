"""Stage 3: PPO on the reward model, under a KL penalty to the SFT policy."""

from typing import Any

import optax

from jrlhf.config import Config, PPOConfig, to_yaml
from jrlhf.parallel import device_peaks
from jrlhf.rollout.actors import Actors, learnt_policy, load_actors, trainable_actors
from jrlhf.rollout.evaluation import judged, make_evaluator
from jrlhf.rollout.iteration import episode_slices, make_iteration, networks_of
from jrlhf.rollout.rules import make_rules
from jrlhf.rollout.safety import make_safety
from jrlhf.rollout.sampling import jit_generate
from jrlhf.rollout.scores import make_rewards
from jrlhf.runs.exports import as_metadata, companions, exported_form, write_adapter, write_export
from jrlhf.runs.folder import open_stage, pass_gates, write_json
from jrlhf.runs.origin_check import changed_inputs, check_origin, finished_summary
from jrlhf.stages.inputs import PPOInputs
from jrlhf.steps import PPOSettings, make_ppo_step
from jrlhf.train.loop import Loop, run_loop
from jrlhf.train.optim import make_actor_critic_optimizer
from jrlhf.train.performance import phase_rates, rates
from jrlhf.train.positions import Positions
from jrlhf.train.start import JittedStep, mesh_of, start_training
from jrlhf.train.window import Rate

SHOWN = ("reward/score_mean", "kl", "entropy", "length/mean", "tokens_per_second")


def run_ppo(config: Config) -> dict[str, Any]:
    """Train, evaluate and export; returns the stage's summary. Goes on where an earlier call left, if it did.

    Writes ``<run>/ppo/{config.yaml, metrics.jsonl, evals/<iteration>.jsonl, safety/<iteration>.jsonl, checkpoints/,
    hf/, peft/, summary.json}``.
    """
    ppo = config.ppo
    with open_stage(config, "ppo") as folder:
        inputs = PPOInputs(config)
        if summary := finished_summary(inputs, folder):
            return summary
        make_rules(ppo.rewards)  # before any weight is read: what they miss is said at once
        mesh = mesh_of(config)
        slices = episode_slices(ppo, ppo.episodes, mesh, key="ppo.episodes")
        update_slices = episode_slices(ppo, ppo.episodes // ppo.minibatches, mesh, key="ppo.episodes / ppo.minibatches")
        prompts, heldout, ptx = inputs.prompts, inputs.heldout, inputs.ptx
        origin = check_origin(inputs, folder)
        actors = load_actors(config, mesh)
        Positions(actors.policy.arch, "ppo.ptx.max_length").check({"ppo.ptx.train": ptx})
        for positions in actors.positions(ppo):
            positions.check({"ppo.prompts.train": prompts, "ppo.prompts.eval": heldout})

        tx, schedule = make_actor_critic_optimizer(
            ppo.optim, value_lr=ppo.value_lr, updates=ppo.iterations * ppo.epochs * ppo.minibatches
        )
        step = make_step(ppo, actors, tx, accumulation=update_slices)
        trained, frozen = trainable_actors(config, actors, mesh)
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
        score = make_rewards(config, actors, mesh, slices=slices)
        iterate, batch_of = make_iteration(config, actors, generate, score, update, prompts, ptx, mesh, slices=slices)
        heldout_figures = make_evaluator(config, actors, generate, heldout, folder, mesh)
        safety = make_safety(
            config,
            inputs.safety_prompts,
            generate,
            actors.tokenizer,
            folder,
            mesh,
            batch_size=ppo.episodes,
            positions=actors.positions(ppo)[0],
        )
        beside = companions(actors.tokenizer, to_yaml(config), stop=ppo.sampling.stop)
        exported = exported_form(actors.policy, ppo.export_dtype)
        peaks = device_peaks(ppo.model.dtype)
        loop = Loop(
            title="PPO",
            total=ppo.iterations,
            advance=iterate,
            batch_of=batch_of,
            max_skipped=ppo.max_skipped,
            guards=ppo.guards,
            canary=ppo.canary,
            gates=ppo.gates,
            evaluate=lambda state, number: (
                heldout_figures(state, number) | safety(exported(learnt_policy(state.train)), number)
            ),
            learning_rate=schedule,
            rates=(Rate("length/tokens", "tokens_per_second"), *rates(peaks), *phase_rates(peaks)),
            best_metric="eval/judge_mean" if judged(ppo.canary) else "eval/score_mean",
            best_mode="max",
            shown=SHOWN,
        )
        outcome = run_loop(
            loop,
            state,
            folder=folder,
            log=ppo.log,
            checkpoint=ppo.checkpoint,
            metadata=as_metadata(beside) | {"origin": origin.as_json()},
        )
        pass_gates("ppo", ppo.gates, outcome.last, folder)
        learnt = learnt_policy(outcome.state.train)
        # Not the policy's own folder: where that is an adapter's, the frozen weights are its base with it merged in.
        write_adapter(actors.policy, learnt, ppo.lora, folder / "peft", base=inputs.source, beside=beside)
        write_export(actors.policy, learnt, folder / "hf", beside=beside, dtype=ppo.export_dtype)
        summary = {
            "before": outcome.first,
            "after": outcome.last,
            "iterations": ppo.iterations,
            "exported_step": outcome.step,
            "export_dtype": ppo.export_dtype,
            "kl_coef": float(outcome.state.kl_coef),
            "cut": prompts.cut,
            "seconds": outcome.seconds,
            **changed_inputs(origin),
        }
        write_json(folder / "summary.json", summary)
        return summary


def make_step(ppo: PPOConfig, actors: Actors, tx: optax.GradientTransformation, *, accumulation: int) -> JittedStep:
    """``make_ppo_step`` with a config's settings: 0 is off there, None here."""
    settings = PPOSettings(
        epochs=ppo.epochs,
        minibatches=ppo.minibatches,
        temperature=ppo.sampling.temperature,
        clip=ppo.clip,
        value_clip=ppo.value_clip,
        value_coef=ppo.value_coef,
        entropy_coef=ppo.entropy_coef,
        dual_clip=ppo.dual_clip or None,
        ptx_coef=ppo.ptx_coef,
        target_approx_kl=ppo.target_approx_kl or None,
        critic_warmup_updates=ppo.critic_warmup * ppo.epochs * ppo.minibatches,
        ema_decay=ppo.ema_decay or None,
        accumulation=accumulation,
        drop_padding=actors.packable,
    )
    return make_ppo_step(networks_of(actors), tx, settings)
