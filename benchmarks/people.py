"""A task with a rule: a sentence about a person is to become a JSON object. The prompts, and the marks of an answer."""

import json
from collections.abc import Sequence
from itertools import product
from random import Random
from typing import Any

KEYS = ("name", "age", "city")
SYSTEM = "You answer with JSON."
SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "{name} lives in {city} and is {age} years old.",
    "{name}, {age}, lives in {city}.",
    "In {city} lives {name}, who is {age}.",
    "My friend {name} from {city} is {age}.",
    "{name} turned {age} today, at home in {city}.",
)
TASK = "Write this as one JSON object with the keys name, age and city."
WORDS = """\
Ada Ben Cleo Dora Emil Fay Gus Hana Ivan Jana Karl Lena Milo Nora Omar Pia Ravi Sara Tom Uma Vera Will Yara Zoe
Adler Berg Costa Dahl Evans Frank Garcia Hill Ito Jones Kim Lopez Meyer Novak Olsen Park Rossi Silva Tanaka Weber
Athens Berlin Boston Cairo Delhi Denver Dublin Geneva Hanoi Helsinki Istanbul Kyoto Lagos Lima Lisbon London \
Madrid Manila Milan Montreal Moscow Munich Nairobi Naples Oslo Paris Prague Quito Rome Seoul Sydney Tokyo
"""
FIRST, LAST, CITIES = (line.split() for line in WORDS.splitlines())


def rows(count: int, *, heldout: bool, seed: int) -> list[dict[str, Any]]:
    """Return ``count`` prompts, each with the right ``name``, ``age`` and ``city``.

    No first name, last name or city of a held-out prompt is in one to train on: every fourth of each is held out.
    """
    words = ([word for i, word in enumerate(some) if (i % 4 == 3) == heldout] for some in (FIRST, LAST, CITIES))
    people = Random(seed).sample(list(product(*words, range(18, 90), SENTENCES)), count)
    return [row(f"{one} {two}", age, city, sentence) for one, two, city, age, sentence in people]


def row(name: str, age: int, city: str, sentence: str) -> dict[str, Any]:
    facts = {"name": name, "age": age, "city": city}
    question = f"{sentence.format(**facts)} {TASK}"
    return {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]} | facts


def marks(completion: str, facts: dict[str, Any]) -> list[bool]:
    """Return which demands an answer meets: it begins as an object, it is one JSON value and nothing else, the first
    object in it has each key with the right value, and no other key."""
    text = completion.strip()
    found = first_object(text)
    right = [key in found and type(found[key]) is type(facts[key]) and found[key] == facts[key] for key in KEYS]
    return [text.startswith("{"), is_json(text), *right, bool(found) and found.keys() <= {*KEYS}]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def first_object(text: str) -> dict[str, Any]:
    """Return the object that begins at the first brace of a text, or an empty one."""
    start = text.find("{")
    try:
        return json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else {}
    except ValueError:
        return {}


def reward(
    prompts: Sequence[Any], completions: Sequence[str], name: list[str], age: list[int], city: list[str]
) -> list[float]:
    """Return the share of the demands that each answer meets, for the rule ``function`` of jrlhf."""
    facts = (dict(zip(KEYS, values, strict=True)) for values in zip(name, age, city, strict=True))
    met = (marks(completion, of) for completion, of in zip(completions, facts, strict=True))
    return [sum(each) / len(each) for each in met]
