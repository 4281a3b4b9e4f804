"""Rules that score the text of an answer: pure functions of strings and numbers. Imports no JAX."""

from jrlhf.rules.answers import number_in, same_number, same_text, text_in
from jrlhf.rules.episode import Episode
from jrlhf.rules.formats import markdown, valid_json
from jrlhf.rules.outside import EndpointError, by_endpoint, by_function, function_file, load_function
from jrlhf.rules.texts import REFUSALS, length_band, matching_fraction, refusal, refuses, repetition, words, yes_or_no

__all__ = [
    "REFUSALS",
    "EndpointError",
    "Episode",
    "by_endpoint",
    "by_function",
    "function_file",
    "length_band",
    "load_function",
    "markdown",
    "matching_fraction",
    "number_in",
    "refusal",
    "refuses",
    "repetition",
    "same_number",
    "same_text",
    "text_in",
    "valid_json",
    "words",
    "yes_or_no",
]
