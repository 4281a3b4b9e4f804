"""Rows as `jrlhf data show` sees them: those of the loaders, token by token; counts against rows made to be odd."""

from typing import Any

import pytest

from jrlhf.config import DataConfig
from jrlhf.data import BadRow, load_prompts, load_rankings, load_sft
from jrlhf.data import tally as tally_module
from jrlhf.data.encode import Encoder
from jrlhf.data.inspect import RowInspector, first_row, guess_kind, inspect_rows
from jrlhf.data.sources import open_source
from jrlhf.data.tally import InspectedRow, Tally, row_texts
from tests.support.chats import turns


def looked_at(source: str, tokenizer: Any, kind: Any, **config: Any) -> tuple[list[InspectedRow], Tally]:
    train_on = config.pop("train_on", "completion")
    tally, seen = Tally(tokenizer, kind), list[InspectedRow]()
    inspector = RowInspector(DataConfig(**config), tokenizer, kind, train_on)
    inspect_rows(inspector, tally, open_source(source).rows, seen.append)
    return seen, tally


def oddities(tally: Tally) -> dict[str, tuple[int, str]]:
    return {name: (count.rows, count.first) for name, count in tally.oddities.items() if count.rows}


ANSWERS = [
    {"prompt": "Hello", "completion": " there, hello world, what is the answer?"},
    {"text": "The answer is 42!"},
    {"prompt": "", "completion": "x"},
    {"prompt": "What is", "completion": " the answer?"},
]


@pytest.mark.parametrize("train_on", ["completion", "all"])
@pytest.mark.parametrize("max_length", [9, 256])
def test_sft_rows_are_those_of_the_loader(tokenizer, write, train_on, max_length):
    source = write(ANSWERS)
    config = DataConfig(max_length=max_length, on_bad_row="skip")
    rows = load_sft(config, source, tokenizer, train_on=train_on)
    seen, tally = looked_at(source, tokenizer, "sft", train_on=train_on, max_length=max_length)
    uncut = load_sft(DataConfig(on_bad_row="skip"), source, tokenizer, train_on=train_on)
    assert [row.place for row in seen] == [f"{source}:{number}" for number in (1, 2, 4)]
    for i, row in enumerate(seen):
        [(tokens, mask, whole)] = row.sequences
        assert tokens.tolist() == rows.tokens[i].tolist()
        assert mask.tolist() == rows.loss_mask[i].tolist()
        assert whole.tolist() == uncut.tokens[i].tolist()
    assert tally.rows == len(rows) == 3
    assert tally.lengths == rows.lengths.tolist()
    assert tally.learnt == sum(int(rows.loss_mask[i].sum()) for i in range(3))
    assert tally.cut == int(uncut.lengths.sum() - rows.lengths.sum())
    assert {reason: count.rows for reason, count in tally.bad.items()} == rows.skipped == {"prompt: is empty": 1}
    assert tally.error == f"{source}:3: prompt: is empty"


RANKED = [
    {"prompt": "Hello", "chosen": " there, hello world", "rejected": " hi"},
    {
        "prompt": "Hello there",
        "completions": [" a", " hello world, hello!", " what is the answer" * 5],
        "ranks": [1, 0, 1],
    },
    {"prompt": "Well", "chosen": " no", "rejected": " no"},
]


