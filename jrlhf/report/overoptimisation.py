"""Fit of the reward as a function of the distance from the SFT policy."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class OveroptimisationFit(NamedTuple):
    """Fitted reward R(d) = start + d · (α - β · log d) at the distance d = √KL."""

    start: float
    alpha: float
    beta: float

    def at(self, distances: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """Return R at each distance d; R(0) is the start."""
        safe = np.where(distances > 0, distances, 1.0)
        return self.start + np.where(distances > 0, distances * (self.alpha - self.beta * np.log(safe)), 0.0)


def overoptimisation_fit(kl: Float[np.ndarray, "N"], rewards: Float[np.ndarray, "N"]) -> OveroptimisationFit | None:
    """Fit α, β and start by least squares. Gao et al. 2022, "Scaling laws for reward model overoptimization", eq. 2.

    ``kl`` is in nats per sequence; a negative value counts as 0. Returns None for fewer than four different distances,
    because the three unknowns fit any three points.
    """
    d = np.sqrt(np.maximum(kl.astype(np.float64), 0.0))
    finite = np.isfinite(d) & np.isfinite(rewards)
    d, rewards = d[finite], rewards[finite]
    if np.unique(d).size < 4:
        return None
    log_d = np.log(np.where(d > 0, d, 1.0))
    columns = np.stack([np.ones_like(d), d, -d * log_d], axis=-1)
    start, alpha, beta = np.linalg.lstsq(columns, rewards.astype(np.float64), rcond=None)[0]
    return OveroptimisationFit(float(start), float(alpha), float(beta))
