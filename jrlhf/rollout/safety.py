"""How often a model refuses what it should, and what it should not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import regex
from jax.sharding import Mesh

from jrlhf.config import Config, DataConfig
from jrlhf.data import Columns, DataError, PromptRows, Tokenizer, load_prompts
from jrlhf.parallel import is_first
from jrlhf.rollout.sampling import GenerateFn, answers
from jrlhf.rules import REFUSALS, refuses, yes_or_no
from jrlhf.system.lines import json_line, write_text
from jrlhf.train.positions import Positions
from jrlhf.types import Params

Rates = dict[str, float]


def load_safety_prompts(config: Config, data: DataConfig, tokenizer: Tokenizer) -> PromptRows | None:
    """The rows of ``config.safety.prompts``, or None where it names none; ``data`` says how prompts are read."""
    safety = config.safety
    return load_prompts(data, safety.prompts, tokenizer, Columns((), (safety.column,))) if safety.prompts else None


def make_safety(
    config: Config,
    prompts: PromptRows | None,
    generate: GenerateFn,
    tokenizer: Tokenizer,
    folder: Path,
    mesh: Mesh,
    *,
    batch_size: int,
    positions: Positions,
) -> Callable[[Params, int], Rates]:
    """Answers to ``config.safety.prompts``, the same draws every time, written to ``safety/<step>.jsonl``.

    ``prompts`` are their rows, ``positions`` what they and their answers must fit in. Nothing is asked where there are
    none. DataError for a column that is not true or false in some row, before anything is answered.
    """
    safety = config.safety
    if prompts is None:
        return lambda params, number: {}
    positions.check({"safety.prompts": prompts})
    wanted = [_wanted(row, safety.column) for row in prompts.shown]
    patterns = [regex.compile(pattern) for pattern in safety.patterns or REFUSALS]

    def evaluate(params: Params, number: int) -> Rates:
        at = {"samples": 1, "seed": config.seed, "mesh": mesh, "batch_size": batch_size, "show_progress": False}
        drawn = [answer for (answer,) in answers(generate, params, prompts, tokenizer, **at)]
        refused = [refuses(answer, patterns, timeout=safety.match_timeout) for answer in drawn]
        if is_first():
            told = zip(prompts.shown, drawn, wanted, refused, strict=True)
            lines = (
                {"prompt": row["prompt"], "completion": answer, "wanted": asked, "refused": found}
                for row, answer, asked, found in told
            )
            path = folder / "safety" / f"{number:06d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            write_text(path, "".join(map(json_line, lines)))
        return refusal_rates(wanted, refused)

    return evaluate


def _wanted(row: dict[str, Any], column: str) -> bool:
    try:
        return yes_or_no(row.get(column))
    except ValueError as error:
        raise DataError(f"column {column} of safety.prompts: {error}") from error


def refusal_rates(wanted: Sequence[bool], refused: Sequence[bool]) -> Rates:
    """The share of refusals among prompts that want one, and among those that do not; none of what there is not."""
    kinds = {"eval/refusal_rate": True, "eval/benign_refusal_rate": False}
    found = {
        name: [answer for asked, answer in zip(wanted, refused, strict=True) if asked is kind]
        for name, kind in kinds.items()
    }
    return {name: sum(of_kind) / len(of_kind) for name, of_kind in found.items() if of_kind}
