"""Write an ONNX graph node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from yunque.export import quantized
from yunque.export.quantized import Precision
from yunque.export.weights import WEIGHTS, WeightFile

OPSET = 21
IR_VERSION = 10  # what onnxruntime 1.23, the oldest we support, reads
_CONTRIB = "com.microsoft"
_INLINE_BYTES = 1024

Array = NDArray[Any]
Config = Any
"""A model's configuration in transformers, which types as optional what every model of a family has."""
State = Mapping[str, Array]
"""A model's weights by their names in its state dict."""

_ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "relu": ("Relu", "", {}),
    "tanh": ("Tanh", "", {}),
    "gelu": ("Gelu", _CONTRIB, {}),
    "gelu_new": ("FastGelu", _CONTRIB, {}),
    "gelu_fast": ("FastGelu", _CONTRIB, {}),
    "gelu_pytorch_tanh": ("FastGelu", _CONTRIB, {}),
    "silu": ("QuickGelu", _CONTRIB, {"alpha": 1.0}),  # x * sigmoid(alpha x)
    "swish": ("QuickGelu", _CONTRIB, {"alpha": 1.0}),
    "quick_gelu": ("QuickGelu", _CONTRIB, {"alpha": 1.702}),
}
ACTIVATIONS = frozenset(_ACTIVATIONS)


class Matrix(NamedTuple):
    """The weight of a linear layer."""

    array: Array  # [in, out]
    parameters: tuple[str, ...]  # names in the state dict of what lies side by side in it


