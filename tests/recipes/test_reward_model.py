"""recipes/reward_model.py from the command line to the classifier folder: from scratch, further trained, refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from runs import assert_refused, json_lines
from transformers import AutoTokenizer

from yunque.artifacts import verify
from yunque.models.loading import load_classifier

SCRATCH = {
    "from_scratch": True,
    "vocab_size": 400,
    "config_overrides": "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,"
    "hidden_dropout_prob=0.0,initializer_range=0.1",
}
KIND, RUDE = ("w10", "w11", "w12"), ("w20", "w21", "w22")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Train and test texts told apart by one word, and a second set with other column names, labels and groups."""
    folder, numbers = tmp_path_factory.mktemp("labelled"), random.Random(0)

    def row():
        label = numbers.randrange(2)
        words = [f"w{numbers.randrange(30, 60)}" for _ in range(numbers.randrange(2, 9))]
        words.insert(numbers.randrange(len(words)), numbers.choice((KIND, RUDE)[label]))
        return " ".join(words), label

    for split, size in (("train", 160), ("test", 60)):
        lines = [json.dumps({"text": text, "label": label}) for text, label in (row() for _ in range(size))]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "second").mkdir()
    rows = [row() for _ in range(40)]
    lines = [f"{text},{('fine', 'bad')[label]},f{len(text) % 3}" for text, label in rows]
    (folder / "second" / "cases.csv").write_text("\n".join(["case,gold,function", *lines]))
    return folder


@pytest.fixture(scope="session")
def reward_options(labelled):
    """Options of a short run on ``labelled``; keywords add or replace, None removes."""

    def options(**changed):
        chosen = (
            SCRATCH
            | {
                "dataset_name": labelled,
                "max_steps": 60,
                "logging_steps": 5,
                "save_steps": 20,
                "per_device_train_batch_size": 16,
                "train_sampling_strategy": "group_by_length",
                "learning_rate": 5e-3,
                "max_length": 32,
            }
            | changed
        )
        return {name: value for name, value in chosen.items() if value is not None}

    return options


@pytest.fixture(scope="session")
def second_set(labelled):
    return {
        "eval_dataset_name": labelled / "second" / "cases.csv",
        "eval_text_column": "case",
        "eval_label_column": "gold",
        "eval_group_column": "function",
    }


@pytest.fixture(scope="session")
def values_file(tmp_path_factory):
    """A list on the command line is several words; the tests' command lines have one value an option."""
    path = tmp_path_factory.mktemp("values") / "values.yaml"
    path.write_text("eval_label_values: [fine, bad]\n")
    return path


