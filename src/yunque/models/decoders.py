"""The leanest decoder of a model: T5, GPT-2, Llama and kin have their own, over a preallocated cache.

Any other model decodes through its own forward pass and cache, or without one where it has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from yunque.models.adapter import DecoderOnly, ModelAdapter, TokenIds
from yunque.models.decoding import Decoder
from yunque.models.decoding_causal import GPT2Decoder, LlamaDecoder
from yunque.models.decoding_t5 import T5Decoder


def decoder_for(
    model: nn.Module, adapter: ModelAdapter, queries: Sequence[TokenIds], max_new_tokens: int, device: torch.device
) -> Decoder:
    """Start decoding responses of up to ``max_new_tokens`` to ``queries`` with the leanest decoder of the family."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for lean in (T5Decoder, GPT2Decoder, LlamaDecoder):
        if lean.supports(base):
            return lean(base, adapter, queries, max_new_tokens, device)
    return ModelDecoder(base, adapter, queries, device)


class ModelDecoder(Decoder):
    """Decodes any model through its forward pass and its own cache."""

    def __init__(self, model: Any, adapter: ModelAdapter, queries: Sequence[TokenIds], device: torch.device) -> None:
        self.model, self.adapter = model, adapter
        self.inputs: dict[str, Any] = dict(adapter.generation_inputs(queries, device))
        self.encoded = model.config.is_encoder_decoder
        if self.encoded:
            hidden = model.get_encoder()(**self.inputs).last_hidden_state
            start = torch.full((len(queries), 1), model.config.decoder_start_token_id, device=device)
            self.inputs = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=hidden),
                "attention_mask": self.inputs["attention_mask"],
                "decoder_input_ids": start,
            }
        else:
            self.inputs |= self._positions()
        self.cache: Any = None

    def first(self) -> tuple[Tensor, Tensor]:
        """Forward the whole query."""
        cached = "past_key_values" in self.adapter.forward_names
        cache = {"past_key_values": self.cache, "use_cache": True} if cached else {"use_cache": False}
        output = self.model(**self.inputs, **cache, output_hidden_states=True)
        self.cache = output.past_key_values if cached else None
        states = output.decoder_hidden_states if self.encoded else output.hidden_states
        return output.logits[:, -1], states[-1][:, -1]

    def step(self, tokens_B: Tensor) -> tuple[Tensor, Tensor]:
        """Forward the new tokens, of which a cache holds the rest; without one, the whole sequences."""
        name = "decoder_input_ids" if self.encoded else "input_ids"
        tokens_BT = tokens_B.unsqueeze(1)
        self.inputs[name] = tokens_BT if self.cache is not None else torch.cat([self.inputs[name], tokens_BT], dim=1)
        if not self.encoded:
            mask = self.inputs["attention_mask"]
            self.inputs["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            self.inputs |= {key: value[:, -self.inputs[name].shape[1] :] for key, value in self._positions().items()}
        return self.first()

    def _positions(self) -> dict[str, Tensor]:
        assert isinstance(self.adapter, DecoderOnly), "positions are a decoder-only model's"
        return self.adapter.position_ids(self.inputs["attention_mask"])

    def keep(self, rows: Tensor) -> None:
        """Select the rows of inputs and cache."""
        if self.cache is not None:
            self.cache.batch_select_indices(rows)
        for name, value in self.inputs.items():
            if name == "encoder_outputs":
                self.inputs[name] = BaseModelOutput(last_hidden_state=value.last_hidden_state[rows])
            else:
                self.inputs[name] = value[rows]
