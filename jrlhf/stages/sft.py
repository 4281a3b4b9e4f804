"""Stage 1: teach a pretrained model how to answer."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jrlhf.config import Config, SFTConfig, to_yaml
from jrlhf.core import combine
from jrlhf.data import Order, PromptRows, SFTRows, Tokenizer, pack_sft
from jrlhf.models import Pretrained, load_pretrained, merge_adapters
from jrlhf.parallel import device_peaks, fetch, is_first, shard_batch
from jrlhf.rollout.safety import make_safety
from jrlhf.rollout.sampling import GenerateFn, answers, jit_generate
from jrlhf.runs.exports import as_metadata, companions, exported_form, write_adapter, write_export
from jrlhf.runs.folder import open_stage, pass_gates, write_json
from jrlhf.runs.metrics import drop_after
from jrlhf.runs.origin_check import changed_inputs, check_origin, finished_summary
from jrlhf.stages.inputs import SFTInputs
from jrlhf.steps import make_sft_eval, make_sft_step
from jrlhf.system.lines import json_line, write_text
from jrlhf.train.batches import covering_batches, device_multiple, device_share, reading_slices
from jrlhf.train.loop import Loop, run_loop
from jrlhf.train.lora import trainable
from jrlhf.train.optim import make_optimizer
from jrlhf.train.performance import rates, timed, training_flops
from jrlhf.train.positions import Positions
from jrlhf.train.start import computed, mesh_of, start_training
from jrlhf.train.state import RunState
from jrlhf.train.window import Rate
from jrlhf.types import Params, SFTBatch


def run_sft(config: Config) -> dict[str, Any]:
    """Train, evaluate and export; returns the stage's summary. Goes on where an earlier call left, if it did.

    Writes ``<run>/sft/{config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, hf/, peft/, summary.json}``, and
    ``candidates.jsonl`` and ``safety/<step>.jsonl`` where the config asks for ranking candidates and for refusals.
    """
    sft = config.sft
    with open_stage(config, "sft") as folder:
        inputs = SFTInputs(config)
        if summary := finished_summary(inputs, folder):
            return summary
        mesh = mesh_of(config)
        share = device_share(sft.batch_size, mesh, key="sft.batch_size")
        source, tokenizer, rows, heldout = inputs.source, inputs.tokenizer, inputs.train, inputs.heldout
        candidates = inputs.candidate_prompts
        origin = check_origin(inputs, folder)
        shown = heldout.prompts(min(sft.log.samples, len(heldout)), tokenizer) if heldout and sft.log.samples else None
        model = load_pretrained(source, mesh=mesh, **computed(sft.model, mesh, key="sft.model"))
        positions = Positions(model.arch, "sft.data.max_length")
        positions.check({"sft.data.train": rows, "sft.data.eval": heldout})
        answering = positions.answering(sft.sampling, "sft.sampling")
        answering.check({"sft.candidate_prompts": candidates, "sft.log.samples (of sft.data.eval)": shown})

        batches = pack_sft(rows, sft.pack_length) if sft.pack_length else rows
        order = Order(config.seed, batch_size=sft.batch_size, lengths=batches.lengths, parts=batches.parts)
        total = math.ceil(sft.epochs * order.steps_per_epoch)
        tx, schedule = make_optimizer(sft.optim, updates=total)
        platform = mesh.devices.flat[0].platform
        tokens = float(batches.lengths.mean())
        slices = reading_slices(share, microbatch=sft.microbatch, tokens=tokens, platform=platform)
        step = make_sft_step(model.logprob_fn, tx, accumulation=slices)
        trained, frozen = trainable(model, sft.lora, jax.random.key(config.seed), mesh=mesh, path="sft.lora")
        state, update = start_training(step, tx, trained, mesh=mesh, rules=model.rules, seed=config.seed, frozen=frozen)

        flops = training_flops(model.arch, frozen=frozen is not None)

        def advance(state: RunState, number: int) -> tuple[RunState, dict[str, Any]]:
            seconds: dict[str, Any] = {}
            with timed(seconds, "seconds/input"):
                batch = shard_batch(batches.batch(order[number]), mesh)
            train, metrics = update(state.train, batch, jax.random.fold_in(state.key, number))
            metrics |= seconds | {"flops": flops(batch.mask, metrics["tokens"])}
            return state._replace(train=train, cursor=state.cursor + 1), metrics

        generate = jit_generate(model.decode_fns, sft.sampling, tokenizer, mesh)
        samples = _sample_writer(sft, generate, tokenizer, shown, folder, mesh=mesh, seed=config.seed)
        score = _evaluator(sft, model, heldout, mesh)
        safety = make_safety(
            config,
            inputs.safety_prompts,
            generate,
            tokenizer,
            folder,
            mesh,
            batch_size=sft.batch_size,
            positions=answering,
        )
        beside = companions(tokenizer, to_yaml(config), stop=sft.sampling.stop)
        exported = exported_form(model, sft.export_dtype)

        def evaluate(state: RunState, number: int) -> dict[str, float]:
            params = exported(combine(state.train.params, frozen))
            samples(params, number)
            return score(params) | safety(params, number)

        loop = Loop(
            title="SFT",
            total=total,
            advance=advance,
            evaluate=evaluate,
            batch_of=lambda state, number: batches.batch(order[number])._asdict(),
            max_skipped=sft.max_skipped,
            guards=None,
            canary=None,
            gates=sft.gates,
            learning_rate=schedule,
            rates=(Rate("tokens", "tokens_per_second"), *rates(device_peaks(sft.model.dtype))),
            best_metric="eval/nll",
            best_mode="min",
            shown=("loss", "tokens_per_second"),
        )
        outcome = run_loop(
            loop,
            state,
            folder=folder,
            log=sft.log,
            checkpoint=sft.checkpoint,
            metadata=as_metadata(beside) | {"origin": origin.as_json()},
        )
        pass_gates("sft", sft.gates, outcome.last, folder)
        learnt = combine(outcome.state.train.params, frozen)
        write_adapter(model, learnt, sft.lora, folder / "peft", base=source, beside=beside)
        params = merge_adapters(exported(learnt))
        write_export(model, params, folder / "hf", beside=beside, dtype=sft.export_dtype)
        if candidates is not None:
            _write_candidates(config, candidates, generate, params, tokenizer, folder, mesh)
        summary = {
            "base_nll": outcome.first.get("eval/nll"),
            "heldout_nll": outcome.last.get("eval/nll"),
            "steps": total,
            "exported_step": outcome.step,
            "export_dtype": sft.export_dtype,
            "rows": len(rows),
            "skipped": rows.skipped,
            "cut": rows.cut,
            "seconds": outcome.seconds,
            **changed_inputs(origin),
        }
        write_json(folder / "summary.json", summary)
        return summary


def _evaluator(
    sft: SFTConfig, model: Pretrained, heldout: SFTRows | None, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """Held-out negative log-likelihood per token, in nats; nothing where there are no held-out rows."""
    if heldout is None:
        return lambda params: {}
    sums = jax.jit(make_sft_eval(model.logprob_fn))
    rows, batch_size = heldout, device_multiple(sft.batch_size, mesh)

    def evaluate(params: Params) -> dict[str, float]:
        parts = []
        for indices, real in covering_batches(rows.lengths, batch_size=batch_size, limit=sft.log.eval_rows):
            batch: SFTBatch = rows.batch(indices)
            batch = batch._replace(loss_mask=batch.loss_mask & real[:, None])
            parts.append(sums(params, shard_batch(batch, mesh)))
        nll, tokens = (float(sum(x)) for x in zip(*fetch(parts), strict=True))
        return {"eval/nll": nll / max(tokens, 1.0), "eval/perplexity": math.exp(min(nll / max(tokens, 1.0), 80.0))}

    return evaluate


def _sample_writer(
    sft: SFTConfig,
    generate: GenerateFn,
    tokenizer: Tokenizer,
    prompts: PromptRows | None,
    folder: Path,
    *,
    mesh: Mesh,
    seed: int,
) -> Callable[[Params, int], None]:
    """Appends answers to the prompts of the first held-out rows (plain text has only a BOS) to samples.jsonl, once a
    step however often a run is broken off."""
    if prompts is None:
        return lambda params, number: None

    def write(params: Params, number: int) -> None:
        drawn = answers(
            generate,
            params,
            prompts,
            tokenizer,
            samples=1,
            seed=seed,
            mesh=mesh,
            batch_size=sft.batch_size,
            show_progress=False,
        )
        rows = [{"step": number, **row, "completion": a} for row, (a,) in zip(prompts.shown, drawn, strict=True)]
        if is_first():
            drop_after(folder / "samples.jsonl", number - 1)
            with (folder / "samples.jsonl").open("a", encoding="utf-8") as out:
                out.writelines(json_line(row) for row in rows)

    return write


def _write_candidates(
    config: Config,
    prompts: PromptRows,
    generate: GenerateFn,
    params: Params,
    tokenizer: Tokenizer,
    folder: Path,
    mesh: Mesh,
) -> None:
    """Several answers to each prompt, for people to rank: add ``"ranks"`` to a row and it is a row of reward data."""
    sft = config.sft
    drawn = answers(
        generate,
        params,
        prompts,
        tokenizer,
        samples=sft.candidates,
        seed=config.seed,
        mesh=mesh,
        batch_size=sft.batch_size,
        show_progress=sft.log.progress,
    )
    rows = (row | {"completions": completions} for row, completions in zip(prompts.shown, drawn, strict=True))
    if is_first():
        write_text(folder / "candidates.jsonl", "".join(map(json_line, rows)))
