"""recipes/finetune.py from the command line to the model folder: from scratch, all weights, LoRA, resumed, refused."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import tiny
import torch
from runs import assert_refused, wait_for

from yunque.artifacts import verify
from yunque.models.arguments import ModelArguments
from yunque.models.loading import load_model, load_tokenizer

SCRATCH = {
    "from_scratch": True,
    "vocab_size": 400,
    "config_overrides": "d_model=32,d_kv=16,d_ff=64,num_heads=2,num_layers=1,dropout_rate=0.1",
}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "wo"}


@pytest.fixture(scope="session")
def finetune_options(assets):
    """Options of a short fine-tuning run; keywords add or replace, None removes."""

    def options(**changed):
        chosen = {
            "model_name_or_path": assets.t5,
            "dataset_name": assets.data,
            "max_steps": 12,
            "save_steps": 4,
            "logging_steps": 2,
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "group_by_length",
            "learning_rate": 5e-3,
            "max_new_tokens": 8,
        } | changed
        return {name: value for name, value in chosen.items() if value is not None}

    return options


@pytest.fixture(scope="session")
def scratch_run(finished, finetune_options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch") / "out"
    options = finetune_options(output_dir=folder, model_name_or_path=None, max_steps=40, **SCRATCH)
    return finished("finetune", options, cold=True)


@pytest.fixture
def full_run(called, finetune_options, tmp_path):
    return called("finetune", finetune_options(output_dir=tmp_path / "out", max_steps=40))


@pytest.fixture
def lora_run(called, finetune_options, tmp_path):
    return called("finetune", finetune_options(output_dir=tmp_path / "out", max_steps=40, **LORA))


def loaded(folder):
    args = ModelArguments(model_name_or_path=str(folder))
    tokenizer = load_tokenizer(args)
    return load_model(args, tokenizer).eval(), tokenizer


def answers_again(run):
    """What the model in the run's folder answers to the queries of its predictions."""
    model, tokenizer = loaded(run.folder)
    inputs = tokenizer([row["query"] for row in run.rows("predictions.jsonl")], padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=run.options["max_new_tokens"])
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def comparable(run):
    return {name: value for name, value in run.manifest["metrics"].items() if not name.endswith("_s")}


# --- what a finished run leaves ---


def test_a_model_from_scratch_learns_and_its_folder_is_complete(scratch_run):
    manifest, first, last = scratch_run.manifest, scratch_run.losses[0], scratch_run.losses[-1]
    assert last < 0.75 * first
    assert verify(scratch_run.folder) == []
    assert set(manifest["files"]) >= {"config.json", "model.safetensors", "tokenizer.json", "predictions.jsonl"}
    assert not (scratch_run.folder / "checkpoints").exists()
    assert (manifest["stage"], manifest["parents"], manifest["base_model"]) == ("finetune", [], None)
    assert [(part["split"], part["rows"]) for part in manifest["data"]] == [("train", 20), ("test", 7)]
    assert "{text}" in manifest["prompt_template"]
    assert manifest["config"]["config_overrides"] == SCRATCH["config_overrides"]
    metrics = manifest["metrics"]
    assert metrics["train_loss"] == pytest.approx(last)
    assert metrics["train_steps"] == 40
    assert metrics["eval_loss"] > 0
    assert 0 <= metrics["rougeL"]["low"] <= metrics["rougeL"]["mean"] <= metrics["rougeL"]["high"] <= 1


def test_the_folder_answers_as_the_trained_model_did(scratch_run):
    predictions = [row["prediction"] for row in scratch_run.rows("predictions.jsonl")]
    assert any(predictions)
    assert answers_again(scratch_run) == predictions


def test_all_weights_train(full_run, assets):
    assert full_run.losses[-1] < full_run.losses[0]
    assert full_run.manifest["parents"] == [{"path": str(assets.t5), "manifest_sha256": None}]
    assert full_run.manifest["base_model"] == str(assets.t5)
    assert answers_again(full_run) == [row["prediction"] for row in full_run.rows("predictions.jsonl")]
    before, after = loaded(assets.t5)[0].state_dict(), loaded(full_run.folder)[0].state_dict()
    assert [name for name, weight in before.items() if torch.equal(weight, after[name])] == []


