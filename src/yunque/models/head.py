"""Log-probabilities straight from the language-model head's input: no vocabulary-sized tensor outlives its chunk.

Shapes: N scored tokens, D hidden size, V vocabulary. Logits are computed for a few tokens at a time. Where the head is
frozen (LoRA) the gradient of every log-probability is taken on the way forward, so that the backward pass has nothing
left to compute but a scale; where it trains, the backward pass computes the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 2**22}
"""Logits held at once, 16 MiB in float32: beyond a core's cache, larger chunks save little."""
_CHUNK_ELEMENTS_ELSEWHERE = 2**27


class HeadWeights(NamedTuple):
    """Weight (V, D) and bias (V,) of a language-model head."""

    weight_VD: Tensor
    bias_V: Tensor | None


def head_scores(hidden_ND: Tensor, head: HeadWeights, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(logits / temperature), and the entropy, both (N,) in float32.

    The entropy carries no gradient, and is left at 0 where nothing else does (no statistic asks for it then).
    """
    device = hidden_ND.device.type
    parts: list[Any] = [hidden_ND, *head]
    if torch.is_autocast_enabled(device):
        parts = [part if part is None else part.to(torch.get_autocast_dtype(device)) for part in parts]
    if not torch.is_grad_enabled():  # inside a Function it never is: its inputs must say so
        parts = [part if part is None else part.detach() for part in parts]
    with torch.autocast(device, enabled=False):
        return _HeadScores.apply(*parts, targets_N, 1.0 if temperature == 0 else 1.0 / temperature)


class _HeadScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        logprobs_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        entropy_N = torch.zeros_like(logprobs_N)
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] and not head_trains else None
        for rows in _chunks(hidden_ND, weight_VD):
            targets_N1 = targets_N[rows].unsqueeze(1)
            logits = _logits(hidden_ND[rows], weight_VD, bias_V, scale)
            logits -= logits.amax(dim=1, keepdim=True)
            weights = logits.exp()
            total_N = weights.sum(dim=1)
            logprobs_N[rows] = logits.gather(1, targets_N1).squeeze(1) - total_N.log()
            if any(ctx.needs_input_grad):
                mean_N = torch.bmm(weights.unsqueeze(1), logits.unsqueeze(2)).flatten() / total_N
                entropy_N[rows] = total_N.log() - mean_N
            if gradient_ND is not None:
                expected_ND = (weights.to(weight_VD.dtype) @ weight_VD) / total_N.unsqueeze(1)
                gradient_ND[rows] = (weight_VD[targets_N[rows]] - expected_ND).to(gradient_ND.dtype) * scale
        ctx.scale, ctx.head_trains = scale, head_trains
        ctx.save_for_backward(gradient_ND) if not head_trains else ctx.save_for_backward(
            hidden_ND, weight_VD, bias_V, targets_N
        )
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        upstream_N1 = gradients[0].unsqueeze(1)
        if not ctx.head_trains:
            (gradient_ND,) = ctx.saved_tensors
            return (gradient_ND * upstream_N1).to(gradient_ND.dtype), None, None, None, None
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        hidden_gradient, weight_gradient = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD)
        bias_gradient = None if bias_V is None else torch.zeros_like(bias_V)
        for rows in _chunks(hidden_ND, weight_VD):
            change = _logits(hidden_ND[rows], weight_VD, bias_V, ctx.scale).softmax(dim=1).neg_()
            change.scatter_add_(1, targets_N[rows].unsqueeze(1), torch.ones_like(change[:, :1]))
            change *= upstream_N1[rows] * ctx.scale
            if bias_gradient is not None:
                bias_gradient += change.sum(dim=0)
            change = change.to(weight_VD.dtype)
            hidden_gradient[rows] = change @ weight_VD
            weight_gradient.addmm_(change.t(), hidden_ND[rows])
        return hidden_gradient, weight_gradient, bias_gradient, None, None


def _chunks(hidden_ND: Tensor, weight_VD: Tensor) -> Iterator[slice]:
    elements = _CHUNK_ELEMENTS.get(hidden_ND.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    count = max(1, elements // len(weight_VD))
    return (slice(start, start + count) for start in range(0, len(hidden_ND), count))


def _logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float) -> Tensor:
    """Logits (N, V) / temperature in float32, in memory that may be written to."""
    logits = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V).float()
    return logits if scale == 1.0 else logits.mul_(scale)
