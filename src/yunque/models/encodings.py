"""Encoder states that policy, reference and every PPO epoch share, where nothing in the encoder trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from yunque.models.adapter import ScoringBatch


class QueryEncodings:
    """The encoder's last states of one batch of queries, computed at first need.

    ``usable`` says whether the model has an encoder that no trained weight and no adapter is part of: then policy and
    reference encode a query alike, before and after an update.
    """

    def __init__(self, model: Any, *, sharded: bool) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._encoder = base.get_encoder() if base.config.is_encoder_decoder else None
        # sharded weights are whole inside the engine's own forward pass only
        self.usable = self._encoder is not None and not sharded and _is_frozen(self._encoder)
        self._states: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forget the batch."""
        self._states.clear()

    def attach(self, batch: ScoringBatch, rows: Sequence[int]) -> ScoringBatch:
        """Give ``batch``, made of ``rows``, encoder states (B, Q, D) instead of queries to encode."""
        if not self.usable:
            return batch
        inputs: dict[str, Any] = dict(batch.inputs)
        query_ids, mask_BQ = inputs.pop("input_ids"), inputs["attention_mask"]
        new = [index for index, row in enumerate(rows) if row not in self._states]
        if new:
            assert self._encoder is not None
            with torch.no_grad():
                states = self._encoder(input_ids=query_ids[new], attention_mask=mask_BQ[new]).last_hidden_state
            lengths = mask_BQ[new].sum(dim=1).tolist()
            for index, state, length in zip(new, states, lengths, strict=True):
                self._states[rows[index]] = state[:length].clone()
        padded_BQD = pad_sequence([self._states[row] for row in rows], batch_first=True)
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=padded_BQD)
        return replace(batch, inputs=inputs)


def _is_frozen(encoder: Any) -> bool:
    if any(isinstance(layer, BaseTunerLayer) for layer in encoder.modules()):
        return False
    return not any(parameter.requires_grad for parameter in encoder.parameters())
