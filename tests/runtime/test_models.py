"""Folders: labels, what is damaged or too new, and nothing that needs torch."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from exported import CLASSIFIERS

from yunque.errors import InputError
from yunque.runtime import load
from yunque.runtime.spec import unique_names

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnx", "safetensors"):
    sys.modules[name] = None
from yunque.runtime import load
for folder in sys.argv[1:]:
    model = load(folder, threads=1)
    print(model.classify(["w5 w6"])[0] if hasattr(model, "classify") else model.generate(["w5 w6"])[0].tokens)
"""


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_probabilities_of_labels(exported, prompts, name):
    made = exported(name)
    found = made.runtime.classify(prompts, batch_size=5)
    for prompt, probabilities in zip(prompts, found, strict=True):
        with torch.inference_mode():
            wanted = made.model(torch.tensor(made.runtime.encode([prompt]))).logits.softmax(dim=-1)[0].tolist()
        assert list(probabilities) == list(made.model.config.id2label.values())
        assert list(probabilities.values()) == pytest.approx(wanted, abs=1e-5)


def test_long_texts_are_cut_to_the_model_s_positions(exported):
    model = exported("roberta").runtime
    long = " ".join(["w9"] * 100)
    assert model.spec.max_positions == 65
    assert model.classify([long]) == model.classify([[9] * 65])
    assert model.classify([long], max_length=4) == model.classify(["w9 w9 w9 w9"])


def test_runs_where_torch_cannot_be_imported(exported):
    folders = [exported(name).folder for name in ("t5", "llama", "roberta")]
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


@pytest.fixture
def copied(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported("t5").folder, folder)
    return folder


def test_missing_and_altered_weights_are_found_at_load(copied):
    weights = copied / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.bin has other content"):
        load(copied)
    assert load(copied, verify="size").generate(["w5"])
    weights.write_bytes(content[:-1])
    for verify in ("sha256", "size"):
        with pytest.raises(InputError, match=r"weights\.bin .* size|weights\.bin has \d+ bytes"):
            load(copied, verify=verify)
    weights.unlink()
    with pytest.raises(InputError, match=r"weights\.bin is missing"):
        load(copied)
    with pytest.raises(InputError, match="cannot load it"):
        load(copied, verify="none")


def test_other_folders_are_refused(copied, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "absent")
    spec = copied / "runtime.json"
    content = json.loads(spec.read_text())
    spec.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(InputError, match="not of format 2"):
        load(copied)
    spec.unlink()
    with pytest.raises(InputError, match=r"holds no runtime\.json"):
        load(copied)


def test_graphs_for_a_newer_runtime_say_so(copied):
    model = onnx.load(copied / "decoder.onnx", load_external_data=False)
    for field, change in (("opset", 99), ("ir_version", 99)):
        newer = onnx.ModelProto()
        newer.CopyFrom(model)
        if field == "opset":
            newer.opset_import[0].version = change
        else:
            newer.ir_version = change
        (copied / "decoder.onnx").write_bytes(newer.SerializeToString())
        with pytest.raises(InputError, match="made for a newer ONNX Runtime"):
            load(copied, verify="none")


def test_scores_of_given_answers(exported):
    made = exported("t5")
    found = made.runtime.logits([[5, 6, 7], [8]], [[9, 10], [11]])
    with torch.inference_mode():
        wanted = made.model(torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[0, 9, 10]])).logits[0]
    np.testing.assert_allclose(found[0], wanted.numpy(), atol=1e-4)
    assert found[1].shape == (2, 64)


def test_labels_that_share_a_name_stay_apart():
    assert unique_names(["a", "b"]) == ("a", "b")
    assert unique_names(["other", "hate", "other"]) == ("other (0)", "hate", "other (2)")
    assert len(set(unique_names(["x", "x", "x (1)"]))) == 3


def test_probabilities_of_labels_that_share_a_name(exported, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(exported("roberta").folder, folder)
    content = json.loads((folder / "runtime.json").read_text())
    content["labels"] = ["other"] * len(content["labels"])
    (folder / "runtime.json").write_text(json.dumps(content))
    model = load(folder, verify="none")
    (found,) = model.classify(["w3 w4"])
    assert len(found) == len(model.labels) == model.logits(["w3"]).shape[1]
    assert sum(found.values()) == pytest.approx(1)
