"""Each format means what it says, and each bad row is named by its column."""

import pytest

from jrlhf.data import BadRow
from jrlhf.data.errors import ExcludedRow
from jrlhf.data.formats import Example, Ranking, parse_answers, parse_prompt, parse_ranking, parse_sft
from jrlhf.data.repeats import PROMPT_REMOVED, PROMPT_UNCLEAR


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def parts(*texts):
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


S, CALL = {"role": "system", "content": "S"}, {"type": "function", "function": {"name": "f", "arguments": {}}}
U, A, B, U2, A2 = user("Q"), assistant("A"), assistant("B"), user("Q2"), assistant("A2")
HH = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant:"

ASKED = "Question: what is it?\nAnswer:"

SFT = [
    ({"text": "T"}, Example(None, "T")),
    ({"messages": [U, A]}, Example(None, [U, A])),
    ({"prompt": "P", "completion": "C"}, Example("P", "C")),
    ({"prompt": [U], "completion": [A]}, Example([U], [A])),
    ({"prompt": [U], "completion": "C"}, Example([U], "C")),
    ({"prompt": "P", "chosen": "A", "rejected": "B"}, Example("P", "A")),
    ({"prompt": "P", "chosen": "A", "rejected": "A"}, Example("P", "A")),
    ({"chosen": HH + " yes", "rejected": HH + " no"}, Example(HH, " yes")),
    ({"chosen": "A", "rejected": "B"}, Example(None, "A")),
    ({"chosen": [U, A], "rejected": [U, B]}, Example([U], [A])),
    ({"prompt": "Q", "completion": "A", "label": True}, Example("Q", "A")),
    ({"prompt": "Q", "completion": "A", "label": "TRUE"}, Example("Q", "A")),
    ({"prompt": "Q", "completion": "A", "label": 1}, Example("Q", "A")),
    # A label of a text is a class.
    ({"text": "T", "label": False}, Example(None, "T")),
    ({"messages": [U, A], "label": 0}, Example(None, [U, A])),
    # One answer may well begin as its prompt does.
    (
        {"prompt": "Once upon a time", "completion": "Once upon a time there"},
        Example("Once upon a time", "Once upon a time there"),
    ),
    ({"prompt": [S, U], "completion": [U, A]}, Example([S, U], [A])),
    ({"prompt": [U], "completion": [U, A]}, Example([U], [A])),
    ({"messages": [parts("Q"), assistant("A")]}, Example(None, [U, A])),
    (
        {"messages": [U, {**A, "weight": 0}, U2, {**A2, "weight": 1}]},
        Example(None, [U, {**A, "weight": 0}, U2, {**A2, "weight": 1}]),
    ),
    # ShareGPT
    ({"conversations": [human("Q"), gpt("A")]}, Example(None, [U, A])),
    ({"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]}, Example(None, [U, A])),
    ({"conversations": [U, A], "system": "S"}, Example(None, [S, U, A])),
    (
        {"conversations": [{"from": "system", "value": "S"}, human("Q"), gpt("A")], "system": "S"},
        Example(None, [S, U, A]),
    ),
    ({"conversations": [human("Q"), {**gpt("A"), "weight": 0}]}, Example(None, [U, {**A, "weight": 0}])),
    (
        {"conversations": [human("Q"), {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
        Example(None, [U, {**assistant(""), "tool_calls": [CALL]}]),
    ),
    (
        {"conversations": [human("Q"), gpt("A"), {"from": "observation", "value": "r"}, gpt("A2")]},
        Example(None, [U, A, {"role": "tool", "content": "r"}, A2]),
    ),
    ({"conversations": [human("Q")], "chosen": gpt("A"), "rejected": gpt("B")}, Example([U], [A])),
    # Alpaca
    ({"instruction": "Q", "output": "A"}, Example([U], "A")),
    ({"instruction": "Q", "input": "", "output": "A"}, Example([U], "A")),
    ({"instruction": "Q", "input": "here", "output": "A", "text": "T"}, Example([user("Q\n\nhere")], "A")),
    ({"instruction": "Q", "context": "here", "response": "A"}, Example([user("Q\n\nhere")], "A")),
    ({"instruction": "Q", "system": "S", "output": "A"}, Example([S, U], "A")),
    ({"instruction": "Q", "chosen": "A", "rejected": "B"}, Example([U], "A")),
    # Columns that only other rows have.
    ({"text": "T", "prompt": None, "completion": None, "chosen": None}, Example(None, "T")),
    ({"messages": [{**U, "name": None}, A]}, Example(None, [U, A])),
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
    # Prompts that stand in the answers too.
    ({"prompt": ASKED, "chosen": ASKED + " A", "rejected": ASKED + " B"}, Ranking(ASKED, [" A", " B"], [0, 1], 0.0)),
    (
        {"prompt": ASKED + " ", "chosen": ASKED + " A", "rejected": ASKED + " B"},
        Ranking(ASKED + " ", ["A", "B"], [0, 1], 0),
    ),
    (
        {"prompt": "\n" + ASKED, "chosen": ASKED + " A", "rejected": ASKED + " B"},
        Ranking("\n" + ASKED, [" A", " B"], [0, 1], 0),
    ),
    ({"prompt": HH, "chosen": HH + " yes", "rejected": HH + " no"}, Ranking(HH, [" yes", " no"], [0, 1], 0.0)),
    ({"prompt": "Q2", "chosen": HH + " yes", "rejected": HH + " no"}, Ranking(HH, [" yes", " no"], [0, 1], 0.0)),
    (
        {"prompt": ASKED, "completions": [ASKED + " A", ASKED + " B", ASKED + " C"], "ranks": [0, 1, 2]},
        Ranking(ASKED, [" A", " B", " C"], [0, 1, 2], 0.0),
    ),
    ({"prompt": [S, U], "chosen": [U, A], "rejected": [U, B]}, Ranking([S, U], [[A], [B]], [0, 1], 0.0)),
    ({"prompt": [U], "chosen": [S, U, A], "rejected": [S, U, B]}, Ranking([S, U], [[A], [B]], [0, 1], 0.0)),
    (
        {"prompt": [S, U, A, U2], "chosen": [U2, A2], "rejected": [U2, B]},
        Ranking([S, U, A, U2], [[A2], [B]], [0, 1], 0.0),
    ),
    ({"prompt": "Q", "chosen": [S, U, A], "rejected": [S, U, B]}, Ranking([S, U], [[A], [B]], [0, 1], 0.0)),
    ({"prompt": [S, U], "completions": [[U, A], [U, B]], "ranks": [0, 1]}, Ranking([S, U], [[A], [B]], [0, 1], 0.0)),
    ({"prompt": "Q", "completions": [[U, A], [U, B]], "ranks": [0, 1]}, Ranking([U], [[A], [B]], [0, 1], 0.0)),
    # Answers that are text beside a chat.
    (
        {"prompt": [S, user(ASKED)], "chosen": ASKED + " A", "rejected": ASKED + " B"},
        Ranking([S, user(ASKED)], [" A", " B"], [0, 1], 0.0),
    ),
    (
        {"instruction": ASKED, "completions": [ASKED + " A", ASKED + " B"], "ranks": [0, 1]},
        Ranking([user(ASKED)], [" A", " B"], [0, 1], 0.0),
    ),
    # Not of all answers, or too short to tell.
    ({"prompt": ASKED, "chosen": ASKED + " A", "rejected": "B"}, Ranking(ASKED, [ASKED + " A", "B"], [0, 1], 0.0)),
    ({"prompt": "Hi", "chosen": "Hi, you", "rejected": "Hi!"}, Ranking("Hi", ["Hi, you", "Hi!"], [0, 1], 0.0)),
    # ShareGPT and Alpaca
    ({"conversations": [human("Q")], "chosen": gpt("A"), "rejected": gpt("B")}, Ranking([U], [[A], [B]], [0, 1], 0.0)),
    (
        {"conversations": [human("Q")], "system": "S", "chosen": [gpt("A")], "rejected": [gpt("B")]},
        Ranking([S, U], [[A], [B]], [0, 1], 0),
    ),
    ({"instruction": "Q", "chosen": "A", "rejected": "B"}, Ranking([U], ["A", "B"], [0, 1], 0.0)),
    ({"instruction": "Q", "completions": ["A", "B"], "ranks": [1, 0]}, Ranking([U], ["A", "B"], [1, 0], 0.0)),
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
    ({"prompt": [parts("Q")]}, [U]),
    ({"prompt": [parts("Q", "2")]}, [U2]),
    ({"prompt": "Q", "completion": "A", "label": False}, "Q"),
    ({"conversations": [human("Q"), gpt("A")]}, [U]),
    ({"conversations": [human("Q")], "system": "S"}, [S, U]),
    ({"conversations": [human("Q")], "chosen": gpt("A"), "rejected": gpt("B")}, [U]),
    ({"instruction": "Q"}, [U]),
    ({"instruction": "Q", "input": "here", "output": "A"}, [user("Q\n\nhere")]),
    ({"prompt": [S, U], "chosen": [U, A], "rejected": [U, B]}, [S, U]),
    ({"prompt": ASKED, "chosen": ASKED + " A", "rejected": ASKED + " B"}, ASKED),
    ({"chosen": HH + " yes", "rejected": HH + " no"}, HH),
    ({"prompt": "Q", "chosen": [U, A], "rejected": [U, B]}, [U]),
]


@pytest.mark.parametrize(("row", "expected"), PROMPTS)
def test_what_is_answered(row, expected):
    assert parse_prompt(row) == expected


def test_what_is_scored():
    assert parse_answers({"prompt": "P", "completions": ["A", "B"]}) == [Example("P", "A"), Example("P", "B")]
    assert parse_answers({"prompt": "P", "chosen": "A", "rejected": "A"}) == [Example("P", "A"), Example("P", "A")]
    assert parse_answers({"text": "T"}) == [Example(None, "T")]
    assert parse_answers({"prompt": "P", "completion": "A", "label": False}) == [Example("P", "A")]
    assert parse_answers({"messages": [U, A], "label": False}) == [Example(None, [U, A])]
    assert parse_answers({"conversations": [human("Q"), gpt("A")]}) == [Example(None, [U, A])]
    assert parse_answers({"instruction": "Q", "output": "A"}) == [Example([U], "A")]
    assert parse_answers({"instruction": "Q", "completions": ["A", ""]}) == [Example([U], "A"), Example([U], "")]
    row = {"prompt": ASKED, "completions": [ASKED + " A", ASKED + " B"]}
    assert parse_answers(row) == [Example(ASKED, " A"), Example(ASKED, " B")]
    assert parse_answers({"prompt": ASKED, "completions": [ASKED]}) == [Example(ASKED, ASKED)]
    # What a policy answered is scored even where it is nothing; only data to learn from must say something.
    assert parse_answers({"prompt": "P", "completions": ["", "A"]}) == [Example("P", ""), Example("P", "A")]
    with pytest.raises(BadRow, match="is empty"):
        parse_answers({"completions": ["", "A"]})
    with pytest.raises(BadRow, match=r"^completions: expected a list with at least one answer$"):
        parse_answers({"completions": []})


BAD_TEXTS = [
    ("", "is empty"),
    (" \n\t", "is empty"),
    ("a\x00b", "contains a NUL character"),
    ("a\ud800b", "contains half of a surrogate pair, which UTF-8 cannot encode"),
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
    ([U, A | {"reasoning_content": ["R"]}], "messages[1].reasoning_content: expected a string"),
    ([user("\ud800"), A], "messages[0].content: contains half of a surrogate pair, which UTF-8 cannot encode"),
    ("a string", "messages: expected a list of messages, found a string"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES)
def test_bad_messages(messages, message):
    for parse in (parse_sft, parse_prompt):
        with pytest.raises(BadRow) as error:
            parse({"messages": messages})
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"prompt": "P", "completion": "A"}, False),
        ({"prompt": "P", "completion": "A"}, 0),
        ({"prompt": "P", "completion": "A"}, "false"),
        ({"prompt": "P", "completion": "A"}, "0"),
        ({"prompt": [U], "completion": [A]}, False),
        ({"messages": [U, A]}, False),
        ({"conversations": [human("Q"), gpt("A")]}, False),
        ({"instruction": "Q", "output": "A"}, False),
        # Of a CSV file.
        ({"instruction": "Q", "output": "A"}, "False"),
        ({"messages": [U, A]}, " false"),
    ],
)
def test_a_bad_answer_is_left_out(row, label):
    with pytest.raises(ExcludedRow, match=r"^label: false, so the answer is not learnt$"):
        parse_sft(row | {"label": label})


@pytest.mark.parametrize("label", ["good", "", 2, 0.5, [], {}])
def test_any_other_label_is_bad(label):
    with pytest.raises(BadRow, match=r"^label: expected true or false, or 1 or 0, found ") as error:
        parse_sft({"prompt": "P", "completion": "A", "label": label})
    assert not isinstance(error.value, ExcludedRow)


def test_unpaired_answers_are_no_rankings():
    with pytest.raises(BadRow, match=r"^label: an answer by itself makes no pair; a ranking needs chosen and rej"):
        parse_ranking({"prompt": "P", "completion": "A", "label": True})


def test_what_was_done_to_a_row_is_noted():
    notes = []
    parse_ranking({"prompt": "P", "chosen": "A", "rejected": "B"}, note=notes.append)
    parse_ranking({"prompt": [U], "chosen": [U, A], "rejected": [U, B]}, note=notes.append)
    assert notes == []
    row = {"prompt": ASKED, "chosen": ASKED + " A", "rejected": ASKED + " B"}
    for parse in (parse_ranking, parse_sft, parse_answers):
        parse(row, note=notes.append)
    parse_ranking({"prompt": [S, U], "chosen": [U, A], "rejected": [U, B]}, note=notes.append)
    assert notes == [PROMPT_REMOVED] * 4
    parse_ranking({"prompt": "Hi", "chosen": "Hi, you", "rejected": "Hi!"}, note=notes.append)
    assert notes[4:] == [PROMPT_UNCLEAR]


def test_an_empty_answer_does_not_hide_that_others_repeat_the_prompt():
    row = {"prompt": ASKED, "completions": [ASKED + " A", "", ASKED + " B"]}
    assert parse_answers(row) == [Example(ASKED, " A"), Example(ASKED, ""), Example(ASKED, " B")]


def test_a_turn_that_one_answer_repeats_is_refused():
    with pytest.raises(BadRow, match=r"^prompt: the answers repeat its last turn"):
        parse_ranking({"prompt": [U], "chosen": [U, A], "rejected": [B]})


def test_alpaca_without_a_chat_template_is_asked_as_alpaca_was():
    head = "Below is an instruction that describes a task"
    ask = "Write a response that appropriately completes the request."
    plain = f"{head}. {ask}\n\n### Instruction:\nQ\n\n### Response:\n"
    row = {"instruction": "Q", "output": "A"}
    assert parse_sft(row, chat=False) == Example(plain, "A")
    assert parse_prompt(row, chat=False) == plain
    assert parse_answers(row, chat=False) == [Example(plain, "A")]
    row = {"instruction": "{Q}", "input": "here", "chosen": "A", "rejected": "B"}
    context = f"{head}, paired with an input that provides further context. {ask}"
    prompt = f"{context}\n\n### Instruction:\n{{Q}}\n\n### Input:\nhere\n\n### Response:\n"
    assert parse_ranking(row, chat=False) == Ranking(prompt, ["A", "B"], [0, 1], 0.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": [{"from": "nobody", "value": "Q"}]},
            "conversations[0].from: unknown speaker: 'nobody'; expected ",
        ),
        ({"conversations": [{"from": ["human"], "value": "Q"}]}, "conversations[0].from: unknown speaker: ['human']"),
        ({"conversations": [{"from": "human", "value": 5}]}, "conversations[0].value: expected a string"),
        ({"conversations": [human("")]}, "conversations[0].content: is empty"),
        ({"conversations": "hi"}, "conversations: expected a list of turns, found str"),
        ({"conversations": []}, "conversations: is empty"),
        ({"conversations": ["hi"]}, 'conversations[0]: expected a message {"role", "content"}'),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            "conversations[0].value: function_call without ",
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, human("Q")], "system": "other"},
            "system: differs from the system turn of the conversation",
        ),
        ({"instruction": " ", "output": "A"}, "instruction: is empty"),
        ({"instruction": "Q", "output": ""}, "output: is empty"),
        ({"instruction": "Q", "input": 5, "output": "A"}, "input: expected a string, found int"),
        ({"messages": [{**U, "weight": 0}, A]}, "messages[0].weight: only an assistant's turn can have a weight"),
        ({"messages": [U, {**A, "weight": 0.5}]}, "messages[1].weight: expected 0 or 1, found 0.5"),
        ({"messages": [U, {**A, "weight": True}]}, "messages[1].weight: expected 0 or 1, found True"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A]},
            "messages[0].content: a part has type 'image_url', but only text is supported",
        ),
        (
            {"messages": [{"role": "user", "content": ["Q"]}, A]},
            "messages[0].content: expected a string, or a list of parts",
        ),
        ({"messages": [parts("", " "), A]}, "messages[0].content: is empty"),
        (
            {"prompt": [S, U], "chosen": [user("?"), U, A], "rejected": [user("?"), U, B]},
            "prompt: the answers repeat its last turn, but after other turns",
        ),
        (
            {"prompt": ASKED, "chosen": ASKED + " A", "rejected": ASKED},
            "rejected: repeats the prompt and says nothing else",
        ),
    ],
)
def test_bad_rows_of_other_forms(row, message):
    with pytest.raises(BadRow) as error:
        parse_sft(row)
    assert str(error.value).startswith(message)


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
    (PREFERENCE | {"rejected": None}, "rejected: is empty (null); the row has prompt, chosen"),
    (PREFERENCE | {"chosen": None, "rejected": None}, "chosen: is empty (null), and so is rejected"),
    (RANKING | {"completions": None}, "completions: is empty (null)"),
    ({"prompt": "P", "ranks": [0, 1]}, "chosen: no such column, nor completions; the row has prompt, ranks"),
    (PREFERENCE | {"chosen": "B"}, "chosen: is the same as rejected"),
    ({"chosen": HH + " yes", "rejected": HH + " yes"}, "chosen: is the same as rejected"),
    ({"chosen": [U, A], "rejected": [U, A]}, "chosen: is the same as rejected"),
    (PREFERENCE | {"prompt": " "}, "prompt: is empty"),
    (PREFERENCE | {"rejected": [B]}, "rejected: chosen and rejected must both be strings or both be messages"),
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
    (RANKING | {"completions": ["A", "A", "B"]}, "completions: two completions are the same but have different ranks"),
    (RANKING | {"ranks": [1, 1, 1]}, "ranks: all tied, so there is no pair"),
    (RANKING | {"ranks": [0, 1]}, "ranks: expected 3 ranks, one per completion"),
    (RANKING | {"ranks": None}, "ranks: is empty (null); give each completion its rank, 0 for the best"),
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
        (parse_sft, {"prompt": "P", "completion": None}, "completion: is empty (null)"),
        (parse_sft, {"prompt": None, "completion": "C"}, "prompt: is empty (null); the row has completion"),
        (parse_sft, {"instruction": "I", "input": None, "output": None}, "output: is empty (null)"),
        (
            parse_sft,
            dict.fromkeys(("text", "id", "messages", "chosen")),
            "text: is empty (null), and so are messages, chosen",
        ),
        (parse_prompt, {"prompt": None}, "prompt: is empty (null)"),
        (parse_prompt, {"prompt": "", "id": 1}, "prompt: is empty"),
        (parse_prompt, {"chosen": "A", "rejected": None}, "rejected: is empty (null)"),
        (
            parse_prompt,
            {"prompt": None, "chosen": "A", "rejected": "B"},
            "prompt: is empty (null), and chosen and rejected do not imply one",
        ),
        (parse_answers, {"prompt": "P", "completions": None}, "completions: is empty (null)"),
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
