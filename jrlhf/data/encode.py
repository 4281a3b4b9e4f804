"""Text to token ids, such that the ids of a prompt are a prefix of the ids of prompt and answer.

PPO generates after the ids of a prompt; SFT and the reward model must have seen the very same ids there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jrlhf.data.errors import BadRow
from jrlhf.data.formats import Answered, Content, Message
from jrlhf.data.tokenizer import Tokenizer, end_of_turn

# A piece of text is tokenised behind one of these where the tokenizer treats the start of a text in its own way.
ANCHORS = ("\n", "a", ".")


class Segment(NamedTuple):
    """Consecutive ids of a row, and whether they are an answer."""

    ids: list[int]
    answer: bool


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

    def prompt(self, prompt: Content) -> list[int]:
        """The ids that an answer follows: BOS and text, or the chat template up to the assistant's turn."""
        if isinstance(prompt, str):
            return self.bos + self._ids(prompt)
        return self._ids(self._render(prompt, opens=True, column="prompt"))

    def answered(self, row: Answered) -> tuple[list[int], list[int]]:
        """Ids of the prompt (BOS alone where there is none) and of the answer, which ends with its stop token."""
        prompt, completion = row
        if prompt is None and isinstance(completion, str):
            return self.bos, [*self._ids(completion), self._eos]
        if prompt is None:
            segments = self.conversation(self._messages(completion))
            answer = segments.pop().ids
            return [token for segment in segments for token in segment.ids], answer
        if isinstance(prompt, str) and isinstance(completion, str):
            return self.bos + self._ids(prompt), [*self._continuation(prompt, completion), self._eos]
        turns = self._messages(prompt, role="user")
        opening = self._render(turns, opens=True, column="prompt")
        whole = self._render(turns + self._messages(completion, role="assistant"), opens=False, column="completion")
        if not whole.startswith(opening):
            raise BadRow("prompt", "the chat template changes the prompt once the answer is there; it cannot be masked")
        return self._ids(opening), self._closed(self._continuation(opening, whole[len(opening) :]))

    def conversation(self, messages: list[Message]) -> list[Segment]:
        """A whole conversation cut before and after every assistant turn; it ends with the last of them.

        A turn reaches from where the template asks for it to the end of what it adds for it: its stop token included.
        """
        ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not ends:
            raise BadRow("messages", "no assistant turn, so nothing to learn from")
        done, segments = "", list[Segment]()
        for i in ends:
            opening = self._render(messages[:i], opens=True, column="messages")
            closing = self._render(messages[: i + 1], opens=False, column="messages")
            if not (opening.startswith(done) and closing.startswith(opening)):
                raise BadRow(
                    f"messages[{i}]",
                    "the chat template changes earlier turns when later ones come; it cannot be masked",
                )
            between = self._continuation(done, opening[len(done) :]) if done else self._ids(opening)
            answer = self._continuation(opening, closing[len(opening) :])
            last = i == ends[-1]
            segments.append(Segment(between, answer=False))
            segments.append(Segment(self._closed(answer) if last else answer, answer=True))
            done = closing
        return segments

    def _closed(self, ids: list[int]) -> list[int]:
        """Up to and with the stop token, as the sampler would have ended; EOS is added where there is none."""
        for stop in (self._turn_end, self._eos):
            if stop is not None and stop in ids:
                return ids[: len(ids) - ids[::-1].index(stop)]
        return [*ids, self._eos]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _continuation(self, before: str, text: str) -> list[int]:
        """Ids of ``text`` as it stands after ``before``, whose own ids stay what they are.

        Where the two merge into one token, or the start of a text is special (a dummy space), ``text`` is tokenised
        behind an anchor that it does not merge with.
        """
        if not text:
            return []
        head, whole = self._ids(before), self._ids(before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
        for anchor in ANCHORS:
            head, whole = self._ids(anchor), self._ids(anchor + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._ids(text)

    def _messages(self, content: Content, role: str = "assistant") -> list[Message]:
        return [{"role": role, "content": content}] if isinstance(content, str) else content

    def _render(self, messages: Sequence[Message], *, opens: bool, column: str) -> str:
        if not self._tokenizer.chat_template:
            raise BadRow(column, "chat messages, but the tokenizer has no chat template")
        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=opens
            )
        except Exception as error:  # whatever the template raises: it is somebody's program
            raise BadRow(column, f"the chat template refuses it: {error}") from error
        return rendered
