"""Whole weights where an engine would hold, or holds, pieces of them; copies of such modules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)

_SPLITTING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
"""Variables by which a launch profile tells that weights are to be split, beside DeepSpeed's own."""


def copy_module(module: M) -> M:
    """Copy a module with all its weights; under tensor parallelism with this rank's parts of them."""
    parts = [weight for weight in module.parameters() if isinstance(weight, DTensor)]  # deepcopy cannot copy these
    with whole_partitions(module.parameters()):
        return _copied(module, {id(part): nn.Parameter(part.detach().clone(), part.requires_grad) for part in parts})


def skeleton(module: M) -> M:
    """Copy a module without its weights: in their place stand parameters on the meta device, shared as they are."""
    empty = {
        id(weight): nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
        for weight in module.parameters()
    }
    return _copied(module, empty)


@contextmanager
def whole_partitions(weights: Iterable[Tensor]) -> Iterator[None]:
    """While entered, weights that DeepSpeed ZeRO-3 has partitioned are whole on this rank; every rank must enter."""
    partitioned = [weight for weight in weights if hasattr(weight, "ds_id")]
    if partitioned:
        from deepspeed.runtime.zero import GatheredParameters

        gather = GatheredParameters(partitioned)
    with gather if partitioned else nullcontext():
        yield


@contextmanager
def read_whole() -> Iterator[None]:
    """While entered, models are read with all weights on every rank, whatever the launch profile does with a policy.

    For models that no engine wraps: ZeRO-3 and tensor parallelism would split them as they are read, FSDP2 let one rank
    read them for all.
    """
    from transformers.integrations import deepspeed

    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    profile = {name: os.environ.pop(name) for name in _SPLITTING if name in os.environ}
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
        os.environ.update(profile)


@contextmanager
def tied_by_whole_weights() -> Iterator[None]:
    """While entered, ``from_pretrained`` compares whole weights where it decides whether two are one.

    Pieces of ZeRO-3 are empty where it looks, so that all seem equal: an untied head would become the embedding.
    """
    models: Any = PreTrainedModel
    tie = models.tie_weights

    @wraps(tie)
    def tie_whole(model: Any, *args: Any, **options: Any) -> None:
        names = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        parameters = model.named_parameters(remove_duplicate=False)
        with whole_partitions([weight for name, weight in parameters if name in names]):
            tie(model, *args, **options)

    PreTrainedModel.tie_weights = tie_whole  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedModel.tie_weights = tie  # type: ignore[method-assign]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of the context, then the mode that was before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _copied(module: M, memo: dict[int, Any]) -> M:
    for part in module.modules():
        memo |= {id(value): value for value in vars(part).values() if isinstance(value, DeviceMesh)}
    copy = deepcopy(module, memo)
    for part in copy.modules():
        # transformers' tensor parallelism replaces forward by a closure over the module it was made for
        if getattr(vars(part).get("forward"), "__module__", "").startswith("transformers.distributed"):
            del part.forward
    return copy
