import math

import numpy as np
import pytest
import torch

from yunque.errors import InputError
from yunque.metrics.pairs import bradley_terry_loss, pair_calibration, pair_scores

CHOSEN, REJECTED = [2.0, 0.0, 1.0, 3.0], [1.0, 1.0, 1.0, -1.0]  # right, wrong, tie, right
LENGTHS = ([9, 9, 5, 2], [3, 3, 5, 4])  # the chosen answer is longer, longer, as long, shorter


def test_scores_worked_by_hand():
    scores = pair_scores(CHOSEN, REJECTED, *LENGTHS)
    assert scores.accuracy.mean == pytest.approx(2.5 / 4)
    assert scores.longer_accuracy.mean == pytest.approx(2.5 / 4)
    assert scores.above_longer.mean == pytest.approx(0)
    assert (scores.accuracy_longer, scores.accuracy_shorter) == (0.5, 1.0)
    assert (scores.num_pairs, scores.num_ties, scores.mean_difference) == (4, 1, 1.0)


def test_interval_narrows_around_the_accuracy():
    wide = pair_scores(CHOSEN * 25, REJECTED * 25, LENGTHS[0] * 25, LENGTHS[1] * 25).accuracy
    narrow = pair_scores(CHOSEN * 400, REJECTED * 400, LENGTHS[0] * 400, LENGTHS[1] * 400).accuracy
    deviation = np.std([1, 0, 0.5, 1]) / np.sqrt(1600)
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * deviation, rel=0.05)
    assert wide.low < narrow.low < 0.625 < narrow.high < wide.high


def test_a_model_that_counts_words_is_not_above_the_longer_answer():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(1, 100, 300), rng.integers(1, 100, 300)
    scores = pair_scores(chosen / 10, rejected / 10, chosen, rejected)
    assert (scores.above_longer.low, scores.above_longer.high) == (0, 0)


def test_only_longer_answers_leave_the_other_accuracy_open():
    scores = pair_scores([1.0, 2.0], [0.0, 3.0], [5, 5], [4, 4])
    assert (scores.accuracy_longer, scores.accuracy_shorter) == (0.5, None)
    assert scores.as_dict()["accuracy"]["mean"] == 0.5


def test_loss_is_torchs():
    difference = torch.tensor(CHOSEN) - torch.tensor(REJECTED)
    margin = torch.tensor([0.5, 0.0, 2.0, 1.0])
    plain = -torch.nn.functional.logsigmoid(difference).mean().item()
    assert bradley_terry_loss(CHOSEN, REJECTED) == pytest.approx(plain)
    with_margin = -torch.nn.functional.logsigmoid(difference - margin).mean().item()
    assert bradley_terry_loss(CHOSEN, REJECTED, margin.numpy()) == pytest.approx(with_margin)
    assert bradley_terry_loss([1000.0], [-1000.0]) == 0
    assert bradley_terry_loss([-1000.0], [1000.0]) == 2000


def test_calibration_worked_by_hand():
    logit = math.log(0.8 / 0.2)
    # four pairs at confidence 0.8, three right: |0.75 - 0.8|; one tie at 0.5, half right: 0
    calibration = pair_calibration([logit, logit, logit, -logit, 0.0], [0.0] * 5, num_bins=5)
    assert calibration.expected_error == pytest.approx(4 / 5 * 0.05)
    filled = [part for part in calibration.bins if part.num_pairs]
    assert [(part.num_pairs, part.accuracy) for part in filled] == [(1, 0.5), (4, 0.75)]
    assert [part.confidence for part in filled] == pytest.approx([0.5, 0.8])
    assert sum(part.num_pairs for part in calibration.bins) == 5
    assert len(str(calibration).splitlines()) == 4


def test_certainty_lies_in_the_last_bin():
    last = pair_calibration([1000.0, -1000.0], [0.0, 0.0]).bins[-1]
    assert (last.num_pairs, last.confidence, last.accuracy) == (2, 1.0, 0.5)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large():
    rng = np.random.default_rng(0)
    difference = rng.normal(size=20_000)
    chosen_wins = rng.random(20_000) < 1 / (1 + np.exp(-difference))
    seen = np.where(chosen_wins, difference, -difference)
    zeros = np.zeros(20_000)
    assert pair_calibration(seen, zeros).expected_error < 0.02
    assert pair_calibration(4 * seen, zeros).expected_error > 0.15


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (([1.0], [1.0, 2.0], [1], [1]), "1 values against 2"),
        (([1.0], [0.0], [1, 2], [1, 2]), "1 rewards but 2 lengths"),
        (([math.nan], [0.0], [1], [1]), "not finite"),
        (([], [], [], []), "at least one row"),
    ],
)
def test_bad_input(values, words):
    with pytest.raises(InputError, match=words):
        pair_scores(*values)


def test_no_bins():
    with pytest.raises(InputError, match="num_bins: 0"):
        pair_calibration([1.0], [0.0], num_bins=0)
