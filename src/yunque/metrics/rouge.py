"""ROUGE with the rouge-score library, on words of any alphabet."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from yunque.errors import InputError

_WORD = re.compile(r"[^\W_]+")
_KIND = re.compile(r"rouge([1-9]|L|Lsum)")
_STEM_FROM_CHARS = 4  # rouge-score leaves shorter words alone


class UnicodeTokenizer:
    """Words as rouge-score cuts and stems them, except that letters outside a-z stay.

    Its own tokenizer keeps a-z and 0-9 only, so that "año" becomes "a" and "o" and a Cyrillic text has no words.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = functools.cache(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """Stemmed lower-case words of ``text``; composed and decomposed accents are the same letter."""
        words = _WORD.findall(unicodedata.normalize("NFC", text.lower()))
        return [self._stem(word) if len(word) >= _STEM_FROM_CHARS else word for word in words]


def rouge_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str] = ("rougeL",)
) -> dict[str, np.ndarray]:
    """F1 in 0..1 per kind, of shape [num_rows]: per row the best over its references, words stemmed.

    ``rougeLsum`` takes each line of a text for a sentence.

    Raises:
        InputError: unequal numbers of rows, a row without references, an unknown kind.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if unknown := [kind for kind in kinds if not _KIND.fullmatch(kind)]:
        raise InputError(f"unknown ROUGE kind {unknown[0]!r}; known are rouge1 to rouge9, rougeL and rougeLsum")
    if len(predictions) != len(references):
        raise InputError(f"ROUGE: {len(predictions)} predictions but references for {len(references)} rows")
    scorer = RougeScorer(list(kinds), tokenizer=UnicodeTokenizer())
    scores = np.zeros((len(kinds), len(predictions)))
    for row, (prediction, targets) in enumerate(zip(predictions, references, strict=True)):
        if not targets:
            raise InputError(f"ROUGE: row {row} has no reference")
        best = scorer.score_multi(targets, prediction)
        scores[:, row] = [best[kind].fmeasure for kind in kinds]
    return dict(zip(kinds, scores, strict=True))
