"""The clipped losses of PPO as pure functions of masked tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClippedLoss:
    """Per-token losses (B, R), not yet averaged, and where the clip was active (B, R)."""

    per_token_BR: Tensor
    clipped_BR: Tensor


def policy_loss(logprobs_BR: Tensor, old_logprobs_BR: Tensor, advantages_BR: Tensor, clip: float) -> ClippedLoss:
    """Clipped surrogate, max(-A * ratio, -A * clamp(ratio, 1 - clip, 1 + clip)) (Schulman et al. 2017, eq. 7)."""
    ratio_BR = (logprobs_BR - old_logprobs_BR).exp()
    plain, clipped = -advantages_BR * ratio_BR, -advantages_BR * ratio_BR.clamp(1 - clip, 1 + clip)
    return ClippedLoss(torch.maximum(plain, clipped), clipped > plain)


def value_loss(values_BR: Tensor, old_values_BR: Tensor, returns_BR: Tensor, clip: float) -> ClippedLoss:
    """Clipped regression, max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2 (TRL, OpenAI baselines)."""
    near_BR = torch.clamp(values_BR, old_values_BR - clip, old_values_BR + clip)
    plain, clipped = (values_BR - returns_BR).square(), (near_BR - returns_BR).square()
    return ClippedLoss(0.5 * torch.maximum(plain, clipped), clipped > plain)
