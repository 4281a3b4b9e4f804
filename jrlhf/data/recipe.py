"""Tokenisation for reward models that other tools trained, identical to transformers' own."""

from jrlhf.data.encode import Encoder
from jrlhf.data.errors import BadRow
from jrlhf.data.formats import Example
from jrlhf.data.messages import Content, Tools
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.vocabulary import check_ids
from jrlhf.models.reading import Reading


class RecipeEncoder(Encoder):
    """Encodes a chat as ``tokenizer.apply_chat_template(messages)`` and plain text as ``tokenizer(text)``.

    A chat includes whatever the template writes after the answer. Plain text is prompt and completion in one string,
    without an EOS.
    """

    def encode_example(self, row: Example) -> tuple[list[int], list[int]]:
        """Return the ids of prompt and answer as one list, which is cut at its start if too long, and an empty list."""
        return self._conversation_ids(row.prompt, row.completion, row.tools), []

    def encode_sample(
        self, prompt: Content, answer: str, *, stopped: bool, tools: Tools | None = None
    ) -> tuple[list[int], list[int]]:
        """Encode a sampled answer in the same way; the template ends its turn whether or not it has ``stopped``."""
        return self._conversation_ids(prompt, answer, tools), []

    def _conversation_ids(self, prompt: Content | None, completion: Content, tools: Tools | None) -> list[int]:
        if isinstance(prompt, str) and isinstance(completion, list):
            raise BadRow("completion", "messages, but the prompt is a string; both must be strings or both messages")
        if isinstance(prompt, list):
            turns = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
            ids = self._ids(self._chat.conversation(prompt + turns, "completion", tools))
        elif isinstance(completion, list):
            ids = self._ids(self._chat.conversation(completion, "messages", tools))
        else:
            ids = self._tokenizer((prompt or "") + completion)["input_ids"]
            check_ids(self._tokenizer, ids)
        if not ids:
            raise BadRow("completion", "the tokenizer makes no tokens of it")
        return ids


def encoder_for(tokenizer: Tokenizer, reading: Reading) -> Encoder:
    """Return the encoder of texts for a reward model with this ``reading``."""
    return Encoder(tokenizer) if reading.score_at == "stop_token" else RecipeEncoder(tokenizer)
