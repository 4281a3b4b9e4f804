"""Each format means what it says, and each bad row is named by its column."""

import pytest

from jrlhf.data import BadRow
from jrlhf.data.formats import Answered, Ranking, parse_answers, parse_prompt, parse_ranking, parse_sft


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


U, A, B, U2, A2 = user("Q"), assistant("A"), assistant("B"), user("Q2"), assistant("A2")
HH = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant:"

SFT = [
    ({"text": "T"}, Answered(None, "T")),
    ({"messages": [U, A]}, Answered(None, [U, A])),
    ({"prompt": "P", "completion": "C"}, Answered("P", "C")),
    ({"prompt": [U], "completion": [A]}, Answered([U], [A])),
    ({"prompt": [U], "completion": "C"}, Answered([U], "C")),
    ({"prompt": "P", "chosen": "A", "rejected": "B"}, Answered("P", "A")),
    ({"prompt": "P", "chosen": "A", "rejected": "A"}, Answered("P", "A")),
    ({"chosen": HH + " yes", "rejected": HH + " no"}, Answered(HH, " yes")),
    ({"chosen": "A", "rejected": "B"}, Answered(None, "A")),
    ({"chosen": [U, A], "rejected": [U, B]}, Answered([U], [A])),
    # Columns that only other rows have.
    ({"text": "T", "prompt": None, "completion": None, "chosen": None}, Answered(None, "T")),
    ({"messages": [{**U, "name": None}, A]}, Answered(None, [U, A])),
]


@pytest.mark.parametrize(("row", "expected"), SFT)
def test_what_is_learnt_from(row, expected):
    assert parse_sft(row) == expected


RANKINGS = [
    ({"prompt": "P", "chosen": "A", "rejected": "B"}, Ranking("P", ["A", "B"], [0, 1], 0.0)),
    ({"chosen": "A", "rejected": "B", "margin": 2}, Ranking(None, ["A", "B"], [0, 1], 2.0)),
    ({"chosen": "A", "rejected": "B", "margin": "0.5"}, Ranking(None, ["A", "B"], [0, 1], 0.5)),
    ({"chosen": "A", "rejected": "B", "margin": ""}, Ranking(None, ["A", "B"], [0, 1], 0.0)),
    ({"chosen": HH + " yes", "rejected": HH + " yep"}, Ranking(HH, [" yes", " yep"], [0, 1], 0.0)),
    ({"chosen": [U, A, U2, A2], "rejected": [U, A, U2, B]}, Ranking([U, A, U2], [[A2], [B]], [0, 1], 0.0)),
    # They part at a user's turn: the prompt cannot end with an answer.
    (
        {"chosen": [U, A, U2, A2], "rejected": [U, A, user("?"), B]},
        Ranking([U], [[A, U2, A2], [A, user("?"), B]], [0, 1], 0),
    ),
    ({"prompt": [U], "chosen": [A], "rejected": [B]}, Ranking([U], [[A], [B]], [0, 1], 0.0)),
    # Conversations beside a column with their prompt: as in UltraFeedback.
    ({"prompt": "Q", "chosen": [U, A], "rejected": [U, B]}, Ranking([U], [[A], [B]], [0, 1], 0.0)),
    ({"prompt": [U], "chosen": [U, A], "rejected": [U, B]}, Ranking([U], [[A], [B]], [0, 1], 0.0)),
    (
        {"prompt": "P", "completions": ["A", "B", "C"], "ranks": [1, 0, 1], "margin": 0.25},
        Ranking("P", ["A", "B", "C"], [1, 0, 1], 0.25),
    ),
    ({"completions": [[U, A], [U, B]], "ranks": [3, 1]}, Ranking(None, [[U, A], [U, B]], [3, 1], 0.0)),
    (
        {"prompt": "P", "completions": ["A", "A", "B"], "ranks": [0, 0, 1]},
        Ranking("P", ["A", "A", "B"], [0, 0, 1], 0.0),
    ),
]


@pytest.mark.parametrize(("row", "expected"), RANKINGS)
def test_what_is_compared(row, expected):
    assert parse_ranking(row) == expected


