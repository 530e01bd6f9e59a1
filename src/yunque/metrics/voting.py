"""Self-consistency: the answer that most samples of one prompt agree on (Wang et al. 2023, arXiv 2203.11171)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from yunque.metrics.short_answers import normalize_answer


class Vote(NamedTuple):
    """Position of the winning sample, and the share of all samples that agree with it, in 0..1."""

    winner: int
    agreement: float


def vote_key(text: str, final_answer: re.Pattern[str] | None = None) -> str | None:
    """What samples must share to agree: the whole normalised text, or the last match of ``final_answer`` in it.

    Of a pattern with a group, the group counts. None, an abstention, where nothing matches or nothing is left.
    """
    if final_answer is not None:
        matches = list(final_answer.finditer(text))
        if not matches:
            return None
        text = matches[-1].group(1 if final_answer.groups else 0) or ""
    return normalize_answer(text) or None


def majority(keys: Sequence[str | None]) -> Vote:
    """Vote of samples with ``keys``: the first sample of the commonest key, the earlier key at a tie.

    Where all abstain the first sample stands, with an agreement of 0.
    """
    counts = Counter(key for key in keys if key is not None)
    if not counts:
        return Vote(0, 0.0)
    key, votes = counts.most_common(1)[0]  # in order of first appearance among equals
    return Vote(keys.index(key), votes / len(keys))