@pytest.mark.parametrize("max_length", [5, 256])
def test_rankings_are_those_of_the_loader(tokenizer, write, max_length):
    source = write(RANKED)
    rows = load_rankings(DataConfig(max_length=max_length, on_bad_row="skip"), source, tokenizer)
    uncut = load_rankings(DataConfig(on_bad_row="skip"), source, tokenizer)
    seen, tally = looked_at(source, tokenizer, "reward", max_length=max_length)
    sequences = [sequence for row in seen for sequence in row.sequences]
    assert [s.tokens.tolist() for s in sequences] == [rows.tokens[i].tolist() for i in range(5)]
    assert [s.uncut.tolist() for s in sequences] == [uncut.tokens[i].tolist() for i in range(5)]
    assert [row.ranks for row in seen] == [[0, 1], [1, 0, 1]]
    prompts = ("Hello", "Hello there")
    for prompt, row in zip(prompts, seen, strict=True):
        for ids, mask, whole in row.sequences:
            answer = len(whole) - len(tokenizer(prompt)["input_ids"])
            # Nothing predicts the first token, of whatever it is.
            begins = max(len(ids) - answer, len(Encoder(tokenizer).bos), 1)
            assert mask.tolist() == [i >= begins for i in range(len(ids))]
    # By hand: longer wins; loses to the longest and beats the shortest.
    assert (tally.pairs, tally.longer_wins) == (3, 2.0)
    assert {reason: count.rows for reason, count in tally.bad.items()} == {"chosen: is the same as rejected": 1}


def test_answers_of_one_length_count_half(chat, write):
    same = [{"prompt": "Hello", "chosen": " a", "rejected": " b"}]
    _, tally = looked_at(write(same), chat, "reward")
    assert (tally.pairs, tally.longer_wins) == (1, 0.5)


@pytest.mark.parametrize("max_length", [3, 256])
def test_prompts_are_those_of_the_loader(tokenizer, write, max_length):
    source = write([{"prompt": "Hello there, what is the answer?"}, {"prompt": "hi"}])
    rows = load_prompts(DataConfig(max_length=max_length), source, tokenizer)
    seen, tally = looked_at(source, tokenizer, "prompts", max_length=max_length)
    assert [row.sequences[0].tokens.tolist() for row in seen] == [rows.tokens[i].tolist() for i in range(2)]
    assert not any(row.sequences[0].mask.any() for row in seen)
    assert tally.oddities[tally_module.TRUNCATION_NOTE].rows == (max_length == 3)
    assert tally_module.NO_STOP_LEARNT not in tally.oddities
    assert tally_module.NO_FINAL_STOP not in tally.oddities


def test_what_is_odd_is_counted_with_its_first_row(chat, write):
    hello, long = turns("hi", "hello"), turns("hi", "hello world, there is the answer: 42! " * 3)
    rows = [
        {"messages": hello},
        {"messages": long},
        {"messages": hello},
        {"messages": turns("well<|im_end|>", "hello")},
        {"messages": turns("<pad>", "hello")},
        {"messages": hello},
    ]
    source = write(rows)
    seen, tally = looked_at(source, chat, "sft", max_length=30)
    assert oddities(tally) == {
        tally_module.TRUNCATION_NOTE: (1, f"{source}:2"),
        tally_module.NO_STOP_LEARNT: (1, f"{source}:2"),
        tally_module.REPEATED_ROW: (2, f"{source}:3"),
        tally_module.REPEATED_PROMPT: (3, f"{source}:2"),
        tally_module.PAD_TOKENS: (1, f"{source}:5"),
        tally_module.SPECIAL_TOKENS: (2, f"{source}:4"),
    }
    assert [len(row.sequences[0].tokens) for row in seen][1] == 30
    assert tally.cut == len(seen[1].sequences[0].uncut) - 30 > 0


def test_an_answer_of_a_ranking_that_is_cut_has_no_stop_token(chat, write):
    source = write([{"prompt": "Hello", "chosen": " hello world" * 9, "rejected": " a"}, RANKED[0]])
    _, tally = looked_at(source, chat, "reward", max_length=12)
    assert oddities(tally)[tally_module.NO_FINAL_STOP] == (1, f"{source}:1")


