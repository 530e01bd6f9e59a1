"""The weights of a model that an engine has split over the ranks, gathered for one rank to save."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor


def gathered_weights(accelerator: Accelerator, model: Any, wrapped: Any) -> dict[str, Tensor] | None:
    """Whole weights of ``model`` on the main process's CPU, those that train only if it has adapters.

    ``wrapped`` is what the engine made of it. None where every rank holds whole weights (one rank, DDP, ZeRO-1 and 2).
    To be called on every rank; the others get an empty dict.
    """
    adapters_only = isinstance(model, PeftModel)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage < 3:
            return None
        return wrapped._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapters_only) or {}
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    gathered: dict[Any, Tensor] = {}  # what has two names is one tensor, or it would be saved twice
    for name, value in model.state_dict().items():
        if adapters_only and not (name in parameters and parameters[name].requires_grad):
            continue
        key = id(parameters[name]) if name in parameters else name
        if key not in gathered:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            gathered[key] = whole.detach().cpu() if accelerator.is_main_process else torch.empty(0)
        found[name] = gathered[key]
    return found if accelerator.is_main_process else {}
