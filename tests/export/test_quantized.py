"""Graphs of one layer in every scheme against NumPy, and which layers a model has."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from yunque.compression.ranges import Inputs
from yunque.compression.schemes import FLOAT32, LayerScheme, PrecisionPlan
from yunque.errors import InputError
from yunque.export.dequantized import NF4, input_scale, pack, quantize_dequantize, quantized_inputs
from yunque.export.graph import Graph, Matrix
from yunque.export.quantized import Layer, Precision, expected_bytes, head, quantizable_layers, reason_to_leave
from yunque.export.source import Source
from yunque.export.weights import WeightFile

SCHEMES = {
    "int8_dynamic": LayerScheme("int8_dynamic"),
    "int8_static": LayerScheme("int8_static", input_range=(-2.0, 2.5)),  # cuts some inputs off
    "int8_weights": LayerScheme("int8_weights", 16),
    "int8_weights_float_inputs": LayerScheme("int8_weights", 32, int8_inputs=False),
    "int4": LayerScheme("int4", 16),
    "int4_float_inputs": LayerScheme("int4", 32, int8_inputs=False),
    "nf4": LayerScheme("nf4", 16),
    "float32": FLOAT32,
}


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def run(folder, scheme, write, feeds):
    """Outputs of the graph that ``write`` makes with the inputs ``feeds``, and what was written."""
    precision = Precision(PrecisionPlan(scheme))
    with WeightFile(folder) as weights:
        graph = Graph("one", weights, precision)
        names = [
            graph.input(name, value.dtype.name, [f"{name}{axis}" for axis in range(value.ndim)])
            for name, value in feeds.items()
        ]
        for number, value in enumerate(write(graph, *names)):
            graph.output(value, f"output{number}", "float32", [f"out{number}{axis}" for axis in range(3)])
        model = graph.model()
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    onnx.save_model(model, folder / "one.onnx")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # as the runtime
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(folder / "one.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds), precision.written


@pytest.mark.parametrize("inputs", [64, 40], ids=["whole blocks", "a part of a block"])
@pytest.mark.parametrize("name", SCHEMES)
def test_linear_layer_computes_what_numpy_says(name, inputs, tmp_path):
    scheme, weight, bias, rows = SCHEMES[name], normal(inputs, 48, scale=0.1), normal(48, seed=1), normal(6, inputs)
    found, written = run(
        tmp_path,
        scheme,
        lambda graph, value: [graph.linear(value, "layer", Matrix(weight, ("layer.weight",)), bias)],
        {"value": rows.reshape(2, 3, inputs)},
    )
    wanted = quantized_inputs(rows, scheme) @ quantize_dequantize(weight, scheme) + bias
    np.testing.assert_allclose(found[0].reshape(6, 48), wanted, atol=3e-6)
    assert written["layer"].num_bytes == expected_bytes(written["layer"].layer, scheme)
    damage = np.linalg.norm(wanted - bias - rows @ weight) / np.linalg.norm(rows @ weight)
    largest = {"int8": 0.02, "int4": 0.12, "nf4": 0.12, "floa": 1e-6}[scheme.kind[:4].rstrip("_")]
    assert damage < (largest if name != "int8_static" else 0.2)


@pytest.mark.parametrize("name", SCHEMES)
def test_head_and_tied_embedding_are_the_same_numbers(name, tmp_path):
    """One matrix [vocabulary 50, features 32] both looked up and multiplied with, from the same bytes."""
    scheme, table, hidden, ids = SCHEMES[name], normal(50, 32, scale=0.3), normal(4, 32), np.array([[0, 7, 49]])
    found, written = run(
        tmp_path,
        scheme,
        lambda graph, value, numbers: [
            graph.embedding(numbers, "shared.weight", table, "lm_head.weight"),
            head(graph, value, "lm_head.weight", table, "shared.weight", 0.5, np.arange(50, dtype=np.float32)),
        ],
        {"value": hidden, "numbers": ids},
    )
    seen = quantize_dequantize(table.T, scheme).T
    np.testing.assert_allclose(found[0], seen[ids], atol=1e-6)
    # The kernel of "int8_dynamic" scales after the product, the others take scaled inputs: the same steps.
    inputs = quantized_inputs(hidden, scheme) / 2 if name == "int8_dynamic" else quantized_inputs(hidden / 2, scheme)
    np.testing.assert_allclose(found[1], inputs @ seen.T + np.arange(50), atol=1e-5)
    size = (tmp_path / "weights.bin").stat().st_size
    assert list(written) == ["lm_head"]
    pairs = 256 * 2 * 4 if name == "nf4" else 0  # the two numbers of every byte
    assert size <= expected_bytes(written["lm_head"].layer, scheme) + pairs + 4 * 64  # the beginnings are aligned


def test_inputs_are_quantized_as_onnx_says():
    assert input_scale(-1.0, 1.55) == (np.float32(0.01), 100)
    assert input_scale(0.5, 2.55) == (np.float32(0.01), 0)  # 0 is always among them
    assert input_scale(0.0, 0.0)[0] == 1
    scheme = LayerScheme("int8_static", input_range=(-1.0, 1.55))
    np.testing.assert_allclose(quantized_inputs(np.float32([[0.123, -9.0, 9.0]]), scheme), [[0.12, -1.0, 1.55]])


def test_packing_of_known_numbers():
    weight = np.float32([[1.27, 0.0], [-0.64, 0.0]])  # an output of zeros too
    packed = pack(weight, LayerScheme("int8_dynamic"))
    np.testing.assert_array_equal(packed.values, [[127, 0], [-64, 0]])
    np.testing.assert_allclose(packed.scales, [0.01, 1.0])
    exact = (NF4 * 3).reshape(16, 1)  # all 16 levels, and the largest of the block
    np.testing.assert_allclose(quantize_dequantize(exact, LayerScheme("nf4", 16)), exact, rtol=1e-6)
    steps = np.arange(-8, 8, dtype=np.float32).reshape(16, 1) / 4
    np.testing.assert_allclose(quantize_dequantize(steps, LayerScheme("int4", 16)), steps)
    for scheme in SCHEMES.values():
        assert not quantize_dequantize(np.zeros((32, 16), np.float32), scheme).any()


def test_four_bit_scales_serve_the_inputs_that_matter():
    weight, importance = normal(32, 400), np.ones(32, np.float32)
    importance[:4] = 1000
    scheme = LayerScheme("int4", 32)
    plain, weighed = (quantize_dequantize(weight, scheme, given) - weight for given in (None, importance))
    assert np.square(weighed[:4]).sum() < 0.97 * np.square(plain[:4]).sum()
    widest = np.abs(weight).max(axis=0) / 8
    no_search = np.clip(np.rint(weight / widest), -8, 7) * widest - weight
    assert np.square(plain).sum() < 0.97 * np.square(no_search).sum()


def test_what_no_kernel_computes_stays_float32():
    small = Layer("classifier", ("classifier.weight",), (32, 2), "linear")
    table = Layer("lm_head", ("shared.weight",), (40, 64), "head")
    assert "2 outputs" in reason_to_leave(small, LayerScheme("int8_dynamic"))
    assert "blocks of 32" in reason_to_leave(table, LayerScheme("int4", 32))
    assert reason_to_leave(table, LayerScheme("int8_dynamic")) == reason_to_leave(table, FLOAT32) == ""
    with pytest.raises(InputError, match="lm_head is int8_static and has no input_range"):
        reason_to_leave(table, LayerScheme("int8_static"))


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("t5", "seq2seq", 23), ("t5_untied", "seq2seq", 24), ("gpt2", "causal", 9), ("llama", "causal", 10)],
)
def test_layers_are_listed_by_name_and_parameter(exported, name, kind, count):
    made = exported(name)
    layers = quantizable_layers(Source(name, kind, made.model, None, None))
    state = made.model.state_dict()
    assert len({layer.name for layer in layers}) == len(layers) == count
    assert {layer.role for layer in layers} == {"linear", "head"} | ({"embedding"} if count in (24, 10) else set())
    for layer in layers:
        sizes = [torch.numel(state[parameter]) for parameter in layer.parameters]
        assert sum(sizes) == layer.shape[0] * layer.shape[1], layer


def test_errors_are_measured_on_the_inputs_that_were_seen(tmp_path):
    """A layer whose rounding errors meet inputs of 0 has no error; by its weight alone it has one."""
    weight, rows = normal(32, 16), np.zeros((4, 32), np.float32)
    rows[:, 0] = 1
    weight[0] = np.abs(weight).max(axis=0)  # the largest of each output, which int8 keeps
    seen = Inputs(0, 1, rows[0].astype(np.float64), 1, [rows])
    layer = Layer("layer", ("layer.weight",), weight.shape, "linear")
    errors = []
    for inputs in ({}, {"layer": seen}):
        precision = Precision(PrecisionPlan(LayerScheme("int8_dynamic")), inputs)
        precision.pack(layer, weight)
        errors.append(precision.written["layer"].error)
    assert errors[0] > 1e-3
    assert errors[1] < 1e-6


def test_a_row_of_zeros_stays_zeros_and_parts_are_the_whole(tmp_path):
    weight, bias = normal(64, 48, scale=0.1), normal(48, seed=1)
    rows = np.concatenate([np.zeros((1, 64), np.float32), normal(2, 64)])[None]
    matrix = Matrix(weight, ("layer.weight",))
    for name, given in SCHEMES.items():
        if name == "int8_static":
            continue
        folder = tmp_path / name
        folder.mkdir()
        found, _ = run(
            folder,
            given,
            lambda graph, value: [
                graph.linear(value, "layer", matrix, bias),
                *graph.linear_parts(value, "parts", matrix, [16, 32], bias),
            ],
            {"value": rows},
        )
        np.testing.assert_array_equal(found[0][0, 0], bias)
        np.testing.assert_allclose(np.concatenate(found[1:], axis=-1), found[0], atol=1e-6)
