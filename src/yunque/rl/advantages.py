"""Per-token rewards and advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from yunque.rl.masked import masked_whiten


def token_rewards(scores_B: Tensor, kl_BR: Tensor, kl_coef: float, mask_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Spread the score of each response over its tokens: -kl_coef * KL at every token, the score at the last.

    Returns rewards_BR and its part without the scores, both (B, R) and 0 outside the mask (Ziegler et al. 2019, eq. 2).
    """
    penalty_BR = -kl_coef * kl_BR * mask_BR
    positions = torch.arange(mask_BR.shape[1], device=mask_BR.device)
    last_B = (positions * mask_BR).argmax(dim=1)
    rewards_BR = penalty_BR.clone()
    rewards_BR[torch.arange(len(scores_B), device=scores_B.device), last_B] += scores_B
    return rewards_BR, penalty_BR


def gae(values_BR: Tensor, rewards_BR: Tensor, mask_BR: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages_BR and returns_BR, both (B, R).

    A_t = delta_t + gamma * lam * A_{t+1} with delta_t = r_t + gamma * V_{t+1} - V_t and V = 0 after the end;
    returns are A + V. Advantages are not whitened.
    """
    values_BR, rewards_BR = values_BR * mask_BR, rewards_BR * mask_BR
    next_values_BR = torch.nn.functional.pad(values_BR[:, 1:], (0, 1))
    delta_BR = rewards_BR + gamma * next_values_BR - values_BR
    advantages_BR = torch.empty_like(delta_BR)
    running_B = torch.zeros_like(delta_BR[:, 0])
    for t in reversed(range(delta_BR.shape[1])):
        running_B = delta_BR[:, t] + gamma * lam * running_B
        advantages_BR[:, t] = running_B
    return advantages_BR, advantages_BR + values_BR


def whitened_gae(
    values_BR: Tensor, rewards_BR: Tensor, mask_BR: Tensor, *, gamma: float, lam: float, whiten_rewards: bool
) -> tuple[Tensor, Tensor]:
    """Advantages whitened over the whole batch, and returns, both (B, R), as PPO uses them."""
    if whiten_rewards:
        rewards_BR = masked_whiten(rewards_BR * mask_BR, mask_BR, shift_mean=False)
    advantages_BR, returns_BR = gae(values_BR, rewards_BR, mask_BR, gamma=gamma, lam=lam)
    return masked_whiten(advantages_BR, mask_BR), returns_BR
