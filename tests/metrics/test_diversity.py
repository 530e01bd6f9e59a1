import pytest

from yunque.errors import InputError
from yunque.metrics.diversity import distinct_n


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["the cat sat"], 1, 1.0),
        (["The cat, the CAT!"], 1, 4 / 6),  # the cat , the cat !
        (["The cat, the CAT!"], 2, 4 / 5),  # "the cat" twice
        (["good good good good"], 2, 1 / 3),
        (["so good", "so good", "so bad"], 2, 2 / 3),
        (["one", "two"], 2, 0.0),  # no pair, and none across texts
        (["", "one two"], 1, 1.0),
        ([], 1, 0.0),
    ],
)
def test_share_of_distinct_n_grams(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


def test_n_below_one():
    with pytest.raises(InputError, match="distinct_n: 0"):
        distinct_n(["text"], 0)
