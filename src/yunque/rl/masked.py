"""Statistics over the masked entries of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is 1; both of one shape, a scalar comes back."""
    return (values * mask).sum() / mask.sum()


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = True) -> Tensor:
    """Variance of ``values`` where ``mask`` is 1, with Bessel's correction n / (n - 1) if ``unbiased`` and n > 1."""
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    count = mask.sum()
    return variance * count / (count - 1) if unbiased and count > 1 else variance


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale ``values`` to unit variance, and to zero mean if ``shift_mean``, over the entries where ``mask`` is 1."""
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean
