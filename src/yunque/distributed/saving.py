"""The weights of a model that an engine has split over the ranks, gathered for one rank to save."""

from __future__ import annotations

from typing import Any

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
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {}
    for name, value in model.state_dict().items():
        if adapters_only and name not in trained:
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if accelerator.is_main_process:
            found[name] = whole.detach().cpu()
    return found
