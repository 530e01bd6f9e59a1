"""Lean decoding of T5: keys and values of the query computed once, those of the response in a preallocated cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yunque.models.adapter import ModelAdapter, TokenIds
from yunque.models.decoding import Decoder, additive, attend, length_batches


class T5Decoder(Decoder):
    """T5, FLAN-T5, mT5: norms, feed-forward layers and projections are the model's own modules."""

    def __init__(
        self, model: Any, adapter: ModelAdapter, queries: Sequence[TokenIds], max_new_tokens: int, device: torch.device
    ) -> None:
        self.model, self.stack = model, model.get_decoder()
        self.heads: int = model.config.num_heads
        self.length = 0
        self.query_mask = torch.empty(0)
        self.start_B = torch.full((len(queries),), model.config.decoder_start_token_id, device=device)
        cross = self._encode(adapter, queries, device)
        attention = self.stack.block[0].layer[0].SelfAttention
        self.bias_1HTT = attention.compute_bias(max_new_tokens, max_new_tokens, device=device).to(cross[0][0].dtype)
        shape = (len(queries), self.heads, max_new_tokens, model.config.d_kv)
        own = [tuple(torch.empty(shape, dtype=keys.dtype, device=device) for _ in range(2)) for keys, _ in cross]
        self.caches = [(*pair, *crossed) for pair, crossed in zip(own, cross, strict=True)]

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether ``model`` is of this family."""
        return model.config.model_type in ("t5", "mt5")

    def first(self) -> tuple[Tensor, Tensor]:
        """The decoder's start token is the first input."""
        return self.step(self.start_B)

    def step(self, tokens_B: Tensor) -> tuple[Tensor, Tensor]:
        """Run the new position through all layers."""
        now, until = self.length, self.length + 1
        bias = self.bias_1HTT[:, :, now:until, :until]
        x_BD = self.stack.embed_tokens(tokens_B)
        for block, (keys, values, cross_keys, cross_values) in zip(self.stack.block, self.caches, strict=True):
            own, cross, feed_forward = block.layer
            normed, attention = own.layer_norm(x_BD), own.SelfAttention
            keys[:, :, now] = self._by_head(attention.k(normed))
            values[:, :, now] = self._by_head(attention.v(normed))
            query = self._by_head(attention.q(normed))
            x_BD = x_BD + attention.o(attend(query, keys[:, :, :until], values[:, :, :until], bias, 1.0))
            attention = cross.EncDecAttention
            query = self._by_head(attention.q(cross.layer_norm(x_BD)))
            x_BD = x_BD + attention.o(attend(query, cross_keys, cross_values, self.query_mask, 1.0))
            x_BD = feed_forward(x_BD)
        self.length = until
        hidden_BD = self.stack.final_layer_norm(x_BD)
        config = self.model.config
        scaled_BD = hidden_BD * config.d_model**-0.5 if config.scale_decoder_outputs else hidden_BD
        return self.model.lm_head(scaled_BD), hidden_BD

    def keep(self, rows: Tensor) -> None:
        """Select the rows of every cache."""
        self.query_mask = self.query_mask[rows]
        self.caches = [tuple(cache[rows] for cache in layer) for layer in self.caches]

    def _encode(
        self, adapter: ModelAdapter, queries: Sequence[TokenIds], device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, H, Q, K) of the queries for every layer, encoded in batches of similar length."""
        longest = max(len(query) for query in queries)
        mask_BQ = torch.zeros((len(queries), longest), dtype=torch.bool, device=device)
        cross: list[tuple[Tensor, Tensor]] = []
        for rows in length_batches(queries, device):
            inputs = adapter.generation_inputs([queries[row] for row in rows], device)
            encoded = self.model.get_encoder()(**inputs).last_hidden_state
            width = encoded.shape[1]
            mask_BQ[rows, :width] = inputs["attention_mask"].bool()
            for index, block in enumerate(self.stack.block):
                attention = block.layer[1].EncDecAttention
                pair = [layer(encoded).unflatten(-1, (self.heads, -1)) for layer in (attention.k, attention.v)]
                if index == len(cross):
                    shape = (len(queries), self.heads, longest, pair[0].shape[-1])
                    cross.append((pair[0].new_zeros(shape), pair[0].new_zeros(shape)))
                for cache, new in zip(cross[index], pair, strict=True):
                    cache[rows, :, :width] = new.transpose(1, 2)
        self.query_mask = additive(mask_BQ[:, None, None], cross[0][0].dtype)
        return cross

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
