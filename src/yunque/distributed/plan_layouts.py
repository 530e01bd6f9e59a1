"""Bytes that each launch profile keeps on one device for a model's weights, gradients and optimizer state.

What our profiles do (all bf16; measured by ``accounting.Meter``, see docs/plan.md): ``cpu``, ``ddp``, ``tp`` and the
FSDP2 profiles keep float32 weights and compute on bf16 copies; ZeRO keeps bf16 weights for computing and float32
masters of what trains with the optimizer. AdamW keeps two float32 moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from yunque.distributed.plan_model import Weight

PROFILES = ("cpu", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload", "tp", "fsdp2_tp")
ZERO = ("zero1", "zero2", "zero3", "zero3_offload")
ZERO3 = ("zero3", "zero3_offload")
SHARDED = ("fsdp2", "fsdp2_tp", *ZERO3)
TENSOR_PARALLEL = ("tp", "fsdp2_tp")
AUTOCAST = ("ddp", "tp")
"""Profiles that compute on bf16 copies, made anew in every step, of float32 weights."""

_FLOAT32, _BFLOAT16 = 4, 2
_MOMENTS = 2 * _FLOAT32
_PERSISTENT = 100_000
"""ZeRO-3 leaves smaller parameters whole on every device (DeepSpeed's stage3_param_persistence_threshold)."""
_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce bucket, which it allocates in full."""
_NF4_BLOCK, _NF4_OUTER_BLOCK = 64, 256
_NF4_TABLES = 2 * 256 * 4 + 4
"""Code tables and offset of a doubly quantized weight."""


@dataclass(frozen=True)
class Layout:
    """A launch profile on so many devices; tensor parallelism over ``tensor_ranks`` of them."""

    profile: str
    devices: int
    tensor_ranks: int = 1
    weight_bytes: int = _FLOAT32
    persistent: int = _PERSISTENT

    @property
    def data_ranks(self) -> int:
        """Devices that work on different rows."""
        return self.devices // self.tensor_ranks


@dataclass(frozen=True)
class Held:
    """Bytes on one device (the one that holds most); ``buffers`` come and go, ``host`` is the CPU's share."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    host: int = 0


def held(weights: Iterable[Weight], layout: Layout, tensor_plan: dict[str, str] | None = None) -> Held:
    """Bytes of ``weights``, their gradients and AdamW's state on one device under ``layout``."""
    local = [_tensor_parallel(weight, layout, tensor_plan or {}) for weight in weights]
    if not local:
        return Held(0, 0, 0, 0)
    if layout.profile in ZERO:
        return _zero(local, layout)
    rank = layout.data_ranks if layout.profile in SHARDED else 1

    def total(size: Callable[[Weight], int], which: Callable[[Weight], bool] = lambda weight: True) -> int:
        return sum(size(weight) for weight in local if which(weight))

    def shard(weight: Weight) -> int:  # FSDP2 splits the first dimension into equal chunks
        return math.ceil(weight.shape[0] / rank) * weight.count // weight.shape[0] if weight.count else 0

    def weight_bytes(weight: Weight) -> int:
        if weight.packed:
            return _nf4_bytes(weight.count) // rank
        return shard(weight) * (_FLOAT32 if weight.trains else layout.weight_bytes)

    trained = total(shard, lambda weight: weight.trains)
    steps = sum(_FLOAT32 for weight in local if weight.trains)
    buffers = 0
    if layout.profile in SHARDED:
        buffers = _gathered(local)
    elif layout.data_ranks > 1:  # DDP's buckets hold a second copy of all gradients
        buffers = _FLOAT32 * trained
    return Held(total(weight_bytes), _FLOAT32 * trained, _MOMENTS * trained + steps, buffers)


def _zero(local: list[Weight], layout: Layout) -> Held:
    ranks, stage = layout.data_ranks, int(layout.profile[4])
    trained = sum(weight.count for weight in local if weight.trains)
    part = math.ceil(trained / ranks)
    optimizer = (_FLOAT32 + _MOMENTS) * part + _FLOAT32
    full = sum(_nf4_bytes(weight.count) if weight.packed else _BFLOAT16 * weight.count for weight in local)
    bucket = _BFLOAT16 * min(_BUCKET, trained)
    if stage < 3:
        # the 16-bit average of the rank's part, and the float32 copy of it that the step works on
        gradients = (_BFLOAT16 + _FLOAT32) * part if stage == 2 else _BFLOAT16 * trained + _FLOAT32 * part
        return Held(full, gradients, optimizer, bucket)
    sizes = [(weight.count, _FLOAT32 if weight.added else _BFLOAT16) for weight in local]
    parts = sum(size * math.ceil(count / ranks) for count, size in sizes)
    whole = sum(size * count for count, size in sizes if count < layout.persistent)
    gradients = (_BFLOAT16 + _FLOAT32) * part
    buffers = bucket + _gathered(local)
    if layout.profile == "zero3_offload":
        return Held(whole, 0, 0, buffers, host=parts + gradients + optimizer)
    return Held(parts + whole, gradients, optimizer, buffers)


def _tensor_parallel(weight: Weight, layout: Layout, plan: dict[str, str]) -> Weight:
    """``weight`` as one tensor-parallel rank holds it: the first dimension split or the second."""
    if layout.tensor_ranks == 1:
        return weight
    layer, _, matrix = weight.name.removesuffix(".weight").removesuffix(".bias").partition(".lora_")
    layer = layer.removesuffix(".base_layer")
    style = next((style for pattern, style in plan.items() if fnmatch(layer, f"*{pattern}")), "")
    dimension = 0 if style.startswith(("colwise", "embedding_rowwise")) else 1 if style.startswith("rowwise") else None
    if matrix and matrix[0] != ("B" if dimension == 0 else "A"):  # the matrix on the side that is not split stays whole
        dimension = None
    if dimension is None or dimension >= len(weight.shape):
        return weight
    shape = list(weight.shape)
    shape[dimension] = math.ceil(shape[dimension] / layout.tensor_ranks)
    return Weight(weight.name, tuple(shape), weight.trains, weight.packed)


def _gathered(weights: list[Weight]) -> int:
    """Bytes of bf16 weights that are whole at one time: two layers, one of which is on its way, and what is in none.

    The gradients of the layer whose turn it is are whole too.
    """
    layers: dict[str, int] = {}
    gradients: dict[str, int] = {}
    outside = 0
    for weight in weights:
        parts = weight.name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        size = _nf4_bytes(weight.count) if weight.packed else _BFLOAT16 * weight.count
        if number is None:
            outside += size
            continue
        layer = ".".join(parts[: number + 1])
        layers[layer] = layers.get(layer, 0) + size
        gradients[layer] = gradients.get(layer, 0) + (_BFLOAT16 * weight.count if weight.trains else 0)
    return outside + 2 * max(layers.values(), default=0) + max(gradients.values(), default=0)


def _nf4_bytes(count: int) -> int:
    """Half a byte a weight, a byte for each block of 64, 4 for each 256 of those (Dettmers et al., 2023, section 3)."""
    blocks = math.ceil(count / _NF4_BLOCK)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / _NF4_OUTER_BLOCK) + _NF4_TABLES
