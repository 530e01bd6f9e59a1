"""What a PPO step reports, under TRL 0.11's names."""

from __future__ import annotations

import resource
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yunque.rl.masked import masked_mean, masked_var


@dataclass(frozen=True)
class Rollout:
    """One global batch of B responses of up to R tokens, as the policy before its update saw it.

    scores_B: reward per response; groups_B: index into ``groups``, the labels of the groups, of each response; every
    other tensor is (B, R) and is meaningful where mask_BR is 1.
    """

    queries: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    scores_B: Tensor
    groups: Sequence[Hashable]
    groups_B: Tensor
    mask_BR: Tensor
    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    values_BR: Tensor
    kl_BR: Tensor


MINIBATCH_STATISTICS = (
    "loss/policy",
    "loss/value",
    "policy/entropy",
    "policy/approxkl",
    "policy/policykl",
    "policy/clipfrac",
    "policy/ratio",
    "policy/advantages_mean",
    "val/vpred",
    "val/error",
    "val/clipfrac",
    "val/mean",
    "returns/mean",
)
"""Token means over a minibatch, in the order in which the trainer sums them."""


def rollout_statistics(rollout: Rollout, penalty_BR: Tensor, kl_coef: float) -> dict[str, float]:
    """Objective and lengths of a batch before its update; KL and entropy are sums over a response's tokens."""
    mask_BR, scores_B = rollout.mask_BR, rollout.scores_B
    kl_B = (rollout.kl_BR * mask_BR).sum(dim=1)
    query_lengths = torch.tensor([float(len(query)) for query in rollout.queries])
    response_lengths = torch.tensor([float(len(response)) for response in rollout.responses])
    statistics: dict[str, Tensor | float] = {
        "objective/kl": kl_B.mean(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -(rollout.logprobs_BR * mask_BR).sum(dim=1).mean(),
        "ppo/mean_non_score_reward": masked_mean(penalty_BR, mask_BR),
        "ppo/mean_scores": scores_B.mean(),
        "ppo/std_scores": _std(scores_B),
        "tokens/queries_len_mean": query_lengths.mean(),
        "tokens/queries_len_std": _std(query_lengths),
        "tokens/responses_len_mean": response_lengths.mean(),
        "tokens/responses_len_std": _std(response_lengths),
    }
    return {name: float(value) for name, value in statistics.items()}


def group_statistics(rollout: Rollout, advantages_BR: Tensor) -> dict[str, float]:
    """Per group of the batch: responses, mean reward, advantage (over tokens) and KL (nats per response)."""
    mask_BR = rollout.mask_BR
    kl_B = (rollout.kl_BR * mask_BR).sum(dim=1)
    statistics: dict[str, float] = {}
    for index, name in enumerate(rollout.groups):
        rows = rollout.groups_B == index
        statistics |= {
            f"group/{name}/responses": float(rows.sum()),
            f"group/{name}/reward": rollout.scores_B[rows].mean().item(),
            f"group/{name}/advantage": masked_mean(advantages_BR[rows], mask_BR[rows]).item(),
            f"group/{name}/kl": kl_B[rows].mean().item(),
        }
    return statistics


def update_statistics(
    minibatch_means: Sequence[Tensor], variances: Sequence[tuple[float, float]], vf_coef: float, *, values: bool
) -> dict[str, float]:
    """Plain means over minibatches; ``variances`` are those of returns and old values of each minibatch.

    What concerns the value head is left out without ``values``.
    """
    means = dict(zip(MINIBATCH_STATISTICS, torch.stack(list(minibatch_means)).mean(dim=0).tolist(), strict=True))
    statistics = {f"ppo/{name}": value for name, value in means.items()}
    statistics["ppo/returns/var"] = sum(returns for returns, _ in variances) / len(variances)
    if not values:
        without = {name: value for name, value in statistics.items() if "/val" not in name}
        return without | {"ppo/loss/total": means["loss/policy"]}
    statistics["ppo/loss/total"] = means["loss/policy"] + vf_coef * means["loss/value"]
    statistics["ppo/val/var"] = sum(values for _, values in variances) / len(variances)
    returns_var = statistics["ppo/returns/var"]
    statistics["ppo/val/var_explained"] = 1 - means["val/error"] / returns_var if returns_var else 0.0
    return statistics


def minibatch_variances(returns_BR: Tensor, values_BR: Tensor, mask_BR: Tensor) -> tuple[float, float]:
    """Unbiased variances of returns and old values over the tokens of a minibatch."""
    return masked_var(returns_BR, mask_BR).item(), masked_var(values_BR, mask_BR).item()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: of the accelerator if there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _std(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else torch.zeros(())
