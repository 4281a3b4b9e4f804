"""Answers that are labelled one by one, and the mismatched pairs that are made of them."""

import json

import numpy as np
import pytest

from jrlhf.cli import main
from jrlhf.data import DataError, PreferenceRows, UnpairedPreferenceRows, load_rankings, load_unpaired, pack_unpaired
from jrlhf.data.errors import BadRow
from jrlhf.data.mismatched import mismatches
from jrlhf.data.unpaired import parse_unpaired

PROMPT = [{"role": "user", "content": "Say hi"}]
SAID = [{"role": "assistant", "content": "hi"}]
ROWS = [
    {"prompt": "Once upon", "completion": " a time", "label": True},
    {"prompt": "Once upon", "completion": " a b", "label": False},
    {"prompt": "Say a", "chosen": " a", "rejected": " no"},
    {"prompt": "So", "completion": " the answer is what it is", "label": "false"},
]
"""Rows of both forms: five answers to three prompts."""


def texts(tokenizer, column):
    return [tokenizer.decode(column[row], skip_special_tokens=True) for row in range(len(column))]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": "A", "label": True}, [("Q", "A", True)]),
        ({"prompt": "Q", "completion": "A", "label": 0}, [("Q", "A", False)]),
        ({"prompt": PROMPT, "completion": SAID, "label": "1"}, [(PROMPT, SAID, True)]),
        ({"messages": PROMPT + SAID, "label": False}, [(None, PROMPT + SAID, False)]),
        ({"instruction": "Q", "output": "A", "label": True}, None),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, [("Q", "A", True), ("Q", "B", False)]),
        ({"chosen": PROMPT + SAID, "rejected": [*PROMPT, {"role": "assistant", "content": "no"}]}, None),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}, None),
    ],
)
def test_what_is_read_as_labelled_answers(row, expected):
    found = parse_unpaired(row)
    assert [answer.desirable for answer in found] == ([True, False] if "chosen" in row else [found[0].desirable])
    if expected is not None:
        assert [(a.example.prompt, a.example.completion, a.desirable) for a in found] == expected


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Q", "completion": "A"},
         "label: no such column; the loss kto reads prompt, completion and label, or chosen and rejected"),
        ({"prompt": "Q", "completion": "A", "label": 0.7}, "label: expected true or false, or 1 or 0, found 0.7"),
        ({"prompt": "Q", "completions": ["A", "B"], "ranks": [0, 1]},
         "completions: their ranks say which answer is better, not which is good; the loss kto reads prompt, "
         "completion and label, or chosen and rejected"),
        ({"prompt": "Q", "chosen": "A"}, "rejected: no such column; the row has prompt, chosen"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen: is the same as rejected"),
        ({"text": "A", "label": True}, "prompt: none, but the loss kto also reads each prompt with an answer"),
        ({"messages": SAID, "label": True}, "prompt: none, but the loss kto also reads each prompt with an answer"),
        ({"prompt": "Q", "completion": "", "label": True}, "completion: "),
    ],
)  # fmt: skip
def test_what_is_no_labelled_answer_names_column_and_reason(row, problem):
    with pytest.raises(BadRow) as caught:
        parse_unpaired(row)
    assert str(caught.value).startswith(problem)


def test_a_loss_of_pairs_does_not_read_labelled_answers(chat, config, write):
    source = write(ROWS[:2])
    with pytest.raises(DataError, match=r"rows.jsonl:1: label: an answer by itself makes no pair; .* dpo.loss kto"):
        load_rankings(config(), source, chat)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([ROWS[0], ROWS[0] | {"prompt": "Q"}],
         "label: all 2 answers are labelled true, and the loss kto learns from both kinds"),
        ([ROWS[1], ROWS[3]], "label: all 2 answers are labelled false, and the loss kto learns from both kinds"),
        (ROWS[:2], "prompt: all 2 answers have the same, but the loss kto also needs answers to others"),
    ],
)  # fmt: skip
def test_rows_of_one_label_or_one_prompt_alone_are_refused(chat, config, write, rows, problem, capsys):
    source = write(rows)
    with pytest.raises(DataError) as caught:
        load_unpaired(config(), source, chat)
    assert str(caught.value) == f"{source}: {problem}"
    assert main(["data", "show", "--data", source, "--model", "asset:stories260k", "--kind", "kto"]) == 2
    assert capsys.readouterr().err == f"jrlhf: {source}: {problem}\n"


def test_every_prompt_gets_the_answer_to_another_one():
    rng = np.random.default_rng(0)
    for sizes in ([1, 1], [2, 2, 2], [5, 1], [1, 3, 2, 7], [1] * 20):
        prompts = rng.permutation(np.repeat(rng.integers(0, 2**63, len(sizes), np.uint64), sizes))
        partners = mismatches(prompts)
        assert (prompts[partners] != prompts).all()
        if len({*sizes}) == 1:
            assert sorted(partners) == [*range(len(prompts))], "each answer is used once"
        # Other rows about them change nothing but what they must: the pairing is a function of the rows alone.
        np.testing.assert_array_equal(mismatches(prompts), partners)


