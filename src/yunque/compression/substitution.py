"""A torch model for a while with the weights, and the rounding of inputs, that a scheme would give some layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from yunque.compression.schemes import LayerScheme

Rounding = Callable[[str, np.ndarray, LayerScheme], np.ndarray]
"""A layer's name, weight [in, out] and scheme -> the numbers that the kernel computes with."""


@dataclass(frozen=True)
class Target:
    """A layer of a graph in the torch model: the weights fused into it, and the modules that read its input."""

    name: str
    parameters: tuple[str, ...]
    readers: tuple[str, ...]


@contextmanager
def quantized(model: nn.Module, layers: Mapping[Target, LayerScheme], rounding: Rounding) -> Iterator[None]:
    """Let ``layers`` compute as their schemes would, and give back exactly what was there when the context ends."""
    with ExitStack() as stack, torch.no_grad():
        for target, scheme in layers.items():
            if not scheme.is_quantized:
                continue
            stack.callback(_restore, [(weight, weight.clone()) for weight in _weights(model, target)])
            _round_weights(model, target, scheme, rounding)
            hook = _input_hook(scheme)
            if hook is not None:
                for name in target.readers:
                    handle = model.get_submodule(name).register_forward_pre_hook(hook)
                    stack.callback(handle.remove)
        yield


def _weights(model: nn.Module, target: Target) -> list[nn.Parameter]:
    return [model.get_parameter(name) for name in target.parameters]


def _restore(saved: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for weight, values in saved:
            weight.copy_(values)


def _round_weights(model: nn.Module, target: Target, scheme: LayerScheme, rounding: Rounding) -> None:
    """Round the weights as one matrix [in, sum of out], which is how the graph holds them."""
    weights = _weights(model, target)
    # a torch Linear or embedding holds [out, in], GPT-2's Conv1D [in, out]
    turned = [isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) for name in target.parameters]
    parts = [weight if as_is else weight.T for weight, as_is in zip(weights, turned, strict=True)]
    together = torch.cat([part.float() for part in parts], dim=1).cpu().numpy()
    rounded = torch.from_numpy(np.ascontiguousarray(rounding(target.name, together, scheme)))
    widths = [part.shape[1] for part in parts]
    for weight, as_is, values in zip(weights, turned, rounded.split(widths, dim=1), strict=True):
        weight.copy_(values if as_is else values.T)


# --- inputs -----------------------------------------------------------------------------------------------------------


def _input_hook(scheme: LayerScheme) -> Callable[..., Any] | None:
    if scheme.kind == "int8_static" and scheme.input_range is not None:
        low, high = scheme.input_range

        def round_to_uint8(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (uint8_inputs(args[0], low, high), *args[1:])

        return round_to_uint8
    if scheme.kind == "int8_dynamic" or (scheme.kind in ("int4", "int8_weights") and scheme.int8_inputs):

        def round_to_int8(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (int8_blocks(args[0], scheme.block_size or args[0].shape[-1]), *args[1:])

        return round_to_int8
    return None


def uint8_inputs(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` rounded to 256 steps between ``low`` and ``high``, 0 among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    return ((x / scale).round().add(zero).clamp(0, 255) - zero) * scale


def int8_blocks(x: Tensor, block_size: int) -> Tensor:
    """``x`` [..., features] rounded to int8 with a scale for each block of features of each row."""
    features = x.shape[-1]
    padded = nn.functional.pad(x, (0, -features % block_size)).unflatten(-1, (-1, block_size))
    scale = (padded.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
    return ((padded / scale).round() * scale).flatten(-2)[..., :features]
