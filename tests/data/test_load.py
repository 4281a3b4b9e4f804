"""Files to batches, end to end: what is learnt, what is compared, what is cut, and what is refused or counted."""

import csv
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrlhf.data import DataError, load_prompts, load_rankings, load_sft, load_texts, load_tokenizer, stop_token_ids
from jrlhf.data.errors import bad_row_error

HH = "\n\nHuman: hi\n\nAssistant:"


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def row_of(rows: Any, i: int) -> tuple[list[int], list[bool]]:
    return rows.tokens[i].tolist(), rows.loss_mask[i].tolist()


def written(rows: list[dict[str, Any]], kind: str, folder: Path) -> str:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        out = io.StringIO()
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        path.write_text(out.getvalue())
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


KINDS = ["jsonl", "json", "csv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_from_every_kind_of_file(tokenizer, config, tmp_path, kind):
    given = [("Hello", " there"), ("What is\n", "the answer?"), ("\n\nHuman: hi", "\n\n42!")]
    source = written([{"prompt": p, "completion": c} for p, c in given], kind, tmp_path)
    rows = load_sft(config(), source, tokenizer, train_on="completion")
    prompts = load_prompts(config(), source, tokenizer)
    assert len(rows) == len(prompts) == 3
    for i, (prompt, completion) in enumerate(given):
        tokens, learnt = row_of(rows, i)
        head = tokenizer(prompt)["input_ids"]
        assert tokens[: len(head)] == head == prompts.tokens[i].tolist()
        assert learnt == [False] * len(head) + [True] * (len(tokens) - len(head))
        assert tokens[-1] == tokenizer.eos_token_id
        before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (head, tokens))
        assert after == before + completion
        assert prompts.shown[i] == {"prompt": prompt}


@pytest.mark.parametrize("kind", KINDS)
def test_preferences_from_every_kind_of_file(tokenizer, config, tmp_path, kind):
    given = [{"prompt": "Q", "chosen": " yes", "rejected": " no way", "margin": 0.5}]
    rows = load_rankings(config(), written(given, kind, tmp_path), tokenizer)
    batch = rows.batch([0])
    texts = [
        tokenizer.decode(t[m], skip_special_tokens=True) for t, m in zip(batch.tokens[0], batch.mask[0], strict=True)
    ]
    assert [text.strip() for text in texts] == ["Q yes", "Q no way"]
    assert batch.tokens[0][batch.mask[0]].tolist().count(tokenizer.eos_token_id) == 2
    assert (batch.ranks.tolist(), batch.valid.tolist(), batch.margin.tolist()) == ([[0, 1]], [[True, True]], [0.5])


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_rankings_and_messages_from_every_kind_that_has_lists(chat, config, tmp_path, kind):
    user, answers = {"role": "user", "content": "hi"}, ["hello", "well", "42"]
    said = [[{"role": "assistant", "content": answer}] for answer in answers]
    source = written([{"prompt": [user], "completions": said, "ranks": [1, 0, 1]}], kind, tmp_path)
    rows = load_rankings(config(), source, chat)
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [rows.tokens[i].tolist() for i in range(3)] == [ids(chat, head + a + "<|im_end|>") for a in answers]
    assert rows.batch([0]).ranks.tolist() == [[1, 0, 1]]
    assert load_prompts(config(), source, chat).tokens[0].tolist() == ids(chat, head)
    texts = load_texts(config(), source, chat)
    assert [texts.tokens[i].tolist() for i in range(3)] == [rows.tokens[i].tolist() for i in range(3)]
    assert list(texts.shown) == [{"prompt": [user], "completion": answer} for answer in said]


def learnt_of(rows, index: int) -> list[int]:
    return rows.tokens[index][rows.loss_mask[index]].tolist()


