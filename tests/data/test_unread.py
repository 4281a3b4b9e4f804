"""Columns and message fields that nothing reads are counted and named once, whatever the rows are for."""

import logging
from dataclasses import replace
from typing import Any

import pytest

from jrlhf.data import BadRow, Columns, load_prompts, load_rankings, load_sft, load_texts
from jrlhf.data.errors import MAX_COUNTED_NAMES, MAX_NAMES, Skips
from jrlhf.data.formats import parse_answers, parse_prompt, parse_ranking, parse_sft, parse_tools
from jrlhf.data.unpaired import parse_unpaired
from jrlhf.data.unread import READ_COLUMNS, template_fields, unread_of
from tests.support.chats import CHATML

ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TEXT, PAIR = {"prompt": "Q", "completion": " a"}, {"prompt": "Q", "chosen": " yes", "rejected": " no"}
RANKED = {"prompt": "Q", "completions": [" a", " b"], "ranks": [0, 1]}
CHAT = {"messages": [ASK, ANSWER]}
SAID = {"from": "gpt", "value": "a"}
NOTES = {"id": 7, "source": "web"}

LOADERS: dict[str, Any] = {
    "sft": lambda *given: load_sft(*given, train_on="completion"),
    "rankings": load_rankings,
    "prompts": load_prompts,
    "texts": load_texts,
}
PARSERS: dict[str, Any] = {
    "sft": parse_sft,
    "rankings": parse_ranking,
    "unpaired": parse_unpaired,
    "prompts": lambda row: parse_tools(row, parse_prompt(row)),
    "texts": parse_answers,
}
SHAPES = [
    ("sft", TEXT),
    ("sft", CHAT),
    ("sft", {"text": "a"}),
    ("sft", PAIR),
    ("rankings", {**PAIR, "margin": 1}),
    ("rankings", {**RANKED, "margin": 1}),
    ("prompts", {"prompt": "a"}),
    ("prompts", CHAT),
    ("prompts", PAIR),
    ("texts", {"prompt": "Q", "completions": [" a"]}),
    ("texts", PAIR),
    ("texts", TEXT),
    ("texts", CHAT),
    ("sft", {"conversations": [{**SAID, "from": "human"}, SAID], "system": "Be brief."}),
    ("sft", {"instruction": "Add", "input": "1 and 1", "output": "2", "system": "Be brief."}),
    ("sft", {**TEXT, "label": True}),
    ("sft", {"messages": [ASK, {**ANSWER, "weight": 1}], "label": True}),
    ("prompts", {"instruction": "Add", "input": "1 and 1"}),
    ("rankings", {"conversations": [{**SAID, "from": "human"}], "chosen": SAID, "rejected": {**SAID, "value": "b"}}),
]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "nothing reads" in message]


@pytest.mark.parametrize(("kind", "row"), SHAPES)
def test_what_is_not_read_is_named_with_its_rows(kind, row, chat, config, write, caplog):
    """Once a source, by the loaders of all stages; a row of nothing else is not spoken of."""
    LOADERS[kind](config(), write([row, row]), chat)
    assert said(caplog) == []
    source = write([{**row, **NOTES, "note": None}, {**row, "id": 0}, {**row, "source": ""}], "noted.jsonl")
    LOADERS[kind](config(), source, chat)
    assert said(caplog) == [f"{source}: columns that nothing reads: id (2 rows), source (1 row)"]


