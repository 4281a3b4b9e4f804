"""Which rows make which batch: all of them, once an epoch, whoever asks and in whatever order."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.data import Order, Part, steps_per_epoch
from jrlhf.data.order import WINDOW, mixed_draws, shares

SIZES = st.tuples(st.integers(1, 200), st.integers(1, 40))
PARTS = st.lists(st.tuples(st.integers(1, 120), st.floats(0.01, 100.0)), min_size=2, max_size=4).map(
    lambda given: [Part(rows, weight) for rows, weight in given]
)


def lengths_of(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(1, 500, rows)


def order_of(seed: int, *, batch_size: int, lengths: np.ndarray) -> Order:
    return Order(seed, batch_size=batch_size, lengths=lengths, parts=[Part(len(lengths), 1.0)])


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    steps = order.steps_per_epoch
    return np.stack([order[step] for step in range(epoch * steps, (epoch + 1) * steps)])


def whole_epoch(rng: np.random.Generator, draws: np.ndarray, batch_size: int, lengths: np.ndarray) -> np.ndarray:
    """An epoch's batches, made all at once and plainly: what ``Order`` gives one by one."""
    whole = len(draws) - len(draws) % batch_size
    body, rest = draws[:whole], draws[whole:]
    span = WINDOW * batch_size
    windows = [body[start : start + span] for start in range(0, whole, span)]
    batches = [window[np.argsort(lengths[window], kind="stable")] for window in windows]
    if len(rest):
        batches.append(np.resize(np.concatenate([rest, body]), batch_size))
    steps = steps_per_epoch(len(draws), batch_size)
    return np.concatenate(batches).reshape(steps, batch_size)[rng.permutation(steps)]


