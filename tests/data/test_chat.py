"""Assistant-only masks through chat templates, character by character against conversations put together by hand."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.data import BadRow, DataError, load_sft
from jrlhf.data.chat import ChatTemplate, template_of
from jrlhf.data.encode import Encoder
from jrlhf.data.errors import bad_row_error
from jrlhf.data.formats import Example
from tests.support.chat_templates import (
    ASK,
    CHATML,
    LLAMA3,
    LOOP,
    MARKED,
    QWEN3,
    TURN,
    WAYS,
    Messages,
    Pieces,
    im_pieces,
    made,
)
from tests.support.chats import TEXTS, turns

Way = tuple[Any, Callable[[Messages], Pieces]]
Templated = Callable[..., Any]


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Any]) -> Way:
    template, kind, pieces = WAYS[request.param]
    return made(make_tokenizer, template, kind), pieces


@pytest.fixture(scope="module")
def templated(make_tokenizer: Callable[..., Any]) -> Templated:
    return lambda template, kind="im": made(make_tokenizer, template, kind)


def byte_of() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = byte_of()


def bytes_of(tokenizer: Any, token: int) -> bytes:
    text = tokenizer.convert_ids_to_tokens(token)
    return text.encode() if token in tokenizer.added_tokens_decoder else bytes(BYTES[letter] for letter in text)


def mask_by_bytes(tokenizer: Any, tokens: list[int], pieces: Pieces) -> list[bool]:
    """The brute force: each token lies in answers or outside them, byte for byte, and is learnt accordingly."""
    text = "".join(text for text, _ in pieces).encode()
    learnt = [answer for text, answer in pieces for _ in text.encode()]
    at, mask = 0, []
    for token in tokens:
        said = bytes_of(tokenizer, token)
        assert text[at : at + len(said)] == said
        [inside] = set(learnt[at : at + len(said)])
        mask.append(inside)
        at += len(said)
    # All that is left is what the template puts after the last stop token.
    assert not any(learnt[at:])
    assert text[at:].strip() == b""
    return mask


def flat(segments: list[Any]) -> tuple[list[int], list[bool]]:
    return [t for s in segments for t in s.ids], [s.answer for s in segments for _ in s.ids]


def check(tokenizer: Any, pieces: Pieces, messages: Messages) -> None:
    tokens, mask = flat(Encoder(tokenizer).segments(Example(None, messages), every_turn=False))
    assert mask == mask_by_bytes(tokenizer, tokens, pieces)
    # Every run of learnt tokens ends with the stop token, and there is one for each answer.
    ends = [token for token, here, after in zip(tokens, mask, [*mask[1:], False], strict=True) if here and not after]
    assert ends == [Encoder(tokenizer)._turn_end] * sum(m["role"] == "assistant" for m in messages)


PLAIN_TURNS = turns("hi", "hello world", "what is the answer?", "The answer is 42!", "Well?", "\n\nhi", system="there")


@pytest.mark.parametrize("count", [3, 5, 7])
@pytest.mark.parametrize("system", [True, False])
def test_each_answer_and_its_stop_token_are_learnt_and_nothing_else(way, count, system):
    tokenizer, by_hand = way
    messages = PLAIN_TURNS[0 if system else 1 : count]
    check(tokenizer, by_hand(messages), messages)


@given(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0), st.one_of(st.none(), TEXTS))
def test_so_with_any_text(way, texts, system):
    tokenizer, by_hand = way
    messages = turns(*texts, system=system)
    check(tokenizer, by_hand(messages), messages)


@given(TEXTS, TEXTS, TEXTS)
def test_the_last_answer_alone_follows_its_prompt(way, first, second, answer):
    tokenizer, by_hand = way
    prompt = turns(first, second, first)
    encoder = Encoder(tokenizer)
    before, after = encoder.encode_example(Example(prompt, answer))
    assert before == encoder.prompt(prompt)
    pieces = by_hand([*prompt, {"role": "assistant", "content": answer}])
    last = max(i for i, (_, learnt) in enumerate(pieces) if learnt)
    assert b"".join(bytes_of(tokenizer, token) for token in before).decode() == "".join(t for t, _ in pieces[:last])
    assert b"".join(bytes_of(tokenizer, token) for token in after).decode() == pieces[last][0]


def test_markers_say_what_transformers_reads_from_them(templated):
    tokenizer = templated(MARKED)
    theirs = tokenizer.apply_chat_template(PLAIN_TURNS[:5], return_assistant_tokens_mask=True, return_dict=True)
    tokens, mask = flat(Encoder(tokenizer).segments(Example(None, PLAIN_TURNS[:5]), every_turn=False))
    assert tokens == theirs["input_ids"][: len(tokens)]
    assert mask == [bool(learnt) for learnt in theirs["assistant_masks"][: len(tokens)]]
    assert not any(theirs["assistant_masks"][len(tokens) :])


def test_markers_may_begin_an_answer_later_than_the_prompt_ends(templated):
    later = MARKED.replace("{% generation %}", "Well: {% generation %}")
    encoder = Encoder(templated(later))
    before, *after = encoder.segments(Example(turns("hi"), "hello"), every_turn=False)
    assert before.ids == encoder.prompt(turns("hi"))
    assert [(encoder._tokenizer.decode(s.ids), s.answer) for s in after] == [
        ("Well: ", False),
        ("hello<|im_end|>", True),
    ]


# Qwen3


@pytest.mark.parametrize("system", [None, "there"])
def test_qwen3_one_answer_is_learnt_with_its_empty_thought(templated, system):
    tokenizer = templated(QWEN3)
    messages = turns("hi", "hello", system=system)
    check(tokenizer, im_pieces(messages, think=True), messages)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nwell\n</think>\n\nhello"},
        {"content": "hello", "reasoning_content": "well"},
    ],
)
def test_qwen3_a_thought_is_learnt_in_either_form(templated, answer):
    encoder = Encoder(templated(QWEN3))
    row = Example([*turns("hi", "<think>\nso\n</think>\n\nhi!", "there")], [{"role": "assistant", **answer}])
    before, after = encoder.encode_example(row)
    # What the answers before had thought is dropped from the prompt, here and where PPO samples.
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhi!<|im_end|>\n<|im_start|>user\nthere<|im_end|>\n"
    assert encoder._tokenizer.decode(before) == asked + "<|im_start|>assistant\n"
    assert before == encoder.prompt(row.prompt)
    assert encoder._tokenizer.decode(after) == "<think>\nwell\n</think>\n\nhello<|im_end|>"


def test_qwen3_several_answers_are_refused_with_reason_and_row(templated, write, config):
    tokenizer = templated(QWEN3)
    source = write([{"messages": turns("hi", "hello")}, {"messages": turns("hi", "hello", "well", "there")}])
    expected = (
        f"{source}:2: messages: the chat template changes earlier turns when later ones come, so what is learnt cannot "
        "be marked; give the row as prompt and completion to learn its last answer alone (message 3)"
    )
    with pytest.raises(DataError) as error:
        load_sft(config(), source, tokenizer, train_on="completion")
    assert str(error.value) == str(bad_row_error(expected))
    assert list(load_sft(config(on_bad_row="skip"), source, tokenizer, train_on="completion").skipped.values()) == [1]


# Dates

CALENDAR = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}|{{ strftime_now('%-d %b %B %A') }}"


def test_the_date_in_a_template_is_the_same_on_every_day(templated, monkeypatch):
    import transformers.utils.chat_template_utils as theirs

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2, tzinfo=tz)

    tokenizer = templated(LLAMA3, "llama3")
    messages = turns("hi", "hello", system="there")
    today = Encoder(tokenizer).segments(Example(None, messages), every_turn=False)
    monkeypatch.setattr(theirs, "datetime", Later)
    assert "02 Jan 2031" in tokenizer.apply_chat_template(messages, tokenize=False)
    assert Encoder(tokenizer).segments(Example(None, messages), every_turn=False) == today
    assert "Today: 26 Jul 2024\n" in tokenizer.decode(today[0].ids)


def test_every_form_of_the_date_stands_still(templated):
    tokenizer = templated(CALENDAR + "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert ChatTemplate(tokenizer).prompt(turns("hi"), "prompt") == ("2024-07-26 00:00:00.000000|26 Jul July Fridayhi")


@pytest.mark.parametrize(
    "begin", ["", "\n", "\n\n", "  {% if true %}x{% endif %}", "{%- if true %}\n y{% endif %}", " "]
)
def test_the_calendar_changes_nothing_else(templated, begin):
    template = begin + "{# strftime_now #}" + LLAMA3
    tokenizer = templated(template, "llama3")
    assert template_of(tokenizer) != template
    ours = ChatTemplate(tokenizer).prompt(turns("hi"), "prompt")
    date = datetime.datetime.now().strftime("%d %b %Y")
    theirs = tokenizer.apply_chat_template(turns("hi"), tokenize=False, add_generation_prompt=True)
    assert ours == theirs.replace(date, "26 Jul 2024")


@pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_a_template_that_draws_at_random_is_refused(templated, draw):
    with pytest.raises(DataError, match=r"^the tokenizer's chat template draws at random \('"):
        Encoder(templated(draw + CHATML))


# What cannot be masked

FORGETS = CHATML.replace("{% for m", "{{ messages[0].content if messages[-1].role == 'user' else '' }}{% for m", 1)
"""Mistral Nemo's way: what the system says stands before the last question only while nobody has answered it."""
NO_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ASK
SYSTEM_LATE = (
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for m in messages %}{% if m.role != 'system' %}{% if m == last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}{% endif %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
"""Mistral's first way: the system turn goes to the last question."""
LOWER = CHATML.replace("m.content", "m.content | lower")
NO_THOUGHTS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
REASONS = CHATML + "{{ '' if not add_generation_prompt else '<think>\n' }}"
UNSTOPPED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + "{{ 'assistant:' * add_generation_prompt }}"
)
LAST_MARKED = MARKED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}")
TRIMMED_MARKS = MARKED.replace("{{ m.content }}", "{{ m.content | trim }}{% if true %}\ufdd0{% endif %}")