def test_an_adapter_is_saved_alone_and_loads_on_its_base(lora_run, assets):
    assert lora_run.losses[-1] < lora_run.losses[0]
    assert "adapter_model.safetensors" in lora_run.manifest["files"]
    assert "model.safetensors" not in lora_run.manifest["files"]
    assert json.loads((lora_run.folder / "adapter_config.json").read_text())["r"] == 4
    assert answers_again(lora_run) == [row["prediction"] for row in lora_run.rows("predictions.jsonl")]
    base, trained = loaded(assets.t5)[0].state_dict(), loaded(lora_run.folder)[0].get_base_model().state_dict()
    kept = [torch.equal(weight, trained[name]) for name, weight in base.items() if name in trained]
    assert len(kept) > 10
    assert all(kept)


def test_an_adapter_trains_on_and_merges(called, finetune_options, assets, tmp_path):
    options = finetune_options(output_dir=tmp_path / "out", model_name_or_path=assets.adapter, merge_adapter=True)
    run = called("finetune", options)
    assert "model.safetensors" in run.manifest["files"]
    assert answers_again(run) == [row["prediction"] for row in run.rows("predictions.jsonl")]


def test_truncation_is_counted(call_recipe, finetune_options, tmp_path):
    options = finetune_options(output_dir=tmp_path / "out", max_steps=1, max_prompt_length=12, max_target_length=3)
    process = call_recipe("finetune", options)
    assert process.returncode == 0, process.stderr
    # every answer has four words, which are tokens, and its end; dialogues have 5 to 14 words, the template 5
    assert "train answers: 20, cut to 3 tokens: 20 (40 tokens lost)" in process.stdout
    assert "cut to 12 tokens" in process.stdout


