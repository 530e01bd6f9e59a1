"""Agreement of two rankings."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from yunque.metrics.bootstrap import finite_vector


def spearman(first: ArrayLike, second: ArrayLike) -> float | None:
    """Spearman's rank correlation of two vectors [n], equal values sharing their mean rank; None where one is constant.

    Raises:
        InputError: no values, values that are not finite.
    """
    ranks = [_ranks(finite_vector(values, name)) for values, name in ((first, "first"), (second, "second"))]
    centred = [rank - rank.mean() for rank in ranks]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / norm if norm else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[numbers]
