"""recipes/orpo.py from the command line to the model folder: both families, LoRA, two ranks, resumed, refused."""

from __future__ import annotations

import pairs
import pytest
import torch
from runs import assert_refused

from yunque.artifacts import verify
from yunque.distributed.preferences import PreferenceTrainer
from yunque.models.adapter import adapter_for
from yunque.models.arguments import ModelArguments
from yunque.models.loading import load_model, load_tokenizer
from yunque.models.policy import score_tokens


@pytest.fixture(scope="session")
def orpo_options(assets, tmp_path_factory):
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
            "mixed_precision": "no",
        } | changed
        return {name: value for name, value in chosen.items() if value is not None}

    return options


def margins_again(run):
    """Margins per token of the saved rows under the saved folder, each answer scored alone."""
    args = ModelArguments(model_name_or_path=str(run.folder))
    tokenizer = load_tokenizer(args)
    model = load_model(args, tokenizer).eval()
    adapter = adapter_for(model, tokenizer)

    def score(prompt, answer):
        query, response = (tokenizer(text)["input_ids"] for text in (prompt, answer))
        batch = adapter.scoring_batch([query], [[*response, tokenizer.eos_token_id]], torch.device("cpu"))
        with torch.no_grad():
            return score_tokens(model, adapter, batch, 1.0, lean=False)[0].logprobs_BR.mean().item()

    rows = run.rows("margins.jsonl")
    return [score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"]) for row in rows]


def kept_its_promises(run):
    """What every finished run must show."""
    assert verify(run.folder) == []
    assert run.losses[-1] < run.losses[0]
    assert run.manifest["metrics"]["margin_change"]["mean"] > 0
    # the tolerance is that of float32 sums over padded and unpadded rows
    assert margins_again(run) == pytest.approx([row["margin_after"] for row in run.rows("margins.jsonl")], abs=1e-4)
    return True


def test_from_the_command_line_on_one_and_two_ranks(finished, orpo_options, new_folder, assets):
    one = finished("orpo", orpo_options(output_dir=new_folder()), cold=True)
    assert kept_its_promises(one)
    assert (one.manifest["stage"], one.manifest["parents"][0]["path"]) == ("orpo", str(assets.llama))
    last = [line for line in one.log if "loss" in line][-1]
    assert last["loss"] > last["loss/preference"] > 0  # the chosen answers' cross entropy is the rest
    options = orpo_options(output_dir=new_folder(), per_device_train_batch_size=2)
    two = finished("orpo", options, ranks=2, cold=True)  # a whole launch as a user's is
    assert two.losses == pytest.approx(one.losses, rel=1e-3)  # float32 sums in another order


@pytest.mark.parametrize("changed", [{}, {"use_peft": True, "lora_r": 8, "learning_rate": 1e-2}], ids=["full", "lora"])
def test_encoder_decoder(changed, called, orpo_options, assets, tmp_path):
    options = orpo_options(output_dir=tmp_path / "out", model_name_or_path=assets.t5, max_steps=40) | changed
    run = called("orpo", options)
    assert kept_its_promises(run)
    assert ("adapter_model.safetensors" in run.manifest["files"]) == ("use_peft" in changed)


def test_a_run_goes_on_from_its_checkpoint(call_recipe, called, orpo_options, tmp_path, monkeypatch):
    whole = called("orpo", orpo_options(output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "compute_loss", pairs.signalled_at(16, PreferenceTrainer.compute_loss))
        process = call_recipe("orpo", orpo_options(output_dir=tmp_path / "stopped", save_steps=100))
    assert process.returncode == 75, process.stderr
    resumed = called("orpo", orpo_options(output_dir=tmp_path / "stopped", save_steps=100, resume=True))
    assert resumed.losses == whole.losses
    assert resumed.rows("margins.jsonl") == whole.rows("margins.jsonl")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rejected_column": "worse"}, ("rejected_column: ", "worse", "prompt, chosen, rejected")),
        ({"max_prompt_length": 1}, ("max_prompt_length: no pair is left",)),
        ({"beta": -1}, ("beta: ",)),
        ({"loss_type": "ipo"}, ("loss_type",)),
        ({"model_name_or_path": "./absent"}, ("model_name_or_path: ", "no such model folder")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(changed, words, call_recipe, orpo_options, tmp_path):
    assert_refused(call_recipe("orpo", orpo_options(output_dir=tmp_path / "out", **changed)), *words)
    assert not (tmp_path / "out").exists()
