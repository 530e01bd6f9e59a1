"""Exact match and token F1 of short answers, as the SQuAD evaluation scripts count them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """``text`` in lower case without ASCII punctuation, English articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """1 where a normalised prediction equals one of its row's normalised references, else 0; shape [num_rows]."""
    matches = (
        normalize_answer(prediction) in {normalize_answer(target) for target in targets}
        for prediction, targets in zip(predictions, references, strict=True)
    )
    return np.array([float(match) for match in matches])


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """F1 of the bags of normalised words in 0..1, shape [num_rows]: per row the best over its references.

    Where prediction or reference has no words, 1 if both have none and else 0, as SQuAD 2.0.
    """
    pairs = zip(predictions, references, strict=True)
    return np.array([max(_f1(prediction, target) for target in targets) for prediction, targets in pairs])


def _f1(prediction: str, target: str) -> float:
    given, wanted = normalize_answer(prediction).split(), normalize_answer(target).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))
