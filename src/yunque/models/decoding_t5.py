"""Lean decoding of T5: keys and values of the query computed once, those of the response in a preallocated cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yunque.models.adapter import ModelAdapter, TokenIds
from yunque.models.decoding import Decoder, additive, attend, length_batches, plain


class _Layer:
    """The modules of one decoder layer, looked up once and not at every token."""

    def __init__(self, block: Any) -> None:
        own, cross, self.feed_forward = block.layer
        self.norm, self.cross_norm = own.layer_norm, cross.layer_norm
        self.q, self.k, self.v, self.o = (plain(getattr(own.SelfAttention, name)) for name in "qkvo")
        self.cross_q, self.cross_k, self.cross_v, self.cross_o = (
            plain(getattr(cross.EncDecAttention, name)) for name in "qkvo"
        )


class T5Decoder(Decoder):
    """T5, FLAN-T5, mT5: norms, feed-forward layers and projections are the model's own modules."""

    def __init__(
        self, model: Any, adapter: ModelAdapter, queries: Sequence[TokenIds], max_new_tokens: int, device: torch.device
    ) -> None:
        self.model, self.stack = model, model.get_decoder()
        self.heads: int = model.config.num_heads
        self.head = plain(model.lm_head)
        self.scale = model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else None
        self.length = 0
        self.query_mask = torch.empty(0)
        self.start_B = torch.full((len(queries),), model.config.decoder_start_token_id, device=device)
        self.layers = [_Layer(block) for block in self.stack.block]
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
        for layer, (keys, values, cross_keys, cross_values) in zip(self.layers, self.caches, strict=True):
            normed = layer.norm(x_BD)
            keys[:, :, now] = self._by_head(layer.k(normed))
            values[:, :, now] = self._by_head(layer.v(normed))
            query = self._by_head(layer.q(normed))
            x_BD = x_BD + layer.o(attend(query, keys[:, :, :until], values[:, :, :until], bias, 1.0))
            query = self._by_head(layer.cross_q(layer.cross_norm(x_BD)))
            x_BD = x_BD + layer.cross_o(attend(query, cross_keys, cross_values, self.query_mask, 1.0))
            x_BD = layer.feed_forward(x_BD)
        self.length = until
        hidden_BD = self.stack.final_layer_norm(x_BD)
        scaled_BD = hidden_BD * self.scale if self.scale else hidden_BD
        return self.head(scaled_BD), hidden_BD

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
            for index, layer in enumerate(self.layers):
                pair = [self._by_head(projection(encoded)) for projection in (layer.cross_k, layer.cross_v)]
                if index == len(cross):
                    shape = (len(queries), self.heads, longest, pair[0].shape[-1])
                    cross.append((pair[0].new_zeros(shape), pair[0].new_zeros(shape)))
                for cache, new in zip(cross[index], pair, strict=True):
                    cache[rows, :, :width] = new.transpose(1, 2)
        self.query_mask = additive(mask_BQ[:, None, None], cross[0][0].dtype)
        return cross

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
