"""Markdown as HTML that can do nothing: no raw HTML, no picture, no link that leads anywhere."""

from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from jrlhf.rank.tasks import Content, turn_text


@cache
def _parser() -> MarkdownIt:
    """CommonMark and tables. Raw HTML is shown as the text it is."""
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


def to_html(text: str) -> str:
    """What the page puts in as it stands."""
    parser = _parser()
    tokens = parser.parse(text)
    for token in tokens:
        _disarm(token)
    return str(parser.renderer.render(tokens, parser.options, {}))


def _disarm(token: Token) -> None:
    """Links become text with their address as a title; inline styles, which the page's policy forbids, go."""
    token.attrs.pop("style", None)
    if token.type == "link_open":
        token.tag, token.attrs = "span", {"class": "link", "title": token.attrs.get("href", "")}
    elif token.type == "link_close":
        token.tag = "span"
    for child in token.children or []:
        _disarm(child)


def shown(content: Content | None) -> list[dict[str, Any]]:
    """Turns, each as text and as HTML; a plain text is one turn of no one."""
    if content is None:
        return []
    turns = [{"role": "", "content": content}] if isinstance(content, str) else content
    texts = [(turn["role"], turn_text(turn)) for turn in turns]
    return [{"role": role, "text": text, "html": to_html(text)} for role, text in texts]
