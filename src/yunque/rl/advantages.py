"""Per-token rewards and advantages: four estimators behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from yunque.rl.config import PPOConfig
from yunque.rl.masked import masked_whiten


@dataclass(frozen=True)
class Rewards:
    """What advantages are estimated from, over one global batch of B responses of up to R tokens.

    rewards_BR: token rewards, 0 outside mask_BR; values_BR: values of the states before each token, 0 without a value
    head; groups_B: number of each response's group.
    """

    rewards_BR: Tensor
    values_BR: Tensor
    mask_BR: Tensor
    groups_B: Tensor


def estimate_advantages(rewards: Rewards, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, R), by the estimator that ``config.advantage_estimator`` names."""
    return _ESTIMATORS[config.advantage_estimator](rewards, config)


def estimate_gae(rewards: Rewards, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """PPO: generalised advantage estimation over the value head, whitened over the batch."""
    return whitened_gae(
        rewards.values_BR,
        rewards.rewards_BR,
        rewards.mask_BR,
        gamma=config.gamma,
        lam=config.lam,
        whiten_rewards=config.whiten_rewards,
    )


def estimate_reinforce(rewards: Rewards, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """REINFORCE: discounted reward to go (Williams 1992), whitened over the batch (Hu 2025, REINFORCE++, eq. 5)."""
    return whitened_gae(
        torch.zeros_like(rewards.rewards_BR),
        rewards.rewards_BR,
        rewards.mask_BR,
        gamma=config.gamma,
        lam=1.0,
        whiten_rewards=config.whiten_rewards,
    )


def estimate_grpo(rewards: Rewards, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """GRPO: (R - mean of the group) / std of the group, the same at every token (Shao et al. 2024, section 4.1.2).

    ``config.scale_advantages`` takes the batch's standard deviation, or none (Liu et al. 2025, "Dr. GRPO"). R is the
    sum of a response's token rewards. A response alone in its group is compared with the whole batch.
    """
    returns_B = rewards.rewards_BR.sum(dim=1)
    advantages_B = torch.empty_like(returns_B)
    for rows, peers in _peers(rewards.groups_B):
        advantages_B[rows] = returns_B[rows] - returns_B[peers].mean()
        if config.scale_advantages != "none":
            scale = returns_B[peers] if config.scale_advantages == "group" else returns_B
            advantages_B[rows] /= scale.std() + 1e-4
    return _at_every_token(advantages_B, rewards.mask_BR), _at_every_token(returns_B, rewards.mask_BR)


def estimate_rloo(rewards: Rewards, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """RLOO: R minus the mean R of the group's other responses (Kool et al. 2019; Ahmadian et al. 2024, eq. 8).

    R is the sum of a response's token rewards. A response alone in its group is compared with the whole batch.
    """
    returns_B = rewards.rewards_BR.sum(dim=1)
    advantages_B = torch.empty_like(returns_B)
    for rows, peers in _peers(rewards.groups_B):
        others_B = (returns_B[peers].sum() - returns_B[rows]) / (len(peers) - 1)
        advantages_B[rows] = returns_B[rows] - others_B
    return _at_every_token(advantages_B, rewards.mask_BR), _at_every_token(returns_B, rewards.mask_BR)


Estimator = Callable[[Rewards, PPOConfig], tuple[Tensor, Tensor]]

_ESTIMATORS: dict[str, Estimator] = {
    "gae": estimate_gae,
    "grpo": estimate_grpo,
    "rloo": estimate_rloo,
    "reinforce": estimate_reinforce,
}


def _peers(groups_B: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of each group, and the rows that they are compared with."""
    everyone = torch.arange(len(groups_B), device=groups_B.device)
    groups = [everyone[groups_B == group] for group in groups_B.unique()]
    return [(rows, rows if len(rows) > 1 else everyone) for rows in groups]


def _at_every_token(numbers_B: Tensor, mask_BR: Tensor) -> Tensor:
    return numbers_B.unsqueeze(1) * mask_BR


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
