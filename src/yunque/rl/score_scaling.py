"""Scaling of scores by their running moments, and clipping, as TRL 0.11's options of these names mean it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from yunque.rl.config import RewardArguments


class ScoreScaler:
    """Scores of a step divided by the standard deviation of all scores seen up to and with it, then clipped.

    scaled = clip(score / std, -c, c); with ``use_score_norm`` (score - mean) / std. The moments are updated batch by
    batch (Chan, Golub and LeVeque 1983) and the variance is the unbiased one. Called with the scores of all ranks, it
    gives every rank the same. Scores that have not differed yet are not divided.
    """

    def __init__(self, args: RewardArguments) -> None:
        self.args = args
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """Standard deviation of all scores seen; 1 as long as it is unknown or 0."""
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return deviation if deviation > np.finfo(np.float32).eps * abs(self.mean) else 1.0

    def __call__(self, scores: Sequence[float]) -> list[float]:
        """Scaled scores (n,), after taking ``scores`` (n,) into the moments; not finite ones come back as they are."""
        values = np.asarray(scores, dtype=float)
        if not np.isfinite(values).all():
            return values.tolist()  # the trainer stops on them: no moment is worth keeping
        if self.args.use_score_scaling:
            self._update(values)
            values = (values - (self.mean if self.args.use_score_norm else 0.0)) / self.std
        if self.args.score_clip is not None:
            values = np.clip(values, -self.args.score_clip, self.args.score_clip)
        return values.tolist()

    def state(self) -> dict[str, float]:
        """The moments, for a checkpoint's JSON."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state(self, state: dict[str, float]) -> None:
        """Take up the moments of ``state()``."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]

    def _update(self, values: np.ndarray) -> None:
        total = self.count + len(values)
        change = float(values.mean()) - self.mean
        self.squares += float(((values - values.mean()) ** 2).sum()) + change**2 * self.count * len(values) / total
        self.mean += change * len(values) / total
        self.count = total
