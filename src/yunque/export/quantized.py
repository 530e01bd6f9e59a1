"""Layers of a graph in the precision that a plan gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from yunque.compression.schemes import LayerScheme, PrecisionPlan
    from yunque.export.source import Source


class Layer(NamedTuple):
    """A layer that may be quantized."""

    name: str
    """Its ONNX name, such as "encoder.block.0.layer.0.SelfAttention.qkv"; "lm_head" is the head."""
    parameters: tuple[str, ...]
    """Names in the state dict of the weights fused into it, side by side along the outputs."""
    shape: tuple[int, int]
    """Inputs and outputs; of an embedding, features and vocabulary."""
    role: Literal["linear", "head", "embedding"]
    """A tied embedding is no layer of its own: it is in its head, whose scheme it has."""


def quantizable_layers(source: Source) -> list[Layer]:
    """The layers of all graphs of ``source``, without writing anything."""
    raise NotImplementedError


def reason_to_leave(layer: Layer, scheme: LayerScheme) -> str:
    """Why the kernel of ``scheme`` cannot compute ``layer``, which then stays float32; empty where it can."""
    raise NotImplementedError


def applied(plan: PrecisionPlan, layer: Layer) -> LayerScheme:
    """The scheme that ``layer`` really gets."""
    raise NotImplementedError
