"""The clipped losses of PPO as pure functions of masked tensors."""

from __future__ import annotations

from collections.abc import Sequence
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


def row_weights(
    normalization: str, tokens_B: Tensor, minibatches: Sequence[Sequence[int]], groups_B: Tensor, weight_of_G: Tensor
) -> Tensor:
    """Weight (B,) of every token of a response in the loss of one optimizer step, whose rows ``minibatches`` lists.

    The loss is the sum of weight times token loss, whatever the ranks and passes it is summed over. ``normalization``:
    tokens, all tokens alike (Yu et al. 2025, DAPO); sequences, mean over responses of their token means (GRPO); groups,
    mean over groups of their token means, weighted by weight_of_G; minibatches, mean over minibatches (TRL 0.11).
    """
    weights_B = torch.zeros(len(tokens_B), device=tokens_B.device)
    rows = torch.tensor([row for minibatch in minibatches for row in minibatch], device=tokens_B.device)
    if normalization == "tokens":
        weights_B[rows] = 1 / tokens_B[rows].sum()
    elif normalization == "sequences":
        weights_B[rows] = 1 / tokens_B[rows] / len(rows)
    elif normalization == "groups":
        present = groups_B[rows].unique()
        shares = weight_of_G[present] / weight_of_G[present].sum()
        for group, share in zip(present, shares, strict=True):
            members = rows[groups_B[rows] == group]
            weights_B[members] = share / tokens_B[members].sum()
    else:
        for minibatch in minibatches:
            weights_B[list(minibatch)] = 1 / tokens_B[list(minibatch)].sum() / len(minibatches)
    return weights_B
