"""Sample texts that a stage writes with its evaluations."""

from collections.abc import Callable

from jrlhf.data import PromptRows
from jrlhf.parallel import is_first
from jrlhf.rollout.sampling import GenerateFn, answers
from jrlhf.runs.metrics import drop_after
from jrlhf.system.lines import json_line
from jrlhf.train.keys import stream_key
from jrlhf.train.site import Site
from jrlhf.types import Params


def make_sample_writer(
    site: Site, prompts: PromptRows | None, generate: GenerateFn, *, batch_size: int
) -> Callable[[Params, int], None]:
    """Return a function that appends answers to ``prompts`` to samples.jsonl, with the same random draws in every call.

    The prompts are those of the first held-out rows; with None nothing is written. A resumed run replaces the lines of
    a repeated step. The prompt of plain text is only a BOS token.
    """
    if prompts is None:
        return lambda params, number: None

    def write(params: Params, number: int) -> None:
        key = stream_key(site.config.seed, site.stage, "samples")
        at = {"key": key, "mesh": site.mesh, "batch_size": batch_size, "show_progress": False}
        texts = answers(generate, params, prompts, site.tokenizer, samples=1, **at)
        rows = [{"step": number, **row, "completion": a} for row, (a,) in zip(prompts.shown, texts, strict=True)]
        if is_first():
            drop_after(site.folder / "samples.jsonl", number - 1)
            with (site.folder / "samples.jsonl").open("a", encoding="utf-8") as out:
                out.writelines(json_line(row) for row in rows)

    return write
