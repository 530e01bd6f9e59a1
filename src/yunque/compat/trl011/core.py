"""The tensor and dictionary helpers of ``trl.core`` 0.11, under their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TopKLogitsWarper, TopPLogitsWarper

from yunque.rl import masked

__all__ = [
    "WANDB_PADDING",
    "LengthSampler",
    "PPODecorators",
    "clip_by_value",
    "convert_to_scalar",
    "entropy_from_logits",
    "flatten_dict",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "respond_to_batch",
    "set_seed",
    "stack_dicts",
    "stats_to_np",
    "top_k_top_p_filtering",
    "whiten",
]

WANDB_PADDING = -1
"""What fills the rows of stacked statistics up to one length."""


# --- statistics over tensors ---


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean where ``mask`` is 1, over everything or along ``axis``."""
    if axis is None:
        return masked.masked_mean(values, mask)
    return (values * mask).sum(dim=axis) / mask.sum(dim=axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance where ``mask`` is 1.

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("mask: no token is left to take a variance of; use a larger mini_batch_size")
    return masked.masked_var(values, mask, unbiased=unbiased)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance, and to zero mean if ``shift_mean``, by the entries where ``mask`` is 1."""
    return masked.masked_whiten(values, mask, shift_mean=shift_mean)


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance, and to zero mean if ``shift_mean``."""
    return masked.masked_whiten(values, torch.ones_like(values), shift_mean=shift_mean)


def logprobs_from_logits(logits: Tensor, labels: Tensor | None, gather: bool = True) -> Tensor:
    """Log-probabilities (B, T) of ``labels`` (B, T) under ``logits`` (B, T, V); all (B, T, V) without ``gather``."""
    logprobs = logits.log_softmax(dim=-1)
    if not gather:
        return logprobs
    if labels is None:
        raise ValueError("labels: needed to gather their log-probabilities; pass gather=False for all of them")
    return logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of the distributions over the last axis: logsumexp(l) - sum_v p_v l_v."""
    return logits.logsumexp(dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)


def clip_by_value(x: Tensor, tensor_min: Tensor, tensor_max: Tensor) -> Tensor:
    """Clip element by element, between two tensors."""
    return torch.maximum(torch.minimum(x, tensor_max), tensor_min)


# --- sampling ---


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Put ``filter_value`` where a logit (B, V) is not among the ``top_k``, or outside the nucleus of ``top_p``."""
    options: dict[str, Any] = {"filter_value": filter_value, "min_tokens_to_keep": min_tokens_to_keep}
    no_tokens = torch.empty((len(logits), 0), dtype=torch.long)
    if top_k > 0:
        logits = TopKLogitsWarper(top_k, **options)(no_tokens, logits)
    if 0 <= top_p < 1:
        logits = TopPLogitsWarper(top_p, **options)(no_tokens, logits)
    return logits


@torch.no_grad()
def respond_to_batch(
    model: Callable[[Tensor], Sequence[Tensor]],
    queries: Tensor,
    txt_len: int = 20,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Sample ``txt_len`` tokens after ``queries`` (B, Q) from a decoder-only model with value head: (B, txt_len)."""
    tokens = queries
    for _ in range(txt_len):
        logits = top_k_top_p_filtering(model(tokens)[0][:, -1], top_k=top_k, top_p=top_p)
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(dim=-1), num_samples=1)], dim=1)
    return tokens[:, queries.shape[1] :]


class LengthSampler:
    """Draws a length from ``min_value`` to ``max_value - 1``, by NumPy's global random state."""

    def __init__(self, min_value: int, max_value: int) -> None:
        if max_value <= min_value:
            raise ValueError(f"max_value: no length lies in [{min_value}, {max_value}); it must be above min_value")
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """Draw one length."""
        return int(np.random.choice(self.values))


# --- dictionaries of statistics ---


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """Join the keys of nested mappings by ``sep``.

    Raises:
        ValueError: a key holds ``sep``.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"key {key!r} holds the separator {sep!r}")
        if isinstance(value, Mapping):
            flat |= {f"{key}{sep}{name}": inner for name, inner in flatten_dict(value, sep).items()}
        else:
            flat[key] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Flatten each dictionary's tensors and stack them by key, (N, longest), padded with ``WANDB_PADDING``."""
    return {
        key: pad_sequence(
            [stats[key].flatten() for stats in stats_dicts], batch_first=True, padding_value=WANDB_PADDING
        )
        for key in stats_dicts[0]
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Turn tensors into NumPy arrays (bfloat16 into float32) and scalars into floats."""
    arrays: dict[str, Any] = {}
    for key, value in stats_dict.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        arrays[key] = float(value) if isinstance(value, int | float | np.number) else value
    return arrays


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Turn arrays and tensors of a single number, of shape () or (1,), into that number."""
    return {
        key: value.item() if isinstance(value, Tensor | np.ndarray) and value.shape in ((), (1,)) else value
        for key, value in stats.items()
    }


class _EmptyCache(ContextDecorator):
    """Empties the accelerator's cache on leaving."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if PPODecorators.optimize_device_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()


class PPODecorators:
    """``@PPODecorators.empty_device_cache()`` empties the accelerator's cache where ``optimize_device_cache`` says."""

    optimize_device_cache = False

    @classmethod
    def empty_device_cache(cls) -> _EmptyCache:
        """Context manager and decorator."""
        return _EmptyCache()
