"""Length and wording, each against texts made by hand."""

import pytest

from jrlhf.rules import length_band, words


@pytest.mark.parametrize(
    ("length", "score"), [(0, 0.0), (5, 0.5), (10, 1.0), (15, 1.0), (20, 1.0), (40, 0.5), (20_000_000, 1e-6)]
)
def test_length_band(length: int, score: float) -> None:
    assert length_band(length, low=10, high=20) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "found"),
    [("", []), ("  ?! ", []), ("Ein Ärger, 2 mal", ["ein", "ärger", "2", "mal"]), ("日本 語", ["日本", "語"])],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found
