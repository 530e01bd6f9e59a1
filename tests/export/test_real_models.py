"""Trained models on real text: logits and 64 greedy tokens on 100 prompts."""

import json
from pathlib import Path

import pytest

from yunque.export.arguments import ExportArguments
from yunque.export.folder import export

SHARED = Path(__file__).parents[3] / "shared"


def check(parity, prompts=100):
    assert parity["prompts"] == prompts
    assert parity["source"] != "built in"
    assert parity["max_logit_difference"] <= 1e-3
    assert parity["max_step_difference"] <= 1e-3
    assert parity["tokens_equal"] + parity["ties"] == parity["tokens_compared"] >= prompts * 64


@pytest.mark.parametrize("name", ["stories260K", "babyllama-105"])
def test_trained_llama_on_dialogues(name, tmp_path):
    model, data = SHARED / "models" / name, SHARED / "data" / "dialogsum" / "test.jsonl"
    if not model.is_dir() or not data.is_file():
        pytest.skip("needs the models and data beside the checkout")
    cut = tmp_path / "cut.jsonl"  # whole dialogues are longer than the models' contexts
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    cut.write_text("".join(json.dumps({"text": row["dialogue"][:120]}) + "\n" for row in rows))
    manifest = export(
        ExportArguments(
            model_name_or_path=str(model), output_dir=str(tmp_path / "onnx"), parity_dataset=str(cut),
            parity_text_column="text", parity_prompts=100,
        )
    )  # fmt: skip
    check(manifest.metrics["parity"])


def test_trained_t5_and_classifier_on_their_own_test_data(embedded, tmp_path):
    data = str(embedded.dataset)
    for model, prompts in ((embedded.policy, 100), (embedded.reward_model, 100)):
        folder = tmp_path / model.name
        manifest = export(
            ExportArguments(
                model_name_or_path=str(model), output_dir=str(folder), parity_dataset=data, parity_prompts=prompts
            )
        )
        parity = manifest.metrics["parity"]
        if model is embedded.policy:
            check(parity)
            weights = (model / "model.safetensors").stat().st_size
            files = [path for path in folder.iterdir() if not path.name.startswith(("tokenizer", "yunque"))]
            graphs = sum(path.stat().st_size for path in files if path.suffix in (".onnx", ".json"))
            # The graphs' own bytes do not grow with the width of the model; of a real one they are 0.02 %.
            assert sum(path.stat().st_size for path in files) - graphs <= 1.02 * weights
        else:
            assert parity["max_logit_difference"] <= 1e-3
            assert parity["tokens_equal"] == parity["tokens_compared"] == 100