def test_the_answers_of_a_ranking_are_marked(tokenizer, config, write):
    """Word and stop token of each answer, and nothing of the prompt, as SFT on the same answer marks them."""
    given, answers = {"prompt": "Q", "ranks": [1, 0, 1]}, [" yes", " no way", " so"]
    rows = load_rankings(config(), write([given | {"completions": answers}]), tokenizer)
    sft_rows = load_sft(
        config(),
        write([{"prompt": "Q", "completion": answer} for answer in answers], "sft.jsonl"),
        tokenizer,
        train_on="completion",
    )
    for i, answer in enumerate(answers):
        assert rows.tokens[i].tolist() == sft_rows.tokens[i].tolist()
        assert rows.loss_mask[i].tolist() == sft_rows.loss_mask[i].tolist()
        assert learnt_of(rows, i)[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learnt_of(rows, i), skip_special_tokens=True).strip() == answer.strip()


def test_the_marks_of_a_ranking_that_is_cut(metaspace, config, write):
    """The prompt goes first; then the answers lose their ends. A BOS stays, and is never of an answer."""
    source = write([{"prompt": "Hello there", "chosen": " hi well", "rejected": " no"}])
    whole = load_rankings(config(), source, metaspace)
    lengths = [len(learnt_of(whole, i)) for i in (0, 1)]
    for max_length in range(2, 1 + max(map(int, whole.tokens.lengths))):
        rows = load_rankings(config(max_length=max_length), source, metaspace)
        for i, length in enumerate(lengths):
            assert learnt_of(rows, i) == learnt_of(whole, i)[: max_length - 1]
            assert len(rows.tokens[i]) == min(max_length, len(whole.tokens[i]))
            assert rows.tokens[i][0] == metaspace.bos_token_id
            assert rows.loss_mask[i].tolist()[-min(length, max_length - 1) :] == [True] * min(length, max_length - 1)


def test_words_between_the_turns_of_an_answer_are_not_its_own(chat, config, write):
    ask = {"role": "user", "content": "hi"}
    said = [
        [{"role": "assistant", "content": a}, {"role": "user", "content": "and?"}, {"role": "assistant", "content": b}]
        for a, b in (("hello", "well"), ("42", "hello"))
    ]
    rows = load_rankings(config(), write([{"prompt": [ask], "completions": said, "ranks": [0, 1]}]), chat)
    end = "<|im_end|>"
    for i, (first, _, last) in enumerate(said):
        assert chat.decode(learnt_of(rows, i)) == first["content"] + end + last["content"] + end


def test_rows_of_different_formats_in_one_file(chat, config, write):
    rows = [{"text": "hi"}, {"prompt": "a", "completion": "b"}, {"chosen": HH + " x", "rejected": HH + " y"}]
    loaded = load_sft(config(), write(rows), chat, train_on="completion")
    eos = [chat.eos_token_id]
    assert row_of(loaded, 0)[0] == ids(chat, "hi") + eos
    assert row_of(loaded, 1)[0] == ids(chat, "a") + ids(chat, "b") + eos
    assert row_of(loaded, 2)[0] == ids(chat, HH) + ids(chat, " x") + eos


def test_a_prompt_may_be_absent(metaspace, config, write):
    rows = load_rankings(config(), write([{"chosen": "Hello", "rejected": "hi there"}]), metaspace)
    eos = [metaspace.eos_token_id]
    assert rows.tokens[0].tolist() == metaspace("Hello")["input_ids"] + eos
    assert rows.tokens[1].tolist() == metaspace("hi there")["input_ids"] + eos


MESSAGES = [
    {"role": role, "content": content}
    for role, content in [("user", "hi"), ("assistant", "hello"), ("user", "well"), ("assistant", "42")]
]


