"""Gradients and optimizer steps of a model under any engine: DDP, FSDP2, tensor parallel, DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from yunque.distributed.gathering import buffers_left_whole


class Updates:
    """Backward passes that add up and steps that apply or drop the sum, by torch's own optimizer.

    ``module`` is what forward passes with gradients go through; data_rank and data_ranks say which share of a batch
    this rank forwards: ranks that hold parts of one model, by tensor parallelism, forward the same rows.
    """

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, optimizer: Any, max_grad_norm: float | None
    ) -> None:
        self.accelerator, self.optimizer, self.max_grad_norm = accelerator, optimizer, max_grad_norm
        self.module: Any = module
        parallelism = accelerator.parallelism_config
        same_rows = parallelism.tp_size if parallelism else 1
        self.data_rank = accelerator.process_index // same_rows
        self.data_ranks = accelerator.num_processes // same_rows

    @contextmanager
    def collecting(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one minibatch; gradients travel between ranks at the ``last`` of a step."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.module):
                yield

    def sum(self, numbers: Tensor) -> Tensor:
        """Add ``numbers`` up over the ranks that forward different rows."""
        copies = self.accelerator.num_processes // self.data_ranks
        return self.accelerator.reduce(numbers, reduction="sum") / copies

    def backward(self, loss: Tensor, void: Callable[[], bool]) -> None:
        """Add the gradients of ``loss``, this rank's part of a sum over all rows.

        ``void`` tells whether the step will be dropped: an engine that must know before it has the gradients asks.
        """
        # DDP and its kin average over ranks
        self.accelerator.backward(loss * self.data_ranks)

    def step(self, *, void: bool) -> bool:
        """Clip and apply the gradients, unless ``void``, and forget them; False where they were not finite."""
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm or float("inf"))
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        finite = bool(torch.isfinite(torch.as_tensor(norm)))
        if finite and not void:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return finite


class DeepSpeedUpdates(Updates):
    """DeepSpeed clips, steps and forgets by itself; a step it is to drop gets gradients that are not finite."""

    @contextmanager
    def collecting(self, *, last: bool) -> Iterator[None]:
        """ZeRO-2 and 3 cannot keep gradients whole, so they reduce every minibatch."""
        self.module.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor, void: Callable[[], bool]) -> None:
        """As above."""
        loss = loss * self.data_ranks
        if void():
            # the one way to drop gradients that is the same for every stage: what it does when they overflow
            loss.register_hook(lambda gradient: gradient * float("nan"))
        self.module.backward(loss)

    def step(self, *, void: bool) -> bool:
        """As above; ``void`` steps have been made so by ``backward``."""
        self.module.step()
        return void or bool(self.module.was_step_applied())


def prepare_updates(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rows_per_rank: int,
    max_grad_norm: float | None,
) -> Updates:
    """Wrap ``module`` and ``optimizer`` into the engine of ``accelerator``; a minibatch is ``rows_per_rank`` rows."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        settings = accelerator.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = rows_per_rank
        settings["gradient_accumulation_steps"] = 1  # losses are parts of a sum: nothing is left to divide
        settings["gradient_clipping"] = max_grad_norm or 0.0
        _unify(module)
    elif kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
        plugin = accelerator.state.fsdp_plugin
        # log-probabilities leave the model in float32: a ratio of two that were rounded to bf16 says nothing
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    with buffers_left_whole(module, accelerator):
        prepared, optimizer = accelerator.prepare(module, optimizer)
    updates = DeepSpeedUpdates if kind == DistributedType.DEEPSPEED else Updates
    return updates(accelerator, prepared, optimizer, max_grad_norm)


def _unify(module: nn.Module) -> None:
    """Cast what trains beside weights that ZeRO-3 split as they were read to the type it read them in: it wants one."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    split = {weight.dtype for weight in trained if hasattr(weight, "ds_id")}
    for weight in trained if split else ():
        weight.data = weight.data.to(next(iter(split)))
