"""Ids of prompts and answers: prefixes, stop tokens and masks, against templates rendered and searched by hand."""

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from jrlhf.data import BadRow
from jrlhf.data.encode import Encoder
from jrlhf.data.formats import Example
from tests.support.chat_templates import SPECIALS as SPECIAL_TOKENS
from tests.support.chat_templates import WAYS, made
from tests.support.chats import TEXTS, turns


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(TEXTS, TEXTS)
def test_a_prompt_is_a_prefix_and_the_text_comes_back(tokenizer, prompt, completion):
    encoder = Encoder(tokenizer)
    before, after = encoder.encode_example(Example(prompt, completion))
    assert before == encoder.prompt(prompt)
    assert after[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in before + after[:-1]
    text = tokenizer.decode(before + after, skip_special_tokens=True)
    assert text == tokenizer.decode(before, skip_special_tokens=True) + completion
    # At the start of a text Llama's kind cannot tell its dummy space from a space.
    assert text.lstrip(" ") == (prompt + completion).lstrip(" ")


@given(TEXTS)
def test_a_text_is_tokenised_as_the_tokenizer_does(tokenizer, text):
    before, after = Encoder(tokenizer).encode_example(Example(None, text))
    assert before + after == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("prompt", "completion"), [("Hello", " world"), ("What is", " the answer?"), ("Human:", " hi\n")]
)
def test_where_a_token_ends_both_are_tokenised_as_one(tokenizer, prompt, completion):
    before, after = Encoder(tokenizer).encode_example(Example(prompt, completion))
    assert before + after[:-1] == tokenizer(prompt + completion)["input_ids"]


def test_a_token_across_the_border_is_not_made(chat):
    # "Hello" is one token; its two halves are not.
    assert len(ids(chat, " hello")) < len(ids(chat, " he")) + len(ids(chat, "llo"))
    before, after = Encoder(chat).encode_example(Example(" he", "llo"))
    assert (before, after) == (ids(chat, " he"), [*ids(chat, "llo"), chat.eos_token_id])


def test_bos_is_put_where_the_tokenizer_puts_it(chat, metaspace):
    assert Encoder(chat).bos == []
    bos = metaspace.bos_token_id
    assert Encoder(metaspace).bos == [bos]
    assert Encoder(metaspace).prompt("Hello") == [bos, *ids(metaspace, "Hello")]
    # Already in the text: not twice. So with an EOS.
    before, after = Encoder(metaspace).encode_example(Example("<s>Hello", " there</s>"))
    assert before.count(bos) == 1
    assert after.count(metaspace.eos_token_id) == 1


def chatml(tokenizer: Any, messages: list[dict[str, Any]], learnt: set[int]) -> tuple[list[int], list[bool]]:
    """By hand: each piece of the template on its own, and which of them are learnt."""
    tokens, mask = [], []
    for i, message in enumerate(messages):
        pieces = (f"<|im_start|>{message['role']}\n", message["content"] + "<|im_end|>", "\n")
        for piece, inside in zip(pieces, (False, i in learnt, False), strict=True):
            tokens += ids(tokenizer, piece)
            mask += [inside] * len(ids(tokenizer, piece))
    # Nothing after the last stop token.
    return tokens[:-1], mask[:-1]


def flat(segments: list[Any]) -> tuple[list[int], list[bool]]:
    return [t for s in segments for t in s.ids], [s.answer for s in segments for _ in s.ids]


CONVERSATION = turns("hi", "hello world", "what is the answer?", "The answer is 42!", "Well?", "hi", system="there")


@pytest.mark.parametrize("count", [3, 5, 7])
def test_every_assistant_turn_is_learnt_and_nothing_else(chat, count):
    messages = CONVERSATION[:count]
    whole = Encoder(chat).segments(Example(None, messages), every_turn=False)
    assert flat(whole) == chatml(chat, messages, learnt=set(range(2, count, 2)))
    # The very tokens of the whole template, up to the last stop token.
    assert flat(whole)[0] == ids(chat, chat.apply_chat_template(messages, tokenize=False).rstrip("\n"))


