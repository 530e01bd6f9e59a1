"""Layers of a graph in the precision that a plan gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from yunque.compression.schemes import FLOAT32, LayerScheme, PrecisionPlan
from yunque.errors import InputError
from yunque.export.dequantized import NF4, Packed, input_scale, pack, relative_error, unpack

if TYPE_CHECKING:
    from yunque.compression.ranges import Inputs
    from yunque.export.graph import Graph
    from yunque.export.source import Source

Array = NDArray[Any]

_FEWEST_OUTPUTS = 16
_INT8_COMPUTE, _FLOAT32_COMPUTE = 4, 1
"""Accuracy levels of MatMulNBits."""


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


@dataclass(frozen=True)
class Written:
    """What became of a layer."""

    layer: Layer
    scheme: LayerScheme
    reason: str  # why it is not in the scheme of the plan; empty when it is
    num_bytes: int  # of values and scales
    error: float  # of its outputs on the inputs that were seen, else of its weight; relative to their norm

    @property
    def float32_bytes(self) -> int:
        """Bytes it had."""
        return 4 * self.layer.shape[0] * self.layer.shape[1]


@dataclass
class Precision:
    """A plan while graphs are written by it, and what became of every layer by its name."""

    plan: PrecisionPlan = field(default_factory=PrecisionPlan)
    inputs: Mapping[str, Inputs] = field(default_factory=dict)
    """What was seen of each layer's inputs, where they were measured."""
    written: dict[str, Written] = field(default_factory=dict)
    tables: dict[str, Packed] = field(default_factory=dict)
    """Heads and embeddings, which several graphs hold."""

    def pack(self, layer: Layer, weight: Array) -> tuple[LayerScheme, Packed | None]:
        """``weight`` [in, out] of ``layer`` in its scheme, and None where that is float32."""
        wanted = self.plan.scheme(layer.name)
        reason = reason_to_leave(layer, wanted)
        if reason or not wanted.is_quantized:
            self.written[layer.name] = Written(layer, FLOAT32, reason, 4 * weight.size, 0.0)
            return FLOAT32, None
        seen = self.inputs.get(layer.name)
        packed = pack(weight, wanted, None if seen is None else seen.importance)
        error = relative_error(
            weight, unpack(packed, layer.shape, wanted), wanted, None if seen is None else seen.sample
        )
        self.written[layer.name] = Written(layer, wanted, "", packed.nbytes, error)
        return wanted, packed

    def table(self, layer: Layer, table: Array) -> tuple[LayerScheme, Packed | None]:
        """``table`` [vocabulary, features] of a head or an embedding, packed once."""
        if layer.name in self.tables:
            return self.written[layer.name].scheme, self.tables[layer.name]
        scheme, packed = self.pack(layer, table.T)
        if packed is not None:
            self.tables[layer.name] = packed
        return scheme, packed


def quantizable_layers(source: Source) -> list[Layer]:
    """The layers of all graphs of ``source``, without writing anything."""
    from yunque.export.weights import Unwritten

    precision = Precision()
    source.graphs(Unwritten(), precision)
    return [written.layer for written in precision.written.values()]


def reason_to_leave(layer: Layer, scheme: LayerScheme) -> str:
    """Why the kernel of ``scheme`` cannot compute ``layer``, which then stays float32; empty where it can."""
    inputs, outputs = layer.shape
    size = scheme.block_size
    if not scheme.is_quantized:
        return ""
    if outputs < _FEWEST_OUTPUTS:
        return f"its {outputs} outputs are not worth a scale"
    if size and layer.role != "linear" and inputs % size:
        return f"rows of {inputs} features cannot be looked up in blocks of {size}"
    if scheme.kind == "nf4" and inputs % 2:
        return f"{inputs} inputs are no whole bytes"
    if scheme.kind == "int8_static" and scheme.input_range is None and layer.role != "embedding":
        raise InputError(f"plan: {layer.name} is int8_static and has no input_range; give calibration data")
    return ""