def test_mismatched_pairs_are_the_ids_of_a_prompt_and_of_another_answer(tokenizer, config, write):
    rows = load_unpaired(config(), write(ROWS), tokenizer)
    assert [int(rows.answers.ranks[row][0]) for row in range(5)] == [0, 1, 0, 1, 1]
    own = [(rows.answers.tokens[row], rows.answers.loss_mask[row]) for row in range(5)]
    prompts = [ids[: int(np.argmax(marks))].tolist() for ids, marks in own]
    answers = [ids[int(np.argmax(marks)) :].tolist() for ids, marks in own]
    for row in range(5):
        ids, marks = rows.mismatched.tokens[row], rows.mismatched.loss_mask[row]
        start = int(np.argmax(marks))
        assert ids[:start].tolist() == prompts[row]
        assert ids[start:].tolist() in [a for a, prompt in zip(answers, prompts, strict=True) if prompt != prompts[row]]
        assert marks[start:].all()
        assert len(ids) == len(marks) == rows.mismatched.tokens.lengths[row]
        assert rows.lengths[row] == max(len(ids), len(own[row][0]))


@pytest.mark.parametrize("max_length", [4, 6, 8])
def test_a_prompt_that_is_too_long_for_another_answer_is_cut_at_its_start(metaspace, config, write, max_length):
    whole = load_unpaired(config(), write(ROWS), metaspace)
    rows = load_unpaired(config(max_length=max_length), write(ROWS), metaspace)
    for row in range(5):
        ids, marks = rows.mismatched.tokens[row], rows.mismatched.loss_mask[row]
        assert len(ids) == len(marks) == rows.mismatched.tokens.lengths[row] <= max_length
        assert ids[0] == metaspace.bos_token_id
        start, expected = int(np.argmax(marks)), whole.mismatched.tokens[row]
        answer = expected[int(np.argmax(whole.mismatched.loss_mask[row])) :]
        assert ids[start:].tolist() == answer[: len(ids) - start].tolist()
        prompt = whole.answers.tokens[row][: int(np.argmax(whole.answers.loss_mask[row]))]
        assert ids[1:start].tolist() == prompt[len(prompt) - start + 1 :].tolist()


def test_packed_rows_hold_the_same_pairs(metaspace, config, write):
    rows = load_unpaired(config(buckets=1), write(ROWS), metaspace)
    plain = UnpairedPreferenceRows(PreferenceRows(rows.answers, None), PreferenceRows(rows.mismatched, None))
    packed = UnpairedPreferenceRows(*(PreferenceRows(part, None) for part in pack_unpaired(rows, 40)))
    assert len(packed) < len(plain) == 5
    reference = {name: np.arange(5.0, dtype=np.float32) + 10 * len(name) for name in plain.views()}
    expected, found = (some.with_reference(reference).batch(range(len(some))) for some in (plain, packed))
    for part, other in zip(expected, found, strict=True):
        sequences = sorted(
            (ids[mask].tolist(), marks[mask].tolist(), int(rank), float(logprob))
            for ids, mask, marks, rank, logprob in zip(
                part.tokens[:, 0], part.mask[:, 0], part.loss_mask[:, 0], part.ranks[:, 0], part.ref_logprobs[:, 0],
                strict=True,
            )
        )  # fmt: skip
        unpacked = []
        for row in range(len(packed)):
            for place in np.flatnonzero(other.valid[row, :, 0]):
                inside = other.segments[row] == other.segments[row, other.ends[row, place, 0]]
                values = other.tokens[row][inside].tolist(), other.loss_mask[row][inside].tolist()
                unpacked.append((*values, int(other.ranks[row, place, 0]), float(other.ref_logprobs[row, place, 0])))
        assert sorted(unpacked) == sequences
    np.testing.assert_array_equal(found.answers.valid, found.mismatched.valid)
    with pytest.raises(ValueError, match="does not fit a row of 8"):
        pack_unpaired(rows, 8)


def test_what_nothing_reads_is_named_and_the_label_is_read(chat, config, write, caplog):
    rows = [row | {"id": 1} for row in ROWS[:2]] + [ROWS[2] | {"margin": 1.0}]
    rows += [{"messages": PROMPT + SAID, "label": 1}]
    load_unpaired(config(), write(rows), chat)
    [line] = [line for line in caplog.messages if "nothing reads" in line]
    assert line.endswith("columns that nothing reads: id (2 rows), margin (1 row)")


def test_data_show_says_which_answers_are_desirable(write, capsys):
    source = write(ROWS)
    assert main(["data", "show", "--data", source, "--model", "asset:stories260k", "--kind", "kto"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{source} for KTO; max_length 1024\n")
    assert [line.split(",")[0] for line in out.splitlines() if "desirable, " in line] == [
        "desirable", "undesirable", "desirable", "undesirable"
    ]  # fmt: skip
    assert "desirable answers 2, undesirable ones 3\n" in out
    assert "pairs" not in out


def test_the_cache_gives_the_same_rows(chat, config, write, tmp_path):
    source = write("".join(json.dumps(row) + "\n" for row in ROWS))
    plain = load_unpaired(config(cache=""), source, chat)
    for _ in range(2):
        cached = load_unpaired(config(cache=str(tmp_path / "cache")), source, chat)
        for part, other in ((plain.answers, cached.answers), (plain.mismatched, cached.mismatched)):
            assert texts(chat, part.tokens) == texts(chat, other.tokens)
            np.testing.assert_array_equal(part.batch(range(5)).tokens, other.batch(range(5)).tokens)
        assert plain.sources[0].digest == cached.sources[0].digest
