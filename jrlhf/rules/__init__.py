"""Scores that are read off the text of an answer: pure functions of strings and numbers. Imports no JAX."""

from jrlhf.rules.episode import Episode
from jrlhf.rules.formats import valid_json
from jrlhf.rules.texts import length_band, words

__all__ = ["Episode", "length_band", "valid_json", "words"]
