"""Losses on preference pairs as functions of log-probabilities: DPO and its kin, ORPO.

Shapes: B pairs. ``w`` is the chosen, ``l`` the rejected answer, pi the policy, ref the start model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_LARGEST_MEAN_LOGPROB = -1e-6
"""Nearer to 0 the odds p / (1 - p) of an answer leave float32."""


@dataclass(frozen=True)
class PairScores:
    """Summed log-probabilities of the answers of B pairs, all (B,), and how many tokens they sum over."""

    chosen_B: Tensor
    rejected_B: Tensor
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor


@dataclass(frozen=True)
class PairLosses:
    """A loss for each pair and the rewards (without gradient) that the objective implies, all (B,)."""

    losses_B: Tensor
    chosen_rewards_B: Tensor
    rejected_rewards_B: Tensor


class Objective(Protocol):
    """What a trainer minimises: the mean of the pairs' losses plus ``sft_weight`` times the chosen tokens' mean NLL."""

    sft_weight: float
    needs_reference: bool

    def __call__(self, policy: PairScores, reference: PairScores | None) -> PairLosses:
        """Losses and rewards of B pairs."""


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation: the policy's own log-ratio to its start is the reward that ranks the pair.

    delta = (log pi(w) - log ref(w)) - (log pi(l) - log ref(l)), and with beta = b, smoothing = e:
    sigmoid -(1-e) log sigmoid(b delta) - e log sigmoid(-b delta)  (Rafailov et al. 2023, eq. 7; e: Mitchell 2023);
    hinge max(0, 1 - b delta)  (Zhao et al. 2023);
    ipo (delta - 1/(2b))^2 with log-ratios per token  (Azar et al. 2023, eq. 17; per token as TRL does).
    """

    beta: float
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    needs_reference: bool = True

    def __call__(self, policy: PairScores, reference: PairScores | None) -> PairLosses:
        """Losses of B pairs, and their rewards b (log pi - log ref)."""
        assert reference is not None
        chosen_B, rejected_B = policy.chosen_B - reference.chosen_B, policy.rejected_B - reference.rejected_B
        return PairLosses(
            self._losses(chosen_B, rejected_B, policy), self.beta * chosen_B.detach(), self.beta * rejected_B.detach()
        )

    def _losses(self, chosen_B: Tensor, rejected_B: Tensor, policy: PairScores) -> Tensor:
        if self.loss_type == "ipo":
            delta_B = chosen_B / policy.chosen_tokens_B - rejected_B / policy.rejected_tokens_B
            return (delta_B - 1 / (2 * self.beta)) ** 2
        scaled_B = self.beta * (chosen_B - rejected_B)
        if self.loss_type == "hinge":
            return torch.relu(1 - scaled_B)
        smoothing = self.label_smoothing
        return -(1 - smoothing) * logsigmoid(scaled_B) - smoothing * logsigmoid(-scaled_B)


@dataclass(frozen=True)
class ORPO:
    """Odds-ratio preference optimisation: fine-tuning on the chosen answer plus an odds ratio, without a reference.

    With p = exp(log pi(y) / tokens of y): b * -log sigmoid(log p_w/(1-p_w) - log p_l/(1-p_l)), beside the NLL of w
    (Hong et al. 2024, eqs. 4, 6 and 7). The rewards are b log p.
    """

    beta: float
    sft_weight: float = 1.0
    needs_reference: bool = False

    def __call__(self, policy: PairScores, reference: PairScores | None) -> PairLosses:
        """Losses of B pairs, and their rewards b log p."""
        chosen_B = policy.chosen_B / policy.chosen_tokens_B
        rejected_B = policy.rejected_B / policy.rejected_tokens_B
        losses_B = -self.beta * logsigmoid(_log_odds(chosen_B) - _log_odds(rejected_B))
        return PairLosses(losses_B, self.beta * chosen_B.detach(), self.beta * rejected_B.detach())


def _log_odds(logprob_B: Tensor) -> Tensor:
    """The log of p / (1 - p), from log p, accurate at both ends."""
    logprob_B = logprob_B.clamp(max=_LARGEST_MEAN_LOGPROB)
    complement_B = torch.where(
        logprob_B > -math.log(2), torch.log(-torch.expm1(logprob_B)), torch.log1p(-torch.exp(logprob_B))
    )
    return logprob_B - complement_B
