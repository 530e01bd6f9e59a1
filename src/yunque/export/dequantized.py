"""The numbers that ONNX Runtime's kernels keep and compute with, in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from yunque.compression.schemes import LayerScheme

Array = NDArray[Any]
Floats = NDArray[np.float32]

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""Quantiles of the normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""
_NF4_BORDERS = (NF4[1:] + NF4[:-1]) / 2
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Scales that are tried for a block of 4-bit weights, relative to the one that cuts nothing off."""
_ROWS_AT_A_TIME = 1 << 22
"""Weights that are searched at a time: bounds memory."""


class Packed(NamedTuple):
    """A weight as its kernel takes it.

    int8: values [in, out], scales [out]. Per block: values [out, blocks, bytes of a block], scales [out, blocks].
    nf4: both flat, in the order of [out, in].
    """

    values: Array
    scales: Floats

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return int(self.values.nbytes + self.scales.nbytes)


def pack(weight: Array, scheme: LayerScheme, importance: Array | None = None) -> Packed:
    """Quantize ``weight`` [in, out]; ``importance`` [in] weighs its errors where a scale is searched for (int4)."""
    if scheme.kind in ("int8_dynamic", "int8_static"):
        scales = _or_one(np.abs(weight).max(axis=0) / np.float32(127))
        return Packed(np.rint(weight / scales).astype(np.int8), scales)
    if scheme.kind == "nf4":
        return _pack_nf4(weight, int(scheme.block_size or 0))
    blocks, weights_of_errors = _blocks(weight, importance, int(scheme.block_size or 0))
    bits = 4 if scheme.kind == "int4" else 8
    parts = max(1, blocks.size // _ROWS_AT_A_TIME)
    packed = [_pack_blocks(part, weights_of_errors, bits) for part in np.array_split(blocks, parts)]
    return Packed(*(np.concatenate(arrays) for arrays in zip(*packed, strict=True)))


def unpack(packed: Packed, shape: tuple[int, int], scheme: LayerScheme) -> Floats:
    """The weight ``shape`` [in, out] that the kernel of ``scheme`` multiplies with."""
    values, scales = packed
    if scheme.kind in ("int8_dynamic", "int8_static"):
        return values.astype(np.float32) * scales
    if scheme.kind == "nf4":
        indices = np.stack([values >> 4, values & 15], axis=-1).reshape(-1)[: shape[0] * shape[1]]
        spread = np.repeat(scales, int(scheme.block_size or 0))[: indices.size]
        return np.asarray((NF4[indices] * spread).reshape(shape[::-1]).T)
    middle = 128
    if scheme.kind == "int4":
        values, middle = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:2], -1), 8
    floats = (values.astype(np.float32) - middle) * scales[..., None]
    return np.asarray(floats.reshape(shape[1], -1)[:, : shape[0]].T)


def quantize_dequantize(weight: Array, scheme: LayerScheme, importance: Array | None = None) -> Floats:
    """``weight`` [in, out] as the kernel of ``scheme`` sees it: quantized and back to float32."""
    if not scheme.is_quantized:
        return np.asarray(weight, np.float32)
    inputs, outputs = weight.shape
    return unpack(pack(weight, scheme, importance), (inputs, outputs), scheme)


def quantized_inputs(inputs: Array, scheme: LayerScheme) -> Floats:
    """``inputs`` [rows, in] as the kernel of ``scheme`` sees them; int8_static without a range takes theirs."""
    if scheme.kind == "int8_dynamic":
        largest = np.maximum(np.abs(inputs).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return np.asarray(np.rint(inputs / largest / np.float32(1 / 127)) * np.float32(1 / 127) * largest, np.float32)
    if scheme.kind == "int8_static":
        low, high = scheme.input_range or (float(inputs.min()), float(inputs.max()))
        scale, zero = input_scale(low, high)
        return (np.clip(np.rint(inputs / scale) + zero, 0, 255) - zero).astype(np.float32) * scale
    if scheme.kind in ("int8_weights", "int4") and scheme.int8_inputs:
        size = int(scheme.block_size or 0)
        padded = np.pad(inputs, ((0, 0), (0, -inputs.shape[1] % size)))
        blocks = padded.reshape(len(inputs), -1, size)
        scales = _or_one(np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127))
        return np.asarray((np.rint(blocks / scales) * scales).reshape(padded.shape)[:, : inputs.shape[1]], np.float32)
    return np.asarray(inputs, np.float32)


