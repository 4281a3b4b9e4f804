"""The protocol of a tokenizer, as ``load_tokenizer`` returns it and as encoders, samplers and exports use it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer with an EOS token and another token to pad with. Every transformers tokenizer is one if it has both.

    A tokenizer of your own must offer what is declared here, with the meaning that transformers gives it:

    - text to ids and back: a call with a text returns ``{"input_ids": [...]}``, ``decode`` returns the text, and
      ``decode`` of the ids of a text gives the text back;
    - the vocabulary: ``get_vocab`` as ``{token: id}``, ``len()`` and ``convert_ids_to_tokens``;
    - special tokens by their ids; ``eos_token_id`` and ``pad_token_id`` must differ, the others may be None;
    - a chat template, or None for plain text: with one, ``apply_chat_template`` renders messages;
    - ``save_pretrained``, which writes all that defines it into a folder: the export has these files, and the cache of
      tokenised rows knows a tokenizer by them. ``name_or_path`` is the folder it was read from, else empty.

    It must accept new attributes, as an object without ``__slots__`` does.
    """

    def __len__(self) -> int: ...

    def __call__(self, text: str, /, *, add_special_tokens: bool = True) -> Mapping[str, Any]: ...

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool = False, **settings: Any) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_ids_to_tokens(self, ids: Any, /) -> Any:
        """The token of one id, or a list of tokens for a list of ids."""
        ...

    def apply_chat_template(self, conversation: Any, /, **settings: Any) -> Any: ...

    def get_chat_template(self, *, tools: list[Any] | None = None) -> str: ...

    def save_pretrained(self, save_directory: Any, /) -> Any: ...

    # transformers answers for these by __getattr__, which isinstance does not look at.
    if TYPE_CHECKING:
        pad_token: str | None
        chat_template: Any

        @property
        def eos_token_id(self) -> int: ...

        @property
        def pad_token_id(self) -> int: ...

        @property
        def bos_token_id(self) -> int | None: ...

        @property
        def unk_token_id(self) -> int | None: ...

        @property
        def unk_token(self) -> str | None: ...

        @property
        def all_special_ids(self) -> list[int]: ...

        @property
        def all_special_tokens(self) -> list[str]: ...

        @property
        def special_tokens_map(self) -> Mapping[str, Any]: ...

        @property
        def added_tokens_decoder(self) -> Mapping[int, Any]:
            """Tokens added to the vocabulary, by id; each has ``special`` and is a token by ``str``."""
            ...

        @property
        def name_or_path(self) -> str: ...

        @property
        def init_kwargs(self) -> Mapping[str, Any]:
            """The settings it was read with."""
            ...
