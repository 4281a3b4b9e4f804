"""Hypothesis draws masks, the shapes stay fixed: every example reuses what is compiled."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

ROWS, LENGTH = 4, 7
seeds = st.integers(0, 2**31 - 1)


def masks(*shape):
    """Any mask at all: holes, prompts, padding on either side, rows that are all masked."""
    return hnp.arrays(np.bool_, shape or (ROWS, LENGTH))


def floats(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape or (ROWS, LENGTH)) * scale).astype(np.float32)


def with_nan(x, mask):
    """``x`` with NaN in every masked slot."""
    return np.where(mask, x, np.float32(np.nan))
