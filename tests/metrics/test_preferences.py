"""Margins and accuracies of held-out pairs, beside numbers worked out by hand."""

import numpy as np
import pytest

from yunque.metrics.preferences import change_line, preference_metrics, reward_metrics

BEFORE = np.array([[-10.0, -12.0], [-8.0, -7.0], [-5.0, -6.0], [-9.0, -9.0]])  # margins 2, -1, 1, 0
AFTER = np.array([[-10.0, -14.0], [-7.0, -8.0], [-6.0, -6.5], [-9.0, -10.0]])  # margins 4, 1, 0.5, 1


def test_margins_and_accuracies_before_and_after():
    metrics = preference_metrics(BEFORE, AFTER)
    assert metrics["num_pairs"] == 4
    assert metrics["margin_before"]["mean"] == pytest.approx(0.5)
    assert metrics["margin_after"]["mean"] == pytest.approx(1.625)
    assert metrics["margin_change"]["mean"] == pytest.approx(1.125)
    assert metrics["accuracy_before"]["mean"] == pytest.approx(0.5)  # a margin of 0 leads nobody
    assert metrics["accuracy_after"]["mean"] == pytest.approx(1.0)
    assert metrics["accuracy_change"]["mean"] == pytest.approx(0.5)
    assert metrics["chosen_change"]["mean"] == pytest.approx(0.0)
    assert metrics["rejected_change"]["mean"] == pytest.approx(-1.125)


def test_the_interval_of_a_change_is_paired():
    numbers = np.random.default_rng(0)
    before = numbers.normal(0, 50, (200, 2))
    after = before + np.array([0.5, 0.0])  # every margin rises alike, however far apart they are
    change = preference_metrics(before, after)["margin_change"]
    assert (change["low"], change["high"]) == pytest.approx((0.5, 0.5))


def test_rewards_are_beta_times_the_change():
    metrics = reward_metrics(BEFORE, AFTER, beta=0.1)
    assert metrics["reward_margin"]["mean"] == pytest.approx(0.1125)
    assert metrics["reward_accuracy"]["mean"] == pytest.approx(0.75)  # of 2, 2, -0.5 and 1


def test_the_line_for_the_user():
    line = change_line("margin", preference_metrics(BEFORE, AFTER))
    assert line.startswith("margin 0.500 -> 1.625, change +1.125 [")
    assert change_line("margin", preference_metrics(BEFORE[:1], AFTER[:1])).endswith("[?, ?]")
