"""The policy: a language model with a value head, and the reference it must stay close to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from yunque.errors import InputError
from yunque.models.adapter import ModelAdapter, ScoringBatch
from yunque.models.copying import copy_module, whole_partitions
from yunque.models.fusing import fuse_layers
from yunque.models.head import HeadWeights, head_scores
from yunque.models.loading import REFERENCE_ADAPTER
from yunque.models.placement import tensor_parallel


@dataclass(frozen=True)
class TokenScores:
    """What one forward pass says of response tokens.

    logprobs_BR, entropy_BR and values_BR are (B, R) in float32, meaningful where the batch's mask is 1; logits_BRV
    (B, R, V) only where asked for.
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
    """Language model and, for advantages by GAE, a value head as one module, so that DDP and its kin wrap both."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter, *, value_head: bool = True) -> None:
        super().__init__()
        self.model: Any = model  # a PreTrainedModel or PeftModel, whose common interface has no type
        self.v_head = ValueHead(adapter.hidden_size).to(next(model.parameters()).device) if value_head else None
        self.adapter = adapter
        fuse_layers(model)
        self.plain_head = has_plain_head(model, adapter)

    @property
    def config(self) -> Any:
        """The language model's configuration, where engines look for sizes."""
        return self.model.config

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layers that FSDP2 gathers one by one."""
        return list(_base(self.model)._no_split_modules or ())

    def tie_weights(self) -> None:
        """Tie again what FSDP2 has untied by moving the model."""
        _base(self.model).tie_weights()

    def forward(self, batch: ScoringBatch, temperature: float = 1.0, keep_logits: bool = False) -> TokenScores:
        """Score the response tokens of ``batch`` under the policy that samples at ``temperature``."""
        lean = self.plain_head and not keep_logits
        scores, hidden_BRD = score_tokens(self.model, self.adapter, batch, temperature, lean=lean)
        return replace(scores, values_BR=None if self.v_head is None else self.v_head(hidden_BRD))


class Reference:
    """The policy as it was at the start: frozen, and without a second copy of the weights where adapters allow.

    A model with a fresh LoRA is its own reference with the adapter off. A model that starts from a trained adapter
    (an SFT run) keeps a frozen copy of that adapter beside the trained one: turning adapters off would compare with
    the base model, the mistake of TRL 0.11 that starts training at a KL of 32. A full model keeps a frozen copy, and so
    does an adapter of which PEFT holds one only: such that train biases, or are no LoRA.
    A model given as ``model`` is the reference as it is.
    """

    def __init__(self, policy: Policy, *, adapter_is_trained: bool = False, model: nn.Module | None = None) -> None:
        self._policy = policy
        self._copy: Any = model
        self.is_given = model is not None
        self._named = self._entered = False
        if model is not None:
            fuse_layers(model.eval().requires_grad_(False))
        elif not isinstance(policy.model, PeftModel) or (adapter_is_trained and not _can_stand_twice(policy.model)):
            layout = tensor_parallel()
            if layout is not None and layout.groups > 1:
                raise InputError(
                    "launch profile fsdp2_tp: rl: the reference cannot be copied from weights that are split and "
                    "sharded too; take fsdp2 or tp"
                )
            self._copy = copy_module(policy.model).eval().requires_grad_(False)
        elif adapter_is_trained:
            self._named = True
            policy.model.add_adapter(REFERENCE_ADAPTER, policy.model.peft_config["default"])
            _copy_adapter(policy.model, "default", REFERENCE_ADAPTER)
            _activate(policy.model, "default")

    @property
    def copy(self) -> nn.Module | None:
        """The frozen copy, or given model; None where adapters make the difference."""
        return self._copy

    def on(self, policy: Policy, copy: nn.Module | None) -> Reference:
        """The same reference by other modules: twins of its policy and its copy."""
        reference = Reference.__new__(Reference)
        reference._policy, reference._copy = policy, copy
        reference._named, reference._entered, reference.is_given = self._named, False, self.is_given
        return reference

    @torch.no_grad()
    def score(self, batch: ScoringBatch, temperature: float = 1.0, keep_logits: bool = False) -> TokenScores:
        """Score the response tokens of ``batch`` under the reference."""
        lean = self._policy.plain_head and not keep_logits
        with self.model() as model:
            return score_tokens(model, self._policy.adapter, batch, temperature, lean=lean)[0]

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """The reference language model, for the time of the context; may be entered again inside."""
        model = self._policy.model
        if self._copy is not None:
            yield self._copy
        elif self._entered:
            yield model
        else:
            self._entered = True
            try:
                with self._adapter() if self._named else model.disable_adapter():
                    yield model
            finally:
                self._entered = False

    @contextmanager
    def _adapter(self) -> Iterator[None]:
        _activate(self._policy.model, REFERENCE_ADAPTER)
        try:
            yield
        finally:
            _activate(self._policy.model, "default")


def score_tokens(
    model: Any, adapter: ModelAdapter, batch: ScoringBatch, temperature: float, *, lean: bool
) -> tuple[TokenScores, Tensor]:
    """Forward ``batch``: scores of its response tokens and the last hidden states (B, R, D) they come from.

    ``lean`` skips the logits of padding and keeps none of the others; without it they come back.
    """
    if not lean:
        logits_BRV, hidden_BRD = adapter.score(model, batch)
        return token_scores(logits_BRV, batch.response_BR, temperature, keep_logits=True), hidden_BRD
    mask_BR, targets_N = batch.mask_BR, batch.response_BR[batch.mask_BR]
    entropies: list[Tensor] = []

    def padded(column_N: Tensor) -> Tensor:
        return torch.zeros(mask_BR.shape, device=mask_BR.device).masked_scatter(mask_BR, column_N)

    def instead(head: nn.Linear, states_BRD: Tensor) -> Tensor:
        weights = HeadWeights(head.weight, head.bias)
        logprobs_N, entropy_N = head_scores(states_BRD[mask_BR], weights, targets_N, temperature)
        entropies.append(entropy_N)
        return padded(logprobs_N).unsqueeze(-1)

    with _head_replaced(model, instead):
        # log-probabilities leave in the logits' place: gradients come back through the head, where ZeRO-3 awaits them
        logprobs_BR1, hidden_BRD = adapter.score(model, batch)
    return TokenScores(logprobs_BR1[..., 0].clone(), padded(entropies[0])), hidden_BRD


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


@torch.no_grad()
def has_plain_head(model: Any, adapter: ModelAdapter) -> bool:
    """Whether the logits are what the head makes of its input, unscaled, uncapped, through plain weights."""
    head = _base(model).get_output_embeddings()
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:  # quantised, or split by its outputs
        return False
    seen: list[Tensor] = []

    def watch(head: nn.Linear, states_BRD: Tensor) -> Tensor:
        seen.append(nn.functional.linear(states_BRD, head.weight, head.bias))
        return seen[0]

    token = [adapter.eos_ids[0]]
    with whole_partitions(model.parameters()), _head_replaced(model, watch):
        logits, _ = adapter.score(model, adapter.scoring_batch([token], [token], head.weight.device))
    # FSDP2 lets one rank read the weights: on others these may still be anything, NaN too
    return len(seen) == 1 and torch.equal(logits.float().nan_to_num(), seen[0].float().nan_to_num())


@contextmanager
def _head_replaced(model: Any, forward: Callable[[nn.Linear, Tensor], Tensor]) -> Iterator[None]:
    """Let ``forward(head, states)`` stand in for the head, inside its module: hooks that gather weights still run."""
    head = _base(model).get_output_embeddings()
    head.forward = partial(forward, head)
    try:
        yield
    finally:
        del head.forward


def _base(model: Any) -> Any:
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return model.get_base_model() if isinstance(model, PeftModel) else model


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


def _can_stand_twice(model: Any) -> bool:
    config = model.peft_config["default"]
    return config.peft_type == PeftType.LORA and config.bias == "none" and not config.trainable_token_indices


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
