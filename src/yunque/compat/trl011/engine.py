"""The engine of ``yunque.rl`` under a wrapped model: policy, reference and trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel, PeftType
from torch import Tensor, nn

from yunque.compat.trl011.config import PPOConfig
from yunque.compat.trl011.models import PreTrainedModelWrapper, create_reference_model
from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.models.policy import Policy, Reference
from yunque.rl.statistics import Rollout
from yunque.rl.trainer import PPOTrainer as EngineTrainer


class WrappedPolicy(Policy):
    """Language model and value head of a wrapper as the engine's policy; the weights are the wrapper's own."""

    def __init__(self, wrapper: PreTrainedModelWrapper, tokenizer: Any) -> None:
        adapter = adapter_for(wrapper.pretrained_model, tokenizer)
        if adapter.pad_id is None:
            adapter.pad_id = adapter.eos_ids[0]  # padding is masked: any token will do
        super().__init__(wrapper.pretrained_model, adapter)
        self.v_head: Any = nn.Sequential(wrapper.v_head, nn.Flatten(start_dim=-2))  # (B, R, 1) -> (B, R)


class WrappedReference:
    """The reference of a wrapped model: a wrapper of its own, or the model with its adapters off."""

    def __init__(self, wrapper: PreTrainedModelWrapper, given: PreTrainedModelWrapper | None, strict: bool) -> None:
        self._policy = wrapper
        self.own = given
        if wrapper.is_peft_model and (strict or (given is None and not _adapter_has_learned(wrapper))):
            self.own = None
        elif given is None:
            self.own = create_reference_model(wrapper)

    def of(self, policy: Policy) -> Reference:
        """The engine's reference."""
        return Reference(policy) if self.own is None else Reference(policy, model=self.own.pretrained_model)

    @contextmanager
    def wrapper(self) -> Iterator[PreTrainedModelWrapper]:
        """The reference with a value head, for the time of the context."""
        if self.own is not None:
            yield self.own
        else:
            with self._policy.pretrained_model.disable_adapter():
                yield self._policy


class Engine(EngineTrainer):
    """The engine's trainer, keeping what it learned from last: a batch and its advantages (B, R)."""

    rollout: Rollout
    advantages_BR: Tensor

    def check_rollouts(self, policy: Policy) -> None:
        """Nothing: answers come from transformers' own generate."""

    def _update(self, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor) -> dict[str, float]:
        self.rollout, self.advantages_BR = rollout, advantages_BR
        return super()._update(rollout, advantages_BR, returns_BR)


class GivenRates:
    """Learning rates as the optimizer has them: set by the user, or by the scheduler that steps once a PPO step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        """Leave them alone."""

    def get_last_lr(self) -> list[float]:
        """Learning rate of every parameter group."""
        return [group["lr"] for group in self._optimizer.param_groups]


def build_engine(
    config: PPOConfig,
    wrapper: PreTrainedModelWrapper,
    tokenizer: Any,
    reference: WrappedReference,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer | None,
) -> Engine:
    """Build the engine's trainer; it moves the model to its device.

    Raises:
        InputError: weights are to be sharded, which this interface does not know.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError(
            f"accelerate config: {accelerator.distributed_type} shards weights, which TRL 0.11's interface does not "
            "know; take one process or data parallelism (launch/ddp.yaml)"
        )
    policy = WrappedPolicy(wrapper, tokenizer)
    rates = [] if optimizer is None else [group["lr"] for group in optimizer.param_groups]
    engine = Engine(
        config.engine_config(accelerator.num_processes),
        policy,
        reference.of(policy),
        accelerator,
        seed=config.seed,
        total_steps=config.total_ppo_epochs,
        optimizer=optimizer,
    )
    engine.scheduler = GivenRates(engine.optimizer)
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=False):
        group["lr"] = rate  # a schedule that begins with a warm-up has set it already; the engine's own reset it
    if reference.own is not None and not getattr(reference.own.pretrained_model, "hf_device_map", None):
        reference.own.to(accelerator.device)
    return engine


def shared_trained_weights(model: nn.Module, reference: nn.Module) -> Sequence[str]:
    """Names of trainable weights of ``model`` that ``reference`` would move with."""
    held = {id(parameter) for parameter in reference.parameters()}
    return [name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) in held]


def _adapter_has_learned(wrapper: PreTrainedModelWrapper) -> bool:
    """Whether the adapter changes the base model; a fresh LoRA does not, its second factor is 0."""
    model: PeftModel = wrapper.pretrained_model
    config = model.peft_config[wrapper.policy_adapter_name]
    if config.peft_type != PeftType.LORA or getattr(config, "modules_to_save", None):
        return True
    second = [
        weight
        for name, weight in model.named_parameters()
        if f".{wrapper.policy_adapter_name}" in name and ("lora_B." in name or "lora_embedding_B." in name)
    ]
    return not second or any(bool(weight.any()) for weight in second)
