"""recipes/dpo.py from the command line to the model folder: both families, full and LoRA, ranks, resumed, refused."""

from __future__ import annotations

import json
import signal

import numpy as np
import pairs
import pytest
import torch
from runs import assert_refused, wait_for

from yunque.artifacts import verify
from yunque.distributed.preferences import PreferenceTrainer
from yunque.models.adapter import adapter_for
from yunque.models.arguments import ModelArguments
from yunque.models.loading import load_model, load_tokenizer
from yunque.models.policy import score_tokens

LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture(scope="session")
def dpo_options(assets, tmp_path_factory):
    """Options of a short run; keywords add or replace, None removes."""
    data = pairs.write_pairs(tmp_path_factory.mktemp("pairs"))

    def options(**changed):
        chosen = {
            "model_name_or_path": assets.llama,
            "dataset_name": data,
            "max_steps": 24,
            "save_steps": 8,
            "logging_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "max_completion_length": 16,
        } | changed
        return {name: value for name, value in chosen.items() if value is not None}

    return options


def margins_again(run):
    """Margins of the saved rows under the saved folder, each answer scored alone."""
    args = ModelArguments(model_name_or_path=str(run.folder))
    tokenizer = load_tokenizer(args)
    model = load_model(args, tokenizer).eval()
    adapter = adapter_for(model, tokenizer)

    def score(prompt, answer):
        queries, answers = ([tokenizer(text)["input_ids"]] for text in (prompt, answer))
        batch = adapter.scoring_batch(queries, [[*answers[0], tokenizer.eos_token_id]], torch.device("cpu"))
        with torch.no_grad():
            return score_tokens(model, adapter, batch, 1.0, lean=False)[0].logprobs_BR.sum().item()

    rows = run.rows("margins.jsonl")
    return [score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"]) for row in rows]


def kept_its_promises(run):
    """What every finished run must show."""
    assert verify(run.folder) == []
    assert not (run.folder / "checkpoints").exists()
    assert run.losses[-1] < run.losses[0]
    # the tolerance is that of float32 sums over padded and unpadded rows
    assert margins_again(run) == pytest.approx([row["margin_after"] for row in run.rows("margins.jsonl")], abs=2e-4)
    return True


# --- trained ---


@pytest.fixture(scope="module")
def full_run(finished, dpo_options, new_folder):
    return finished("dpo", dpo_options(output_dir=new_folder()), cold=True)


def test_decoder_only_from_the_command_line(full_run, assets):
    assert kept_its_promises(full_run)
    first, last = full_run.log[0], [line for line in full_run.log if "loss" in line][-1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)  # policy and start are still the same
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert last["rewards/margins"] > 0.1
    assert last["rewards/accuracies"] > 0.9
    assert {"logps/chosen", "logps/rejected", "loss/preference", "grad_norm", "learning_rate"} <= last.keys()
    manifest = full_run.manifest
    assert (manifest["stage"], manifest["parents"][0]["path"]) == ("dpo", str(assets.llama))
    assert [(part["split"], part["rows"]) for part in manifest["data"]] == [("train", 24), ("test", 9)]


def test_the_metrics_are_those_of_the_held_out_pairs(full_run):
    metrics, rows = full_run.manifest["metrics"], full_run.rows("margins.jsonl")
    before, after = (np.array([row[f"margin_{when}"] for row in rows]) for when in ("before", "after"))
    assert metrics["num_pairs"] == len(rows) == 9
    assert metrics["margin_before"]["mean"] == pytest.approx(before.mean(), rel=1e-5)
    assert metrics["margin_change"]["mean"] == pytest.approx((after - before).mean(), rel=1e-5)
    assert metrics["reward_margin"]["mean"] == pytest.approx(0.1 * (after - before).mean(), rel=1e-5)
    assert metrics["reward_accuracy"]["mean"] == pytest.approx((after > before).mean())
    assert metrics["accuracy_after"]["mean"] == pytest.approx((after > 0).mean())
    assert metrics["chosen_change"]["mean"] - metrics["rejected_change"]["mean"] == pytest.approx(
        metrics["margin_change"]["mean"]
    )


def test_encoder_decoder(called, dpo_options, assets, tmp_path):
    run = called("dpo", dpo_options(output_dir=tmp_path / "out", model_name_or_path=assets.t5))
    assert kept_its_promises(run)
    assert run.manifest["metrics"]["margin_change"]["mean"] > 0


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_adapter_is_saved_alone_and_reloads(family, called, dpo_options, assets, tmp_path):
    run = called("dpo", dpo_options(output_dir=tmp_path / "out", model_name_or_path=getattr(assets, family), **LORA))
    assert kept_its_promises(run)
    assert "adapter_model.safetensors" in run.manifest["files"]
    assert "model.safetensors" not in run.manifest["files"]


def test_a_trained_adapter_is_its_own_reference_and_merges(called, dpo_options, assets, tmp_path):
    options = dpo_options(output_dir=tmp_path / "out", model_name_or_path=assets.adapter, merge_adapter=True)
    run = called("dpo", options | {"logging_steps": 1, "resume": True})
    assert run.log[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the bare base model would give another one
    assert kept_its_promises(run)
    assert "model.safetensors" in run.manifest["files"]


@pytest.mark.parametrize("changed", [{"loss_type": "ipo"}, {"loss_type": "hinge"}, {"sft_weight": 1.0}], ids=str)
def test_other_losses(changed, called, dpo_options, tmp_path):
    run = called("dpo", dpo_options(output_dir=tmp_path / "out", **changed))
    assert run.losses[-1] < run.losses[0]
    assert run.manifest["metrics"]["margin_change"]["mean"] > 0


# --- ranks, and stopped and resumed ---


def test_two_ranks_train_as_one(called, finished, dpo_options, tmp_path):
    changed = {"sft_weight": 0.1, "mixed_precision": "no", "max_steps": 12, "logging_steps": 1}
    one = called("dpo", dpo_options(output_dir=tmp_path / "one", **changed))
    two = finished("dpo", dpo_options(output_dir=tmp_path / "two", per_device_train_batch_size=2, **changed), ranks=2)
    # float32 sums in another order, over 12 optimizer steps
    assert two.losses == pytest.approx(one.losses, rel=1e-3)
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
        theirs, ours = ([line[name] for line in run.log if "loss" in line] for run in (two, one))
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-4), name
    after = [[row["margin_after"] for row in run.rows("margins.jsonl")] for run in (two, one)]
    assert after[0] == pytest.approx(after[1], abs=1e-2)


def test_a_stopped_run_resumes_to_the_same_curve(start_recipe, called, dpo_options, tmp_path):
    options = dpo_options(max_steps=120, save_steps=120, logging_steps=1, precompute_ref_log_probs=True)
    process = start_recipe("dpo", options | {"output_dir": tmp_path / "stopped"})
    wait_for(tmp_path / "stopped" / "log.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75
    assert "--resume" in errors.splitlines()[-1]
    assert not (tmp_path / "stopped" / "yunque.json").exists()
    resumed = called("dpo", options | {"output_dir": tmp_path / "stopped", "resume": True})
    assert_same_run(resumed, called("dpo", options | {"output_dir": tmp_path / "undisturbed"}))


def test_a_trained_adapter_s_reference_survives_a_resume(
    call_recipe, called, dpo_options, assets, tmp_path, monkeypatch
):
    options = dpo_options(model_name_or_path=assets.adapter, save_steps=100)
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "compute_loss", pairs.signalled_at(16, PreferenceTrainer.compute_loss))
        assert call_recipe("dpo", options | {"output_dir": tmp_path / "stopped"}).returncode == 75
    resumed = called("dpo", options | {"output_dir": tmp_path / "stopped", "resume": True})
    assert_same_run(resumed, called("dpo", options | {"output_dir": tmp_path / "undisturbed"}))


def test_a_resumed_run_keeps_its_objective(call_recipe, dpo_options, tmp_path, monkeypatch):
    options = dpo_options(output_dir=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "compute_loss", pairs.signalled_at(6, PreferenceTrainer.compute_loss))
        assert call_recipe("dpo", options).returncode == 75
    for changed in ({"beta": 0.9}, {"loss_type": "hinge"}, {"max_prompt_length": 9}, {"max_steps": 2}):
        process = call_recipe("dpo", options | changed | {"resume": True})
        assert_refused(process, f"{next(iter(changed))}: the checkpoint in", "--overwrite_output_dir")


def assert_same_run(one, other):
    assert one.losses == other.losses
    assert one.rows("margins.jsonl") == other.rows("margins.jsonl")
    metrics = [{k: v for k, v in run.manifest["metrics"].items() if not k.endswith("_s")} for run in (one, other)]
    assert metrics[0] == metrics[1]


# --- refused ---


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"chosen_column": "better"}, ("chosen_column: ", "better", "prompt, chosen, rejected")),
        ({"model_name_or_path": None}, ("model_name_or_path: ", "give a hub id")),
        ({"max_completion_length": 3000}, ("max_completion_length: ", "512 positions")),
        ({"max_prompt_length": 1}, ("max_prompt_length: no pair is left",)),
        ({"beta": 0}, ("beta: ",)),
        ({"label_smoothing": 0.5}, ("label_smoothing: 0.5",)),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, ("label_smoothing: loss_type ipo",)),
        ({"loss_type": "kto"}, ("kto",)),
        ({"sft_weight": -1}, ("sft_weight: ",)),
        ({"margin": 1}, ("margin",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(changed, words, call_recipe, dpo_options, tmp_path):
    assert_refused(call_recipe("dpo", dpo_options(output_dir=tmp_path / "out", **changed)), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "w9", "chosen": " w10", "rejected": "w10 "}, ("no usable pair", "two equal answers")),
        ({"prompt": "w9 " * 600, "chosen": " w10", "rejected": " w11"}, ("max_prompt_length: 3 of 3 prompts",)),
    ],
    ids=["equal", "long"],
)
def test_bad_rows(row, words, call_recipe, dpo_options, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    assert_refused(call_recipe("dpo", dpo_options(output_dir=tmp_path / "out", dataset_name=tmp_path / "data")), *words)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_run(call_recipe, dpo_options, assets, tmp_path):
    options = dpo_options(output_dir=tmp_path / "out", learning_rate=1e30, max_grad_norm=0)
    process = call_recipe("dpo", options)
    assert process.returncode == 1
    assert "failed: the loss is " in process.stderr
    assert not (tmp_path / "out" / "yunque.json").exists()
