"""Lean decoding of decoder-only models: query and response share one preallocated cache, queries end in one column."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from yunque.models.adapter import ModelAdapter, TokenIds
from yunque.models.decoding import Decoder, additive, attend, length_batches, plain


class CausalDecoder(Decoder):
    """What GPT-2 and Llama share: prefill by the model's own forward pass, cache, mask and positions."""

    def __init__(
        self, model: Any, adapter: ModelAdapter, queries: Sequence[TokenIds], max_new_tokens: int, device: torch.device
    ) -> None:
        self.body, self.head = model.base_model, plain(model.get_output_embeddings())
        self.length = max(len(query) for query in queries)
        columns = self.length + max_new_tokens
        mask_BT = torch.ones((len(queries), columns), dtype=torch.bool, device=device)
        self.positions_B = torch.tensor([len(query) for query in queries], device=device)
        self.caches: list[tuple[Tensor, Tensor]] = []
        hidden: list[Tensor | None] = [None] * len(queries)
        for rows in length_batches(queries, device):
            inputs = adapter.generation_inputs([queries[row] for row in rows], device)
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
            output = self.body(**inputs, use_cache=True)
            for row, state in zip(rows, output.last_hidden_state[:, -1], strict=True):
                hidden[row] = state
            width = inputs["input_ids"].shape[1]
            mask_BT[rows, : self.length - width] = False
            mask_BT[rows, self.length - width : self.length] = inputs["attention_mask"].bool()
            self._store(rows, width, columns, len(queries), output.past_key_values)
        self.hidden_BD = torch.stack([state for state in hidden if state is not None])
        self.mask = additive(mask_BT[:, None, None], self.caches[0][0].dtype)

    def _store(self, rows: list[int], width: int, columns: int, count: int, past: Any) -> None:
        """Copy a prefilled cache so that its queries end where all queries end."""
        for index, layer in enumerate(past.layers):
            if index == len(self.caches):
                shape = (count, layer.keys.shape[1], columns, layer.keys.shape[3])
                self.caches.append((layer.keys.new_zeros(shape), layer.keys.new_zeros(shape)))
            for cache, new in zip(self.caches[index], (layer.keys, layer.values), strict=True):
                cache[rows, :, self.length - width : self.length] = new

    def first(self) -> tuple[Tensor, Tensor]:
        """The query's last hidden state predicts the first token."""
        return self.head(self.hidden_BD), self.hidden_BD

    def step(self, tokens_B: Tensor) -> tuple[Tensor, Tensor]:
        """Run the new position through all layers."""
        hidden_BD = self._forward(tokens_B)
        self.length += 1
        self.positions_B += 1
        return self.head(hidden_BD), hidden_BD

    @abstractmethod
    def _forward(self, tokens_B: Tensor) -> Tensor:
        """Last hidden states (B, D) of new tokens at ``positions_B``, their keys and values cached."""

    def keep(self, rows: Tensor) -> None:
        """Select the rows of mask, positions and caches."""
        self.mask, self.positions_B = self.mask[rows], self.positions_B[rows]
        self.caches = [(keys[rows], values[rows]) for keys, values in self.caches]

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Cache key and value (B, H, K) of the new position and attend from it: (B, H * K)."""
        keys, values = self.caches[layer]
        keys[:, :, self.length], values[:, :, self.length] = key, value
        until = self.length + 1
        return attend(query, keys[:, :, :until], values[:, :, :until], self.mask[..., :until], scale)


class GPT2Decoder(CausalDecoder):
    """GPT-2: learned absolute positions, one projection for query, key and value."""

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether ``model`` is a GPT-2 language model whose attention is the usual one."""
        config = model.config
        return config.model_type == "gpt2" and not (config.add_cross_attention or config.reorder_and_upcast_attn)

    def _forward(self, tokens_B: Tensor) -> Tensor:
        x_BD = self.body.wte(tokens_B) + self.body.wpe(self.positions_B)
        for index, block in enumerate(self.body.h):
            attention = block.attn
            joint = plain(attention.c_attn)(block.ln_1(x_BD))
            query, key, value = joint.unflatten(-1, (3, attention.num_heads, attention.head_dim)).unbind(1)
            x_BD = x_BD + plain(attention.c_proj)(self._attend(index, query, key, value, attention.scaling))
            x_BD = x_BD + block.mlp(block.ln_2(x_BD))
        return self.body.ln_f(x_BD)


class LlamaDecoder(CausalDecoder):
    """Llama and Qwen2: rotary positions, grouped key and value heads."""

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether ``model`` is of this family and attends to all positions."""
        config = model.config
        return config.model_type == "llama" or (config.model_type == "qwen2" and not config.use_sliding_window)

    def _forward(self, tokens_B: Tensor) -> Tensor:
        x_BD = self.body.embed_tokens(tokens_B)
        rotation = self.body.rotary_emb(x_BD.unsqueeze(1), position_ids=self.positions_B.unsqueeze(1))
        for index, layer in enumerate(self.body.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x_BD)
            query, key, value = (
                plain(projection)(normed).unflatten(-1, (-1, attention.head_dim))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = (x.squeeze(2) for x in apply_rotary_pos_emb(query.unsqueeze(2), key.unsqueeze(2), *rotation))
            x_BD = x_BD + attention.o_proj(self._attend(index, query, key, value, attention.scaling))
            x_BD = x_BD + layer.mlp(layer.post_attention_layernorm(x_BD))
        return self.body.norm(x_BD)