def input_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 inputs in [``low``, ``high``], 0 among them, as ONNX's DynamicQuantizeLinear."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    return scale, np.uint8(np.clip(np.rint(-np.float32(low) / scale), 0, 255))


def relative_error(weight: Array, quantized: Array, scheme: LayerScheme, rows: Array | None) -> float:
    """Size of the error of a layer's outputs on ``rows`` [rows, in], or of its weight, by that of the right ones."""
    if rows is None:
        return _relative(quantized - weight, weight)
    wanted = rows @ weight
    return _relative(quantized_inputs(rows, scheme) @ quantized - wanted, wanted)


def _relative(error: Array, wanted: Array) -> float:
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(error)) / size if size else 0.0


# --- packing ----------------------------------------------------------------------------------------------------------


def _or_one(scales: Array) -> Floats:
    """Without zeros, which weights that are all 0 have."""
    return np.where(scales == 0, np.float32(1), scales).astype(np.float32)


def _blocks(weight: Array, importance: Array | None, size: int) -> tuple[Floats, Floats]:
    """[out, blocks, size] of ``weight``, filled up with zeros, and the importance [blocks, size] of each input."""
    inputs = weight.shape[0]
    missing = -inputs % size
    padded = np.pad(np.asarray(weight, np.float32).T, ((0, 0), (0, missing)))
    matters = np.ones(inputs, np.float32) if importance is None else importance.astype(np.float32)
    return padded.reshape(len(padded), -1, size), np.pad(matters, (0, missing)).reshape(-1, size)


def _pack_blocks(blocks: Floats, importance: Floats, bits: int) -> tuple[Array, Floats]:
    """Values [out, blocks, bytes] and scales [out, blocks].

    The value of largest size becomes the end of the range that has one value more, as it need not be cut off there. Of
    a few smaller scales the one with the least squared error, weighed by ``importance``, is taken for 4 bits.
    """
    middle = 1 << (bits - 1)
    places = np.abs(blocks).argmax(axis=2)[..., None]
    widest = np.take_along_axis(blocks, places, axis=2)[..., 0] / np.float32(-middle)
    best_scales, best_errors = widest, np.full(widest.shape, np.inf, np.float32)
    for shrink in _SHRINKS if bits == 4 else ():
        scales = _or_one(widest * np.float32(shrink))
        values = _rounded(blocks, scales, middle)
        errors = np.einsum("obi,bi->ob", np.square(values * scales[..., None] - blocks), importance)
        better = errors < best_errors
        best_errors = np.where(better, errors, best_errors)
        best_scales = np.where(better, scales, best_scales)
    best_scales = _or_one(best_scales)
    whole = (_rounded(blocks, best_scales, middle) + middle).astype(np.uint8)
    return (whole if bits == 8 else whole[..., 0::2] | whole[..., 1::2] << 4), best_scales


def _rounded(blocks: Floats, scales: Floats, middle: int) -> Floats:
    return np.clip(np.rint(blocks / scales[..., None]), -middle, middle - 1)


def _pack_nf4(weight: Array, size: int) -> Packed:
    flat = np.asarray(weight, np.float32).T.reshape(-1)
    padded = np.pad(flat, (0, -flat.size % size)).reshape(-1, size)
    scales = np.abs(padded).max(axis=1)
    indices = np.searchsorted(_NF4_BORDERS, padded / _or_one(scales)[:, None]).astype(np.uint8).reshape(-1)
    indices = indices[: flat.size + flat.size % 2]
    return Packed(indices[0::2] << 4 | indices[1::2], scales)
