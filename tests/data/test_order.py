"""Which rows make which batch: all of them, once an epoch, whoever asks and in whatever order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.data import Order, epoch_batches, steps_per_epoch

SIZES = st.tuples(st.integers(1, 200), st.integers(1, 40))


def lengths_of(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(1, 500, rows)


@given(SIZES, st.integers(0, 5))
def test_an_epoch_visits_every_row(sizes, epoch):
    rows, batch_size = sizes
    batches = epoch_batches(3, epoch, batch_size=batch_size, lengths=lengths_of(rows))
    assert batches.shape == (steps_per_epoch(rows, batch_size), batch_size)
    counts = np.bincount(batches.ravel(), minlength=rows)
    assert counts.min() == 1 if rows >= batch_size else counts.min() >= batch_size // rows
    assert counts.max() <= (2 if rows >= batch_size else -(-batch_size // rows))
    if rows >= batch_size:
        assert all(len(set(batch)) == batch_size for batch in batches.tolist())


def test_rows_come_again_only_in_the_batch_that_is_filled_up():
    batches = epoch_batches(0, 0, batch_size=8, lengths=lengths_of(100)).tolist()
    filled = [i for i in range(13) if len({row for j, b in enumerate(batches) if j != i for row in b}) == 96]
    assert len(filled) == 1
    assert len({row for batch in batches for row in batch}) == 100


@given(SIZES, st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_a_step_has_its_rows_however_it_is_reached(sizes, steps):
    rows, batch_size = sizes
    lengths = lengths_of(rows)
    order = Order(7, batch_size=batch_size, lengths=lengths)
    for step in steps:
        fresh = Order(7, batch_size=batch_size, lengths=lengths)
        np.testing.assert_array_equal(order[step], fresh[step])
        epoch, index = divmod(step, order.steps_per_epoch)
        expected = epoch_batches(7, epoch, batch_size=batch_size, lengths=lengths)[index]
        np.testing.assert_array_equal(order[step], expected)


def test_epochs_and_seeds_differ():
    lengths = lengths_of(64)
    orders = [
        epoch_batches(seed, epoch, batch_size=8, lengths=lengths).tobytes() for seed in range(3) for epoch in range(3)
    ]
    assert len(set(orders)) == 9


def test_like_lengths_go_together_in_random_order():
    lengths = lengths_of(2048)
    batches = epoch_batches(0, 0, batch_size=16, lengths=lengths)
    padded = sum(16 * lengths[batch].max() for batch in batches)
    shuffled = np.random.default_rng(0).permutation(2048).reshape(-1, 16)
    assert padded < 1.1 * lengths.sum()
    assert sum(16 * lengths[batch].max() for batch in shuffled) > 1.6 * lengths.sum()
    # Short ones do not come first.
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.25


@pytest.mark.parametrize(("rows", "batch_size", "steps"), [(1, 1, 1), (7, 8, 1), (8, 8, 1), (9, 8, 2), (160, 8, 20)])
def test_steps_per_epoch(rows, batch_size, steps):
    assert steps_per_epoch(rows, batch_size) == steps