def test_train_on(chat, config, write):
    source = write([{"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, {"messages": MESSAGES}])
    text = chat.apply_chat_template(MESSAGES, tokenize=False).removesuffix("\n")
    whole = ids(chat, text)
    first, last = ids(chat, "hello<|im_end|>"), ids(chat, "42<|im_end|>")
    start = next(i for i in range(len(whole)) if whole[i : i + len(first)] == first)
    inner = set(range(start, start + len(first)))
    answer = set(range(len(whole) - len(last), len(whole)))
    learnt = {
        "completion": (answer, inner | answer),
        "assistant": (inner | answer,) * 2,
        "all": (set(range(1, len(whole))),) * 2,
    }
    for train_on, (of_prompt, of_messages) in learnt.items():
        rows = load_sft(config(), source, chat, train_on=train_on)
        for i, expected in enumerate((of_prompt, of_messages)):
            tokens, mask = row_of(rows, i)
            assert tokens == whole
            assert {at for at, inside in enumerate(mask) if inside} == expected


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_a_text_is_learnt_whole_but_for_its_first_token(tokenizer, config, write, train_on):
    rows = load_sft(config(), write([{"text": "Hello there"}]), tokenizer, train_on=train_on)
    tokens, learnt = row_of(rows, 0)
    assert tokens == [*tokenizer("Hello there")["input_ids"], tokenizer.eos_token_id]
    assert learnt == [False] + [True] * (len(tokens) - 1)


@pytest.mark.parametrize("reload", [False, True], ids=["as it is", "by load_tokenizer"])
def test_the_eos_keeps_its_label_where_it_is_the_pad_token_too(make_tokenizer, config, write, tmp_path, reload):
    eos = "<|endoftext|>"
    tokenizer = make_tokenizer([eos], eos_token=eos, pad_token=eos)
    if reload:
        tokenizer.save_pretrained(tmp_path / "saved")
        tokenizer = load_tokenizer(str(tmp_path / "saved"))
    source = write([{"prompt": "a", "completion": " b"}, {"prompt": "a much longer one", "completion": " b c d e"}])
    rows = load_sft(config(), source, tokenizer, train_on="completion")
    batch = rows.batch([0, 1])
    for place in (0, 1):
        tokens, learnt = row_of(rows, place)
        assert (tokens[-1], learnt[-1]) == (tokenizer.eos_token_id, True)
        assert batch.mask[place].tolist() == [True] * len(tokens) + [False] * (batch.mask.shape[1] - len(tokens))
        assert batch.loss_mask[place].sum() == sum(learnt)
    assert tokenizer.eos_token_id in stop_token_ids(tokenizer, ())


def test_answers_are_cut_at_their_end_and_prompts_at_their_start(metaspace, config, write):
    source = write([{"prompt": "What is the answer", "completion": " The answer is 42!"}])
    full = load_sft(config(), source, metaspace, train_on="completion")
    tokens, learnt = row_of(full, 0)
    head, answer = learnt.index(True), len(tokens) - learnt.index(True)
    cut = load_sft(config(max_length=head + 3), source, metaspace, train_on="completion")
    assert row_of(cut, 0) == (tokens[: head + 3], learnt[: head + 3])
    prompts = load_prompts(config(max_length=4), source, metaspace)
    assert prompts.tokens[0].tolist() == [tokens[0], *tokens[head - 3 : head]]
    for length in (answer + 3, answer, 3):
        texts = load_texts(config(max_length=length), source, metaspace)
        # BOS, as much of the prompt's end as there is room for, and the answer.
        expected = [tokens[0], *tokens[min(len(tokens) - length + 1, head) :]]
        assert texts.tokens[0].tolist() == expected[:length]


def test_cut_until_nothing_is_left(metaspace, config, write):
    source = write([{"prompt": "What is the answer", "completion": " 42"}])
    with pytest.raises(DataError) as error:
        load_sft(config(max_length=4), source, metaspace, train_on="completion")
    reason = "completion: starts beyond max_length (4), so nothing would be learnt"
    assert str(error.value) == str(bad_row_error(f"{source}:1: {reason}"))
    source = write([{"chosen": "Hello there, one", "rejected": "Hello there, two"}])
    with pytest.raises(DataError) as error:
        load_rankings(config(max_length=3), source, metaspace)
    reason = "chosen: two answers of unequal rank have the same tokens after the cut to max_length 3"
    assert str(error.value) == str(bad_row_error(f"{source}:1: {reason}"))


WEIGHED = [MESSAGES[0], {**MESSAGES[1], "weight": 0}, MESSAGES[2], {**MESSAGES[3], "weight": 1}]


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_a_turn_of_weight_0_is_context(chat, config, write, train_on):
    """Wherever the turn stands; all other tokens are as without weights."""
    shapes = [lambda m: {"messages": m}, lambda m: {"prompt": m[:3], "completion": m[3:]}]
    for shape in (*shapes, lambda m: {"prompt": m[:1], "completion": m[1:]}):
        with_weights = load_sft(config(), write([shape(WEIGHED)]), chat, train_on=train_on)
        without = load_sft(config(), write([shape(MESSAGES)]), chat, train_on=train_on)
        tokens, mask = row_of(without, 0)
        barred = ids(chat, "hello<|im_end|>")
        start = next(i for i in range(len(tokens)) if tokens[i : i + len(barred)] == barred)
        expected = [inside and not start <= i < start + len(barred) for i, inside in enumerate(mask)]
        assert row_of(with_weights, 0) == (tokens, expected)
        assert load_prompts(config(), write([shape(WEIGHED)]), chat).tokens[0].tolist() == ids(
            chat,
            chat.apply_chat_template(
                MESSAGES[: 1 if shape(WEIGHED).get("prompt") == MESSAGES[:1] else 3],
                tokenize=False,
                add_generation_prompt=True,
            ),
        )


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_a_row_of_weight_0_alone_is_bad(chat, config, write, train_on):
    none = [MESSAGES[0], WEIGHED[1]]
    for row in ({"messages": none}, {"prompt": none[:1], "completion": none[1:]}):
        source = write([row])
        with pytest.raises(DataError) as error:
            load_sft(config(), source, chat, train_on=train_on)
        reason = "weight: is 0 for every assistant turn, so nothing would be learnt"
        assert str(error.value) == str(bad_row_error(f"{source}:1: {reason}"))
        assert load_sft(config(on_bad_row="skip"), write([row, {"text": "a"}]), chat, train_on=train_on).skipped == {
            reason: 1
        }


@pytest.mark.parametrize("kind", KINDS)
def test_bad_answers_are_left_out_and_counted_whatever_bad_rows_do(chat, config, tmp_path, caplog, kind):
    labels: list[Any] = ["true", "FALSE", "0", "1"] if kind == "csv" else [True, False, False, True]
    rows = [{"prompt": "Say hi", "completion": f" hi {i}", "label": label} for i, label in enumerate(labels)]
    source = written(rows, kind, tmp_path)
    for on_bad_row in ("error", "skip"):
        caplog.clear()
        loaded = load_sft(config(on_bad_row=on_bad_row), source, chat, train_on="completion")
        texts = [chat.decode(loaded.tokens[i], skip_special_tokens=True) for i in range(len(loaded))]
        assert texts == ["Say hi hi 0", "Say hi hi 3"]
        assert loaded.skipped == {"label: false, so the answer is not learnt": 2}
        [line] = caplog.messages
        assert line.startswith(f"{source}: skipped 2 rows: label: false, so the answer is not learnt (first: {source}")
    assert len(load_texts(config(), source, chat)) == len(load_prompts(config(), source, chat)) == 4
    with pytest.raises(DataError, match="label: an answer by itself makes no pair; a ranking needs chosen"):
        load_rankings(config(), source, chat)


def test_bad_answers_alone_are_no_rows(chat, config, write):
    source = write([{"prompt": "Q", "completion": "A", "label": False}])
    with pytest.raises(DataError, match="no rows; all 1 were skipped, most for: label: false"):
        load_sft(config(), source, chat, train_on="completion")


def test_a_prompt_that_all_answers_repeat_stands_once(tokenizer, config, write, caplog):
    prompt = "Question: what colour is the sky?\nAnswer:"
    doubled = {"prompt": prompt, "chosen": f"{prompt} blue", "rejected": f"{prompt} green"}
    once = {"prompt": prompt, "chosen": " blue", "rejected": " green"}
    several = {"prompt": prompt, "completions": [doubled["chosen"], doubled["rejected"]], "ranks": [0, 1]}
    for row in (doubled, several):
        for load in (load_rankings, load_texts, sft):
            if load is sft and row is several:
                continue
            caplog.clear()
            source = write([row, once], "doubled.jsonl")
            loaded, expected = load(config(), source, tokenizer), load(config(), write([once]), tokenizer)
            half = len(expected.tokens)
            for i in range(half):
                assert loaded.tokens[i].tolist() == loaded.tokens[half + i].tolist() == expected.tokens[i].tolist()
            note = "the prompt, which the answers repeat, was taken off them"
            assert caplog.messages[0] == f"{source}: 1 of 2 rows (50 %): {note} (first: {source}:1)"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_sharegpt_from_every_kind_that_has_lists(chat, config, tmp_path, kind):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    source = written([{"conversations": turns}], kind, tmp_path)
    text = chat.apply_chat_template(MESSAGES[:2], tokenize=False).removesuffix("\n")
    for rows in (sft(config(), source, chat), load_texts(config(), source, chat)):
        assert chat.decode(rows.tokens[0]) == text
    assert load_prompts(config(), source, chat).shown[0] == {"prompt": MESSAGES[:1]}


@pytest.mark.parametrize("kind", KINDS)
def test_alpaca_from_every_kind_of_file(tokenizer, config, tmp_path, kind):
    source = written([{"instruction": "hi", "input": "", "output": "hello"}], kind, tmp_path)
    [prompts, rows] = load_prompts(config(), source, tokenizer), sft(config(), source, tokenizer)
    said = tokenizer.decode(rows.tokens[0])
    if tokenizer.chat_template:
        assert said == tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False).removesuffix("\n")
    else:
        assert "### Instruction:\nhi\n\n### Response:\nhello" in said
    assert said.startswith(tokenizer.decode(prompts.tokens[0]))


def sft(*given: Any) -> Any:
    return load_sft(*given, train_on="completion")


@pytest.mark.parametrize("load", [sft, load_rankings, load_prompts, load_texts])
def test_rows_that_are_cut_are_counted_and_said_once_a_source(chat, config, write, caplog, load, tmp_path):
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    long = {"prompt": "a " * 5, "chosen": "b" * 9, "rejected": "c"}
    source, other = write([short, long, long, short]), write([short, long], "other.jsonl")
    for cache in ("", str(tmp_path / "cache")):
        for _ in range(2):
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="jrlhf.data"):
                limit = 12 if load is sft else 8
                rows = load(config(max_length=limit, cache=cache), {source: 1.0, other: 2.0}, chat)
            assert rows.cut == 3
            assert rows.skipped == {}
            assert caplog.messages == [
                f"{source}: 2 of 4 rows (50 %): cut to max_length (first: {source}:2)",
                f"{other}: 1 of 2 rows (50 %): cut to max_length (first: {other}:2)",
            ]
    caplog.clear()
    assert load(config(), source, chat).cut == 0
    assert caplog.messages == []


def test_tied_answers_may_be_the_same_once_cut(chat, config, write):
    source = write([{"completions": ["hello one", "hello two", "42"], "ranks": [0, 0, 1]}])
    rows = load_rankings(config(max_length=2), source, chat)
    assert rows.tokens[0].tolist() == rows.tokens[1].tolist()


BAD = [
    '{"prompt": "a", "chosen": "b"',
    '{"prompt": "a", "chosen": "b", "rejected": "b"}',
    '{"prompt": "", "chosen": "b", "rejected": "c"}',
    '{"prompt": "a", "chosen": "b", "rejected": "b"}',
    '{"prompt": 5, "chosen": "b", "rejected": "c"}',
]
GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_ends_the_run_with_its_line(chat, config, write, bad):
    source = write(f"{GOOD}\n\n{bad}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: "):
        load_rankings(config(), source, chat)


def test_bad_rows_are_counted_and_reported_where_they_are_skipped(chat, config, write, caplog):
    source = write("\n".join([GOOD, *BAD, GOOD]))
    with caplog.at_level(logging.WARNING, logger="jrlhf.data"):
        rows = load_rankings(config(on_bad_row="skip"), source, chat)
    assert len(rows) == 2
    assert rows.skipped == {
        "chosen: is the same as rejected": 2,
        "not a JSON object per line": 1,
        "prompt: is empty": 1,
        "prompt: expected a string or a list of messages, found int": 1,
    }
    assert f"{source}: skipped 2 rows: chosen: is the same as rejected (first: {source}:3)" in caplog.messages
    assert f"{source}: skipped 1 rows: prompt: is empty (first: {source}:4)" in caplog.messages
    assert len(caplog.messages) == 4


NO_TEXT = {
    b'{"text": "a"': "not a JSON object per line: Expecting ',' delimiter at 13",
    b'{"text": "a\\u0000b"}': "text: contains a NUL character",
    b'{"text": "\\ud800"}': "text: contains half of a surrogate pair, which UTF-8 cannot encode",
    b'{"text": 7}': "text: expected a string or a list of messages, found int",
    b'{"text": "a", "text": "b"}': "text: given twice in one object",
    b'{"text": " "}': "text: is empty",
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested too deeply",
}


def test_what_is_no_text_is_named_or_counted_and_the_rest_is_learnt(chat, config, write, caplog):
    good = [
        b'\xef\xbb\xbf{"text": "Hello"}\r',
        b'{"text": "Hello\\ud83d\\ude00"}\r',
        b'{"text": "' + b"x" * 10**6 + b'"}',
    ]
    source = write(b"\n".join([*good, *NO_TEXT]))
    with caplog.at_level(logging.WARNING, logger="jrlhf.data"):
        rows = load_sft(config(on_bad_row="skip"), source, chat, train_on="completion")
    assert [chat.decode(row_of(rows, i)[0], skip_special_tokens=True) for i in (0, 1)] == ["Hello", "Hello😀"]
    assert rows.lengths.tolist()[2] == 256
    assert sum(rows.skipped.values()) == len(NO_TEXT)
    for number, (line, reason) in enumerate(NO_TEXT.items(), 4):
        assert f"(first: {source}:{number})" in caplog.text
        alone = write(b"\n\n" + line, "alone.jsonl")
        with pytest.raises(DataError) as error:
            load_sft(config(), alone, chat, train_on="completion")
        assert str(error.value) == str(bad_row_error(f"{alone}:3: {reason}"))


def test_rankings_without_a_pair_are_counted_by_reason(chat, config, write):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    several = {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]}
    bad = [
        pair | {"prompt": " "},
        pair | {"chosen": ""},
        pair | {"rejected": "\n"},
        pair | {"rejected": "b"},
        several | {"ranks": [1, 1]},
        several | {"completions": ["b"], "ranks": [0]},
        several | {"completions": [], "ranks": []},
    ]
    source = write([*bad, pair, several, pair | {"prompt": "long " * 500}])
    rows = load_rankings(config(on_bad_row="skip", max_length=32), source, chat)
    assert rows.skipped == {
        "prompt: is empty": 1,
        "chosen: is empty": 1,
        "rejected: is empty": 1,
        "chosen: is the same as rejected": 1,
        "ranks: all tied, so there is no pair": 1,
        "completions: fewer than two, so there is nothing to rank": 2,
    }
    # A prompt that is too long loses its start, so that both answers stay.
    assert [len(rows.completions(i)) for i in range(len(rows))] == [2, 2, 2]
    assert rows.lengths.tolist()[2] == 32
    assert [rows.tokens[i][-2:].tolist() for i in rows.completions(2)] == [rows.tokens[i][-2:].tolist() for i in (0, 1)]


