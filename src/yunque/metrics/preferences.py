"""What training changed on held-out pairs: margins of log-probability and how often the chosen answer leads."""

from __future__ import annotations

from typing import Any

import numpy as np

from yunque.metrics.bootstrap import bootstrap, paired_bootstrap


def preference_metrics(before_N2: np.ndarray, after_N2: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Margins (chosen less rejected) and accuracies before and after, of log-probabilities (pairs, 2), with intervals.

    The intervals of the changes are paired; ``chosen_change`` and ``rejected_change`` say which answer moved.
    """
    margins = [(scores_N2[:, 0] - scores_N2[:, 1]).astype(np.float64) for scores_N2 in (before_N2, after_N2)]
    leads = [margin_N > 0 for margin_N in margins]
    metrics: dict[str, Any] = {"num_pairs": len(before_N2)}
    for name, (before_N, after_N) in {"margin": margins, "accuracy": leads}.items():
        metrics |= {
            f"{name}_before": bootstrap(before_N, seed=seed).as_dict(),
            f"{name}_after": bootstrap(after_N, seed=seed).as_dict(),
            f"{name}_change": paired_bootstrap(before_N, after_N, seed=seed).as_dict(),
        }
    for column, name in enumerate(("chosen", "rejected")):
        change = paired_bootstrap(before_N2[:, column], after_N2[:, column], seed=seed)
        metrics[f"{name}_change"] = change.as_dict()
    return metrics


def reward_metrics(before_N2: np.ndarray, after_N2: np.ndarray, *, beta: float, seed: int = 0) -> dict[str, Any]:
    """Margin and accuracy of DPO's implicit rewards beta (log pi - log ref); at the start all of them are 0."""
    margins_N = beta * ((after_N2 - before_N2)[:, 0] - (after_N2 - before_N2)[:, 1])
    return {
        "reward_margin": bootstrap(margins_N, seed=seed).as_dict(),
        "reward_accuracy": bootstrap(margins_N > 0, seed=seed).as_dict(),
    }


def change_line(name: str, metrics: dict[str, Any]) -> str:
    """One line for the user: ``name`` before and after, and the change with its interval."""
    before, after, change = (metrics[f"{name}_{when}"] for when in ("before", "after", "change"))
    low, high = (f"{end:+.3f}" if end is not None else "?" for end in (change["low"], change["high"]))
    return f"{name} {before['mean']:.3f} -> {after['mean']:.3f}, change {change['mean']:+.3f} [{low}, {high}]"