@given(SIZES, st.integers(0, 5))
def test_an_epoch_visits_every_row(sizes, epoch):
    rows, batch_size = sizes
    batches = epoch_of(order_of(3, batch_size=batch_size, lengths=lengths_of(rows)), epoch)
    assert batches.shape == (steps_per_epoch(rows, batch_size), batch_size)
    counts = np.bincount(batches.ravel(), minlength=rows)
    assert counts.min() == 1 if rows >= batch_size else counts.min() >= batch_size // rows
    assert counts.max() <= (2 if rows >= batch_size else -(-batch_size // rows))
    if rows >= batch_size:
        assert all(len(set(batch)) == batch_size for batch in batches.tolist())


def test_rows_come_again_only_in_the_batch_that_is_filled_up():
    batches = epoch_of(order_of(0, batch_size=8, lengths=lengths_of(100)), 0).tolist()
    filled = [i for i in range(13) if len({row for j, b in enumerate(batches) if j != i for row in b}) == 96]
    assert len(filled) == 1
    assert len({row for batch in batches for row in batch}) == 100


@given(st.tuples(st.integers(1, 2000), st.integers(1, 40)), st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_a_step_has_its_rows_however_it_is_reached(sizes, steps):
    rows, batch_size = sizes
    lengths = lengths_of(rows)
    order = order_of(7, batch_size=batch_size, lengths=lengths)
    for step in steps:
        fresh = order_of(7, batch_size=batch_size, lengths=lengths)
        np.testing.assert_array_equal(order[step], fresh[step])
        epoch, index = divmod(step, order.steps_per_epoch)
        rng = np.random.default_rng([7, epoch])
        expected = whole_epoch(rng, rng.permutation(rows), batch_size, lengths)[index]
        np.testing.assert_array_equal(order[step], expected)


def test_epochs_and_seeds_differ():
    lengths = lengths_of(64)
    orders = [
        epoch_of(order_of(seed, batch_size=8, lengths=lengths), epoch).tobytes()
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9


def test_like_lengths_go_together_in_random_order():
    lengths = lengths_of(2048)
    batches = epoch_of(order_of(0, batch_size=16, lengths=lengths), 0)
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


def test_the_documented_shares():
    assert shares([Part(100, 3.0), Part(60, 1.0)]) == [120, 40]
    assert shares([Part(7, 7.0), Part(3, 3.0)]) == [7, 3]
    assert shares([Part(1000, 1e9), Part(1, 1e-9), Part(1, 1e-9)]) == [1000, 1, 1]


@given(PARTS)
def test_shares_are_the_weights_to_within_a_row_and_no_source_starves(parts):
    counts = shares(parts)
    rows, weights = sum(part.rows for part in parts), sum(Fraction(part.weight) for part in parts)
    assert sum(counts) == rows
    assert min(counts) >= 1
    wanted = [rows * Fraction(part.weight) / weights for part in parts]
    if min(wanted) >= 1:
        assert all(abs(count - want) < 1 for count, want in zip(counts, wanted, strict=True))
    else:  # a row each for those below 1 is taken from the others
        assert all(count == 1 for count, want in zip(counts, wanted, strict=True) if want < 1)


def source_of(row: int, parts: list[Part]) -> tuple[int, int]:
    """Source and row in it, counted out."""
    for number, part in enumerate(parts):
        if row < part.rows:
            return number, row
        row -= part.rows
    raise AssertionError


@given(PARTS, st.integers(0, 2**32 - 1))
def test_streams_are_whole_passes_that_go_on_over_epochs(parts, seed):
    """Cut a source's draws of several epochs into passes: each is all of its rows, once, in an order of its own."""
    drawn: list[list[int]] = [[] for _ in parts]
    for epoch in range(4):
        draws = [source_of(int(row), parts) for row in mixed_draws(seed, epoch, parts)]
        counts = Counter(number for number, _ in draws)
        assert [counts[number] for number in range(len(parts))] == shares(parts)
        for number, row in draws:
            drawn[number].append(row)
    for part, rows in zip(parts, drawn, strict=True):
        passes = [rows[start : start + part.rows] for start in range(0, len(rows), part.rows)]
        assert all(sorted(of_pass) == list(range(part.rows)) for of_pass in passes if len(of_pass) == part.rows)
        assert len(set(passes[-1])) == len(passes[-1])
        if part.rows > 20 and len(passes) > 2:
            assert passes[0] != passes[1]


@given(PARTS)
def test_every_stretch_of_draws_is_in_proportion(parts):
    draws = [source_of(int(row), parts)[0] for row in mixed_draws(1, 0, parts)]
    counts, taken = shares(parts), [0] * len(parts)
    for done, number in enumerate(draws, 1):
        taken[number] += 1
        for count, have in zip(counts, taken, strict=True):
            assert abs(have - done * count / len(draws)) <= 0.5 + len(parts) / 2


def test_weights_in_proportion_to_sizes_are_one_pass_over_all():
    parts = [Part(300, 3.0), Part(100, 1.0), Part(200, 2.0)]
    assert sorted(mixed_draws(5, 3, parts).tolist()) == list(range(600))


@given(PARTS, st.integers(1, 16), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_mixture_is_a_pure_function_of_seed_epoch_and_index(parts, batch_size, steps):
    lengths = lengths_of(sum(part.rows for part in parts))
    order = Order(11, batch_size=batch_size, lengths=lengths, parts=parts)
    for step in steps:
        epoch, index = divmod(step, order.steps_per_epoch)
        rng = np.random.default_rng([11, epoch])
        expected = whole_epoch(rng, mixed_draws(11, epoch, parts), batch_size, lengths)
        np.testing.assert_array_equal(order[step], expected[index])


@given(
    st.one_of(PARTS, st.builds(lambda rows: [Part(rows, 1.0)], st.integers(1, 200))),
    st.integers(1, 16),
    st.integers(0, 60),
)
def test_the_rows_that_are_drawn_are_those_of_the_batches(parts, batch_size, steps):
    order = Order(11, batch_size=batch_size, lengths=lengths_of(sum(part.rows for part in parts)), parts=parts)
    assert order.drawn(steps).tolist() == sorted({row for step in range(steps) for row in order[step].tolist()})


def test_a_row_of_a_repeated_source_is_not_twice_in_a_batch():
    """Passes follow one another: a shuffle of all draws would put copies in a window, and sorting them in a batch."""
    parts = [Part(4000, 1.0), Part(1000, 1.0)]
    batches = epoch_of(Order(0, batch_size=8, lengths=lengths_of(5000), parts=parts), 0)
    twice = sum(len(set(batch)) < 8 for batch in batches.tolist())
    assert twice <= 0.01 * len(batches)


@pytest.mark.parametrize("parts", [[Part(500, 1.0)], [Part(420, 1.0), Part(80, 2.0)]], ids=["one", "mixed"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_out_every_batch(parts, hosts):
    """Each host has an order of its own and takes its part of each step: together they are the batches of one host."""
    lengths, batch_size = lengths_of(500), 16
    orders = [Order(9, batch_size=batch_size, lengths=lengths, parts=parts) for _ in range(hosts)]
    alone = Order(9, batch_size=batch_size, lengths=lengths, parts=parts)
    share = batch_size // hosts
    for step in (0, 1, 31, 32, 100, 63):
        slices = [order[step][host * share : (host + 1) * share] for host, order in enumerate(orders)]
        np.testing.assert_array_equal(np.concatenate(slices), alone[step])


def test_parts_that_are_not_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"the parts have \[3, 4\] rows, but lengths has 8"):
        Order(0, batch_size=2, lengths=lengths_of(8), parts=[Part(3, 1.0), Part(4, 1.0)])


def test_two_million_rows_take_eight_bytes_each():
    """An epoch's order is one array: a step sorts its own window and no other."""
    lengths = np.ones(2_000_000, np.int32)
    order = order_of(0, batch_size=32, lengths=lengths)
    order[0]
    draws, batches = order._epoch(0)
    assert draws.nbytes == 16_000_000
    assert batches.nbytes == 8 * 62_500
