"""Rollouts at the base model's speed: LoRA updates folded into the weights for the time of a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """While entered, W carries its active adapter's update W + (alpha / r) B A, and leaves exactly as it came.

    Saves the adapter's two products per layer and token. Where folding would not be exact (half precision, quantised
    or sharded weights, DoRA, layers saved whole) the model stays as it is.
    """
    layers = _foldable_layers(model)
    if not layers:
        yield
        return
    originals = [layer.get_base_layer().weight.data for layer in layers]
    try:
        with torch.no_grad():
            for layer, original in zip(layers, originals, strict=True):
                update = sum(layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A)
                layer.get_base_layer().weight.data = original + update
        with model.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.get_base_layer().weight.data = original


def _foldable_layers(model: nn.Module) -> list[Any]:
    """The adapted layers, if every one of them can be folded; else none."""
    if not isinstance(model, PeftModel):
        return []
    if any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
        return []
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return layers if all(_is_foldable(layer) for layer in layers) else []


def _is_foldable(layer: Any) -> bool:
    if type(layer) is not LoraLinear or layer.disable_adapters or layer.merged:
        return False
    weight = layer.get_base_layer().weight
    plain = type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.numel() > 0
    return plain and not any(layer.use_dora.get(name, False) for name in layer.active_adapters)
