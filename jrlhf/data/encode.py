"""Text to token ids, such that the ids of a prompt are a prefix of the ids of prompt and answer.

PPO generates after the ids of a prompt; SFT and the reward model must have seen the very same ids there.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jrlhf.data.chat import UNSTOPPED, ChatTemplate, Turn
from jrlhf.data.errors import BadRow
from jrlhf.data.formats import Answered, last_assistant
from jrlhf.data.messages import Content, Message, Tools, is_learnt
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.tokenizer import end_of_turn
from jrlhf.data.vocabulary import check_ids

# A piece of text is tokenised behind one of these where the tokenizer treats the start of a text in its own way.
ANCHORS = ("\n", "a", ".")
TAIL = 32
"""Characters before a piece of text that decide how it is tokenised: no shorter than any token but runs of spaces."""


class Segment(NamedTuple):
    """Consecutive ids of a row, and whether they are an answer."""

    ids: list[int]
    answer: bool
    barred: bool = False
    """Never learnt, whatever is trained on: a turn of weight 0."""


class Encoder:
    """A tokenizer and the rules by which rows become ids; the same for all stages."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._eos = int(tokenizer.eos_token_id)
        # The tokenizer decides: SmolLM2 has a BOS token but puts none before a text.
        probe = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        self.bos: list[int] = [int(bos)] if bos is not None and probe[:1] == [bos] else []
        self._turn_end = end_of_turn(tokenizer)
        self._chat = ChatTemplate(tokenizer)
        # The answers to a prompt come one after the other, each with its prompt.
        self._ids = lru_cache(maxsize=64)(self._tokenized)

    @property
    def chat(self) -> bool:
        """Whether there is a chat template."""
        return self._chat.exists

    def prompt(self, prompt: Content, tools: Tools | None = None) -> list[int]:
        """The ids that an answer follows: BOS and text, or the chat template up to the assistant's turn."""
        return self._opened(prompt, tools)[1]

    def continued(
        self, prompt: Content, answer: str, *, stopped: bool, tools: Tools | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of an answer as if it had been sampled in these tokens: a text of somebody else's model.

        It ends with a stop token only where it ``stopped``, or at the first one that its text spells out. No template
        sees it, as none sees what is sampled.
        """
        text, before = self._opened(prompt, tools)
        if stopped and isinstance(prompt, list) and self._turn_end is not None:
            # In one piece with its stop token, as a conversation is: that may take the white space before it.
            ids = self._continuation(text, answer + self._tokenizer.convert_ids_to_tokens(self._turn_end))
        else:
            ids = [*self._continuation(text, answer), *([self._eos] if stopped else [])]
        stops = (i for i, token in enumerate(ids) if token in (self._eos, self._turn_end))
        return before, ids[: next(stops, len(ids)) + 1]

    def fitted(self, before: list[int], after: list[int], max_length: int) -> Int[np.ndarray, "T"]:
        """Cut the prompt at its start, after the BOS; only an answer that is too long by itself is cut at its end."""
        over = len(before) + len(after) - max_length
        if over > 0:
            bos = self.bos if before[: len(self.bos)] == self.bos else []
            rest = before[len(bos) :]
            before = bos + rest[min(over, len(rest)) :]
        return np.asarray((before + after)[:max_length], np.int32)

    def answered(self, row: Answered) -> tuple[list[int], list[int]]:
        """Ids of the prompt (BOS alone where there is none) and of the answer, which ends with its stop token."""
        if row.prompt is None and isinstance(row.completion, list):
            last = last_assistant(row.completion)
            row = row._replace(prompt=row.completion[:last], completion=row.completion[last:])
        before, *after = self.segments(row, every_turn=False)
        return before.ids, [token for segment in after for token in segment.ids]

    def segments(self, row: Answered, *, every_turn: bool) -> list[Segment]:
        """The row's ids cut into what is an answer and what is not, a prompt (maybe of no ids) first.

        ``every_turn``: the assistant's turns in a prompt of messages are answers too.
        """
        prompt, completion, tools = row
        if prompt is None and isinstance(completion, list):
            return self._conversation(completion, "messages", tools, first=0)
        if isinstance(prompt, list):
            turns = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
            return self._conversation(prompt + turns, "completion", tools, first=0 if every_turn else len(prompt))
        if isinstance(completion, list):
            raise BadRow("completion", "messages, but the prompt is a string; both must be of one kind")
        if prompt is None:
            whole = self._begun(completion, "text")
            before, answer = whole[: len(self.bos)], whole[len(self.bos) :]
        else:
            before, answer = self._begun(prompt, "prompt"), self._continuation(prompt, completion)
        if completion.strip() and not answer:
            raise BadRow("completion", "the tokenizer makes no tokens of it")
        closed = answer if answer[-1:] == [self._eos] else [*answer, self._eos]
        return [Segment(before, answer=False), Segment(closed, answer=True)]

    def _conversation(self, messages: list[Message], column: str, tools: Tools | None, *, first: int) -> list[Segment]:
        """Cut before and after every assistant turn from message ``first`` on; it ends with the last of them.

        A turn reaches from where the template asks for it to its stop token. What the template puts after that
        belongs to no answer: the sampler has stopped by then. It is tokenised together with what follows, as special
        tokens may take the white space before them.
        """
        text, turns = self._chat.turns(messages, column, first=first, tools=tools)
        answers = [message for message in messages[first:] if message["role"] == "assistant"]
        done, segments = 0, list[Segment]()
        for turn, message in zip(turns, answers, strict=True):
            segments.append(Segment(self._piece(text, done, turn.asked), answer=False))
            if turn.start > turn.asked:
                segments.append(Segment(self._piece(text, turn.asked, turn.start), answer=False))
            answer, done = self._turn(text, turn, column, last=turn is turns[-1])
            segments.append(Segment(answer, answer=True, barred=not is_learnt(message)))
        return segments

    def _turn(self, text: str, turn: Turn, column: str, *, last: bool) -> tuple[list[int], int]:
        """A turn's ids up to and with its stop token, and where in the text that ends. A last one may get an EOS."""
        ids = self._piece(text, turn.start, turn.end)
        for stop in (self._turn_end, self._eos):
            if stop is not None and stop in ids:
                word = self._tokenizer.convert_ids_to_tokens(stop)
                if (at := text.rfind(word, turn.start, turn.end)) >= 0:
                    return ids[: len(ids) - ids[::-1].index(stop)], at + len(word)
        if not last:
            raise BadRow(column, UNSTOPPED)
        return [*ids, self._eos], turn.end

    def _piece(self, text: str, start: int, end: int) -> list[int]:
        return self._continuation(text[:start][-TAIL:], text[start:end]) if start else self._ids(text[:end])

    def _opened(self, prompt: Content, tools: Tools | None) -> tuple[str, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._begun(prompt, "prompt")
        text = self._chat.prompt(prompt, "prompt", tools)
        return text, self._ids(text)

    def _tokenized(self, text: str) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        check_ids(self._tokenizer, ids)
        return ids

    def _begun(self, text: str, column: str) -> list[int]:
        """The ids of a sequence that begins with ``text``: one BOS in front, be it in the text or not."""
        ids = self._ids(text)
        if not ids:
            raise BadRow(column, "the tokenizer makes no tokens of it")
        return ids if self.bos and ids[:1] == self.bos else self.bos + ids

    def _continuation(self, before: str, text: str) -> list[int]:
        """Ids of ``text`` as it stands after ``before``, whose own ids stay what they are.

        Where the two merge into one token, or the start of a text is special (a dummy space), ``text`` is tokenised
        behind an anchor that it does not merge with.
        """
        if not text:
            return []
        for anchor in (before[-TAIL:], *ANCHORS):
            head, whole = self._ids(anchor), self._ids(anchor + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._ids(text)
