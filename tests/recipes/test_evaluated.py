"""Evaluations while a recipe trains, and the best checkpoint at its end: every supervised trainer."""

from __future__ import annotations

import json
import signal

import pairs
import pytest
from runs import assert_refused, json_lines, wait_for

COMMON = {"max_steps": 12, "logging_steps": 4, "save_steps": 100, "per_device_train_batch_size": 4, "eval_size": 0.25}


@pytest.fixture(scope="session")
def evaluated_options(assets, tmp_path_factory):
    """Options by recipe of a run whose loss on held-out rows falls and rises again."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = pairs.write_pairs(folder)
    labelled = folder / "labelled.jsonl"
    rows = [{"text": f"{'good' if row % 2 else 'bad'} w{row % 7}", "label": row % 2} for row in range(60)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scratch = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"
    chat = {"model_name_or_path": assets.llama, "dataset_name": data, "max_completion_length": 16}
    answers = {"dataset_name": assets.data, "max_new_tokens": 4}
    return {
        "finetune": COMMON | answers | {"model_name_or_path": assets.t5},
        "finetune_causal": COMMON | answers | {"model_name_or_path": assets.llama},
        "dpo": COMMON | chat | {"precompute_ref_log_probs": True},
        "orpo": COMMON | chat,
        "reward_model": COMMON
        | {"dataset_name": labelled, "from_scratch": True, "vocab_size": 300, "config_overrides": scratch},
        "reward_pairs": COMMON | {"dataset_name": data, "model_name_or_path": assets.llama},
    }


def evaluations(folder):
    return [line for line in json_lines(folder / "log.jsonl") if "eval_loss" in line]


METRICS = {
    "finetune": None,
    "finetune_causal": "mean_token_accuracy",
    "dpo": "rewards/margins",
    "orpo": "eval_rewards/accuracies",
    "reward_model": "accuracy",
    "reward_pairs": "margin",
}


@pytest.mark.parametrize("kind", METRICS)
def test_the_model_at_the_end_is_the_best_one(kind, called, evaluated_options, tmp_path):
    metric = METRICS[kind]
    options = evaluated_options[kind] | {"output_dir": tmp_path / "out", "learning_rate": 1e-2, "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    options |= {} if metric is None else {"metric_for_best_model": metric}
    recipe = {"finetune_causal": "finetune", "reward_pairs": "reward_model"}.get(kind, kind)
    run = called(recipe, options)
    found = evaluations(run.folder)
    assert [line["step"] for line in found] == [2, 4, 6, 8, 10, 12]
    name = f"eval_{(metric or 'loss').removeprefix('eval_')}"
    best = (min if metric is None else max)(found, key=lambda line: line[name])
    metrics = run.manifest["metrics"]
    assert (metrics["best_step"], metrics[f"best_{name}"]) == (best["step"], best[name])
    again = called(recipe, options | {"output_dir": tmp_path / "short", "max_steps": best["step"]})
    assert again.manifest["files"]["model.safetensors"] == run.manifest["files"]["model.safetensors"]


def test_the_loss_depends_on_neither_batches_nor_epochs_by_name(called, evaluated_options, tmp_path):
    options = evaluated_options["finetune"] | {"max_steps": 5, "eval_strategy": "epoch", "seed": 1}
    one, many = (
        called("finetune", options | {"output_dir": tmp_path / str(size), "per_device_eval_batch_size": size})
        for size in (1, 32)
    )
    losses = [[line["eval_loss"] for line in evaluations(run.folder)] for run in (one, many)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert evaluations(one.folder)[0]["epoch"] == 1


def test_a_resumed_run_still_knows_its_best(start_recipe, called, evaluated_options, tmp_path):
    options = evaluated_options["finetune"] | {"max_steps": 60, "eval_steps": 2, "save_steps": 10}
    options |= {"load_best_model_at_end": True, "learning_rate": 1e-2, "save_total_limit": 1}
    undisturbed = called("finetune", options | {"output_dir": tmp_path / "undisturbed"})
    options |= {"output_dir": tmp_path / "stopped"}
    process = start_recipe("finetune", options)
    wait_for(tmp_path / "stopped" / "checkpoints" / "best.json", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    resumed = called("finetune", options | {"resume": True})
    assert evaluations(resumed.folder)[-1]["eval_loss"] == evaluations(undisturbed.folder)[-1]["eval_loss"]
    assert resumed.manifest["metrics"]["best_step"] == undisturbed.manifest["metrics"]["best_step"]
    assert resumed.manifest["files"]["model.safetensors"] == undisturbed.manifest["files"]["model.safetensors"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"load_best_model_at_end": True}, ("load_best_model_at_end: ", "eval_steps")),
        ({"eval_steps": 2, "eval_strategy": "epoch"}, ("eval_steps: ", "epoch")),
        ({"eval_steps": 0}, ("eval_steps: 0",)),
        ({"eval_steps": 2, "eval_size": 1}, ("eval_size: 1",)),
        ({"eval_steps": 2, "metric_for_best_model": "bleu"}, ("metric_for_best_model: ", "'bleu'", "loss")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(changed, words, call_recipe, evaluated_options, tmp_path):
    options = evaluated_options["finetune"] | {"output_dir": tmp_path / "out"} | changed
    assert_refused(call_recipe("finetune", options), *words)
