import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from yunque.errors import InputError
from yunque.metrics.bootstrap import bootstrap
from yunque.metrics.classification import GroupAccuracy, _confusion, _macro_f1, accuracy_by_group, classification_scores


def test_scores_worked_by_hand():
    # Label 0: 2 hits, 1 false positive, 1 missed: F1 2/3. Label 1: 1 hit, 1 false positive, 1 missed: F1 1/2.
    scores = classification_scores([0, 0, 0, 1, 1], [0, 0, 1, 0, 1])
    assert scores.accuracy.mean == pytest.approx(3 / 5)
    assert scores.macro_f1.mean == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores.num_rows == 5


def test_accuracy_interval_equals_the_bootstrap_over_rows():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=800)
    predictions = np.where(rng.random(800) < 0.8, labels, 1 - labels)
    expected = bootstrap(labels == predictions)
    accuracy = classification_scores(labels, predictions).accuracy
    assert (accuracy.mean, accuracy.low, accuracy.high) == pytest.approx(
        (expected.mean, expected.low, expected.high), abs=2e-3
    )


def test_macro_f1_interval_equals_resampling_the_rows_with_scikit_learn():
    rng = np.random.default_rng(1)
    labels = rng.choice(["a", "b", "c"], p=[0.7, 0.2, 0.1], size=300)
    predictions = np.where(rng.random(300) < 0.6, labels, rng.choice(["a", "b", "c"], size=300))
    resampled = []
    for _ in range(500):
        rows = rng.integers(0, 300, size=300)
        resampled.append(f1_score(labels[rows], predictions[rows], average="macro"))
    macro_f1 = classification_scores(labels, predictions).macro_f1
    assert macro_f1.mean == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert (macro_f1.low, macro_f1.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.015)


@pytest.mark.filterwarnings("ignore:A single label")
def test_confusions_and_their_macro_f1_equal_scikit_learn():
    rng = np.random.default_rng(2)
    for _ in range(200):  # few rows, so that labels are often absent
        labels, predictions = rng.integers(0, 4, size=(2, rng.integers(1, 7)))
        names = np.unique([*labels, *predictions])
        expected_confusion = confusion_matrix(labels, predictions, labels=names)
        np.testing.assert_array_equal(_confusion(labels, predictions), expected_confusion)
        padded = np.zeros((1, 4, 4), dtype=int)
        padded[0, : len(names), : len(names)] = expected_confusion
        expected = f1_score(labels, predictions, average="macro", zero_division=0)
        assert _macro_f1(padded)[0] == pytest.approx(expected)


def test_same_seed_same_scores():
    labels, predictions = np.random.default_rng(3).integers(0, 2, size=(2, 100))
    assert classification_scores(labels, predictions, seed=1) == classification_scores(labels, predictions, seed=1)


def test_one_row_gives_no_interval():
    scores = classification_scores([1], [1])
    assert (scores.accuracy.mean, scores.accuracy.low) == (1, -math.inf)
    assert scores.as_dict() == {
        "accuracy": {"mean": 1.0, "low": None, "high": None},
        "macro_f1": {"mean": 1.0, "low": None, "high": None},
        "num_rows": 1,
    }


def test_accuracy_by_group():
    groups = ["slur", "negation", "slur", "slur"]
    scores = accuracy_by_group([1, 0, 1, 1], [1, 1, 0, 1], groups)
    assert scores == {"negation": GroupAccuracy(0.0, 1), "slur": GroupAccuracy(2 / 3, 3)}
    assert list(scores) == ["negation", "slur"]
    weighted = sum(group.accuracy * group.num_rows for group in scores.values()) / 4
    assert weighted == pytest.approx(accuracy_score([1, 0, 1, 1], [1, 1, 0, 1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification_scores([1, 0], [1]), r"labels \[2\], predictions \[1\]"),
        (lambda: classification_scores([], []), r"labels \[0\]"),
        (lambda: accuracy_by_group([1], [1], ["a", "b"]), r"groups \[2\]"),
        (lambda: classification_scores([1, 0], [1, 0], resamples=0), "resamples"),
        (lambda: classification_scores([1, 0], [1, 0], confidence=1.5), "confidence"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
