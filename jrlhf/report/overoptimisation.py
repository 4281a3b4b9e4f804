"""The fit of reward over the distance from the SFT policy."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class OveroptimisationFit(NamedTuple):
    """R(d) = start + d · (α - β · log d), d = √KL."""

    start: float
    alpha: float
    beta: float

    def at(self, distances: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """R at each d; R(0) is the start."""
        safe = np.where(distances > 0, distances, 1.0)
        return self.start + np.where(distances > 0, distances * (self.alpha - self.beta * np.log(safe)), 0.0)


def overoptimisation_fit(kl: Float[np.ndarray, "N"], rewards: Float[np.ndarray, "N"]) -> OveroptimisationFit | None:
    """Least squares over α, β and the start. Gao et al. 2022, "Scaling laws for reward model overoptimization", eq. 2.

    ``kl`` in nats a sequence; one below 0 counts as 0. None with fewer than four different distances, as three
    unknowns go through any three.
    """
    d = np.sqrt(np.maximum(kl.astype(np.float64), 0.0))
    known = np.isfinite(d) & np.isfinite(rewards)
    d, rewards = d[known], rewards[known]
    if np.unique(d).size < 4:
        return None
    log_d = np.log(np.where(d > 0, d, 1.0))
    columns = np.stack([np.ones_like(d), d, -d * log_d], axis=-1)
    start, alpha, beta = np.linalg.lstsq(columns, rewards.astype(np.float64), rcond=None)[0]
    return OveroptimisationFit(float(start), float(alpha), float(beta))