def test_unknown_tokens_are_counted(make_tokenizer, write):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2, "hello": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **tokens)
    source = write([{"text": "hello hello"}, {"text": "hello Monday"}])
    _, tally = looked_at(source, tokenizer, "sft")
    assert oddities(tally) == {tally_module.UNKNOWN_TOKENS: (1, f"{source}:2")}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a"}, "prompts"),
        ({"prompt": "a", "id": 3, "chosen": None}, "prompts"),
        ({"prompt": "a", "completion": "b"}, "sft"),
        ({"text": "a"}, "sft"),
        ({"messages": []}, "sft"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "reward"),
        ({"completions": []}, "reward"),
        ({}, "sft"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "sft"),
        ({"conversations": [{"from": "human", "value": "hi"}], "chosen": {}, "rejected": {}}, "reward"),
        ({"instruction": "a", "input": "", "output": "b"}, "sft"),
        ({"instruction": "a", "context": "c", "response": "b"}, "sft"),
        ({"instruction": "a", "input": "c"}, "prompts"),
        ({"prompt": "a", "completion": "b", "label": False}, "sft"),
    ],
)
def test_the_kind_of_rows_is_told_by_their_columns(row, kind):
    assert guess_kind(row) == kind


FORMS = {
    "sharegpt": {"conversations": [{"from": "human", "value": "hi", "id": 1}, {"from": "gpt", "value": "hello"}]},
    "alpaca": {"instruction": "hi", "input": "", "output": "hello"},
    "dolly": {"instruction": "hi", "context": "", "response": "hello"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, turns("hi", "hello")[1]]},
    "weight": {"messages": [turns("hi")[0], {**turns("hi", "hello")[1], "weight": 1}]},
}


@pytest.mark.parametrize("name", FORMS)
def test_conversations_in_other_forms_are_seen_as_messages_are(name, chat, write):
    [expected], _ = looked_at(write([{"messages": turns("hi", "hello")}]), chat, "sft")
    [seen], tally = looked_at(write([FORMS[name]], "other.jsonl"), chat, guess_kind(FORMS[name]))
    for one, other in zip(seen.sequences[0], expected.sequences[0], strict=True):
        assert one.tolist() == other.tolist()
    assert tally.unread == ({"conversations[].id": 1} if name == "sharegpt" else {})


def test_answers_labelled_bad_are_left_out(chat, write):
    row = {"prompt": "Say hi", "completion": " hi", "label": False}
    source = write([{**row, "label": True}, row])
    seen, tally = looked_at(source, chat, guess_kind(row))
    assert [row.place for row in seen] == [f"{source}:1"]
    assert (tally.bad, tally.error) == ({}, "")
    assert [(count.rows, count.first) for count in tally.excluded.values()] == [(1, f"{source}:2")]


def test_what_loading_notes_is_counted_but_for_cuts(chat, write):
    doubled = {"prompt": "Say hi", "chosen": "Say hi there", "rejected": "Say hi hello " + "x" * 50}
    source = write([doubled])
    _, tally = looked_at(source, chat, "reward", max_length=20)
    assert [(count.rows, count.first) for count in tally.notes.values()] == [(1, f"{source}:1")]
    assert tally.oddities[tally_module.TRUNCATION_NOTE].rows == 1


def test_the_first_row_is_found_behind_bad_ones_and_none_is_lost():
    bad = ("f:1", BadRow(None, "no row"))
    rows = [bad, ("f:2", {"prompt": "a"}), ("f:3", {"prompt": "b"})]
    first, everything = first_row(iter(rows))
    assert first == {"prompt": "a"}
    assert list(everything) == rows
    first, everything = first_row(iter([bad]))
    assert (first, list(everything)) == ({}, [bad])


def test_the_texts_of_a_row_are_those_a_stage_reads():
    row = {"prompt": turns("a"), "completions": ["b", turns("x", "c")[1:]], "id": "d", "source": {"text": "e"}}
    assert list(row_texts(row, {"id", "source"})) == ["a", "b", "c"]
    assert list(row_texts({"text": "a", "messages": None}, ())) == ["a"]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert list(row_texts({"messages": messages}, ())) == ["a", "function", "weather", "Oslo"]


def test_special_tokens_in_columns_that_nothing_reads_are_not_odd(chat, write):
    source = write([{"text": "hi", "source": "<|im_end|>"}, {"text": "hi <|im_end|>"}])
    _, tally = looked_at(source, chat, "sft")
    assert tally.oddities[tally_module.SPECIAL_TOKENS].rows == 1
    assert tally.unread == {"source": 1}