def test_many_reasons_are_summed_up(chat, config, write, caplog):
    bad = [{"messages": [{"role": "user", "content": "hi"}] * i + [{"role": "x"}]} for i in range(25)]
    with caplog.at_level(logging.WARNING, logger="jrlhf.data"):
        rows = load_prompts(config(on_bad_row="skip"), write([*bad, {"prompt": "hi"}]), chat)
    assert sum(rows.skipped.values()) == len(rows.skipped) == 25
    assert len(caplog.messages) == 21
    assert caplog.messages[-1].endswith("skipped 5 rows for 5 other reasons")


@pytest.mark.parametrize("load", [load_prompts, load_rankings, load_texts])
def test_nothing_left_is_an_error(chat, config, write, load):
    source = write([{"question": "a"}] * 3)
    with pytest.raises(DataError, match=r": no rows; all 3 were skipped, most for: \w+: no such column, .*question$"):
        load(config(on_bad_row="skip"), source, chat)
    for empty, name in (("\n\n", "rows.jsonl"), ("[]", "rows.json"), ("prompt,completion\n", "rows.csv")):
        with pytest.raises(DataError, match=r": no rows$"):
            load(config(), write(empty, name), chat)


def test_empty_cells_are_empty_and_not_absent(chat, config, write):
    with pytest.raises(DataError, match=r"rows\.csv:2: prompt: is empty; with on_bad_row: skip"):
        load_rankings(config(), write("prompt,chosen,rejected\n,a,b\n", "rows.csv"), chat)
    rows = load_rankings(config(), write("chosen,rejected,margin\na,007,\nNA,null,2\n", "rows.csv"), chat)
    texts = [chat.decode(rows.tokens[i], skip_special_tokens=True) for i in range(4)]
    assert texts == ["a", "007", "NA", "null"]
    assert rows.batch([0, 1]).margin.tolist() == [0.0, 2.0]


