"""Padded batches against brute force."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.data import Part, PromptRows, RankingRows, SFTRows, TextRows, bucket_lengths
from jrlhf.data.ragged import Column, Flat, Objects, Ragged

PAD = 99
ROWS = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=40), min_size=1, max_size=8)


def ragged(rows, dtype=np.int32) -> Ragged:
    return Ragged.from_rows([np.asarray(row, dtype) for row in rows])


def parts_of(rows) -> list[Part]:
    return [Part(len(rows), 1.0)]


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
    sft = SFTRows(ragged(rows), ragged(learnt, np.bool_), sizes, PAD, {}, parts_of(rows)).batch(chosen)
    prompts = PromptRows(ragged(rows), shown, sizes, PAD, {}, parts_of(rows)).batch(np.asarray(chosen))
    texts = TextRows(ragged(rows), shown, sizes, PAD, {}, parts_of(rows)).batch(chosen)
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
        loss_mask=ragged([[n % 2 for n in range(len(tokens))] for tokens in answers]),
        ranks=ragged([[rank for _, rank in group] for group in groups]),
        margin=np.arange(len(groups), dtype=np.float32),
        lengths=np.asarray([max(len(tokens) for tokens, _ in group) for group in groups], np.int32),
        buckets=buckets_of(answers),
        pad=PAD,
        skipped={},
        parts=parts_of(groups),
    )
    assert len(rows) == len(groups)
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
    assert [x.dtype for x in batch[:5]] == [np.int32, np.bool_, np.int32, np.bool_, np.float32]
    assert batch[5:] == (None, None)
    marks, places = rows.batch_loss_mask(chosen), rows.places(chosen)
    assert marks.shape == batch.mask.shape
    for place, i in enumerate(chosen):
        for k in range(most):
            length = len(groups[i][k][0]) if k < len(groups[i]) else 0
            assert marks[place, k].tolist() == padded([n % 2 == 1 for n in range(length)], width, False, left=False)
            assert (places[place, k] >= 0) == bool(length)
            assert not length or rows.tokens[int(places[place, k])].tolist() == groups[i][k][0]


def test_lengths_compile_for_no_more_widths_than_buckets():
    rows = [[1] * n for n in range(1, 501)]
    for buckets in (1, 2, 4, 7):
        prompts = PromptRows(ragged(rows), [{}] * 500, buckets_of(rows, buckets), PAD, {}, parts_of(rows))
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
    [flat] = rows._flats
    assert flat.values.nbytes == 4 * sum(range(1, 200))
    assert [rows[i].tolist() for i in range(199)] == [[1] * n for n in range(1, 200)]
    assert rows[5].base is flat.values


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_rows_of_several_sources_are_those_of_one(sources):
    """Row by row, padded, and where each starts."""

    def column(rows):
        lengths = np.asarray([len(row) for row in rows], np.int32)
        values = np.asarray([value for row in rows for value in row], np.int32)
        return Column(Flat(values), lengths, np.cumsum(lengths, dtype=np.int64))

    joined, rows = Ragged([column(rows) for rows in sources]), [row for rows in sources for row in rows]
    one = ragged(rows)
    assert len(joined) == len(rows)
    assert joined.lengths.tolist() == one.lengths.tolist() == [len(row) for row in rows]
    assert [joined[i].tolist() for i in range(len(rows))] == rows
    starts = [sum(map(len, rows[:i])) for i in range(len(rows))]
    assert [joined.start(i) for i in range(len(rows))] == [one.start(i) for i in range(len(rows))] == starts
    everyone, width = list(range(len(rows)))[::-1], max(map(len, rows))
    for a, b in zip(joined.padded(everyone, width, fill=7), one.padded(everyone, width, fill=7), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mapped_array_is_the_file_s_and_lets_go_of_what_was_read(tmp_path):
    values = np.arange(2**20, dtype=np.int32)
    values.tofile(tmp_path / "values")
    flat = Flat.from_file(tmp_path / "values", np.dtype(np.int32))

    def resident() -> int:
        """Pages of the mapping that this process holds, in kB, as the kernel counts them."""
        inside, text = False, Path("/proc/self/smaps").read_text()
        for line in text.splitlines():
            inside = line.endswith(str(tmp_path / "values")) or (inside and not re.match(r"[0-9a-f]+-", line))
            if inside and line.startswith("Rss:"):
                return int(line.split()[1])
        raise AssertionError("not mapped")

    assert flat.values.tobytes() == values.tobytes()
    assert resident() == 4096
    flat.release()
    assert resident() == 0
    np.testing.assert_array_equal(flat.values[1000:1010], np.arange(1000, 1010))
    (tmp_path / "none").write_bytes(b"")
    assert len(Flat.from_file(tmp_path / "none", np.dtype(np.uint8)).values) == 0


def test_objects_are_a_sequence_of_what_was_put_in():
    given = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "\ud800 é"}], "n": 1.5}, {}]
    texts = [np.frombuffer(json.dumps(value).encode(), np.uint8) for value in given]
    objects = Objects(Ragged.from_rows(texts))
    assert list(objects) == given
    assert (len(objects), objects[1], objects[-1], objects[1:]) == (3, given[1], given[2], given[1:])
    with pytest.raises(IndexError, match="index 3 is out of range for 3 rows"):
        objects[3]


def test_prompts_are_what_stands_before_the_first_learnt_token(chat):
    tokens = [chat(text)["input_ids"] for text in ("Hello there, well", "hi world")]
    learnt = [[False] * 2 + [True] * (len(tokens[0]) - 2), [False] + [True] * (len(tokens[1]) - 1)]
    rows = SFTRows(ragged(tokens), ragged(learnt, np.bool_), (8, 16), PAD, {}, parts_of(tokens))
    prompts = rows.prompts(2, chat)
    batch, mask = prompts.batch([0, 1])
    assert batch.tolist() == [[PAD] * 6 + tokens[0][:2], [PAD] * 7 + tokens[1][:1]]
    assert mask.tolist() == [[False] * 6 + [True] * 2, [False] * 7 + [True]]
    assert prompts.shown == [{"prompt": chat.decode(tokens[0][:2])}, {"prompt": chat.decode(tokens[1][:1])}]
