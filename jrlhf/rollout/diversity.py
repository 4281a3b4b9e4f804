"""The words of texts, and how many of them are different."""

import re
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"[^\W_]+(?:['*-]+[^\W_]+)*\+?")


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, with ``'``, ``-`` and ``*`` inside them and a ``+`` after them.

    ``"Well-made, isn't it? A+" -> ["well-made", "isn't", "it", "a+"]``. The opinion lexicon's entries are words too,
    but for ``anti-``, ``bull----`` and ``bull****``.
    """
    return _WORD.findall(text.lower())


def distinct_n(sequences: Sequence[Sequence[Hashable]], *, n: int) -> float:
    """Different n-grams / all n-grams, over all sequences together; 0 where there are none. Li et al. 2016, section 5.

    Sequences are token ids, or ``words`` of texts. It falls as a sample grows: compare samples of one size only.
    """
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
