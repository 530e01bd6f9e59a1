import matplotlib.image
import numpy as np

from yunque.evaluation.reward_plots import plot_pair_scores
from yunque.metrics.pairs import pair_calibration


def test_plot_shows_both_answers_and_the_calibration(tmp_path):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(1, 1, 200), rng.normal(0, 1, 200)
    path = plot_pair_scores(chosen, rejected, pair_calibration(chosen, rejected), tmp_path)
    assert path == tmp_path / "reward_scores.png"
    image = matplotlib.image.imread(path)[..., :3]
    left, right = image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 :]
    for half in (left, right):
        assert (half.min(axis=2) < 0.9).mean() > 0.02  # something is drawn


def test_rewards_that_are_all_equal_are_plotted(tmp_path):
    zeros = np.zeros(5)
    assert plot_pair_scores(zeros, zeros, pair_calibration(zeros, zeros), tmp_path).is_file()
