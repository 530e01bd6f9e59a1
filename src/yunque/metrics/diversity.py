"""How varied texts are: a policy that has found one sentence its reward likes repeats it, and this falls."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from yunque.errors import InputError

_WORD = re.compile(r"\w+|[^\w\s]")


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of ``texts`` together, in 0..1; 0 where no text has n words.

    distinct-n of Li et al. 2016 (arXiv 1510.03055), on lower-case words and punctuation marks, n-grams within a text
    only. More text has more repetition by itself: compare sets of about the same length.

    Raises:
        InputError: n below 1.
    """
    if n < 1:
        raise InputError(f"distinct_n: {n} is not a number of words; give 1 or more")
    words = (_WORD.findall(text.lower()) for text in texts)
    grams = list(itertools.chain.from_iterable(zip(*(row[skip:] for skip in range(n)), strict=False) for row in words))
    return len(set(grams)) / len(grams) if grams else 0.0


def num_words(text: str) -> int:
    """Words and punctuation marks of ``text``, as ``distinct_n`` counts them."""
    return len(_WORD.findall(text))
