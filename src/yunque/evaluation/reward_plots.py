"""What a reward model says of the answers of preference pairs, as a PNG file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from yunque.metrics.pairs import Calibration

_BLUE, _ORANGE = "#1f6fb4", "#d9662b"
_BINS = 30


def plot_pair_scores(chosen: np.ndarray, rejected: np.ndarray, calibration: Calibration, folder: Path) -> Path:
    """Plot histograms of the rewards of both answers, (num_pairs,) each, beside the reliability of their differences.

    Returns the path, ``reward_scores.png`` in ``folder``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    scores, reliability = figure.subplots(1, 2)
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=_BINS)
    for values, color, name in ((rejected, _ORANGE, "rejected"), (chosen, _BLUE, "chosen")):
        scores.hist(values, bins=edges, color=color, alpha=0.55, label=f"{name} (mean {values.mean():.2f})")
        scores.axvline(values.mean(), color=color, linestyle="--", linewidth=1.2)
    scores.set(title=f"Rewards of {len(chosen):,} pairs", xlabel="reward (logit; dashed: mean)")
    scores.set(ylabel="number of answers")
    scores.margins(y=0.25)  # room for the legend
    scores.legend(frameon=False)

    filled = [part for part in calibration.bins if part.num_pairs]
    reliability.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1, linestyle="--", label="believable")
    reliability.plot(
        [part.confidence for part in filled], [part.accuracy for part in filled], color=_BLUE, marker="o", label="model"
    )
    for part in filled:
        place = (part.confidence or 0.0, part.accuracy or 0.0)
        reliability.annotate(f"{part.num_pairs:,}", place, textcoords="offset points", xytext=(4, -12), fontsize=7)
    reliability.set(title=f"Expected calibration error {calibration.expected_error:.3f}", xlim=(0.5, 1.0))
    reliability.set(xlabel="confidence: sigmoid of the difference (numbers: pairs)", ylabel="share of pairs right")
    reliability.legend(frameon=False)
    for axes in (scores, reliability):
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "reward_scores.png"
    figure.savefig(path, dpi=120)
    return path