LOST = "leaves out or changes what a message says, or moves it"
PAIRS = "does not put one pair of generation markers around each answer"
TWICE = turns("hi", "hello", "well", "there")
KIND = turns("hi", "hello", "well", "there", system="You are kind.")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (NO_SYSTEM, KIND, f"{LOST} (message 0, system)"),
        (SYSTEM_LATE, KIND, "changes earlier turns when later ones come"),
        (FORGETS, TWICE, "changes earlier turns when later ones come, so what is learnt cannot be marked (message 1)"),
        (LOWER, turns("HELLO", "hello"), f"{LOST} (message 0, user)"),
        (LOWER, turns("hello", "HELLO"), f"{LOST} (message 1, assistant)"),
        (NO_THOUGHTS, turns("hi", "<think>well</think>hello"), f"{LOST} (message 1, assistant)"),
        (REASONS, TWICE, "begins an answer unlike its generation prompt, so it would not follow its prompt"),
        (LOOP + TURN + "{% endfor %}", TWICE, "ignores add_generation_prompt"),
        (UNSTOPPED, TWICE, "ends an answer inside the conversation with no stop token"),
        (LAST_MARKED, TWICE, f"{PAIRS}: 1 pairs for 2 answers"),
        (TRIMMED_MARKS, TWICE, PAIRS),
    ],
)
def test_what_cannot_be_masked_is_refused_with_the_reason(templated, template, messages, message):
    with pytest.raises(BadRow) as error:
        Encoder(templated(template)).segments(Example(None, messages), every_turn=False)
    assert str(error.value).startswith(f"messages: the chat template {message}")


