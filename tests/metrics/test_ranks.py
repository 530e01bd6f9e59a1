"""Rank correlation against values worked out by hand."""

import pytest

from yunque.errors import InputError
from yunque.metrics.ranks import spearman


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 10_000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [8, 6, 4, 2]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    # ties share their mean rank: ranks 1.5 1.5 3 against 1 2 3
    assert spearman([0, 0, 1], [1, 2, 3]) == pytest.approx(0.8660254)
    assert spearman([2, 2, 2], [1, 2, 3]) is None
    with pytest.raises(InputError, match="not finite"):
        spearman([1, float("nan")], [1, 2])
