"""Wrong uses of recipes/ppo_detox.py: exit code 2, one line with the field and the fix, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from runs import assert_refused


def _no_dataset(assets, tmp_path):
    return {"dataset_name": tmp_path / "absent.jsonl"}


def _wrong_column(assets, tmp_path):
    return {"text_column": "conversation"}


def _nothing_left(assets, tmp_path):
    return {"min_text_chars": 100_000}


def _unknown_label(assets, tmp_path):
    return {"reward_label": "kind"}


def _unknown_key(assets, tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1.0e-5\nlearnin_rate: 1.0e-5\n")
    return {"config": tmp_path / "run.yaml"}


def _minibatch(assets, tmp_path):
    return {"mini_batch_size": 3}


def _no_pad_token(assets, tmp_path):
    return {"model_name_or_path": assets.padless}


def _response_too_long(assets, tmp_path):
    return {"model_name_or_path": assets.llama, "max_new_tokens": 4096}


def _no_model(assets, tmp_path):
    return {"model_name_or_path": tmp_path / "absent"}


def _no_reward_model(assets, tmp_path):
    return {"reward_model_name_or_path": tmp_path / "absent"}


def _no_classifier(assets, tmp_path):
    return {"reward_model_name_or_path": assets.llama}


def _sampler_above_limit(assets, tmp_path):
    return {"max_new_tokens_low": 9}


BAD_INPUTS = [
    (_no_dataset, ("dataset_name: ", "absent.jsonl", "no such file")),
    (_wrong_column, ("text_column: ", "conversation", "id, dialogue, summary")),
    (_nothing_left, ("min_text_chars=100000", "no row of 20 is left", "lengths run from")),
    (_unknown_label, ("reward_label: ", "'kind'", "nothate, hate")),
    (_unknown_key, ("run.yaml", "unknown key learnin_rate", "--help")),
    (_minibatch, ("mini_batch_size: 3", "batch_size (8)", "1, 2, 4, 8")),
    (_no_pad_token, ("model_name_or_path: ", "no pad token", "--pad_token '<unk>'")),
    (_response_too_long, ("max_new_tokens: ", "4096", "512", "lower it")),
    (_no_model, ("model_name_or_path: ", "no such model folder", "absent")),
    (_no_reward_model, ("reward_model_name_or_path: ", "no such model folder", "absent")),
    (_no_classifier, ("reward_model_name_or_path: ", "no trained classification head")),
    (_sampler_above_limit, ("max_new_tokens_low: 9", "max_new_tokens (8)")),
]


@pytest.mark.parametrize(("wrong", "words"), BAD_INPUTS, ids=[wrong.__name__[1:] for wrong, _ in BAD_INPUTS])
def test_bad_input(wrong, words, call_recipe, ppo_options, assets, tmp_path):
    folder = tmp_path / "out"
    options = ppo_options(output_dir=folder) | wrong(assets, tmp_path)
    assert_refused(call_recipe("ppo_detox", options), *words, alone=True)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(_unknown_key, ("unknown key learnin_rate",)), (_unknown_label, ("reward_label: ", "nothate, hate"))],
    ids=["before_torch", "after_the_models"],
)
def test_bad_input_at_the_command_line(wrong, words, run_recipe, ppo_options, assets, tmp_path):
    folder = tmp_path / "out"
    options = ppo_options(output_dir=folder) | wrong(assets, tmp_path)
    assert_refused(run_recipe("ppo_detox", options, cold=True), *words, alone=True)
    assert not folder.exists()


def test_pad_token_is_the_fix_for_a_model_without(called, ppo_options, assets, tmp_path):
    options = ppo_options(
        output_dir=tmp_path / "out", model_name_or_path=assets.padless, pad_token="<unk>", max_steps=1
    )
    run = called("ppo_detox", options)
    assert json.loads((run.folder / "tokenizer_config.json").read_text())["pad_token"] == "<unk>"


# --- an output folder in use ---


@pytest.fixture
def used_folder(t5_run, tmp_path):
    """The output folder of a finished run, with a file of the user's in it."""
    folder = shutil.copytree(t5_run.folder, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    return folder


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_run_is_kept(used_folder, call_recipe, ppo_options):
    before = content(used_folder)
    process = call_recipe("ppo_detox", ppo_options(output_dir=used_folder, max_steps=1))
    assert_refused(
        process, "--output_dir ", str(used_folder), "holds a finished run", "--overwrite_output_dir", alone=True
    )
    assert content(used_folder) == before


def test_bad_input_of_an_overwriting_run_keeps_the_former_one(used_folder, call_recipe, ppo_options):
    before = content(used_folder)
    options = ppo_options(output_dir=used_folder, overwrite_output_dir=True, reward_label="kind")
    assert_refused(call_recipe("ppo_detox", options), "reward_label: ", alone=True)
    assert content(used_folder) == before


def test_finished_run_is_replaced_when_asked(used_folder, called, ppo_options):
    options = ppo_options(output_dir=used_folder, max_steps=2, seed=5, overwrite_output_dir=True)
    run = called("ppo_detox", options)
    assert run.manifest["seed"] == 5
    assert [line["step"] for line in run.log] == [1, 2]
    assert (used_folder / "notes.txt").read_text() == "mine"


def test_output_folder_is_not_an_input(call_recipe, ppo_options, assets):
    before = content(assets.t5)
    options = ppo_options(output_dir=assets.t5, overwrite_output_dir=True)
    assert_refused(call_recipe("ppo_detox", options), "--output_dir ", "is also an input", alone=True)
    assert content(assets.t5) == before


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of ``request.param`` KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("small_disk", [64, 192], ids=["weights", "plots"], indirect=True)
def test_full_disk_while_saving_the_model(small_disk, call_recipe, ppo_options):
    folder = small_disk / "out"
    process = call_recipe("ppo_detox", ppo_options(output_dir=folder, max_steps=1))
    assert full_disk_is_named(process, folder)
    # the last step's checkpoint is kept: with more room --resume has only the evaluation and the saving to do
    assert {path.name for path in folder.iterdir()} == {"log.jsonl", "checkpoints"}


@pytest.mark.parametrize("small_disk", [4, 64], ids=["log", "checkpoint"], indirect=True)
def test_full_disk_while_training(small_disk, call_recipe, ppo_options):
    folder = small_disk / "out"
    process = call_recipe("ppo_detox", ppo_options(output_dir=folder, save_steps=4))
    assert full_disk_is_named(process, folder)
    assert not (folder / "yunque.json").exists()
    assert not (folder / "checkpoints" / ".partial").exists()


def full_disk_is_named(process, folder):
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    last = process.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(folder) in last
    assert "disk is full" in last
    return True
