"""Words of texts, and the diversity of their n-grams."""

import re
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"[^\W_]+(?:['*-]+[^\W_]+)*\+?")


def words(text: str) -> list[str]:
    """Split a text into lower-case runs of letters and digits, with ``'``, ``-``, ``*`` inside and ``+`` at the end.

    ``"Well-made, isn't it? A+" -> ["well-made", "isn't", "it", "a+"]``. All entries of the opinion lexicon are words
    except ``anti-``, ``bull----`` and ``bull****``.
    """
    return _WORD.findall(text.lower())


def distinct_n(sequences: Sequence[Sequence[Hashable]], *, n: int) -> float:
    """Return distinct n-grams / all n-grams over all sequences; 0 without n-grams (Li et al. 2016, section 5).

    Sequences are token ids, or ``words`` of texts. The value falls as a sample grows, so compare equal sizes only.
    """
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
