"""Best of n: the mean score of the best of n answers, and how far it is from the policy that they are drawn from.

Stiennon et al. 2020, arXiv 2009.01325, section 4.3.
"""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float

from jrlhf.config import RolloutConfig
from jrlhf.data import PromptRows
from jrlhf.parallel import fetch
from jrlhf.rollout.reward_models import Scorer
from jrlhf.rollout.sampling import GenerateFn, generate_all
from jrlhf.rollout.scores import Rewards
from jrlhf.runs.folder import write_json
from jrlhf.train.keys import stream_key
from jrlhf.train.site import Site
from jrlhf.types import Params

BEST_OF_N = "best_of_n.json"
"""File of the curve in a stage's folder."""


def make_best_of_n(
    site: Site,
    section: RolloutConfig,
    generate: GenerateFn,
    prompts: PromptRows,
    score: Rewards,
    judge: Scorer | None,
    *,
    batch_size: int,
) -> Callable[[Params], None]:
    """Return a function that draws ``best_of_n`` answers of a policy to each held-out prompt, and writes their curve.

    It does nothing if ``best_of_n`` is 0.
    """
    key, limit = stream_key(site.config.seed, site.stage, "best_of_n"), section.log.eval_rows

    def scores_of(policy: Params, draw: int) -> Float[np.ndarray, "2 P"]:
        """Return an answer's score and the judge's score for each prompt."""
        scores = np.full((2, min(len(prompts), limit or len(prompts))), np.nan)
        at = {"key": jax.random.fold_in(key, draw), "mesh": site.mesh, "batch_size": batch_size, "limit": limit}
        for indices, real, generation in generate_all(generate, policy, prompts, **at):
            _, own, parts = score(generation, prompts, indices)
            judged = own if judge is None else judge(generation, prompts, indices)
            own, judged, *parts = fetch((own, judged, *parts.values()))
            own = np.where(np.any([np.isnan(part) for part in (own, *parts)], axis=0), np.nan, own)
            scores[:, indices[real]] = own[real], judged[real]
        return scores

    def write(policy: Params) -> None:
        if section.best_of_n:
            drawn = np.stack([scores_of(policy, draw) for draw in range(section.best_of_n)], axis=-1)
            curve = best_of_n_curve(drawn[0], None if judge is None else drawn[1])
            write_json(site.folder / BEST_OF_N, {"curve": curve})

    return write


def best_mean(scores: Float[np.ndarray, "N"], n: int, values: Float[np.ndarray, "N"] | None = None) -> float:
    """Return the mean, over all choices of ``n`` answers, of the value of the one with the highest score.

    ``values`` None takes the scores themselves; a second judge's scores show what the choice is worth. In ascending
    order of the scores the i-th answer, from 1, is the best of (i - 1 choose n - 1) of the (N choose n) choices (Nakano
    et al. 2021, arXiv 2112.09332, appendix I).
    """
    order = np.argsort(scores)[::-1]
    ordered = (scores if values is None else values)[order]
    total, mean = len(scores), 0.0
    # The weight of the highest score is n / N; each lower one follows from the one above it.
    weight = n / total
    for place, value in zip(range(total, n - 1, -1), ordered, strict=False):
        mean += weight * float(value)
        weight *= (place - n) / (place - 1) if place > 1 else 0.0
    return mean


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1)/n in nats, an upper bound of the KL of the best of n answers to the policy.

    Beirami et al. 2024, arXiv 2401.01879, theorem 1.
    """
    return float(np.log(n) - (n - 1) / n)


def curve_sizes(samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``samples``, and ``samples`` itself."""
    return [*(2**k for k in range(samples.bit_length()) if 2**k < samples), samples]


def best_of_n_curve(
    scores: Float[np.ndarray, "P N"], judge: Float[np.ndarray, "P N"] | None
) -> list[dict[str, int | float]]:
    """Return ``n``, ``kl``, ``score`` and, with a judge, ``judge`` for best of 1, 2, 4, ... and N answers.

    Scores are means over prompts; NaN marks an answer without one. A prompt with fewer than n scores is left out of n.
    """
    curve = []
    for n in curve_sizes(scores.shape[1]):
        rows = [(row[keep], judged[keep]) for row, judged, keep in _scored(scores, judge) if keep.sum() >= n]
        if rows:
            point = {"n": n, "kl": best_of_n_kl(n), "score": float(np.mean([best_mean(row, n) for row, _ in rows]))}
            if judge is not None:
                point["judge"] = float(np.mean([best_mean(row, n, judged) for row, judged in rows]))
            curve.append(point)
    return curve


def _scored(scores: np.ndarray, judge: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return each prompt's scores, the judge's scores, and which answers have both."""
    judged = scores if judge is None else judge
    return list(zip(scores, judged, np.isfinite(scores) & np.isfinite(judged), strict=True))
