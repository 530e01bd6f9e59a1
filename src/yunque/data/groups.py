"""Groups of prompts whose answers are compared with each other: a column's commonest values, or bands of length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

LENGTH_BAND = "length_band"
OTHER = "other"


def make_groups(
    train: Dataset, test: Dataset, column: str | None, max_groups: int
) -> tuple[list[str] | None, list[str] | None]:
    """Group labels of prepared train and test prompts, as the train prompts define the groups; None without a column.

    ``column`` is "length_band", or was loaded as "group".
    """
    if column is None:
        return None, None
    if column == LENGTH_BAND:
        limits = length_limits([len(ids) for ids in train["input_ids"]], max_groups)
        bands = [label_lengths([len(ids) for ids in split["input_ids"]], limits) for split in (train, test)]
        return bands[0], bands[1]
    names = commonest_groups(train["group"], max_groups)
    return label_groups(train["group"], names), label_groups(test["group"], names)


def commonest_groups(values: Sequence[str], max_groups: int) -> list[str]:
    """The ``max_groups`` commonest of ``values``, most rows first (ties in alphabetical order)."""
    counted = Counter(value.strip() for value in values)
    return sorted(counted, key=lambda value: (-counted[value], value))[:max_groups]


def label_groups(values: Sequence[str], names: Sequence[str]) -> list[str]:
    """Each value's group: itself if it is among ``names``, else "other"."""
    known = set(names)
    return [value.strip() if value.strip() in known else OTHER for value in values]


def length_limits(num_tokens: Sequence[int], max_groups: int) -> list[int]:
    """Upper limits, in tokens, of all but the last of ``max_groups`` bands that hold about equally many rows."""
    shares = np.arange(1, max_groups) / max_groups
    return sorted({int(limit) for limit in np.quantile(np.asarray(num_tokens), shares, method="lower")})


def label_lengths(num_tokens: Sequence[int], limits: Sequence[int]) -> list[str]:
    """Each length's band, such as "41-80 tokens"; the first begins at 1 token, the last has no end."""
    starts = [1, *(limit + 1 for limit in limits)]
    names = [f"{start}-{limit} tokens" for start, limit in zip(starts, limits, strict=False)]
    names.append(f"{starts[-1]}+ tokens")
    return [names[index] for index in np.searchsorted(limits, num_tokens, side="left")]
