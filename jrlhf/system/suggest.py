"""Suggestions for a mistyped name. Imports no JAX."""

from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path


def did_you_mean(wrong: str, known: Iterable[str], prefix: str = "") -> str:
    """Suggest the most similar of the `known` dotted paths, else list the names beside `wrong`, else return "".

    The last part counts most, its parents second: sft.optim.learning_rate and optim.lr both give sft.optim.lr.
    """
    parent, _, leaf = wrong.replace("-", "_").lower().rpartition(".")
    scores: dict[str, float] = {}
    siblings: list[str] = []
    for path in known:
        right_parent, _, right_leaf = path.rpartition(".")
        likeness = _likeness(leaf, right_leaf)
        if likeness >= 0.6:
            scores[path] = likeness + 0.5 * SequenceMatcher(None, parent, right_parent).ratio()
        if parent == right_parent:
            siblings.append(right_leaf)
    if scores:
        best = [prefix + path for path, score in scores.items() if score == max(scores.values())]
        return f"; did you mean {either(best[:3])}?"
    return f"; possible names: {', '.join(siblings)}" if siblings else ""


def either(options: Sequence[str]) -> str:
    """Join options as `a, b or c`."""
    *head, last = options
    return f"{', '.join(head)} or {last}" if head else last


def near_folder(path: Path) -> str:
    """Suggest folders with names similar to the first missing part of a path, else return ""."""
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    near = [str(missing.with_name(name)) for name in _near_names(missing, Path.is_dir)]
    return f"; did you mean {either(near)}?" if near else ""


def near_file(path: Path) -> str:
    """`; did you mean ...?` with the most similar file names beside a missing file, or its missing folder."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    near = _near_names(path, Path.is_file)
    return f"; did you mean {either(near)}?" if near else ""


def _near_names(missing: Path, accept: Callable[[Path], bool]) -> list[str]:
    """Up to three names beside `missing` that are like its own; none if the folder cannot be read."""
    try:
        names = [sibling.name for sibling in missing.parent.iterdir() if accept(sibling)]
    except OSError:
        return []
    return get_close_matches(missing.name, names, 3)


def _likeness(wrong: str, right: str) -> float:
    """Rate similarity: 1.5 for the same name, 1 for its initials (learning_rate, lr), 0.9 for a subset of its words
    (num_epochs, epochs), else the ratio of SequenceMatcher."""
    if wrong == right:
        return 1.5
    words, right_words = wrong.split("_"), right.split("_")
    initials = ["".join(word[:1] for word in ws) for ws in (words, right_words) if len(ws) > 1]
    if right in initials or wrong in initials:
        return 1.0
    if set(words) <= set(right_words) or set(right_words) <= set(words):
        return 0.9
    return SequenceMatcher(None, wrong, right).ratio()
