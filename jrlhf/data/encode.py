"""Tokenisation of rows in which the ids of a prompt are always a prefix of the ids of prompt and answer.

PPO generates after the ids of a prompt, so SFT and the reward model must have seen exactly these ids there.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jrlhf.data.chat import NO_STOP_TOKEN, ChatTemplate, Turn
from jrlhf.data.errors import BadRow
from jrlhf.data.formats import Example
from jrlhf.data.messages import Content, Message, Tools, is_learnt, last_assistant
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.tokenizer import end_of_turn
from jrlhf.data.vocabulary import check_ids

ANCHORS = ("\n", "a", ".")
"""Texts to put before a piece of text where the tokenizer treats the start of a text specially."""
CONTEXT_CHARACTERS = 32
"""Number of preceding characters that can affect how a text is tokenised; only runs of spaces are longer tokens."""


class Segment(NamedTuple):
    """Consecutive ids of a row, which are an answer or not."""

    ids: list[int]
    answer: bool
    zero_weight: bool = False
    """True for a turn of weight 0, which is never learnt."""


class Encoder:
    """Turns rows into token ids in the same way for all stages."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._eos = int(tokenizer.eos_token_id)
        # A BOS token need not be in use: SmolLM2 has one but puts none before a text.
        probe = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        self.bos: list[int] = [int(bos)] if bos is not None and probe[:1] == [bos] else []
        self._turn_end = end_of_turn(tokenizer)
        self._chat = ChatTemplate(tokenizer)
        # The answers to a prompt come one after the other, so its ids are cached.
        self._ids = lru_cache(maxsize=64)(self._tokenize)

    @property
    def chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._chat.exists

    def prompt(self, prompt: Content, tools: Tools | None = None) -> list[int]:
        """Return the ids that an answer follows: BOS and text, or the chat template up to the assistant's turn."""
        return self._prompt_ids(prompt, tools)[1]

    def encode_sample(
        self, prompt: Content, answer: str, *, stopped: bool, tools: Tools | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and of an answer that another model sampled, as if this tokenizer had sampled it.

        The answer ends with a stop token if it ``stopped``, or at the first stop token that its text spells out. The
        chat template does not render the answer, just as it does not render a sampled one.
        """
        text, before = self._prompt_ids(prompt, tools)
        if stopped and isinstance(prompt, list) and self._turn_end is not None:
            # Tokenised together with its stop token, as in a conversation: it may absorb the white space before it.
            ids = self._continuation(text, answer + self._tokenizer.convert_ids_to_tokens(self._turn_end))
        else:
            ids = [*self._continuation(text, answer), *([self._eos] if stopped else [])]
        stops = (i for i, token in enumerate(ids) if token in (self._eos, self._turn_end))
        return before, ids[: next(stops, len(ids)) + 1]

    def truncate(self, before: list[int], after: list[int], max_length: int) -> Int[np.ndarray, "T"]:
        """Cut the prompt at its start, after the BOS; an answer that is too long by itself is cut at its end."""
        return np.asarray((self.cut_prompt(before, len(after), max_length) + after)[:max_length], np.int32)

    def cut_prompt(self, before: list[int], answer: int, max_length: int) -> list[int]:
        """Cut the prompt at its start, after the BOS, to leave room for ``answer`` tokens in ``max_length``."""
        over = len(before) + answer - max_length
        if over <= 0:
            return before
        bos = self.bos if before[: len(self.bos)] == self.bos else []
        rest = before[len(bos) :]
        return bos + rest[min(over, len(rest)) :]

    def encode_example(self, row: Example) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt (BOS alone if there is none) and of the answer with its stop token."""
        before, *after = self.example_segments(row)
        return before.ids, [token for segment in after for token in segment.ids]

    def example_segments(self, row: Example) -> list[Segment]:
        """Return the ids of a row as its prompt, which may be BOS alone, and the segments of its answer.

        Not all of these are the answer's own words: an answer of several messages has tool results between its turns.
        """
        if row.prompt is None and isinstance(row.completion, list):
            last = last_assistant(row.completion)
            row = row._replace(prompt=row.completion[:last], completion=row.completion[last:])
        return self.segments(row, every_turn=False)

    def segments(self, row: Example, *, every_turn: bool) -> list[Segment]:
        """Return the row's ids as alternating context and answers; the first segment is a prompt, which may be empty.

        With ``every_turn`` the assistant's turns in a prompt of messages are answers too.
        """
        prompt, completion, tools = row
        if prompt is None and isinstance(completion, list):
            return self._conversation(completion, "messages", tools, first=0)
        if isinstance(prompt, list):
            turns = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
            return self._conversation(prompt + turns, "completion", tools, first=0 if every_turn else len(prompt))
        if isinstance(completion, list):
            raise BadRow("completion", "messages, but the prompt is a string; both must be strings or both messages")
        if prompt is None:
            ids = self._sequence_start(completion, "text")
            before, answer = ids[: len(self.bos)], ids[len(self.bos) :]
        else:
            before, answer = self._sequence_start(prompt, "prompt"), self._continuation(prompt, completion)
        if completion.strip() and not answer:
            raise BadRow("completion", "the tokenizer makes no tokens of it")
        answer_ids = answer if answer[-1:] == [self._eos] else [*answer, self._eos]
        return [Segment(before, answer=False), Segment(answer_ids, answer=True)]

    def _conversation(self, messages: list[Message], column: str, tools: Tools | None, *, first: int) -> list[Segment]:
        """Split the conversation at every assistant turn from message ``first`` on; the last turn ends it.

        A turn begins after its generation prompt and ends with its stop token. Text that the template writes after the
        stop token belongs to no answer, since a sampler has stopped by then. That text is tokenised together with what
        follows, because special tokens may absorb the white space before them.
        """
        text, turns = self._chat.turns(messages, column, first=first, tools=tools)
        answers = [message for message in messages[first:] if message["role"] == "assistant"]
        position, segments = 0, list[Segment]()
        for turn, message in zip(turns, answers, strict=True):
            segments.append(Segment(self._piece(text, position, turn.prompt_end), answer=False))
            if turn.start > turn.prompt_end:
                segments.append(Segment(self._piece(text, turn.prompt_end, turn.start), answer=False))
            answer, position = self._turn(text, turn, column, last=turn is turns[-1])
            segments.append(Segment(answer, answer=True, zero_weight=not is_learnt(message)))
        return segments

    def _turn(self, text: str, turn: Turn, column: str, *, last: bool) -> tuple[list[int], int]:
        """Return a turn's ids with its stop token and where the turn ends in the text.

        A last turn without a stop token gets an EOS; an earlier one is a ``BadRow``.
        """
        ids = self._piece(text, turn.start, turn.end)
        for stop in (self._turn_end, self._eos):
            if stop is not None and stop in ids:
                word = self._tokenizer.convert_ids_to_tokens(stop)
                if (word_start := text.rfind(word, turn.start, turn.end)) >= 0:
                    return ids[: len(ids) - ids[::-1].index(stop)], word_start + len(word)
        if not last:
            raise BadRow(column, NO_STOP_TOKEN)
        return [*ids, self._eos], turn.end

    def _piece(self, text: str, start: int, end: int) -> list[int]:
        before = text[:start][-CONTEXT_CHARACTERS:]
        return self._continuation(before, text[start:end]) if start else self._ids(text[:end])

    def _prompt_ids(self, prompt: Content, tools: Tools | None) -> tuple[str, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._sequence_start(prompt, "prompt")
        text = self._chat.prompt(prompt, "prompt", tools)
        return text, self._ids(text)

    def _tokenize(self, text: str) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        check_ids(self._tokenizer, ids)
        return ids

    def _sequence_start(self, text: str, column: str) -> list[int]:
        """Return the ids of a sequence that begins with ``text``, with exactly one BOS in front."""
        ids = self._ids(text)
        if not ids:
            raise BadRow(column, "the tokenizer makes no tokens of it")
        return ids if self.bos and ids[:1] == self.bos else self.bos + ids

    def _continuation(self, before: str, text: str) -> list[int]:
        """Return the ids of ``text`` after ``before`` without changing the ids of ``before``.

        Where the two would merge into one token, or the tokenizer adds a dummy space at the start of a text, ``text``
        is tokenised after an anchor that it does not merge with.
        """
        if not text:
            return []
        for anchor in (before[-CONTEXT_CHARACTERS:], *ANCHORS):
            head, ids = self._ids(anchor), self._ids(anchor + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self._ids(text)