@pytest.fixture(scope="session")
def scratch_run(finished, reward_options, second_set, values_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch") / "out"
    return finished("reward_model", reward_options(output_dir=folder, config=values_file, **second_set), cold=True)


def predicted(folder, texts):
    model, tokenizer = load_classifier(str(folder))
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return logits.argmax(-1).numpy()


def test_it_learns_and_its_folder_is_complete(scratch_run):
    losses = scratch_run.losses
    assert losses[-1] < 0.5 * losses[0]
    assert verify(scratch_run.folder) == []
    manifest = scratch_run.manifest
    assert set(manifest["files"]) >= {"config.json", "model.safetensors", "tokenizer.json", "classification.json"}
    assert (manifest["stage"], manifest["parents"], manifest["seed"]) == ("reward", [], 0)
    assert [(part["split"], part["rows"]) for part in manifest["data"]] == [("train", 160), ("test", 60), ("train", 40)]
    assert not (scratch_run.folder / "checkpoints").exists()


def test_the_reported_accuracy_is_that_of_the_saved_model(scratch_run, labelled):
    rows = json_lines(labelled / "test.jsonl")
    right = predicted(scratch_run.folder, [row["text"] for row in rows]) == [row["label"] for row in rows]
    metrics = scratch_run.manifest["metrics"]
    assert metrics["accuracy"]["mean"] == pytest.approx(right.mean())
    assert metrics["num_rows"] == 60
    assert right.mean() > 0.9
    for name in ("accuracy", "macro_f1"):
        assert metrics[name]["low"] <= metrics[name]["mean"] <= metrics[name]["high"]
    assert json.loads((scratch_run.folder / "classification.json").read_text()) == metrics


def test_the_second_set_is_reported_by_group(scratch_run, labelled):
    cells = [line.split(",") for line in (labelled / "second" / "cases.csv").read_text().splitlines()[1:]]
    right = predicted(scratch_run.folder, [text for text, _, _ in cells]) == [gold == "bad" for _, gold, _ in cells]
    report = scratch_run.manifest["metrics"]["eval"]
    assert report["accuracy"]["mean"] == pytest.approx(right.mean())
    for group, score in report["accuracy_by_group"].items():
        members = np.array([function == group for _, _, function in cells])
        assert score == {"accuracy": pytest.approx(right[members].mean()), "num_rows": members.sum()}
    assert sum(score["num_rows"] for score in report["accuracy_by_group"].values()) == 40


def test_it_serves_as_reward_model(scratch_run):
    model, tokenizer = load_classifier(str(scratch_run.folder))
    assert model.config.id2label == {0: "nothate", 1: "hate"}
    assert tokenizer.model_max_length == 32
    longest = tokenizer("w10 " * 100, truncation=True, return_tensors="pt")
    assert longest["input_ids"].shape == (1, 32)
    assert torch.isfinite(model(**longest).logits).all()


def test_a_trained_classifier_is_trained_on(called, reward_options, assets, tmp_path):
    options = reward_options(output_dir=tmp_path / "out", model_name_or_path=assets.classifier, max_steps=60)
    run = called("reward_model", {name: value for name, value in options.items() if name not in SCRATCH})
    assert run.manifest["base_model"] == str(assets.classifier)
    assert run.manifest["metrics"]["accuracy"]["mean"] > 0.65  # half of the texts have either label
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (run.folder, assets.classifier)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_a_language_model_gets_a_new_head_for_the_users_labels(called, reward_options, assets, tmp_path):
    (tmp_path / "labels.yaml").write_text("label_names: [fine, rude]\nlabel_values: ['0', '1']\n")
    options = reward_options(
        output_dir=tmp_path / "out", model_name_or_path=assets.llama, max_steps=2, config=tmp_path / "labels.yaml"
    )
    run = called("reward_model", {name: value for name, value in options.items() if name not in SCRATCH})
    assert load_classifier(str(run.folder))[0].config.id2label == {0: "fine", 1: "rude"}


def test_the_same_seed_gives_the_same_scores_and_resume_continues(called, reward_options, tmp_path):
    whole = called("reward_model", reward_options(output_dir=tmp_path / "whole", max_steps=8, save_steps=4))
    again = called("reward_model", reward_options(output_dir=tmp_path / "again", max_steps=8))
    timeless = [
        {name: value for name, value in run.manifest["metrics"].items() if not name.endswith("_s")}
        for run in (whole, again)
    ]
    assert timeless[0] == timeless[1]


def test_truncation_is_counted(call_recipe, reward_options, tmp_path):
    process = call_recipe("reward_model", reward_options(output_dir=tmp_path / "out", max_steps=1, max_length=8))
    assert process.returncode == 0, process.stderr
    assert "train texts: 160, cut to 8 tokens: " in process.stdout


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"label_column": "class"}, ("label_column: ", "class", "text, label")),
        ({"dataset_name": "./absent"}, ("dataset_name: ", "absent")),
        ({"eval_dataset_name": "./absent.csv"}, ("eval_dataset_name: ", "absent.csv")),
        ({"use_peft": True}, ("use_peft: ",)),
        ({"model_type": "t5"}, ("model_type: ", "roberta")),
        ({"max_length": 2}, ("max_length: 2",)),
        ({"label_names": "hate"}, ("label_names: ", "two")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(changed, words, call_recipe, reward_options, tmp_path):
    process = call_recipe("reward_model", reward_options(output_dir=tmp_path / "out", **changed))
    assert_refused(process, *words)
    assert not (tmp_path / "out").exists()


def test_the_second_sets_labels_and_split_are_named(call_recipe, reward_options, second_set, tmp_path):
    options = reward_options(output_dir=tmp_path / "out", **second_set)
    assert_refused(call_recipe("reward_model", options), "eval_label_values: ", "bad, fine")
    assert_refused(call_recipe("reward_model", options | {"eval_split": "test"}), "eval_split: ", "'test'")


def test_texts_longer_than_the_model_are_refused(call_recipe, reward_options, assets, tmp_path):
    options = reward_options(output_dir=tmp_path / "out", model_name_or_path=assets.classifier, max_length=1000)
    process = call_recipe("reward_model", {name: value for name, value in options.items() if name not in SCRATCH})
    assert_refused(process, "max_length: 1000", "512")
