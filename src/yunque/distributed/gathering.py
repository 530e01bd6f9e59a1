"""Whole weights of a sharded model, gathered once for as long as a rank works without its neighbours.

Rollouts, scoring without gradients, evaluation and saving run on a twin of the model: the same modules without the
engine's hooks, whose weights are gathered when it is entered and given back when it is left. Between the two no rank
waits for another, however long its answers are and however many prompts it has; and decoding costs what it costs on
one process. The price is a copy of the model in the precision that it computes in, on every rank, for that time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from yunque.models.copying import skeleton, whole_partitions
from yunque.models.quantized import is_quantized

M = TypeVar("M", bound=nn.Module)

_PARTITIONED = 3  # the stage of ZeRO from which weights are in pieces


class Twin(Generic[M]):
    """Twin of a module that an engine holds, or is about to hold, in pieces.

    To be made before ``Accelerator.prepare``, which puts hooks on the module.
    """

    def __init__(self, source: M, accelerator: Accelerator) -> None:
        self._source, self._device = source, accelerator.device
        self._dtype = compute_dtype(accelerator)
        self.twin = skeleton(source).eval()
        self._packed = {name for name, weight in source.named_parameters() if is_quantized(weight)}
        self._empty = dict(self.twin.named_parameters(remove_duplicate=False))
        self._open = False

    @contextmanager
    def gathered(self, *, exact: bool = False) -> Iterator[M]:
        """The twin with whole weights, for the time of the context; every rank must enter it, may do so again inside.

        ``exact`` keeps the precision that weights are stored in where the engine computes in a lower one.
        """
        if self._open:
            yield self.twin
            return
        with whole_partitions(self._source.parameters()):
            self._fill(None if exact else self._dtype)
            self._open = True
            try:
                yield self.twin
            finally:
                self._open = False
                for name, weight in self._empty.items():
                    _put(self.twin, name, weight)

    def kept(self, *, on_this_rank: bool) -> M:
        """The twin with whole weights, in host memory and for good where ``on_this_rank``, for a model to be saved."""
        with self.gathered(exact=True):
            weights: dict[int, nn.Parameter] = {}
            for name, weight in self.twin.named_parameters(remove_duplicate=False) if on_this_rank else ():
                if id(weight) not in weights:
                    weights[id(weight)] = nn.Parameter(weight.detach().to("cpu", copy=True), requires_grad=False)
                self._empty[name] = weights[id(weight)]
        return self.twin.cpu() if on_this_rank else self.twin

    @torch.no_grad()
    def _fill(self, dtype: torch.dtype | None) -> None:
        whole: dict[int, nn.Parameter] = {}
        for name, weight in self._source.named_parameters(remove_duplicate=False):
            if id(weight) not in whole:
                low = None if name in self._packed else dtype
                whole[id(weight)] = nn.Parameter(self._whole(weight, low), requires_grad=False)
            _put(self.twin, name, whole[id(weight)])
        for name, buffer in self._source.named_buffers(remove_duplicate=False):
            owner, leaf = _owner(self.twin, name)
            owner._buffers[leaf] = buffer

    def _whole(self, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
        weight = weight.detach()
        if dtype is not None and weight.is_floating_point():
            weight = weight.to(dtype)  # before the gather, which then moves less
        if not isinstance(weight, DTensor):
            return weight
        whole: Tensor = cast(Any, weight.to(self._device)).full_tensor()
        return whole


def is_sharded(module: nn.Module, accelerator: Accelerator) -> bool:
    """Whether the engine of ``accelerator`` keeps, or will keep, only a part of each weight of ``module`` on a rank."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return True
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.deepspeed_plugin.zero_stage >= _PARTITIONED
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def compute_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """What the engine casts weights to for computing with them; None where it leaves them as they are."""
    if accelerator.distributed_type == DistributedType.FSDP:
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy
        return None if policy is None else policy.param_dtype
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return None


@contextmanager
def buffers_left_whole(module: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """While FSDP2 takes ``module``, hide its persistent buffers (BART's bias of the logits); then all have rank 0's.

    Accelerate would take them for weights that it has split, and fail.
    """
    hidden = []
    if accelerator.distributed_type == DistributedType.FSDP:
        for owner in module.modules():
            names = owner._buffers.keys() - owner._non_persistent_buffers_set
            hidden += [(owner, name) for name in sorted(names) if owner._buffers[name] is not None]
    for owner, name in hidden:
        owner._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for owner, name in hidden:
            owner._non_persistent_buffers_set.discard(name)
    for owner, name in hidden:
        broadcast(owner._buffers[name])


def shard_frozen(module: nn.Module, accelerator: Accelerator) -> None:
    """Split the weights of a module that never trains over all ranks, in place, as rank 0 has them.

    It needs no engine: nothing but its twin ever computes with them.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    dtype = compute_dtype(accelerator)
    shards: dict[int, nn.Parameter] = {}
    for name, weight in list(module.named_parameters(remove_duplicate=False)):
        if isinstance(weight, DTensor):
            continue
        if id(weight) not in shards:
            here = weight.detach().to(accelerator.device, dtype)
            shards[id(weight)] = nn.Parameter(distribute_tensor(here, mesh, [Shard(0)]), requires_grad=False)
        _put(module, name, shards[id(weight)])


def _put(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    owner, leaf = _owner(module, name)
    owner._parameters[leaf] = weight


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