PROMPTS = [
    ({"prompt": "P"}, "P"),
    ({"prompt": [U]}, [U]),
    ({"prompt": "P", "completion": "C"}, "P"),
    ({"prompt": "P", "chosen": "A", "rejected": "B"}, "P"),
    ({"messages": [U, A, U2, A2]}, [U, A, U2]),
    ({"messages": [U, A, U2]}, [U]),
    ({"messages": [U]}, [U]),
    ({"prompt": "Q", "messages": [U, A]}, [U]),
    ({"chosen": HH + " yes", "rejected": HH + " no"}, HH),
    ({"prompt": "Q", "chosen": [U, A], "rejected": [U, B]}, [U]),
]


@pytest.mark.parametrize(("row", "expected"), PROMPTS)
def test_what_is_answered(row, expected):
    assert parse_prompt(row) == expected


def test_what_is_scored():
    assert parse_answers({"prompt": "P", "completions": ["A", "B"]}) == [Answered("P", "A"), Answered("P", "B")]
    assert parse_answers({"prompt": "P", "chosen": "A", "rejected": "A"}) == [Answered("P", "A"), Answered("P", "A")]
    assert parse_answers({"text": "T"}) == [Answered(None, "T")]
    # What a policy answered is scored even where it is nothing; only data to learn from must say something.
    assert parse_answers({"prompt": "P", "completions": ["", "A"]}) == [Answered("P", ""), Answered("P", "A")]
    with pytest.raises(BadRow, match="is empty"):
        parse_answers({"completions": ["", "A"]})
    with pytest.raises(BadRow, match=r"^completions: expected a list with at least one answer$"):
        parse_answers({"completions": []})


BAD_TEXTS = [
    ("", "is empty"),
    (" \n\t", "is empty"),
    ("a\x00b", "holds a NUL character"),
    ("a\ud800b", "holds half of a surrogate pair, which is no text"),
    (7, "expected a string or a list of messages, found int"),
    (b"a", "expected a string or a list of messages, found bytes"),
    ([], "is empty"),
]


@pytest.mark.parametrize(("text", "reason"), BAD_TEXTS, ids=range(len(BAD_TEXTS)))
def test_bad_text_is_found_in_every_column(text, reason):
    rows = {
        "text": (parse_sft, {"text": text}),
        "messages": (parse_sft, {"messages": text}),
        "completion": (parse_sft, {"prompt": "P", "completion": text}),
        "prompt": (parse_prompt, {"prompt": text}),
        "chosen": (parse_ranking, {"prompt": "P", "chosen": text, "rejected": "B"}),
        "rejected": (parse_ranking, {"prompt": "P", "chosen": "A", "rejected": text}),
        "completions[1]": (parse_ranking, {"completions": ["A", text], "ranks": [0, 1]}),
    }
    for column, (parse, row) in rows.items():
        with pytest.raises(BadRow) as error:
            parse(row)
        assert str(error.value) == f"{column}: {reason}"


