"""Divergence of the policy from the reference: per-token estimators and the controllers of its coefficient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "full")


def kl_per_token(estimator: str, logprobs_BR: Tensor, ref_logprobs_BR: Tensor) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token, shape (B, R).

    With d = log p - log r: k1 is d, k2 is d^2 / 2, k3 is exp(-d) - 1 + d (Schulman, "Approximating KL divergence",
    2020); abs is |d| (TRL). k1 and k3 are unbiased for samples of the policy; k3 is never negative.
    """
    difference = logprobs_BR - ref_logprobs_BR
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return (-difference).expm1() + difference
    if estimator == "abs":
        return difference.abs()
    raise ValueError(f"kl_estimator: {estimator} is not one of {', '.join(KL_ESTIMATORS)}")


def full_kl(logits_BRV: Tensor, ref_logits_BRV: Tensor) -> Tensor:
    """Exact KL(policy || reference) of the next-token distributions, sum_v p_v (log p_v - log r_v), shape (B, R)."""
    log_p, log_r = logits_BRV.log_softmax(dim=-1), ref_logits_BRV.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_r)).sum(dim=-1)


@dataclass
class FixedKLController:
    """A KL coefficient that stays as configured."""

    value: float

    def update(self, kl: float, samples: int) -> None:
        """Leave the coefficient alone."""


@dataclass
class AdaptiveKLController:
    """Move the KL coefficient so that the KL of a sample meets ``target`` (Ziegler et al. 2019, section 2.2)."""

    value: float
    target: float
    horizon: float

    def update(self, kl: float, samples: int) -> None:
        """Multiply by 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * samples / self.horizon


KLController = FixedKLController | AdaptiveKLController
