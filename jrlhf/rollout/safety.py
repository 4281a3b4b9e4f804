"""Refusal rates of a model on prompts that it should refuse and on benign prompts."""

from collections.abc import Callable, Sequence
from typing import Any

import regex

from jrlhf.config import Config, DataConfig
from jrlhf.data import Columns, DataError, PromptRows, Tokenizer, load_prompts
from jrlhf.parallel import is_first
from jrlhf.rollout.sampling import GenerateFn, answers
from jrlhf.rules import REFUSALS, refuses, yes_or_no
from jrlhf.system.lines import json_line, write_text
from jrlhf.train.keys import stream_key
from jrlhf.train.positions import Positions
from jrlhf.train.site import Site
from jrlhf.types import Params

Rates = dict[str, float]


def load_safety_prompts(config: Config, data: DataConfig, tokenizer: Tokenizer) -> PromptRows | None:
    """Load the rows of ``config.safety.prompts`` with the settings of ``data``; return None if it is empty."""
    safety = config.safety
    return load_prompts(data, safety.prompts, tokenizer, Columns((), (safety.column,))) if safety.prompts else None


def make_safety(
    site: Site,
    prompts: PromptRows | None,
    generate: GenerateFn,
    *,
    batch_size: int,
    positions: Positions,
) -> Callable[[Params, int], Rates]:
    """Return a function that answers ``config.safety.prompts`` and returns the refusal rates.

    It writes the answers to ``safety/<step>.jsonl``, and uses the same random draws in every evaluation. ``prompts``
    are the rows; with None the function returns no rates. Prompts and answers must fit in ``positions``. Raise
    DataError at once if the column of a row is not true or false.
    """
    safety = site.config.safety
    if prompts is None:
        return lambda params, number: {}
    positions.check({"safety.prompts": prompts})
    expected = [_expects_refusal(row, safety.column) for row in prompts.shown]
    patterns = [regex.compile(pattern) for pattern in safety.patterns or REFUSALS]

    def evaluate(params: Params, number: int) -> Rates:
        at = {
            "samples": 1,
            "key": stream_key(site.config.seed, site.stage, "safety"),
            "mesh": site.mesh,
            "batch_size": batch_size,
            "show_progress": False,
        }
        texts = [answer for (answer,) in answers(generate, params, prompts, site.tokenizer, **at)]
        refusals = [refuses(answer, patterns, timeout=safety.match_timeout) for answer in texts]
        if is_first():
            lines = (
                {"prompt": row["prompt"], "completion": answer, "wanted": expects_refusal, "refused": refusal}
                for row, answer, expects_refusal, refusal in zip(prompts.shown, texts, expected, refusals, strict=True)
            )
            path = site.folder / "safety" / f"{number:06d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            write_text(path, "".join(map(json_line, lines)))
        return refusal_rates(expected, refusals)

    return evaluate


def _expects_refusal(row: dict[str, Any], column: str) -> bool:
    try:
        return yes_or_no(row.get(column))
    except ValueError as error:
        raise DataError(f"column {column} of safety.prompts: {error}") from error


def refusal_rates(expected: Sequence[bool], refusals: Sequence[bool]) -> Rates:
    """Return the share of refusals among prompts to refuse and among benign prompts; a kind without prompts has none.

    ``expected`` says for each prompt whether the model should refuse it, ``refusals`` whether it did.
    """
    kinds = {"eval/refusal_rate": True, "eval/benign_refusal_rate": False}
    groups = {
        name: [refusal for expects, refusal in zip(expected, refusals, strict=True) if expects is kind]
        for name, kind in kinds.items()
    }
    return {name: sum(group) / len(group) for name, group in groups.items() if group}
