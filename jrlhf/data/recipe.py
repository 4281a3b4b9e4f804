"""Texts for reward models that jrlhf did not train, in the tokens that transformers' users give them."""

from jrlhf.data.encode import Encoder
from jrlhf.data.errors import BadRow
from jrlhf.data.formats import Answered
from jrlhf.data.messages import Content, Tools
from jrlhf.data.protocol import Tokenizer
from jrlhf.data.vocabulary import check_ids
from jrlhf.models.reading import Reading


class RecipeEncoder(Encoder):
    """The chat template over a whole chat, and plain text as the tokenizer takes it: nothing is added or left out.

    Of a chat these are the ids of ``tokenizer.apply_chat_template(messages)``, so what the template writes behind an
    answer stands there too; of plain text those of ``tokenizer(prompt + completion)``, without an EOS.
    """

    def answered(self, row: Answered) -> tuple[list[int], list[int]]:
        """Ids of prompt and answer in one, so that what is too long is cut at its start; and none besides."""
        return self._whole(row.prompt, row.completion, row.tools), []

    def continued(
        self, prompt: Content, answer: str, *, stopped: bool, tools: Tools | None = None
    ) -> tuple[list[int], list[int]]:
        """The same of an answer that was sampled; the template closes its turn, whether it has ``stopped`` or not."""
        return self._whole(prompt, answer, tools), []

    def _whole(self, prompt: Content | None, completion: Content, tools: Tools | None) -> list[int]:
        if isinstance(prompt, str) and isinstance(completion, list):
            raise BadRow("completion", "messages, but the prompt is a string; both must be of one kind")
        if isinstance(prompt, list):
            turns = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
            ids = self._ids(self._chat.whole(prompt + turns, "completion", tools))
        elif isinstance(completion, list):
            ids = self._ids(self._chat.whole(completion, "messages", tools))
        else:
            ids = self._tokenizer((prompt or "") + completion)["input_ids"]
            check_ids(self._tokenizer, ids)
        if not ids:
            raise BadRow("completion", "the tokenizer makes no tokens of it")
        return ids


def encoder_for(tokenizer: Tokenizer, reading: Reading) -> Encoder:
    """How texts become the ids that a reward model of such a ``reading`` is given."""
    return Encoder(tokenizer) if reading.score_at == "stop_token" else RecipeEncoder(tokenizer)
