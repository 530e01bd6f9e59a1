"""Token-by-token decoding of a padded batch, lean: no work per token but the model's own.

Shapes: B sequences, Q positions of the longest query, T of query and response together, H heads, K head size,
D hidden size, V vocabulary. Families with a decoder of their own (T5, GPT-2, Llama and kin) attend to a preallocated
cache; any other model decodes through its own forward pass and cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from yunque.models.adapter import ModelAdapter, TokenIds

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


def decoder_for(
    model: nn.Module, adapter: ModelAdapter, queries: Sequence[TokenIds], max_new_tokens: int, device: torch.device
) -> Decoder:
    """Start decoding responses of up to ``max_new_tokens`` to ``queries`` with the leanest decoder of the family."""
    from yunque.models.decoding_causal import GPT2Decoder, LlamaDecoder
    from yunque.models.decoding_t5 import T5Decoder

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for lean in (T5Decoder, GPT2Decoder, LlamaDecoder):
        if lean.supports(base):
            return lean(base, adapter, queries, max_new_tokens, device)
    return ModelDecoder(base, adapter, queries, device)


class ModelDecoder(Decoder):
    """Decodes any model through its forward pass and its own cache."""

    def __init__(self, model: Any, adapter: ModelAdapter, queries: Sequence[TokenIds], device: torch.device) -> None:
        self.model = model
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
            self.inputs["position_ids"] = (self.inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        self.cache: Any = None

    def first(self) -> tuple[Tensor, Tensor]:
        """Forward the whole query."""
        output = self.model(**self.inputs, past_key_values=self.cache, use_cache=True, output_hidden_states=True)
        self.cache = output.past_key_values
        states = output.decoder_hidden_states if self.encoded else output.hidden_states
        return output.logits[:, -1], states[-1][:, -1]

    def step(self, tokens_B: Tensor) -> tuple[Tensor, Tensor]:
        """Forward the new tokens; the cache holds the rest."""
        tokens_B1 = tokens_B.unsqueeze(1)
        if self.encoded:
            self.inputs["decoder_input_ids"] = tokens_B1
        else:
            mask = self.inputs["attention_mask"]
            self.inputs["input_ids"] = tokens_B1
            self.inputs["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            self.inputs["position_ids"] = self.inputs["position_ids"][:, -1:] + 1
        return self.first()

    def keep(self, rows: Tensor) -> None:
        """Select the rows of inputs and cache."""
        self.cache.batch_select_indices(rows)
        for name, value in self.inputs.items():
            if name == "encoder_outputs":
                self.inputs[name] = BaseModelOutput(last_hidden_state=value.last_hidden_state[rows])
            else:
                self.inputs[name] = value[rows]


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
