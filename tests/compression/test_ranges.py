"""Ranges of known distributions by every method."""

import numpy as np
import pytest
import torch

from yunque.compression.ranges import Inputs, find_range, observe


def watched(values, *, with_histograms=True, calls=1):
    """What is seen of a layer that reads ``values`` [rows, in] in so many calls."""
    layer = torch.nn.Linear(values.shape[1], 2)

    def forward_all():
        for part in torch.from_numpy(values).chunk(calls):
            layer(part)

    return observe({"layer": layer}, forward_all, with_histograms=with_histograms)["layer"]


@pytest.fixture(scope="module")
def normal_with_outliers():
    """100,000 standard normal values and ten of 60."""
    values = np.random.default_rng(0).standard_normal((10_000, 10)).astype(np.float32)
    values[:10, 0] = 60
    return values


def test_methods_differ_as_they_should(normal_with_outliers):
    seen = watched(normal_with_outliers, calls=7)
    low, high = find_range(seen, "minmax", 0)
    assert (low, high) == (normal_with_outliers.min(), 60)
    low, high = find_range(seen, "percentile", 99.9)
    assert -3.6 < low < -3.1  # quantiles 0.0005 and 0.9995 of a standard normal are -3.29 and 3.29
    assert 3.1 < high < 3.7
    low, high = find_range(seen, "entropy", 0)
    assert -5 < low < -3  # the finest of its bins: 128 of them are the least it keeps
    assert 3 < high < 12
    errors = {}
    for method in ("minmax", "entropy", "percentile"):
        low, high = find_range(seen, method, 99.9)
        scale = (high - low) / 255
        rest = normal_with_outliers[10:]
        errors[method] = np.square(np.clip(np.rint(rest / scale) * scale, low, high) - rest).mean()
    assert errors["entropy"] < errors["minmax"] / 10
    assert errors["percentile"] < errors["minmax"] / 10


def test_all_methods_keep_a_distribution_without_tails():
    values = np.random.default_rng(0).uniform(0, 1, (5000, 8)).astype(np.float32)
    seen = watched(values)
    for method in ("minmax", "entropy", "percentile"):
        low, high = find_range(seen, method, 99.99)
        assert low == pytest.approx(0, abs=0.01)
        assert high == pytest.approx(1, abs=0.03), method


def test_constant_inputs_have_a_range():
    seen = watched(np.full((3, 4), 2.0, np.float32))
    for method in ("minmax", "entropy", "percentile"):
        low, high = find_range(seen, method, 99.99)
        assert low <= 2 <= high


def test_importance_is_the_mean_square_and_rows_are_a_sample():
    values = np.arange(40, dtype=np.float32).reshape(10, 4)
    seen = watched(values, with_histograms=False, calls=3)
    np.testing.assert_allclose(seen.importance, np.square(values).mean(axis=0))
    assert {tuple(row) for row in seen.sample} <= {tuple(row) for row in values}
    assert not seen.histogram.any()


def test_layers_that_no_text_reaches_are_left_out():
    used, unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    seen = observe({"a": used, "b": unused}, lambda: used(torch.ones(1, 2)), with_histograms=False)
    assert set(seen) == {"a"}
    assert isinstance(seen["a"], Inputs)
