"""Padded batches against brute force."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.data import PromptRows, RankingRows, SFTRows, TextRows, bucket_lengths
from jrlhf.data.rows import Ragged

PAD = 99
ROWS = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=40), min_size=1, max_size=8)


def ragged(rows, dtype=np.int32) -> Ragged:
    return Ragged([np.asarray(row, dtype) for row in rows])


def buckets_of(rows, buckets=3) -> tuple[int, ...]:
    return bucket_lengths(max(map(len, rows)), buckets)


def padded(row: list[int], width: int, fill: int, *, left: bool) -> list[int]:
    space = [fill] * (width - len(row))
    return space + row if left else row + space


@given(ROWS, st.data())
def test_rows_are_padded_on_the_side_that_the_stage_needs(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    sizes = buckets_of(rows)
    width = min(size for size in sizes if size >= max(len(rows[i]) for i in chosen))
    shown = [{"prompt": str(row)} for row in rows]
    learnt = [[i % 2 == 0 for i in range(len(row))] for row in rows]
    sft = SFTRows(ragged(rows), ragged(learnt, np.bool_), sizes, PAD, {}).batch(chosen)
    prompts = PromptRows(ragged(rows), shown, sizes, PAD, {}).batch(np.asarray(chosen))
    texts = TextRows(ragged(rows), shown, sizes, PAD, {}).batch(chosen)
    for (tokens, mask), left in ((sft[:2], False), (prompts, True), (texts, False)):
        assert tokens.dtype == np.int32
        assert mask.dtype == np.bool_
        assert tokens.tolist() == [padded(rows[i], width, PAD, left=left) for i in chosen]
        assert mask.tolist() == [padded([True] * len(rows[i]), width, False, left=left) for i in chosen]
    assert sft.loss_mask.tolist() == [padded(learnt[i], width, False, left=False) for i in chosen]
    assert sft.loss_mask.dtype == np.bool_


GROUPS = st.lists(
    st.lists(
        st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(0, 9)), min_size=2, max_size=5
    ),
    min_size=1,
    max_size=6,
)


@given(GROUPS, st.data())
def test_rankings_are_padded_to_the_most_completions_and_the_mask_says_which_are_real(groups, data):
    chosen = data.draw(st.lists(st.integers(0, len(groups) - 1), min_size=1, max_size=4))
    answers = [tokens for group in groups for tokens, _ in group]
    rows = RankingRows(
        tokens=ragged(answers),
        first=np.cumsum([0, *map(len, groups)]),
        ranks=np.asarray([rank for group in groups for _, rank in group], np.int32),
        margin=np.arange(len(groups), dtype=np.float32),
        buckets=buckets_of(answers),
        pad=PAD,
        skipped={},
    )
    assert len(rows) == len(groups)
    assert rows.lengths.tolist() == [max(len(tokens) for tokens, _ in group) for group in groups]
    batch = rows.batch(chosen)
    most = max(map(len, groups))
    width = min(size for size in rows.buckets if size >= max(rows.lengths[i] for i in chosen))
    assert batch.tokens.shape == batch.mask.shape == (len(chosen), most, width)
    for place, i in enumerate(chosen):
        for k in range(most):
            tokens, rank = groups[i][k] if k < len(groups[i]) else ([], 0)
            assert batch.tokens[place, k].tolist() == padded(tokens, width, PAD, left=False)
            assert batch.mask[place, k].tolist() == padded([True] * len(tokens), width, False, left=False)
            assert batch.ranks[place, k] == rank
            assert batch.valid[place, k] == (k < len(groups[i]))
        assert batch.margin[place] == i
    assert [x.dtype for x in batch] == [np.int32, np.bool_, np.int32, np.bool_, np.float32]


def test_lengths_compile_for_no_more_widths_than_buckets():
    rows = [[1] * n for n in range(1, 501)]
    for buckets in (1, 2, 4, 7):
        prompts = PromptRows(ragged(rows), [{}] * 500, buckets_of(rows, buckets), PAD, {})
        widths = {prompts.batch([i])[0].shape[1] for i in range(500)}
        assert len(widths) == buckets
        assert all(width % 8 == 0 for width in widths)
        assert max(widths) == 504


@given(st.integers(1, 5000), st.integers(1, 9))
def test_buckets_are_even_and_reach_the_longest(longest, buckets):
    sizes = bucket_lengths(longest, buckets)
    assert len(sizes) <= buckets
    assert longest <= sizes[-1] < longest + 8
    assert all(0 < b - a <= longest / buckets + 9 for a, b in pairwise((0, *sizes)))


def test_the_documented_buckets():
    assert bucket_lengths(100, 4) == (32, 56, 80, 104)
    assert bucket_lengths(3, 4) == (8,)


def test_ragged_takes_the_memory_of_its_tokens():
    rows = ragged([[1] * n for n in range(1, 200)])
    assert rows._flat.nbytes == 4 * sum(range(1, 200))
    assert [rows[i].tolist() for i in range(199)] == [[1] * n for n in range(1, 200)]
    assert rows[5].base is rows._flat


def test_prompts_are_what_stands_before_the_first_learnt_token(chat):
    tokens = [chat(text)["input_ids"] for text in ("Hello there, well", "hi world")]
    learnt = [[False] * 2 + [True] * (len(tokens[0]) - 2), [False] + [True] * (len(tokens[1]) - 1)]
    rows = SFTRows(ragged(tokens), ragged(learnt, np.bool_), (8, 16), PAD, {})
    prompts = rows.prompts(2, chat)
    batch, mask = prompts.batch([0, 1])
    assert batch.tolist() == [[PAD] * 6 + tokens[0][:2], [PAD] * 7 + tokens[1][:1]]
    assert mask.tolist() == [[False] * 6 + [True] * 2, [False] * 7 + [True]]
    assert prompts.shown == [{"prompt": chat.decode(tokens[0][:2])}, {"prompt": chat.decode(tokens[1][:1])}]
