"""Whole weights where an engine would hold, or holds, pieces of them; copies of such modules."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

M = TypeVar("M", bound=nn.Module)


def copy_module(module: M) -> M:
    """Copy a module with all its weights; under tensor parallelism with this rank's parts of them."""
    parts = [weight for weight in module.parameters() if isinstance(weight, DTensor)]  # deepcopy cannot copy these
    with whole_partitions(module):
        return _copied(module, {id(part): nn.Parameter(part.detach().clone(), part.requires_grad) for part in parts})


def skeleton(module: M) -> M:
    """Copy a module without its weights: in their place stand parameters on the meta device, shared as they are."""
    empty = {
        id(weight): nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
        for weight in module.parameters()
    }
    return _copied(module, empty)


@contextmanager
def whole_partitions(module: nn.Module) -> Iterator[None]:
    """While entered, weights that DeepSpeed ZeRO-3 has partitioned are whole on this rank; every rank must enter."""
    partitioned = [weight for weight in module.parameters() if hasattr(weight, "ds_id")]
    if partitioned:
        from deepspeed.runtime.zero import GatheredParameters

        gather = GatheredParameters(partitioned)
    with gather if partitioned else nullcontext():
        yield


@contextmanager
def read_whole() -> Iterator[None]:
    """While entered, ``from_pretrained`` gives every rank all weights, whatever the launch profile does with a policy.

    For models that no engine wraps: ZeRO-3 would split them as they are read, FSDP2 let one rank read them for all.
    """
    from transformers.integrations import deepspeed

    zero3, fsdp = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop("ACCELERATE_USE_FSDP", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp


def _copied(module: M, memo: dict[int, Any]) -> M:
    for part in module.modules():
        memo |= {id(value): value for value in vars(part).values() if isinstance(value, DeviceMesh)}
    copy = deepcopy(module, memo)
    for part in copy.modules():
        # transformers' tensor parallelism replaces forward by a closure over the module it was made for
        if getattr(vars(part).get("forward"), "__module__", "").startswith("transformers.distributed"):
            del part.forward
    return copy