class Graph:
    """A graph under construction; every method returns the names of the values it makes."""

    def __init__(self, name: str, weights: WeightFile, precision: Precision | None = None) -> None:
        self.name = name
        self.precision = precision or Precision()
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._count = 0

    def input(self, name: str, dtype: str, shape: Sequence[str | int]) -> str:
        """Declare an input; ``dtype`` is a NumPy name, named dimensions are dynamic."""
        self._inputs.append(helper.make_tensor_value_info(name, _onnx_type(dtype), shape))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[str | int]) -> None:
        """Declare ``value`` as the output ``name``."""
        for node in self._nodes:
            node.output[:] = [name if made == value else made for made in node.output]
            node.input[:] = [name if used == value else used for used in node.input]
        self._outputs.append(helper.make_tensor_value_info(name, _onnx_type(dtype), shape))

    def ops(self, kind: str, *inputs: str, num_outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        self._count += 1
        names = [f"{kind}_{self._count}" + (f".{index}" if index else "") for index in range(num_outputs)]
        node = helper.make_node(kind, list(inputs), names, name=names[0], domain=domain, **attributes)
        self._nodes.append(node)
        return names

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.ops(kind, *inputs, num_outputs=1, domain=domain, **attributes)[0]

    def contrib(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add one of ONNX Runtime's own operators with one output."""
        return self.op(kind, *inputs, domain=_CONTRIB, **attributes)

    def constant(self, value: Any, dtype: str) -> str:
        """A small constant inside the graph file; equal ones are one."""
        array = np.asarray(value, dtype=dtype)
        name = f"constant_{dtype}_{array.shape}_{array.tobytes().hex()}"
        if len(name) > 120:
            name = f"constant_{len(self._initializers)}"
        self._initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, array: Array, key: str | None = None) -> str:
        """A weight as initializer ``name``; the same ``key`` is written once for all graphs and initializers."""
        if name in self._initializers:
            return name
        if array.nbytes <= _INLINE_BYTES:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
            return name
        region = self._weights.add(key or name, array)
        tensor = TensorProto(name=name, data_type=_onnx_type(array.dtype.name), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for field, value in (("location", WEIGHTS), ("offset", region.offset), ("length", region.length)):
            tensor.external_data.add(key=field, value=str(value))
        self._initializers[name] = tensor
        return name

    def split(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Parts of ``value`` of these sizes along ``axis``."""
        return self.ops("Split", value, self.constant(sizes, "int64"), num_outputs=len(sizes), axis=axis)

    # --- layers -------------------------------------------------------------------------------------------------------

    def linear(self, value: str, name: str, weight: Matrix, bias: Array | None = None) -> str:
        """``value`` [..., in] times ``weight`` [in, out] plus ``bias`` [out], in the precision of the plan."""
        return quantized.linear(self, value, name, weight.array, weight.parameters, bias)

    def linear_parts(
        self, value: str, name: str, weight: Matrix, sizes: Sequence[int], bias: Array | None = None
    ) -> list[str]:
        """The outputs of ``linear`` in parts of these sizes, without a copy where the precision allows it."""
        return quantized.linear_parts(self, value, name, weight.array, weight.parameters, bias, sizes)

    def embedding(self, ids: str, name: str, table: Array, tied_to: str = "") -> str:
        """Rows ``ids`` of ``table`` [vocabulary, features]; ``tied_to`` names the head that is the same matrix."""
        return quantized.embedding(self, ids, name, table, tied_to)

    def activation(self, value: str, kind: str) -> str:
        """An activation by its name in transformers, one of ``ACTIVATIONS``."""
        operator, domain, attributes = _ACTIVATIONS[kind]
        return self.op(operator, value, domain=domain, **attributes)

    def rms_norm(self, value: str, name: str, weight: Array, epsilon: float) -> str:
        """RMS normalization over the last axis: x / rms(x) * weight."""
        return self.op(
            "SimplifiedLayerNormalization",
            value, self.weight(name, weight), axis=-1, epsilon=epsilon, stash_type=1,
        )  # fmt: skip

    def add_rms_norm(self, value: str, skip: str, name: str, weight: Array, epsilon: float) -> tuple[str, str]:
        """RMS norm of ``value + skip`` (both [batch, length, features]), and that sum."""
        outputs = self.ops(
            "SkipSimplifiedLayerNormalization", value, skip, self.weight(name, weight),
            num_outputs=4, domain=_CONTRIB, epsilon=epsilon,
        )  # fmt: skip
        self._nodes[-1].output[1] = self._nodes[-1].output[2] = ""
        return outputs[0], outputs[3]

    def layer_norm(self, value: str, name: str, weight: Array, bias: Array, epsilon: float) -> str:
        """Layer normalization over the last axis."""
        parameters = (self.weight(f"{name}.weight", weight), self.weight(f"{name}.bias", bias))
        return self.op("LayerNormalization", value, *parameters, axis=-1, epsilon=epsilon)

    def add_layer_norm(
        self, value: str, skip: str, name: str, weight: Array, bias: Array, epsilon: float, value_bias: str = ""
    ) -> tuple[str, str]:
        """Layer normalization of ``value + value_bias + skip``, and that sum."""
        outputs = self.ops(
            "SkipLayerNormalization",
            *(value, skip, self.weight(f"{name}.weight", weight), self.weight(f"{name}.bias", bias), value_bias),
            num_outputs=4, domain=_CONTRIB, epsilon=epsilon,
        )  # fmt: skip
        self._nodes[-1].output[1] = self._nodes[-1].output[2] = ""
        return outputs[0], outputs[3]

    def model(self) -> onnx.ModelProto:
        """The finished model; its large weights stay in the weights file."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="yunque")


def _onnx_type(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def transposed(state: State, name: str) -> Matrix:
    """A torch ``Linear`` weight, which is kept as [out, in]."""
    return Matrix(state[name].T, (name,))


def untransposed(state: State, name: str) -> Matrix:
    """The weight of a ``Conv1D``, which is kept as [in, out]."""
    return Matrix(state[name], (name,))


def fused(state: State, *names: str) -> Matrix:
    """The ``Linear`` weights ``names`` side by side, as one [in, sum of out]."""
    return Matrix(np.concatenate([state[name] for name in names], axis=0).T, names)


def fused_bias(state: State, *names: str) -> Array | None:
    """The biases ``names`` one after the other; None when the layers have none."""
    return np.concatenate([state[name] for name in names]) if names[0] in state else None