def test_a_prompt_that_loses_its_system_turn_is_refused_where_ppo_reads_it(templated):
    messages = turns("hi", system="You are kind.")
    with pytest.raises(BadRow, match=r"^prompt: the chat template leaves out .* \(message 0, system\)$"):
        Encoder(templated(NO_SYSTEM)).prompt(messages)
    for template in (NO_SYSTEM, SYSTEM_LATE):
        row = Example(turns("hi", "hello", "well", system="You are kind."), "there")
        with pytest.raises(BadRow, match=r"^completion: the chat template leaves out .* \(message \d, \w+\)$"):
            Encoder(templated(template)).encode_example(row)


def test_reasoning_that_a_template_would_drop_is_refused(templated):
    answer = {"role": "assistant", "content": "hello", "reasoning_content": "because"}
    with pytest.raises(BadRow, match=rf"{LOST} \(message 1, assistant\)$"):
        Encoder(templated(CHATML)).encode_example(Example(turns("hi"), [answer]))


def test_an_answer_with_a_stop_token_inside_is_refused(templated):
    encoder = Encoder(templated(CHATML))
    for stop in ("<|im_end|>", "<|endoftext|>"):
        with pytest.raises(BadRow) as error:
            encoder.encode_example(Example(turns("hi"), f"hello{stop} there"))
        expected = f"completion: an answer contains a stop token, which would end it: {stop} in message 1"
        assert str(error.value) == expected
    # In a question it is only odd: the mask is exact all the same.
    before, after = encoder.encode_example(Example(turns("hi<|im_end|>"), "hello"))
    assert before == encoder.prompt(turns("hi<|im_end|>"))
    assert encoder._tokenizer.decode(after) == "hello<|im_end|>"


def test_a_conversation_that_an_assistant_begins_is_refused(templated):
    with pytest.raises(BadRow, match=r"^messages: begins with an assistant turn, which answers nothing"):
        Encoder(templated(CHATML)).segments(Example(None, turns("hi", "hello")[1:]), every_turn=False)


def test_what_a_tool_says_may_be_written_in_a_form_of_the_template_s_own(templated):
    tool = "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    encoder = Encoder(templated(CHATML.replace("{{ m.content }}", tool)))
    messages = [*turns("hi", "hello", "well"), {"role": "tool", "content": 'a "b"\nc'}]
    before, _ = encoder.encode_example(Example(messages, "there"))
    assert '<|im_start|>tool\n"a \\"b\\"\\nc"<|im_end|>' in encoder._tokenizer.decode(before)


def test_an_answer_of_nothing_is_its_stop_token(way):
    tokenizer, _ = way
    before, after = Encoder(tokenizer).encode_example(Example(turns("hi"), ""))
    assert before == Encoder(tokenizer).prompt(turns("hi"))
    assert after == [Encoder(tokenizer)._turn_end]


def test_several_templates_without_a_default_are_an_error(templated):
    tokenizer = templated({"tool_use": CHATML, "rag": CHATML})
    with pytest.raises(DataError, match="chat template"):
        Encoder(tokenizer)
    default = templated({"default": CHATML, "tool_use": NO_SYSTEM})
    assert Encoder(default).prompt(turns("hi")) == Encoder(templated(CHATML)).prompt(turns("hi"))