def applied(plan: PrecisionPlan, layer: Layer) -> LayerScheme:
    """The scheme that ``layer`` really gets."""
    scheme = plan.scheme(layer.name)
    return FLOAT32 if reason_to_leave(layer, scheme) else scheme


def layer_module(source: Source, layer: Layer) -> Any:
    """The torch module whose inputs are those of ``layer``."""
    if layer.role == "head":
        return source.model.get_output_embeddings()
    return source.model.get_submodule(layer.parameters[0].removesuffix(".weight"))


def expected_bytes(layer: Layer, scheme: LayerScheme) -> int:
    """Bytes of values and scales of ``layer`` in ``scheme``."""
    inputs, outputs = layer.shape
    size = scheme.block_size or 1
    if scheme.kind == "nf4":
        return -(-inputs * outputs // 2) + 4 * -(-inputs * outputs // size)
    if scheme.kind in ("int4", "int8_weights"):
        return outputs * -(-inputs // size) * (size // (2 if scheme.kind == "int4" else 1) + 4)
    return inputs * outputs + 4 * outputs if scheme.is_quantized else 4 * inputs * outputs


# --- linear layers ----------------------------------------------------------------------------------------------------


def linear(graph: Graph, value: str, name: str, weight: Array, parameters: tuple[str, ...], bias: Array | None) -> str:
    """``value`` [..., in] times ``weight`` [in, out] plus ``bias`` [out], in the precision of the plan."""
    layer = Layer(name, parameters, (weight.shape[0], weight.shape[1]), "linear")
    scheme, packed = graph.precision.pack(layer, weight)
    if packed is None:
        return _float32(graph, value, name, weight, bias)
    if scheme.kind in ("int8_dynamic", "int8_static"):
        return _int8(graph, _int8_inputs(graph, value, scheme), name, packed, bias)
    bias_name = "" if bias is None else graph.weight(f"{name}.bias", bias)
    return _blockwise(graph, value, name, name, packed, scheme, layer.shape, bias_name)


def linear_parts(
    graph: Graph,
    value: str,
    name: str,
    weight: Array,
    parameters: tuple[str, ...],
    bias: Array | None,
    sizes: Sequence[int],
) -> list[str]:
    """The outputs of ``linear`` in parts of ``sizes``: products of their own, which saves copies of long inputs.

    Kernels whose weights lie in blocks compute one product, which is split.
    """
    layer = Layer(name, parameters, (weight.shape[0], weight.shape[1]), "linear")
    if graph.precision.plan.scheme(name).block_size:
        return graph.split(linear(graph, value, name, weight, parameters, bias), sizes, axis=-1)
    scheme, packed = graph.precision.pack(layer, weight)
    ends = np.cumsum(sizes)[:-1]
    biases = [None] * len(sizes) if bias is None else np.split(bias, ends)
    names = [f"{name}.{number}" for number in range(len(sizes))]
    if packed is None:
        parts = zip(names, np.split(weight, ends, axis=1), biases, strict=True)
        return [_float32(graph, value, part, columns, shift) for part, columns, shift in parts]
    inputs = _int8_inputs(graph, value, scheme)
    cut = map(Packed, np.split(packed.values, ends, axis=1), np.split(packed.scales, ends))
    return [_int8(graph, inputs, part, own, shift) for part, own, shift in zip(names, cut, biases, strict=True)]


def _float32(graph: Graph, value: str, name: str, weight: Array, bias: Array | None) -> str:
    product = graph.op("MatMul", value, graph.weight(f"{name}.weight", weight))
    return product if bias is None else graph.op("Add", product, graph.weight(f"{name}.bias", bias))


class _Inputs(NamedTuple):
    """8-bit inputs, their scale and zero point, and what a product with them is multiplied by per row, if anything."""

    values: str
    scale: str
    zero: str
    largest: str = ""


def _int8_inputs(graph: Graph, value: str, scheme: LayerScheme) -> _Inputs:
    return _row_inputs(graph, value) if scheme.kind == "int8_dynamic" else _static_inputs(graph, value, scheme)


def _int8(graph: Graph, inputs: _Inputs, name: str, packed: Packed, bias: Array | None) -> str:
    values = graph.weight(f"{name}.weight_int8", packed.values)
    scales = graph.weight(f"{name}.weight_scale", packed.scales)
    shift = [] if bias is None else [graph.weight(f"{name}.bias", bias)]
    given = (inputs.values, values, inputs.scale, scales, inputs.zero)
    if not inputs.largest:
        return graph.contrib("MatMulIntegerToFloat", *given, *(["", *shift] if shift else []))
    product = graph.op("Mul", graph.contrib("MatMulIntegerToFloat", *given), inputs.largest)
    return graph.op("Add", product, *shift) if shift else product


def _row_inputs(graph: Graph, value: str) -> _Inputs:
    """Each row over its largest magnitude, as uint8.

    The kernels that quantize inputs themselves take one scale for all rows: an answer would depend on which others it
    shares a batch with, and on their padding. By row it does not, to the last bit, and the error is smaller. A row of
    zeros becomes numbers without meaning, which its largest magnitude, 0, makes zeros again.
    """
    largest = graph.op("ReduceMax", graph.op("Abs", value), graph.constant([-1], "int64"), keepdims=1)
    scale, zero = graph.constant(1 / 127, "float32"), graph.constant(128, "uint8")
    quantized = graph.op("QuantizeLinear", graph.op("Div", value, largest), scale, zero)
    return _Inputs(quantized, scale, zero, largest)


def _static_inputs(graph: Graph, value: str, scheme: LayerScheme) -> _Inputs:
    assert scheme.input_range is not None
    number, zero_point = input_scale(*scheme.input_range)
    scale, zero = graph.constant(number, "float32"), graph.constant(zero_point, "uint8")
    return _Inputs(graph.op("QuantizeLinear", value, scale, zero), scale, zero)


def _blockwise(
    graph: Graph,
    value: str,
    name: str,
    key: str,
    packed: Packed,
    scheme: LayerScheme,
    shape: tuple[int, int],
    bias: str = "",
) -> str:
    """A product with weights that have a scale per block; ``key`` names their bytes in the weights file."""
    values = graph.weight(f"{name}.weight_{scheme.kind}", packed.values, f"{key}.weight_{scheme.kind}")
    scales = graph.weight(f"{name}.weight_scale", packed.scales, f"{key}.weight_scale")
    sizes = {"K": shape[0], "N": shape[1], "block_size": scheme.block_size}
    if scheme.kind == "nf4":
        product = graph.contrib("MatMulBnb4", value, values, scales, quant_type=1, **sizes)
        return graph.op("Add", product, bias) if bias else product
    return graph.contrib(
        "MatMulNBits", value, values, scales, *(["", "", bias] if bias else []),
        bits=4 if scheme.kind == "int4" else 8,
        accuracy_level=_INT8_COMPUTE if scheme.int8_inputs else _FLOAT32_COMPUTE, **sizes,
    )  # fmt: skip


# --- heads and embeddings ---------------------------------------------------------------------------------------------


def head(graph: Graph, value: str, name: str, weight: Array, key: str, scale: float, bias: Array | None) -> str:
    """Logits [rows, vocabulary] of ``value`` [rows, features] by ``weight`` [vocabulary, features].

    ``key`` is the name of the embedding where that is the same matrix, whose bytes then serve both.
    """
    layer_name = name.removesuffix(".weight")
    layer = Layer(layer_name, (key,), (weight.shape[1], weight.shape[0]), "head")
    scheme, packed = graph.precision.table(layer, weight)
    bias_name = "" if bias is None or not bias.any() else graph.weight(f"{layer_name}.bias", bias.reshape(-1))
    if packed is None:
        inputs = [value, graph.weight(name, weight, key), *([bias_name] if bias_name else [])]
        return graph.op("Gemm", *inputs, transB=1, alpha=scale)
    if scheme.kind not in ("int8_dynamic", "int8_static"):
        value = value if scale == 1 else graph.op("Mul", value, graph.constant(scale, "float32"))
        return _blockwise(graph, value, layer_name, key, packed, scheme, (weight.shape[1], weight.shape[0]), bias_name)
    if scheme.kind == "int8_static" and scale != 1:  # the range was measured of scaled inputs
        value, scale = graph.op("Mul", value, graph.constant(scale, "float32")), 1.0
    given = _int8_inputs(graph, value, scheme)
    values = graph.weight(f"{layer_name}.weight_int8", packed.values.T, f"{key}.weight_int8")
    scales = graph.weight(f"{layer_name}.weight_scale", packed.scales, f"{key}.weight_scale")
    zeros = graph.weight(f"{layer_name}.weight_zero", np.zeros(len(packed.scales), np.int8))
    logits = graph.contrib("QGemm", given.values, given.scale, given.zero, values, scales, zeros, transB=1, alpha=scale)
    logits = graph.op("Mul", logits, given.largest) if given.largest else logits
    return graph.op("Add", logits, bias_name) if bias_name else logits


def embedding(graph: Graph, ids: str, name: str, table: Array, tied_to: str = "") -> str:
    """Rows ``ids`` of ``table`` [vocabulary, features]; ``tied_to`` names the head that is the same matrix."""
    layer_name = (tied_to or name).removesuffix(".weight")
    role: Literal["head", "embedding"] = "head" if tied_to else "embedding"
    layer = Layer(layer_name, (name,), (table.shape[1], table.shape[0]), role)
    scheme, packed = graph.precision.table(layer, table)
    if packed is None:
        return graph.op("Gather", graph.weight(name, table), ids, axis=0)
    if scheme.kind in ("int8_dynamic", "int8_static"):
        values = graph.weight(f"{name}.rows_int8", packed.values.T, f"{name}.weight_int8")
        scales = graph.weight(f"{name}.rows_scale", packed.scales[:, None], f"{name}.weight_scale")
        found = graph.op("Cast", graph.op("Gather", values, ids, axis=0), to=1)  # float32
        return graph.op("Mul", found, graph.op("Gather", scales, ids, axis=0))
    values = graph.weight(
        f"{name}.rows_{scheme.kind}", packed.values.reshape(len(table), -1), f"{name}.weight_{scheme.kind}"
    )
    if scheme.kind == "nf4":
        return _nf4_rows(graph, ids, name, values, packed.scales.reshape(len(table), -1, 1), table.shape[1])
    scales = graph.weight(f"{name}.rows_scale", packed.scales, f"{name}.weight_scale")
    return graph.contrib(
        "GatherBlockQuantized", values, ids, scales,
        gather_axis=0, quantize_axis=1, block_size=scheme.block_size, bits=4 if scheme.kind == "int4" else 8,
    )  # fmt: skip


def _nf4_rows(graph: Graph, ids: str, name: str, values: str, absmax: Array, features: int) -> str:
    """Rows of nf4 values, for which there is no operator: each byte is looked up as its two numbers."""
    numbers = np.stack([np.repeat(NF4, 16), np.tile(NF4, 16)], axis=1)  # [bytes, 2], the high half first
    bytes_found = graph.op("Cast", graph.op("Gather", values, ids, axis=0), to=6)  # int32
    pairs = graph.op("Gather", graph.weight("nf4.pairs", numbers), bytes_found, axis=0)
    blocks = graph.op("Reshape", pairs, graph.constant([0, 0, absmax.shape[1], -1], "int64"))
    scales = graph.op("Gather", graph.weight(f"{name}.rows_scale", absmax, f"{name}.weight_scale"), ids, axis=0)
    return graph.op("Reshape", graph.op("Mul", blocks, scales), graph.constant([0, 0, features], "int64"))
