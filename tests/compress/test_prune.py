"""compress/prune.py from the command line to the pruned folder; recovery by distillation; refused input."""

import pytest

from yunque.artifacts import verify
from yunque.models.arguments import ModelArguments
from yunque.models.loading import load_model, load_tokenizer

PRUNE = "compress/prune"


@pytest.fixture
def options(assets, tmp_path):
    """Options of a run; keywords add or replace, None removes."""

    def options(**changed):
        chosen = {"model_name_or_path": assets.t5, "dataset_name": assets.data, "output_dir": tmp_path / "pruned"}
        return {name: value for name, value in (chosen | changed).items() if value is not None}

    return options


def test_a_pruned_folder_loads_and_learns_from_its_whole(called, options, assets, tmp_path):
    run = called(PRUNE, options(ffn_sparsity=0.5, head_sparsity=0.5))
    assert run.manifest["stage"] == "prune"
    assert verify(run.folder) == []
    metrics = run.manifest["metrics"]
    assert metrics["ffn"] == {"before": 32, "after": 16}
    assert metrics["heads"] == {"before": 2, "after": 1}
    args = ModelArguments(model_name_or_path=str(run.folder))
    model = load_model(args, load_tokenizer(args))
    assert sum(weight.numel() for weight in model.parameters()) == metrics["parameters"]

    recovery = {
        "student_name_or_path": run.folder,
        "teacher_name_or_path": assets.t5,
        "dataset_name": assets.data,
        "max_steps": 3,
        "output_dir": tmp_path / "recovered",
        "max_new_tokens": 4,
    }
    recovered = called("compress/distill", recovery)
    parents = [parent["path"] for parent in recovered.manifest["parents"]]
    assert parents == [str(assets.t5), str(run.folder)]
    assert recovered.manifest["metrics"]["parameters"] == metrics["parameters"]


def test_an_adapter_is_merged_and_pruned(called, options, assets):
    run = called(PRUNE, options(model_name_or_path=assets.adapter, drop_layers=1))
    assert not (run.folder / "adapter_config.json").exists()
    assert run.manifest["metrics"]["layers"].keys() == {"encoder.block", "decoder.block"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset_name": None, "ffn_sparsity": 0.5}, "dataset_name: importance is measured on calibration data"),
        ({}, "ffn_sparsity: nothing to prune"),
        ({"drop_layers": 2}, "drop_layers: encoder.block has 2 layers; drop fewer"),
        ({"ffn_sparsity": 0.5, "load_in_4bit": True}, "load_in_4bit: pruning takes the weights as they are"),
        ({"ffn_sparsity": 0.5, "model_name_or_path": "./nowhere"}, "model_name_or_path: no such model folder"),
    ],
)
def test_bad_input_is_one_line(call_recipe, options, tmp_path, changed, message):
    done = call_recipe(PRUNE, options(**changed))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "pruned").exists()