class Recorder(dict[str, Any]):
    """A row that knows which of its columns were looked at and were there."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.read = set[str]()

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        if column in self:
            self.read.add(column)
        return super().get(column, default)


SHARED = {"system": "Be brief.", "tools": [{"name": "weather"}], "label": True}
HUMAN = {"conversations": [{"from": "human", "value": "hi"}]}
ALPACA = {"instruction": "I", "input": "i", "output": "o", "response": "r", "context": "c"}
EVERYTHING = {**TEXT, **PAIR, **RANKED, **CHAT, **HUMAN, **ALPACA, **SHARED, "text": "a", "margin": 1}
ALIKE = {"input": "context", "output": "response"}
"""Columns of which a row has one or the other."""


def first_of(kind: str, number: int) -> dict[str, Any]:
    """A row that holds every column but those that would give it a shape before the one of this number."""
    shapes = list(READ_COLUMNS[kind])
    row = dict(EVERYTHING)
    for column, other in ALIKE.items():
        del row[column if other in shapes[number] else other]
    for earlier in shapes[:number]:
        if row.keys() >= set(earlier):
            del row[next((column for column in earlier if column not in shapes[number]), "rejected")]
    if "chosen" not in row:
        row.pop("rejected", None)
    return row


@pytest.mark.parametrize(("kind", "number"), [(k, i) for k, shapes in READ_COLUMNS.items() for i in range(len(shapes))])
def test_the_table_is_what_the_parsers_read(kind, number, chat):
    recorder, found = Recorder(first_of(kind, number)), set[str]()
    try:
        PARSERS[kind](recorder)
    except BadRow:  # the tools are looked at last, where a plain text has none
        found = {"tools"}
    assert set(recorder) - set(unread_of(kind, chat)(recorder.copy())) == recorder.read | found


def test_a_class_beside_a_conversation_is_no_label(chat):
    unread = unread_of("sft", chat)
    assert unread({**CHAT, "label": 3}) == unread({"text": "a", "label": True}) == ["label"]
    assert unread({**CHAT, "label": "True"}) == unread({**CHAT, "label": True}) == unread({**TEXT, "label": 1}) == []


def test_what_is_read_depends_on_the_shape_of_each_row(chat, config, write, caplog):
    """Not on that of the first one."""
    rows = [TEXT, {**TEXT, **CHAT}, {"text": "a", "prompt": "Q"}, TEXT, {**TEXT, "messages": None}]
    source = write(rows)
    load_sft(config(), source, chat, train_on="completion")
    assert said(caplog) == [f"{source}: columns that nothing reads: prompt (2 rows), completion (1 row)"]


def test_columns_of_rules_are_read(chat, config, write, caplog):
    source = write([{"prompt": "Q", "answer": "4", "level": 3, "id": 1}])
    load_prompts(config(), source, chat, Columns(("answer",), ("level",)))
    assert said(caplog) == [f"{source}: columns that nothing reads: id (1 row)"]
    caplog.clear()
    load_prompts(config(), source, chat, Columns(every=True))
    assert said(caplog) == []


def test_fields_of_messages_that_neither_we_nor_the_template_read(chat, make_tokenizer, config, write, caplog):
    noted = {"messages": [{**ASK, "name": "Ann", "id": 1}, {**ANSWER, "id": 2, "name": None}]}
    source = write([noted, CHAT, noted])
    load_sft(config(), source, chat, train_on="completion")
    names = "messages[].name (2 rows), messages[].id (2 rows)"
    assert said(caplog) == [f"{source}: columns that nothing reads: {names}"]
    caplog.clear()
    template = CHATML.replace("{{ m['role'] }}", "{% if 'name' in m %}{{ m.name }} {% endif %}{{ m['role'] }}")
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    named = make_tokenizer(["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"], template, **tokens)
    load_sft(config(), source, named, train_on="completion")
    assert said(caplog) == [f"{source}: columns that nothing reads: messages[].id (2 rows)"]


def test_fields_of_messages_wherever_messages_stand(chat, config, write, caplog):
    ask, better, worse = (
        {**ASK, "id": 1},
        {**ANSWER, "model": "x"},
        {"role": "assistant", "content": "go", "model": "y"},
    )
    row = {"prompt": [ask], "completions": [[better], [worse]], "ranks": [0, 1]}
    source = write([row])
    load_rankings(config(), source, chat)
    names = "prompt[].id (1 row), completions[][].model (1 row)"
    assert said(caplog) == [f"{source}: columns that nothing reads: {names}"]
    caplog.clear()
    row = {"conversations": [{**SAID, "from": "human", "id": 1}], "chosen": {**SAID, "model": "x"}, "rejected": SAID}
    source = write([{**row, "rejected": {**SAID, "value": "b"}}])
    load_rankings(config(), source, chat)
    names = "conversations[].id (1 row), chosen[].model (1 row)"
    assert said(caplog) == [f"{source}: columns that nothing reads: {names}"]


def test_it_is_said_again_of_rows_in_the_cache(chat, config, write, caplog, tmp_path):
    cached = replace(config(), cache=str(tmp_path / "cache"))
    source = write([{**TEXT, **NOTES}])
    lines = []
    for _ in range(2):
        caplog.clear()
        load_sft(cached, source, chat, train_on="completion")
        lines.append(said(caplog))
    assert lines[0] == lines[1] == [f"{source}: columns that nothing reads: id (1 row), source (1 row)"]


def test_the_line_is_short_however_many_names_there_are(caplog):
    skips = Skips("rows.jsonl", skip=True)
    for i in range(2 * MAX_COUNTED_NAMES):
        skips.add_unread([f"column {i}", "a\nb", "x" * 9999])
    with caplog.at_level(logging.WARNING, logger="jrlhf.data"):
        skips.close(1)
    [line] = said(caplog)
    assert line.startswith(r"rows.jsonl: columns that nothing reads: a\nb (2,000 rows), xxx")
    assert line.endswith(f" and {MAX_COUNTED_NAMES + 1 - MAX_NAMES} others")
    assert "\n" not in line
    assert len(line) < 1000


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ('{{ m.name }} and m.other says "id"', {"name"}),
        ("{% for m in messages %}{{ m['role'] + m.get('content', '') }}{% endfor %}", {"role", "content", "get", ""}),
        ("{% generation %}{% if 'tool_calls' in m %}{% endgeneration %}", {"tool_calls"}),
        ("{{ 'Call {\"name\": x}' }}", {'Call {"name": x}'}),
        ("", set()),
        ("{% if %", set()),
    ],
)
def test_fields_that_a_template_names(template, fields):
    assert template_fields(template) == fields
