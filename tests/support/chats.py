"""Texts and conversations to be tokenised."""

from typing import Any

from hypothesis import strategies as st

WORDS = [
    "Hello",
    "hello world",
    " there",
    "\n",
    "\n\n",
    " ",
    "  ",
    ".",
    "!?",
    "'t",
    "42",
    "é",
    "漢字",
    "😀",
    "\t",
    "Ā",
    "a",
]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join).filter(str.strip)


def turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """The user begins; then they take turns."""
    spoken = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + spoken


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
