"""Plans of precisions, and the arguments of quantization."""

import json

import pytest

from yunque.compression.quantization_arguments import QuantizationArguments
from yunque.compression.schemes import FLOAT32, LayerScheme, PrecisionPlan, layer_scheme, read_plan
from yunque.errors import InputError


def test_plan_comes_back_from_its_file(tmp_path):
    plan = PrecisionPlan(
        LayerScheme("int4", 64),
        {
            "lm_head": LayerScheme("int8_dynamic"),
            "a.wo": FLOAT32,
            "a.wi": LayerScheme("int8_static", input_range=(-1, 2.5)),
            "a.q": LayerScheme("int8_weights", 32, int8_inputs=False),
        },
    )
    plan.save(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert plan.scheme("a.wo") == FLOAT32
    assert plan.scheme("elsewhere") == plan.default
    assert plan.with_layers({"lm_head": FLOAT32}).scheme("lm_head") == FLOAT32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 2}, "no plan of format 1"),
        ({"format": 1, "layer": {}}, "layer is unknown"),
        ({"format": 1, "layers": {"a": {"kind": "int3"}}}, "a: kind: 'int3'"),
        ({"format": 1, "layers": {"a": {"kind": "int4", "block_size": 20}}}, "a: block_size: 20"),
        ({"format": 1, "layers": {"a": {"bits": 4}}}, "a: gives"),
        ({"format": 1, "layers": {"a": {"kind": "int8_static", "input_range": [1]}}}, "a: "),
        ("{", "not valid JSON"),
    ],
)
def test_malformed_plans_are_refused(content, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_plan(path)
    with pytest.raises(InputError, match="cannot read"):
        read_plan(tmp_path / "absent.json")


def test_schemes_say_what_layers_become():
    assert layer_scheme("onnx_int4") == LayerScheme("int4", 32)
    assert layer_scheme("onnx_int8_static", weights_only=True) == LayerScheme("int8_weights", 128, int8_inputs=False)
    with pytest.raises(InputError, match="bnb_nf4"):
        layer_scheme("bnb_nf4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "scheme: is missing"),
        ({"scheme": "int5"}, "'int5' is unknown"),
        ({"scheme": "onnx_int4", "plan": "p.json"}, "two answers"),
        ({"scheme": "onnx_int8_static"}, "calibration_dataset: onnx_int8_static measures"),
        ({"scheme": "bnb_nf4", "block_size": 64}, "block_size: bnb_nf4 takes none"),
        ({"scheme": "onnx_int8_dynamic", "block_size": 64}, "block_size: onnx_int8_dynamic takes none"),
        ({"scheme": "onnx_int4", "block_size": 48}, "block_size: 48 is none of"),
        ({"scheme": "onnx_int4", "skip_layers": "("}, "no regular expression"),
        ({"scheme": "onnx_int4", "calibration_samples": 0}, "calibration_samples: 0"),
        ({"scheme": "onnx_int4", "calibration_percentile": 0.5}, "calibration_percentile"),
        ({"scheme": "onnx_int4", "output_dir": None}, "output_dir: is missing"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        QuantizationArguments(**({"model_name_or_path": "model", "output_dir": "out"} | options))