@pytest.mark.parametrize("every_turn", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_of_a_prompt_of_messages_the_turns_are_learnt_if_asked(chat, every_turn, as_text):
    messages = CONVERSATION[:5]
    prompt, completion = messages[:4], messages[4]["content"] if as_text else messages[4:]
    segments = Encoder(chat).segments(Example(prompt, completion), every_turn=every_turn)
    assert flat(segments) == chatml(chat, messages, learnt={2, 4} if every_turn else {4})


def test_user_turns_in_a_completion_are_not_learnt(chat):
    row = Example(CONVERSATION[:2], CONVERSATION[2:])
    segments = Encoder(chat).segments(row, every_turn=False)
    assert flat(segments) == chatml(chat, CONVERSATION, learnt={2, 4, 6})


def test_what_follows_the_last_assistant_turn_is_left_out(chat):
    encoder = Encoder(chat)
    longer = encoder.segments(Example(None, CONVERSATION[:6]), every_turn=False)
    assert longer == encoder.segments(Example(None, CONVERSATION[:5]), every_turn=False)


@given(st.lists(TEXTS, min_size=1, max_size=3).map(lambda texts: turns(*texts, *texts)), TEXTS)
def test_a_prompt_of_messages_is_a_prefix_of_every_form(chat, messages, answer):
    encoder = Encoder(chat)
    prompt, said = messages[:-1], {"role": "assistant", "content": answer}
    before = encoder.prompt(prompt)
    assert before == ids(chat, chat.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    expected = before, [*ids(chat, answer), chat.convert_tokens_to_ids("<|im_end|>")]
    for row in (Example(prompt, [said]), Example(prompt, answer), Example(None, [*prompt, said])):
        assert encoder.encode_example(row) == expected
        for every_turn in (False, True):
            assert flat(encoder.segments(row, every_turn=every_turn))[0] == expected[0] + expected[1]


PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_without_a_stop_token_gets_the_eos(make_tokenizer):
    tokenizer = make_tokenizer(["<eos>", "<pad>"], PLAIN, eos_token="<eos>", pad_token="<pad>")
    before, after = Encoder(tokenizer).encode_example(Example(turns("hi"), " hello"))
    assert tokenizer.decode(before) == "user: hi\nassistant:"
    assert tokenizer.decode(after) == "  hello\n<eos>"


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREETS = "{% if add_generation_prompt %}Go on. {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}x{% endfor %}"
)
SPECIALS = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]


def test_a_template_that_rewrites_history_is_an_error_with_the_reason(make_tokenizer):
    encoder = Encoder(make_tokenizer(SPECIALS, THINKS, eos_token="<eos>", pad_token="<pad>"))
    messages = turns("hi", "hello", "well", "there")
    with pytest.raises(BadRow, match=r"^messages: the chat template changes earlier turns.*\(message 3\)$"):
        encoder.segments(Example(None, messages), every_turn=False)
    with pytest.raises(BadRow, match=r"^completion: the chat template changes earlier turns"):
        encoder.segments(Example(messages[:3], messages[3:]), every_turn=True)
    # Only the last answer is learnt: the history is the same with and without it.
    before, after = encoder.encode_example(Example(None, messages))
    assert before == encoder.prompt(messages[:3])
    assert after == encoder._ids("<think>there<|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (GREETS, "completion: the chat template begins an answer unlike its generation prompt"),
        (REFUSES, "completion: the chat template refuses it: no system turn"),
        (None, "completion: chat messages, but the tokenizer has no chat template"),
    ],
)
def test_templates_that_cannot_be_used(make_tokenizer, template, message):
    encoder = Encoder(make_tokenizer(SPECIALS, template, eos_token="<eos>", pad_token="<pad>"))
    with pytest.raises(BadRow) as error:
        encoder.encode_example(Example(turns("hi", system="there"), "hello"))
    assert str(error.value).startswith(message)


def test_kinds_are_not_mixed(chat):
    with pytest.raises(
        BadRow, match=r"^completion: messages, but the prompt is a string; both must be strings or both"
    ):
        Encoder(chat).encode_example(Example("hi", [{"role": "assistant", "content": "hello"}]))
    with pytest.raises(BadRow, match=r"^messages: no assistant turn, so nothing to learn from$"):
        Encoder(chat).segments(Example(None, turns("hi")), every_turn=False)


