"""Token-by-token decoding of a padded batch, lean: no work per token but the model's own.

Shapes: B sequences, Q positions of the longest query, T of query and response together, H heads, K head size,
D hidden size, V vocabulary. This is what the decoders of all families share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from yunque.models.adapter import TokenIds

_PASS_TOKENS = {"cpu": 1024}
"""Padded tokens per forward pass: a CPU gains nothing from larger passes and loses by their padding."""
_PASS_TOKENS_ELSEWHERE = 65_536


class Decoder(ABC):
    """A batch of sequences that grow by one token a step, and from which finished ones can be dropped."""

    @abstractmethod
    def first(self) -> tuple[Tensor, Tensor]:
        """Logits (B, V) of the first response tokens and the hidden states (B, D) they come from."""

    @abstractmethod
    def step(self, tokens_B: Tensor) -> tuple[Tensor, Tensor]:
        """Append one token to each sequence; logits (B, V) and hidden states (B, D) of the next."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""


def length_batches(
    rows: Sequence[TokenIds], device: torch.device, *, most_rows: int | None = None
) -> Iterator[list[int]]:
    """Numbers of ``rows`` that are forwarded together, shortest first: as many as a forward pass gains by.

    At most ``most_rows`` at once, and as many padded tokens as ``device`` works on at its full speed.
    """
    most_tokens = _PASS_TOKENS.get(device.type, _PASS_TOKENS_ELSEWHERE)
    batch: list[int] = []
    for row in sorted(range(len(rows)), key=lambda row: len(rows[row])):
        if batch and (len(batch) == most_rows or (len(batch) + 1) * len(rows[row]) > most_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def plain(layer: Any) -> Any:
    """The layer under an adapter that is switched off, as merging leaves it: one call instead of two."""
    switched_off = isinstance(layer, BaseTunerLayer) and layer.disable_adapters
    return layer.get_base_layer() if switched_off else layer


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``mask`` is set and the lowest number where not, to be added to attention scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask.bool(), torch.finfo(dtype).min)


def attend(query_BHK: Tensor, keys_BHTK: Tensor, values_BHTK: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one new position, (B, H * K); fewer key heads than query heads are shared in groups."""
    query_BH1K = query_BHK.unsqueeze(2).to(keys_BHTK.dtype)
    grouped = query_BHK.shape[1] != keys_BHTK.shape[1]
    if query_BHK.device.type == "cpu" and not grouped:  # two small products cost less than the fused kernel's set-up
        weights_BH1T = torch.matmul(query_BH1K * scale, keys_BHTK.transpose(2, 3)).add_(mask).softmax(dim=-1)
        return torch.matmul(weights_BH1T, values_BHTK).flatten(1)
    output_BH1K = nn.functional.scaled_dot_product_attention(
        query_BH1K, keys_BHTK, values_BHTK, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    return output_BH1K.flatten(1)
