"""compress/quantize.py from the command line: the report, refused input, the exit codes."""

import pytest

from yunque.artifacts import verify

QUANTIZE = "compress/quantize"


@pytest.fixture
def options(assets, tmp_path):
    """Options of a run; keywords add or replace, None removes."""

    def options(**changed):
        chosen = {
            "model_name_or_path": assets.t5, "scheme": "onnx_int4", "block_size": 16, "parity_prompts": 2,
            "parity_tokens": 4, "output_dir": tmp_path / "quantized",
        }  # fmt: skip
        return {name: value for name, value in (chosen | changed).items() if value is not None}

    return options


def test_a_run_reports_and_may_be_resumed(call_recipe, called, options, assets, tmp_path):
    data = {"calibration_dataset": assets.data, "calibration_text_column": "dialogue", "calibration_new_tokens": 4}
    done = call_recipe(QUANTIZE, options(calibration_samples=3, resume=True, **data))
    assert done.returncode == 0, done.stderr
    assert "23 layers quantized (23 int4 (block 16)), 0 left" in done.stdout
    assert "error of outputs on calibration inputs: mean" in done.stdout
    assert "calibrated on 3 prompts and answers" in done.stdout
    assert "greedy choices equal" in done.stdout
    assert verify(tmp_path / "quantized") == []
    again = call_recipe(QUANTIZE, options())
    assert again.returncode == 2
    assert "holds a finished run" in again.stderr
    run = called(QUANTIZE, options(model_name_or_path=assets.adapter, overwrite_output_dir=True))
    assert run.manifest["config"]["calibration_dataset"] is None
    assert run.manifest["metrics"]["errors"]["of"] == "weights"


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"scheme": "onnx_int8_static", "block_size": None}, 2, "calibration_dataset: onnx_int8_static measures"),
        ({"scheme": "int5"}, 2, "scheme: 'int5' is unknown"),
        (
            {"model_name_or_path": "./nowhere"},
            2,
            "model_name_or_path: cannot load a model from ./nowhere (no such folder",
        ),
        ({"calibration_dataset": "./nowhere.jsonl"}, 2, "nowhere.jsonl"),
        ({"plan": "./nowhere.json", "scheme": None, "block_size": None}, 2, "plan: cannot read"),
        ({"skip_layers": "."}, 1, "nothing to quantize: none of 23 layers changes"),
    ],
)
def test_what_goes_wrong_is_one_line(call_recipe, options, tmp_path, changed, code, message):
    done = call_recipe(QUANTIZE, options(**changed))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "quantized").exists()
