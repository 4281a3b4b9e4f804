"""The losses of pairs in the DPO stage: DPO, IPO and SimPO on rankings."""

from typing import Any

import jax

from jrlhf.config import DPOConfig
from jrlhf.core import PreferenceLoss
from jrlhf.data import PreferenceRows, RankingRows, load_rankings
from jrlhf.parallel import fetch, shard_batch
from jrlhf.parallel.step import jit_for
from jrlhf.stages.dpo_method import Figures, Flops, Method, Reader
from jrlhf.stages.rankings import packed_or_plain, planned_preferences, token_mask
from jrlhf.steps import DPOSettings, compared, make_dpo_step, preference_means, preference_sums
from jrlhf.train.batches import covering_batches
from jrlhf.train.programs import Target
from jrlhf.types import Params, RankingBatch


def pairs_method(dpo: DPOConfig, kind: PreferenceLoss) -> Method:
    """Return the method of a loss of pairs."""
    settings = DPOSettings(kind, dpo.beta, label_smoothing=dpo.label_smoothing, gamma=dpo.gamma)
    has_reference = kind != "simpo"

    def planned(target: Target, rows: int, completions: int, longest: int, pack_length: int) -> Any:
        lead = target, rows, completions, longest, pack_length
        return planned_preferences(*lead, reference=has_reference)

    return Method(
        load=load_rankings,
        arrange=arranged_rankings,
        has_reference=has_reference,
        make_step=lambda logprob_fn, tx, slices: make_dpo_step(logprob_fn, tx, settings, accumulation=slices),
        make_figures=lambda rows, reader: _pair_figures(rows, reader, settings),
        flops=_flops,
        completions=lambda completions: completions,
        planned=planned,
        counted="pairs",
    )


def arranged_rankings(rows: RankingRows, pack_length: int) -> PreferenceRows:
    """Return rankings in batches, packed to ``pack_length`` tokens or, if it is 0, one to a row."""
    return PreferenceRows(packed_or_plain(rows, pack_length, key="dpo"), None)


def _flops(flops: Flops, passes: float, batch: Any, metrics: dict[str, Any]) -> jax.Array:
    del passes
    return flops(token_mask(batch), metrics["tokens"])


def _pair_figures(rows: PreferenceRows, reader: Reader, settings: DPOSettings) -> Figures:
    """Return a function that computes loss, accuracy, margin and log-probs of held-out pairs."""
    sums_of = jit_for(reader.mesh, lambda answers, batch: preference_sums(compared(answers, batch, settings), settings))

    def figures(params: Params) -> dict[str, float]:
        parts = []
        for indices, real in covering_batches(rows.lengths, batch_size=reader.at_once, limit=reader.limit):
            batch = rows.batch(indices)
            assert isinstance(batch, RankingBatch)
            batch = shard_batch(batch._replace(valid=batch.valid & real[:, None]), reader.mesh)
            # The program of the reference, which has no log-probs yet.
            answers = reader.logprobs(params, batch._replace(ref_logprobs=None))
            parts.append(sums_of(answers, batch))
        fetched = fetch(parts)
        sums = {name: sum(float(part[name]) for part in fetched) for name in fetched[0]}
        means = preference_means(sums, max(sums["rankings"], 1.0), max(sums["pairs"], 1.0))
        return {f"eval/{name}": value for name, value in (means | {"pairs": sums["pairs"]}).items()}

    return figures
