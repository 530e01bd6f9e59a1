"""DeepSpeed's ZeRO by parameter name, through its own accessors of partitioned parameters and optimizer state."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yunque.errors import InputError


def holds(model: nn.Module) -> bool:
    """Whether a DeepSpeed engine has wrapped ``model``."""
    deepspeed = sys.modules.get("deepspeed")  # no engine without it, and importing it takes seconds
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def forget_forward_passes(engine: Any) -> None:
    """Let ZeRO-3 forget the order of the modules it has seen so far, by which it would gather weights in training."""
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is not None and not offload.get_param_coordinator().is_invalid_trace():
        offload.get_param_coordinator()._invalidate_trace()


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape: ZeRO-3 leaves an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gather(
    engine: Any, parameters: Mapping[str, nn.Parameter], *, rank: int, ranks: int
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Master weights and moments on the CPU, every so many-th parameter on this rank, and the optimizer's step."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _check(engine, parameters)
    _link_state(engine)
    flat = _flat_parameters(engine)[0]
    state = _base(engine).state.get(flat, {})
    kinds = sorted(key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape)
    tensors: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        whole = {"weight": safe_get_full_fp32_param(parameter)}  # every rank takes part in gathering it
        whole |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in kinds}
        if number % ranks == rank:
            for kind, value in whole.items():
                tensors[f"{kind}/{name}"] = value.detach().reshape(shape_of(parameter)).cpu().clone()
    step = state.get("step", _base(engine).param_groups[0].get("step"))
    scalars = {} if step is None else {name: {"step": float(step)} for name in parameters}
    return tensors, scalars


def make_state(engine: Any, kinds: Sequence[str], scalars: Mapping[str, Mapping[str, float]]) -> None:
    """Give the flat pieces of a fresh engine an optimizer state to load into, as its first step would."""
    base = _base(engine)
    steps = [numbers["step"] for numbers in scalars.values() if "step" in numbers]
    for flat in _flat_parameters(engine):
        state = base.state[flat]
        for kind in kinds:
            state.setdefault(kind, torch.zeros_like(flat))
        if steps:
            is_torch = type(base).__module__.startswith("torch.")
            state["step"] = torch.tensor(max(steps)) if is_torch else int(max(steps))
    for group in base.param_groups:
        if steps and "step" in group:  # where DeepSpeed's fused Adam counts
            group["step"] = int(max(steps))
    _link_state(engine)


def scatter(parameter: nn.Parameter, value: Tensor, kind: str | None) -> None:
    """Put this rank's piece of a whole weight (``kind`` None) or moment where the engine keeps it."""
    from deepspeed import comm
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from deepspeed.utils.tensor_fragment import safe_set_local_fp32_param, safe_set_local_optimizer_state

    held: Any = parameter
    if not hasattr(held, "ds_id"):
        value = value.to(held.device, torch.float32)
        if kind is not None:
            return safe_set_full_optimizer_state(parameter, value, kind)
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)  # what the forward pass reads
        return None
    # safe_set_full_* would read past the end of a parameter that does not divide by the ranks
    size = held.ds_tensor.numel()
    start = comm.get_rank(group=held.ds_process_group) * size
    piece = torch.zeros(size, dtype=torch.float32)
    part = value.flatten()[start : start + size]
    piece[: len(part)] = part
    if kind is not None:
        return safe_set_local_optimizer_state(parameter, piece, kind)
    safe_set_local_fp32_param(parameter, piece)
    held.ds_tensor.data.copy_(piece)
    if parameter.numel():  # small parameters stay gathered
        parameter.data.copy_(value.reshape(held.ds_shape))
    return None


def _check(engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
            raise InputError(f"launch profile: DeepSpeed without ZeRO partitions keeps no state of {name}; use ddp")


def _link_state(engine: Any) -> None:
    """Let stages 1 and 2 find the moments of a parameter: they look once, when only the first group has stepped."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _base(engine: Any) -> Any:
    """The optimizer that ZeRO drives."""
    return engine.optimizer.optimizer


def _flat_parameters(engine: Any) -> list[Tensor]:
    """The flat pieces of parameters that this rank's optimizer updates."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in _base(engine).param_groups for parameter in group["params"]]
