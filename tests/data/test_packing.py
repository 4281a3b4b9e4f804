"""Packed rows against brute force, and against the same rows one to a line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf import assets
from jrlhf.config import DataConfig
from jrlhf.data import Order, Part, load_rankings, load_sft, load_tokenizer, pack_rankings, pack_sft
from jrlhf.data.packing import pack, pack_parts


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 60))
def test_every_sequence_is_in_one_row_that_it_fits(lengths, capacity):
    lengths = np.asarray(lengths, np.int64)
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fill = [int(lengths[row].sum()) for row in rows]
    assert all(0 < used <= capacity for used in fill)
    # Best fit leaves no two rows that would go into one.
    assert all(a + b > capacity for i, a in enumerate(fill) for b in fill[:i])


def test_a_sequence_that_fits_no_row_is_an_error():
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit a row of 8"):
        pack(np.array([3, 9]), 8)


def test_sources_are_packed_apart():
    lengths = np.array([5, 5, 5, 3, 3])
    members, parts = pack_parts(lengths, [Part(3, 2.0), Part(2, 1.0)], 8)
    assert parts == [Part(3, 2.0), Part(1, 1.0)]
    assert [members[row].tolist() for row in range(4)] == [[0], [1], [2], [3, 4]]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(assets.resolve("asset:stories260k"))


def test_a_packed_batch_holds_the_rows_token_for_token(tokenizer):
    config = DataConfig(max_length=64)
    rows = load_sft(config, assets.resolve("asset:sft_heldout"), tokenizer, train_on="completion")
    packed = pack_sft(rows, 256)
    order = Order(0, batch_size=8, lengths=packed.lengths, parts=packed.parts)
    seen = []
    for step in range(order.steps_per_epoch):
        batch = packed.batch(order[step])
        assert batch.tokens.shape == (8, 256)
        for place, index in enumerate(order[step]):
            members, start = packed.members[int(index)].tolist(), 0
            for number, row in enumerate(members, start=1):
                here = slice(start, start + int(rows.lengths[row]))
                np.testing.assert_array_equal(batch.tokens[place, here], rows.tokens[row])
                np.testing.assert_array_equal(batch.loss_mask[place, here], rows.loss_mask[row])
                assert set(batch.mask[place, here].tolist()) == {number}
                start = here.stop
            assert not batch.mask[place, start:].any()
            assert not batch.loss_mask[place, start:].any()
            seen += members
    # The last batch is filled up with rows that were there already.
    assert set(seen) == set(range(len(rows)))


def test_a_packed_ranking_keeps_its_completions_together(tokenizer):
    config = DataConfig(max_length=64)
    rows = load_rankings(config, assets.resolve("asset:rankings_heldout"), tokenizer)
    packed = pack_rankings(rows, 512)
    indices = np.arange(4)
    batch, places, marks = packed.batch(indices), packed.places(indices), packed.batch_loss_mask(indices)
    for place in indices:
        members = packed.members[int(place)].tolist()
        assert batch.valid[place, len(members) :].sum() == 0
        segment = 0
        for number, row in enumerate(members):
            given = rows.ranks[row]
            np.testing.assert_array_equal(batch.ranks[place, number, : len(given)], given)
            assert batch.valid[place, number].sum() == len(given)
            assert batch.margin[place, number] == rows.margin[row]
            for k, completion in enumerate(rows.completions(row)):
                segment += 1
                here = np.flatnonzero(batch.segments[place] == segment)
                np.testing.assert_array_equal(batch.tokens[place, here], rows.tokens[completion])
                assert batch.ends[place, number, k] == here[-1]
                assert places[place, number, k] == completion
                np.testing.assert_array_equal(marks[place, here], rows.loss_mask[completion])
            assert (places[place, number, len(given) :] == -1).all()
        assert (places[place, len(members) :] == -1).all()
        assert not marks[place, batch.segments[place] == 0].any()


def test_the_shipped_reviews_fill_more_than_95_percent(tokenizer):
    config = DataConfig(max_length=168)
    sft = load_sft(config, assets.resolve("asset:sft_train"), tokenizer, train_on="completion")
    rankings = load_rankings(config, assets.resolve("asset:rankings_train"), tokenizer)
    packed_sft, packed_rankings = pack_sft(sft, 256), pack_rankings(rankings, 4096)
    assert sft.lengths.sum() / (256 * len(packed_sft)) > 0.95
    used = sum(int(rankings.tokens.lengths[list(rankings.completions(row))].sum()) for row in range(len(rankings)))
    assert used / (4096 * len(packed_rankings)) > 0.95
