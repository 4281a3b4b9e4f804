"""Markdown as harmless HTML: no raw HTML, no pictures, no working links."""

from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from jrlhf.rank.tasks import Content, turn_text


@cache
def _parser() -> MarkdownIt:
    """Build a parser of CommonMark and tables. It shows raw HTML as text."""
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


def to_html(text: str) -> str:
    """Return HTML that the page inserts unchanged."""
    parser = _parser()
    tokens = parser.parse(text)
    for token in tokens:
        _disarm(token)
    return str(parser.renderer.render(tokens, parser.options, {}))


def _disarm(token: Token) -> None:
    """Turn links into text with the address as a title, and drop inline styles, which the page's policy forbids."""
    token.attrs.pop("style", None)
    if token.type == "link_open":
        token.tag, token.attrs = "span", {"class": "link", "title": token.attrs.get("href", "")}
    elif token.type == "link_close":
        token.tag = "span"
    for child in token.children or []:
        _disarm(child)


def render_turns(content: Content | None) -> list[dict[str, Any]]:
    """Return the turns of a chat as text and as HTML; a plain text is one turn without a role."""
    if content is None:
        return []
    turns = [{"role": "", "content": content}] if isinstance(content, str) else content
    texts = [(turn["role"], turn_text(turn)) for turn in turns]
    return [{"role": role, "text": text, "html": to_html(text)} for role, text in texts]
