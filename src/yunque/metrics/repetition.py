"""How much single texts repeat themselves: what a policy does that has learnt to please its reward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yunque.metrics.diversity import distinct_n, num_words

REPETITION_WORDS = 4


def distinct_share(texts: Sequence[str], n: int) -> np.ndarray:
    """Distinct n-grams over all n-grams of each text in 0..1, shape [num_texts]; 1 where a text has no n words."""
    return np.array([distinct_n([text], n) if num_words(text) >= n else 1.0 for text in texts])


def repetition(texts: Sequence[str]) -> np.ndarray:
    """Share of each text's 4-grams that stood in it before, in 0..1, shape [num_texts].

    seq-rep-4 of Welleck et al. 2020 (arXiv 1908.04319): 1 - distinct 4-grams / 4-grams.
    """
    return 1.0 - distinct_share(texts, REPETITION_WORDS)