def test_an_empty_answer_is_its_stop_token_alone(metaspace):
    before, after = Encoder(metaspace).encode_example(Example("Hello", ""))
    assert before == Encoder(metaspace).prompt("Hello")
    assert after == [metaspace.eos_token_id]


@given(TEXTS, TEXTS)
def test_an_answer_of_another_model_has_the_ids_that_were_learnt(tokenizer, prompt, completion):
    encoder = Encoder(tokenizer)
    learnt = encoder.encode_example(Example(prompt, completion))
    assert encoder.encode_sample(prompt, completion, stopped=True) == learnt
    before, after = encoder.encode_sample(prompt, completion, stopped=False)
    assert (before, [*after, tokenizer.eos_token_id]) == learnt


@given(TEXTS)
def test_so_it_has_in_a_chat(chat, completion):
    encoder, prompt = Encoder(chat), turns("hi", "Well", "hello")
    before, after = encoder.encode_sample(prompt, completion, stopped=True)
    assert (before, after) == encoder.encode_example(Example(prompt, completion))
    assert chat.decode(before).endswith("<|im_start|>assistant\n")
    assert encoder.encode_sample(prompt, completion, stopped=False) == (before, after[:-1])
    # The text of another model's answer may spell a stop token out: it would have ended there.
    assert encoder.encode_sample(prompt, completion + "<|im_end|> more", stopped=False) == (before, after)
    assert encoder.encode_sample(prompt, "", stopped=True) == (before, after[-1:])


def stripping(make_tokenizer: Any, name: str, *, left: bool, right: bool) -> Any:
    """The tokenizer of a known template, whose special tokens take the white space beside them."""
    template, kind, _ = WAYS[name]
    tokenizer = made(make_tokenizer, template, kind)
    special = [AddedToken(t, lstrip=left, rstrip=right, normalized=False, special=True) for t in SPECIAL_TOKENS[kind]]
    tokenizer.add_tokens(special, special_tokens=True)
    kinds = {(token.lstrip, token.rstrip) for token in tokenizer.added_tokens_decoder.values()}
    assert kinds == {(left, right)}
    return tokenizer


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("left", "right"), [(True, False), (False, True), (True, True)])
def test_tokens_that_take_white_space_take_what_a_server_s_take(make_tokenizer, name, left, right):
    """The pieces of a conversation are together the ids of its whole text, as a server tokenises it."""
    tokenizer = stripping(make_tokenizer, name, left=left, right=right)
    encoder = Encoder(tokenizer)
    for messages in (
        turns("hi", "hello world", "what?", "The answer"),
        turns("hi ", "well\n", " so?", "\n42 ", "a", "b"),
    ):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        whole = ids(tokenizer, text.replace(datetime.now().strftime("%d %b %Y"), "26 Jul 2024"))
        tokens, mask = flat(encoder.segments(Example(None, messages), every_turn=False))
        assert tokens == whole[: len(tokens)]
        assert (
            sum(here and not after for here, after in zip(mask, [*mask[1:], False], strict=True)) == len(messages) // 2
        )
        assert tokenizer.decode(whole[len(tokens) :]).strip() == ""
        asked, answer = messages[:-1], messages[-1]["content"]
        before, after = encoder.encode_example(Example(asked, answer))
        assert before + after == tokens
        assert before == encoder.prompt(asked)
        # In pieces or in one: the answer of another model, which no template trims.
        assert encoder.encode_sample(asked, answer.strip(), stopped=True) == (before, after)


def test_what_is_too_long_loses_the_start_of_its_prompt(chat, metaspace):
    assert Encoder(chat).truncate([5, 6, 7], [8, 9], 4).tolist() == [6, 7, 8, 9]
    assert Encoder(chat).truncate([5, 6], [7, 8, 9], 2).tolist() == [7, 8]
    bos = metaspace.bos_token_id
    assert Encoder(metaspace).truncate([bos, 6, 7], [8, 9], 4).tolist() == [bos, 7, 8, 9]
