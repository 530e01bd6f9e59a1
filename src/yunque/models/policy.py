"""The policy: a language model with a value head, and the reference it must stay close to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from yunque.models.adapter import ModelAdapter, ScoringBatch
from yunque.models.loading import REFERENCE_ADAPTER


@dataclass(frozen=True)
class TokenScores:
    """What one forward pass says of response tokens.

    logprobs_BR, entropy_BR and values_BR are (B, R) in float32; logits_BRV (B, R, V) only where asked for.
    """

    logprobs_BR: Tensor
    entropy_BR: Tensor
    values_BR: Tensor | None = None
    logits_BRV: Tensor | None = None


class ValueHead(nn.Module):
    """Linear map from the last hidden state to the state's value, in float32 as TRL's."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, hidden_BRD: Tensor) -> Tensor:
        """Values (B, R) of hidden states (B, R, D)."""
        with torch.autocast(hidden_BRD.device.type, enabled=False):
            return self.summary(hidden_BRD.to(self.summary.weight.dtype)).squeeze(-1)


class Policy(nn.Module):
    """Language model and value head as one module, so that DDP and its kin wrap both at once."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter) -> None:
        super().__init__()
        self.model: Any = model  # a PreTrainedModel or PeftModel, whose common interface has no type
        self.v_head = ValueHead(adapter.hidden_size).to(next(model.parameters()).device)
        self.adapter = adapter

    def forward(self, batch: ScoringBatch, temperature: float = 1.0, keep_logits: bool = False) -> TokenScores:
        """Score the response tokens of ``batch`` under the policy that samples at ``temperature``."""
        logits_BRV, hidden_BRD = self.adapter.score(self.model, batch)
        scores = token_scores(logits_BRV, batch.response_BR, temperature, keep_logits)
        return TokenScores(scores.logprobs_BR, scores.entropy_BR, self.v_head(hidden_BRD), scores.logits_BRV)


class Reference:
    """The policy as it was at the start: frozen, and without a second copy of the weights where adapters allow.

    A model with a fresh LoRA is its own reference with the adapter off. A model that starts from a trained adapter
    (an SFT run) keeps a frozen copy of that adapter beside the trained one: turning adapters off would compare with
    the base model, the mistake of TRL 0.11 that starts training at a KL of 32. A full model keeps a frozen copy.
    A model given as ``model`` is the reference as it is.
    """

    def __init__(self, policy: Policy, *, adapter_is_trained: bool = False, model: nn.Module | None = None) -> None:
        self._policy = policy
        self._copy: Any = model
        self._named = False
        if model is not None:
            model.eval().requires_grad_(False)
        elif not isinstance(policy.model, PeftModel):
            self._copy = deepcopy(policy.model).eval().requires_grad_(False)
        elif adapter_is_trained:
            self._named = True
            policy.model.add_adapter(REFERENCE_ADAPTER, policy.model.peft_config["default"])
            _copy_adapter(policy.model, "default", REFERENCE_ADAPTER)
            _activate(policy.model, "default")

    @torch.no_grad()
    def score(self, batch: ScoringBatch, temperature: float = 1.0, keep_logits: bool = False) -> TokenScores:
        """Score the response tokens of ``batch`` under the reference."""
        with self.model() as model:
            logits_BRV, _ = self._policy.adapter.score(model, batch)
        return token_scores(logits_BRV, batch.response_BR, temperature, keep_logits)

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """The reference language model, for the time of the context."""
        model = self._policy.model
        if self._copy is not None:
            yield self._copy
        elif self._named:
            _activate(model, REFERENCE_ADAPTER)
            try:
                yield model
            finally:
                _activate(model, "default")
        else:
            with model.disable_adapter():
                yield model


def token_scores(logits_BRV: Tensor, response_BR: Tensor, temperature: float, keep_logits: bool) -> TokenScores:
    """Log-probability of each response token and entropy of its distribution, from float32 logits / temperature."""
    logits = logits_BRV.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    normalizer_BR = logits.logsumexp(dim=-1)
    logprobs_BR = logits.gather(-1, response_BR.unsqueeze(-1)).squeeze(-1) - normalizer_BR
    with torch.no_grad():  # a statistic only: its graph would keep a second (B, R, V) tensor
        entropy_BR = normalizer_BR - (logits.detach() * (logits.detach() - normalizer_BR.unsqueeze(-1)).exp()).sum(-1)
    return TokenScores(logprobs_BR, entropy_BR, logits_BRV=logits if keep_logits else None)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in layers and in the attributes that functional dropout reads.

    Train and eval mode then compute the same: the ratio of PPO compares one network with itself.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                setattr(layer, name, 0.0)


def _copy_adapter(model: Any, source: str, target: str) -> None:
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if f".{source}" in name and (twin := name.replace(f".{source}", f".{target}")) in weights:
                weights[twin].copy_(weight)


def _activate(model: Any, name: str) -> None:
    """Make one adapter the active one; only "default" ever trains."""
    model.base_model.set_adapter(name)
    for parameter_name, parameter in model.named_parameters():
        if f".{REFERENCE_ADAPTER}" in parameter_name:
            parameter.requires_grad_(False)
        elif ".default" in parameter_name:
            parameter.requires_grad_(True)