BAD_MESSAGES = [
    (["hi"], 'messages[0]: expected a message {"role", "content"}'),
    ([{"from": "human", "value": "hi"}], 'messages[0]: expected a message {"role", "content"}'),
    ([{"role": "user"}], "messages[0].content: expected a string"),
    ([U, {"role": "assistant", "content": 5}], "messages[1].content: expected a string"),
    ([U, assistant("")], "messages[1].content: is empty"),
    ([user("\ud800"), A], "messages[0].content: holds half of a surrogate pair, which is no text"),
    ("a string", "messages: expected a list of messages, found a string"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES)
def test_bad_messages(messages, message):
    for parse in (parse_sft, parse_prompt):
        with pytest.raises(BadRow) as error:
            parse({"messages": messages})
        assert str(error.value) == message


def test_an_empty_system_turn_is_let_be():
    system = {"role": "system", "content": ""}
    assert parse_prompt({"prompt": [system, U]}) == [system, U]


PREFERENCE = {"prompt": "P", "chosen": "A", "rejected": "B"}
RANKING = {"prompt": "P", "completions": ["A", "B", "C"], "ranks": [0, 1, 1]}
BAD_RANKINGS = [
    ({"chosen": "A"}, "rejected: no such column; the row has chosen"),
    ({"rejected": "A"}, "chosen: no such column; the row has rejected"),
    ({"x": 1, "y": None}, "chosen: no such column, nor completions; the row has x"),
    ({}, "chosen: no such column, nor completions; the row has no columns"),
    (PREFERENCE | {"chosen": "B"}, "chosen: the same as rejected"),
    ({"chosen": HH + " yes", "rejected": HH + " yes"}, "chosen: the same as rejected"),
    ({"chosen": [U, A], "rejected": [U, A]}, "chosen: the same as rejected"),
    (PREFERENCE | {"prompt": " "}, "prompt: is empty"),
    (PREFERENCE | {"rejected": [B]}, "rejected: chosen and rejected are not of one kind (string or messages)"),
    ({"chosen": HH + " yes", "rejected": HH + "  "}, "rejected: the last answer is empty"),
    ({"chosen": HH, "rejected": HH + " no"}, "chosen: the last answer is empty"),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant: A", "rejected": "\n\nHuman: b\n\nAssistant: B"},
        "chosen: the transcripts share no turn of the assistant",
    ),
    (
        {"prompt": "other", "chosen": [U, A], "rejected": [U, B]},
        "prompt: a string, but chosen and rejected are messages that do not share it",
    ),
    (
        {"prompt": [U, A], "chosen": [A2], "rejected": [B]},
        "prompt: ends with an assistant turn, so there is nothing left to answer",
    ),
    (PREFERENCE | {"margin": "much"}, "margin: expected a number, found 'much'"),
    (PREFERENCE | {"margin": True}, "margin: expected a number, found True"),
    (PREFERENCE | {"margin": float("nan")}, "margin: expected a number, found nan"),
    (PREFERENCE | {"margin": float("-inf")}, "margin: expected a number, found -inf"),
    (PREFERENCE | {"margin": [1]}, "margin: expected a number, found [1]"),
    (RANKING | {"completions": "A"}, "completions: expected a list, found str"),
    (RANKING | {"completions": ["A"]}, "completions: fewer than two, so there is nothing to rank"),
    (
        RANKING | {"completions": ["A", None, "C"]},
        "completions[1]: expected a string or a list of messages, found NoneType",
    ),
    (RANKING | {"completions": ["A", "A", "B"]}, "completions: two of them are the same and of unequal rank"),
    (RANKING | {"ranks": [1, 1, 1]}, "ranks: all tied, so there is no pair"),
    (RANKING | {"ranks": [0, 1]}, "ranks: expected 3 ranks, one a completion"),
    (RANKING | {"ranks": None}, "ranks: no such column; give each completion its rank, 0 for the best"),
    (RANKING | {"ranks": [0, 1, True]}, "ranks: expected whole numbers, 0 for the best, found [0, 1, True]"),
    (RANKING | {"ranks": [0, 1, 0.5]}, "ranks: expected whole numbers, 0 for the best, found [0, 1, 0.5]"),
    (RANKING | {"ranks": [0, -1, 2]}, "ranks: expected whole numbers, 0 for the best, found [0, -1, 2]"),
    (RANKING | {"ranks": [0, 1, 2**40]}, "ranks: expected whole numbers, 0 for the best, found [0, 1, 1099511627776]"),
]


@pytest.mark.parametrize(("row", "message"), BAD_RANKINGS)
def test_bad_rankings(row, message):
    with pytest.raises(BadRow) as error:
        parse_ranking(row)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("parse", "row", "message"),
    [
        (
            parse_sft,
            {"instruction": "I"},
            "text: no such column, nor messages, conversations, prompt and completion, instruction and output, "
            "or chosen and rejected; the row has instruction",
        ),
        (parse_sft, {"completion": "C"}, "prompt: no such column; the row has completion"),
        (parse_sft, {"text": [U]}, "text: expected a string, found messages"),
        (
            parse_prompt,
            {"text": "T"},
            "prompt: no such column, nor messages, conversations, instruction, or chosen and rejected; "
            "the row has text",
        ),
        (
            parse_prompt,
            {"chosen": "A", "rejected": "B"},
            "prompt: no such column, and chosen and rejected do not imply one",
        ),
        (parse_prompt, {"messages": [A]}, "messages: is empty"),
    ],
)
def test_missing_columns(parse, row, message):
    with pytest.raises(BadRow) as error:
        parse(row)
    assert str(error.value) == message