@pytest.fixture
def five_steps(finetune_options, assets, tmp_path):
    """Options of five logged steps without dropout, on answers of different lengths; keywords add or replace."""
    model, data = tmp_path / "t5", tmp_path / "data"
    shutil.copytree(assets.t5, model)
    tiny.t5(dropout_rate=0.0).save_pretrained(model)
    data.mkdir()
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (assets.data / f"{split}.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            row["summary"] = " ".join(row["dialogue"].split()[: 1 + number % 5])
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def options(name, **changed):
        fixed = {"model_name_or_path": model, "dataset_name": data, "max_steps": 5, "logging_steps": 1}
        return finetune_options(output_dir=tmp_path / name, mixed_precision="no", **fixed | changed)

    return options


@pytest.fixture
def whole_batches(called, five_steps):
    return called("finetune", five_steps("whole"))


# the tolerance of the next two is that of float32 sums in another order, over five optimizer steps


def test_two_ranks_train_as_one(whole_batches, finished, five_steps):
    two = finished("finetune", five_steps("two", per_device_train_batch_size=2), ranks=2)
    assert two.losses == pytest.approx(whole_batches.losses, rel=1e-4)
    assert two.rows("predictions.jsonl") == whole_batches.rows("predictions.jsonl")


def test_accumulated_batches_train_as_one(whole_batches, called, five_steps):
    four = called("finetune", five_steps("four", per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert four.losses == pytest.approx(whole_batches.losses, rel=1e-4)


def test_label_smoothing_raises_the_loss(whole_batches, called, five_steps):
    smoothed = called("finetune", five_steps("smoothed", label_smoothing_factor=0.2))
    assert smoothed.losses[0] != pytest.approx(whole_batches.losses[0], rel=1e-4)


# --- stopped and resumed ---


def test_a_killed_run_resumes_to_the_same_metrics(start_recipe, called, finetune_options, tmp_path):
    options = finetune_options(max_steps=60, save_steps=20)
    undisturbed = called("finetune", options | {"output_dir": tmp_path / "undisturbed"})
    options |= {"output_dir": tmp_path / "killed"}
    process = start_recipe("finetune", options)
    wait_for(tmp_path / "killed" / "checkpoints" / "step-000020", process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "yunque.json").exists()
    resumed = called("finetune", options | {"resume": True})
    assert comparable(resumed) == comparable(undisturbed)
    assert resumed.losses == undisturbed.losses
    assert resumed.rows("predictions.jsonl") == undisturbed.rows("predictions.jsonl")


def test_a_signal_saves_and_asks_to_try_again(start_recipe, called, finetune_options, tmp_path):
    options = finetune_options(
        output_dir=tmp_path / "out", max_steps=5000, save_steps=5000, lr_scheduler_type="constant"
    )
    process = start_recipe("finetune", options)
    wait_for(tmp_path / "out" / "log.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75
    assert "--resume" in errors.splitlines()[-1]
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("step-*")
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    run = called("finetune", options | {"resume": True, "max_steps": step + 2})
    assert run.manifest["metrics"]["train_steps"] == step + 2


def test_a_checkpoint_killed_half_way_is_passed_over(call_recipe, finetune_options, tmp_path):
    folder = tmp_path / "out" / "checkpoints" / ".partial"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_st')
    process = call_recipe("finetune", finetune_options(output_dir=tmp_path / "out", max_steps=1, resume=True))
    assert process.returncode == 0, process.stderr


# --- refused ---


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dataset_name": "./absent.jsonl"}, ("dataset_name: ", "absent.jsonl")),
        ({"target_column": "answer"}, ("target_column: ", "answer", "id, dialogue, summary")),
        ({"min_text_chars": 100_000}, ("min_text_chars=100000", "no row of 20 is left")),
        ({"model_name_or_path": "./absent"}, ("model_name_or_path: ", "no such model folder")),
        ({"model_name_or_path": None}, ("model_name_or_path: ", "give a hub id")),
        ({"learning_rate": 0}, ("learning_rate: ",)),
        ({"lr_scheduler_type": "square"}, ("square",)),
        ({"per_device_train_batch_size": 0}, ("per_device_train_batch_size: 0",)),
        ({"max_target_length": 1}, ("max_target_length: 1",)),
        ({"label_smoothing_factor": 1.5}, ("label_smoothing_factor: 1.5",)),
        (SCRATCH | LORA | {"model_name_or_path": None}, ("use_peft: ",)),
        (SCRATCH | {"model_type": "roberta"}, ("model_type: ", "t5")),
        (SCRATCH | {"config_overrides": "d_modl=3"}, ("config_overrides: ", "did you mean d_model?")),
        ({"vocab_size": 100}, ("vocab_size: 100",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(changed, words, call_recipe, finetune_options, tmp_path):
    process = call_recipe("finetune", finetune_options(output_dir=tmp_path / "out", **changed))
    assert_refused(process, *words)
    assert not (tmp_path / "out").exists()


def test_rows_of_an_encoder_decoder_are_not_packed(call_recipe, finetune_options, tmp_path):
    process = call_recipe("finetune", finetune_options(output_dir=tmp_path / "out", packing=True))
    assert_refused(process, "packing: ", "encoder-decoder")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_kept_unless_overwritten(call_recipe, called, finetune_options, scratch_run, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(scratch_run.folder, folder)
    options = finetune_options(output_dir=folder, max_steps=1)
    before = (folder / "yunque.json").read_bytes()
    assert_refused(call_recipe("finetune", options), "--output_dir", "--overwrite_output_dir")
    assert (folder / "yunque.json").read_bytes() == before
    assert called("finetune", options | {"overwrite_output_dir": True}).manifest["metrics"]["train_steps"] == 1


def test_a_loss_that_is_no_number_ends_the_run(call_recipe, finetune_options, tmp_path):
    process = call_recipe(
        "finetune", finetune_options(output_dir=tmp_path / "out", learning_rate=1e30, max_grad_norm=0)
    )
    assert process.returncode == 1
    assert "failed: the loss is " in process.stderr
    assert not (tmp_path / "out" / "yunque.json").exists()
