"""Recipes rehearsed under sharded profiles: a plain process's losses, half of its bytes, a model folder that loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pairs
import pytest
import runs
import tiny
import torch
import warm
from peft import PeftModel

from yunque.artifacts import verify
from yunque.distributed.profiles import find_profile
from yunque.distributed.rehearse import Rehearsal, rehearse
from yunque.models.arguments import ModelArguments
from yunque.models.loading import load_classifier, load_model, load_tokenizer

SHARE = {"fsdp2": 0.55, "zero3": 0.65}
"""Of a plain process's bytes that each of two ranks may hold: a half, and what does not divide.

ZeRO keeps weights in 16 bits beside float32 ones: 14 bytes a parameter, where a plain process has 12.
"""

OUTPUT_TOLERANCE = 0.1
"""Distance of logits from those of the model that one rank trained, relative to their size: both computed in bfloat16,
and Adam turns small gradients into whole steps."""

OWN_ANSWERS = 0.05
"""Relative difference of losses on answers that a student has sampled: other ranks sample other ones."""

LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def models(assets, tmp_path_factory):
    """The tiny models without dropout, which a comparison turns off."""
    folder = tmp_path_factory.mktemp("models")
    for name, options in (("t5", {"dropout_rate": 0.0}), ("llama", {})):
        tiny.FAMILIES[name](**options).save_pretrained(folder / name)
        load_tokenizer(ModelArguments(model_name_or_path=str(assets.t5))).save_pretrained(folder / name)
    return folder


@pytest.fixture
def rehearsed(monkeypatch):
    """Rehearse a recipe: rehearsed("fsdp2", "finetune", options, ranks=2, nodes=1)."""
    for name, value in warm.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", warm.python())
    monkeypatch.chdir(Path(__file__).parents[2])

    def run(profile, recipe, options, *, compare=True, **sizes):
        parts = [
            part
            for name, value in options.items()
            for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
        ]
        wanted = Rehearsal(find_profile(profile), runs.script(recipe), parts, **sizes)
        return rehearse(wanted, compare=compare)

    return run


def held(record):
    return record["parameter_bytes"] + record["optimizer_bytes"]


def logits(folder, prompts):
    args = ModelArguments(model_name_or_path=str(folder))
    tokenizer = load_tokenizer(args)
    model = load_model(args, tokenizer).eval()
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.distributed
@pytest.mark.parametrize(("profile", "family", "nodes"), [("fsdp2", "t5", 1), ("zero3", "llama", 2)])
def test_a_sharded_run_ends_in_one_rank_s_model(profile, family, nodes, rehearsed, called, models, assets, tmp_path):
    options = {
        "model_name_or_path": models / family, "dataset_name": assets.data, "max_steps": 3, "logging_steps": 1,
        "learning_rate": 5e-3, "max_new_tokens": 8, "evaluate_before": True,
    }  # fmt: skip
    two = options | {"output_dir": tmp_path / "two", "per_device_train_batch_size": 2}
    report = rehearsed(profile, "finetune", two, nodes=nodes)
    assert report.equal, report.largest_difference
    assert len(report.losses) == 3
    for record in report.per_rank:
        assert held(record) <= SHARE[profile] * held(report.plain)
        assert record["activation_peak_bytes"] > 0
        assert record["communication_bytes"]["reduce_scatter"] > 0
    one = options | {"output_dir": tmp_path / "one", "per_device_train_batch_size": 4, "mixed_precision": "bf16"}
    run = called("finetune", one)
    assert verify(tmp_path / "two") == []
    found, expected = ({**run.manifest} for run in (type(run)(tmp_path / "two", two), run))
    assert found["metrics"]["eval_loss"] == pytest.approx(expected["metrics"]["eval_loss"], rel=1e-2)
    before = [manifest["metrics"]["change"]["test"]["loss_before"] for manifest in (found, expected)]
    assert before[0] == pytest.approx(before[1], rel=1e-2)
    prompts = [json.loads(line)["dialogue"] for line in (assets.data / "test.jsonl").read_text().splitlines()]
    ours, wanted = (logits(tmp_path / name, prompts) for name in ("two", "one"))
    assert (ours - wanted).norm() < OUTPUT_TOLERANCE * wanted.norm()


@pytest.mark.distributed
def test_dpo_of_an_adapter_keeps_its_reference_under_fsdp2(rehearsed, models, tmp_path):
    data = pairs.write_pairs(tmp_path / "pairs")
    options = LORA | {
        "model_name_or_path": models / "llama", "dataset_name": data, "max_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_completion_length": 16,
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    report = rehearsed("fsdp2", "dpo", options)
    assert report.equal, report.largest_difference
    assert report.losses[0] == pytest.approx(0.6931, abs=2e-3)  # log 2: policy and reference are one model
    model = load_model(ModelArguments(model_name_or_path=str(tmp_path / "out")), tiny.tokenizer())
    assert isinstance(model, PeftModel)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("profile", "family"), [("fsdp2", "t5"), ("zero3", "llama")])
def test_a_student_answers_and_learns_while_it_is_in_pieces(profile, family, rehearsed, models, assets, tmp_path):
    options = {
        "teacher_name_or_path": models / family, "dataset_name": assets.data, "max_steps": 4, "logging_steps": 1,
        "per_device_train_batch_size": 4, "max_train_samples": 16, "max_new_tokens": 6, "max_target_length": 16,
        "on_policy_share": 0.5, "hidden_weight": 0.1, "sequence_level": True, "output_dir": tmp_path / "out",
    }  # fmt: skip
    report = rehearsed(profile, "compress/distill", options)
    assert report.largest_difference < OWN_ANSWERS, report.losses
    assert len(report.losses) == 4
    assert all(held(record) <= SHARE[profile] * held(report.plain) for record in report.per_rank)
    assert verify(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("profile", ["fsdp2", "zero3"])
def test_dpo_of_all_weights_scores_its_reference_first(profile, rehearsed, models, tmp_path):
    data = pairs.write_pairs(tmp_path / "pairs")
    options = {
        "model_name_or_path": models / "t5", "dataset_name": data, "max_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_completion_length": 16,
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    report = rehearsed(profile, "dpo", options)
    assert report.equal, report.largest_difference
    assert verify(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("profile", "method"), [("fsdp2", LORA), ("zero3", {})])
def test_a_reward_model_is_trained_and_saved_from_shards(profile, method, rehearsed, models, tmp_path):
    data = pairs.write_pairs(tmp_path / "pairs")
    options = method | {
        "model_name_or_path": models / "llama", "dataset_name": data, "max_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_length": 32, "output_dir": tmp_path / "out",
    }  # fmt: skip
    report = rehearsed(profile, "reward_model", options)
    assert report.equal, report.largest_difference
    assert verify(tmp_path / "out") == []
    model, _ = load_classifier(str(tmp_path / "out"))
    assert model.config.num_labels == 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("profile", ["fsdp2", "zero3"])
def test_an_adapter_is_merged_from_shards(profile, rehearsed, models, assets, tmp_path):
    options = LORA | {
        "model_name_or_path": models / "llama", "dataset_name": assets.data, "max_steps": 2, "learning_rate": 1e-2,
        "max_new_tokens": 4, "merge_adapter": True, "output_dir": tmp_path / "out",
    }  # fmt: skip
    rehearsed(profile, "finetune", options, compare=False)
    assert verify(tmp_path / "out") == []
    weights = load_model(ModelArguments(model_name_or_path=str(tmp_path / "out")), tiny.tokenizer()).state_dict()
    start = load_model(ModelArguments(model_name_or_path=str(models / "llama")), tiny.tokenizer()).state_dict()
    # in bfloat16, which ZeRO-3 keeps its weights in
    moved = {name for name in start if not torch.equal(weights[name].bfloat16(), start[name].bfloat16())}
    assert moved >= {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"}
    assert "model.embed_tokens.weight" not in moved


@pytest.mark.distributed
def test_an_adapter_starts_the_same_under_tensor_parallelism(rehearsed, models, assets):
    options = LORA | {
        "model_name_or_path": models / "llama", "dataset_name": assets.data, "max_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_new_tokens": 4, "lora_dropout": 0.0,
        "mixed_precision": "no",
    }  # fmt: skip
    report = rehearsed("tp", "finetune", options)
    assert report.equal, report.largest_difference
    assert report.largest_difference < 1e-5


@pytest.mark.distributed
def test_an_impossible_pair_is_refused_on_every_rank_with_exit_2(rehearsed, models, assets, tmp_path, capfd):
    options = LORA | {
        "model_name_or_path": models / "llama", "dataset_name": assets.data, "load_in_4bit": True,
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    with pytest.raises(SystemExit) as left:
        rehearsed("zero3", "finetune", options, compare=False)
    assert left.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == ["error: launch profile zero3: load_in_4bit: ZeRO-3 cannot split nf4 weights; take fsdp2"]
    assert not (tmp_path / "out").exists()