def test_messages_need_a_template(metaspace, config, write):
    with pytest.raises(
        DataError, match=r":1: messages: chat messages, but the tokenizer has no chat template; with on_bad_row: skip"
    ):
        load_sft(config(), write([{"messages": MESSAGES}]), metaspace, train_on="completion")


def test_prompts_from_stdin_are_left_padded(metaspace, config, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\nOnce upon a time\n"))
    prompts = load_prompts(config(), "-", metaspace)
    tokens, mask = prompts.batch([0, 1])
    assert tokens.shape == (2, prompts.buckets[-1])
    assert tokens[mask].tolist() == metaspace("Once")["input_ids"] + metaspace("Once upon a time")["input_ids"]
    assert mask[:, -1].all()
    assert (np.diff(mask.astype(int), axis=1) >= 0).all()
    assert (tokens[~mask] == metaspace.pad_token_id).all()


@pytest.mark.parametrize("asset", ["prompts_train", "prompts_heldout"])
def test_shipped_prompts_come_back_as_text(metaspace, config, asset):
    prompts = load_prompts(config(), f"asset:{asset}", metaspace)
    assert len(prompts) == {"prompts_train": 1490, "prompts_heldout": 512}[asset]
    assert prompts.skipped == {}
    decoded = [metaspace.decode(prompts.tokens[i], skip_special_tokens=True) for i in range(0, 500, 7)]
    assert decoded == [row["prompt"] for row in prompts.shown[0:500:7]]
