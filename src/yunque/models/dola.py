"""DoLa: the last layer's logits less those of an inner layer, against facts that only sound likely.

Chuang et al. 2024 (arXiv 2309.03883). transformers 5 has moved its own to code on the hub, which only
``trust_remote_code`` would run. Shapes: B sequences, L candidate layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from yunque.errors import InputError

_LEAST_OF_TOP = 0.1  # a token below this share of the likeliest one's probability is out of the question
_DEEP = 40  # layers; beyond them candidates are a fixed number of layers
_DEEP_SPAN = 20


class DolaModel(nn.Module):
    """A decoder-only model whose logits are contrasted; to be decoded through its own forward pass and cache.

    logits = log p_last - log p_inner on the tokens with p_last >= 0.1 max p_last, -inf elsewhere. The inner layer is,
    for each sequence and token, the candidate whose distribution is farthest from the last one's (Jensen-Shannon).

    Raises:
        InputError: an encoder-decoder model, a head that is more than a matrix, too few layers.
    """

    def __init__(self, model: Any, layers: str, *, plain_head: bool) -> None:
        super().__init__()
        kind = model.config.model_type
        if model.config.is_encoder_decoder:
            raise InputError(
                f"dola_layers: DoLa is for decoder-only models, and {kind} is an encoder-decoder; leave it out"
            )
        if not plain_head:
            raise InputError(f"dola_layers: the logits of this {kind} are not those of its head alone; leave it out")
        self.model = model
        self.candidates = candidate_layers(model.config.num_hidden_layers, layers, tied=_is_tied(model))
        self.config = copy(model.config)
        self.config.model_type = f"dola-{kind}"  # the family's lean decoder would pass over the inner layers

    def forward(self, **inputs: Any) -> Any:
        """Forward the model; ``logits`` (B, 1, V) are the contrasted ones of the last position."""
        output = self.model(**inputs, logits_to_keep=1)
        head = self.model.get_output_embeddings()
        inner = torch.stack([head(output.hidden_states[layer][:, -1]) for layer in self.candidates])
        output.logits = contrasted(output.logits[:, -1].float(), inner.float()).unsqueeze(1)
        return output


def candidate_layers(num_layers: int, layers: str, *, tied: bool) -> list[int]:
    """Indices into the hidden states (0: the embeddings) of every second layer of the `low` or the `high` half.

    With tied embeddings the first two are left out, as their logits would repeat the input token.

    Raises:
        InputError: the model has too few layers.
    """
    first = min(2, max(num_layers - 1, 0)) if tied else 0
    if layers == "low":
        found = range(first, num_layers // 2 if num_layers <= _DEEP else _DEEP_SPAN, 2)
    else:
        found = range(num_layers // 2 if num_layers <= _DEEP else num_layers - _DEEP_SPAN, num_layers, 2)
    if not found:
        raise InputError(f"dola_layers: a model of {num_layers} layers has no {layers} ones to contrast with")
    return list(found)


def contrasted(last_BV: Tensor, inner_LBV: Tensor) -> Tensor:
    """Contrasted logits (B, V) of the last layer's (B, V) and the candidates' (L, B, V)."""
    last, inner = last_BV.log_softmax(dim=-1), inner_LBV.log_softmax(dim=-1)
    mixed = torch.logaddexp(last, inner) - math.log(2)
    divergence_LB = 0.5 * (_divergence(last.expand_as(inner), mixed) + _divergence(inner, mixed))
    farthest_B = divergence_LB.argmax(dim=0)
    chosen = inner[farthest_B, torch.arange(len(farthest_B), device=inner.device)]
    threshold_B1 = last.amax(dim=-1, keepdim=True) + math.log(_LEAST_OF_TOP)
    return (last - chosen).masked_fill(last < threshold_B1, -torch.inf)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
