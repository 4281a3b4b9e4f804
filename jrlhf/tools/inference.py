"""Applies a trained model to files: it answers prompts, or scores texts."""

import sys
from typing import Any

from jrlhf import assets
from jrlhf.config import DataConfig
from jrlhf.config.tools import GenerateConfig, SampleConfig, ScoreConfig
from jrlhf.data import DataError, load_texts, load_tokenizer
from jrlhf.models import load_reward_model
from jrlhf.parallel import make_mesh
from jrlhf.rank.tasks import MIN_ANSWERS, TaskFile, distinct, task_line
from jrlhf.rollout.reward_models import score_texts
from jrlhf.rollout.sampling import answers
from jrlhf.runs.folder import last_export
from jrlhf.system.lines import json_line, write_output
from jrlhf.tools.best_of_n import best_of_n
from jrlhf.tools.sampler import load_sampler
from jrlhf.train.positions import Positions


def run_generate(args: GenerateConfig) -> None:
    """Write one JSON line for each prompt, in order: ``{"prompt", "tools"?, "completions": [...]}``."""
    rows = (row | {"completions": completions} for row, completions in _sample(args))
    write_output(args.out, "".join(map(json_line, rows)))


def run_sample(args: SampleConfig) -> None:
    """Write one JSON line for each prompt, with its answers to rank or with the best, and notes to stderr."""
    lines = _tasks(args) if args.keep == "all" else best_of_n(args)
    write_output(args.out, "".join(lines))


def _tasks(args: SampleConfig) -> list[str]:
    lines: list[str] = []
    merged = left_out = 0
    about = {"model": args.model, "seed": args.seed, "temperature": args.sampling.temperature}
    for row, completions in _sample(args):
        different = distinct(completions)
        merged += len(completions) - len(different)
        if len(different) < MIN_ANSWERS:
            left_out += 1
        else:
            tools = {name: row[name] for name in ("tools",) if name in row}
            lines.append(task_line(row["prompt"], different, **tools, **about))
    unique = list(dict.fromkeys(lines))
    repeated = len(lines) - len(unique)
    for note in TaskFile((), merged, left_out, repeated).notes():
        print(f"jrlhf: {note}", file=sys.stderr)
    if not unique:
        raise DataError(f"{args.prompts}: no prompt has two different answers; raise sampling.temperature or samples")
    return unique


def _sample(args: GenerateConfig) -> list[tuple[dict[str, Any], list[str]]]:
    """Return each prompt, the tools that it may call, and its answers."""
    sampler = load_sampler(args)
    texts = answers(sampler.generate, sampler.model.params, sampler.prompts, sampler.tokenizer, **sampler.settings)
    return list(zip(sampler.prompts.shown, texts, strict=True))


def run_score(args: ScoreConfig) -> None:
    """Write one JSON line for each answer, in the order of the rows: ``{"prompt"?, "tools"?, "completion",
    "score"}``."""
    source = last_export(assets.resolve(args.model), "reward")
    tokenizer = load_tokenizer(source)
    data = DataConfig(train=args.data, max_length=args.max_length)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    model = load_reward_model(source, dtype=args.dtype, mesh=mesh, weights="auto", option="model")
    texts = load_texts(data, args.data, tokenizer, model.reading)
    Positions(model.arch, "max_length", model="the reward model").check({args.data: texts})
    shown = len(texts) > args.batch_size
    scores = score_texts(model, texts, mesh=mesh, batch_size=args.batch_size, show_progress=shown)
    rows = (row | {"score": float(score)} for row, score in zip(texts.shown, scores, strict=True))
    write_output(args.out, "".join(map(json_line, rows)))
