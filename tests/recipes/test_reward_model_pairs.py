"""recipes/reward_model.py on preference pairs: one reward from scratch, on ranks, on language models, with LoRA."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from runs import assert_refused, json_lines
from transformers import AutoModelForSequenceClassification

from yunque.artifacts import verify
from yunque.distributed.checkpoint import StopSignal
from yunque.errors import EXIT_TRY_AGAIN
from yunque.metrics.pairs import bradley_terry_loss
from yunque.models.adapter import adapter_for
from yunque.models.loading import load_classifier
from yunque.rl.config import RewardArguments
from yunque.rl.reward_sources import load_reward

SCRATCH = {
    "from_scratch": True,
    "vocab_size": 400,
    "config_overrides": "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,"
    "initializer_range=0.1",
}
KIND, RUDE = ("w10", "w11", "w12"), ("w20", "w21", "w22")


def some_words(numbers, word=None):
    words = [f"w{numbers.randrange(30, 60)}" for _ in range(numbers.randrange(2, 9))]
    if word:
        words.insert(numbers.randrange(len(words)), word)
    return " ".join(words)


def write(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def preferred(tmp_path_factory):
    """Train and test pairs whose better answer is told by one word, with margins and groups."""
    folder, numbers = tmp_path_factory.mktemp("preferred"), random.Random(0)
    for split, size in (("train", 120), ("test", 45)):
        rows = [
            {
                "prompt": some_words(numbers),
                "chosen": " " + some_words(numbers, numbers.choice(KIND)),
                "rejected": " " + some_words(numbers, numbers.choice(RUDE)),
                "gap": number % 3 / 2,
                "kind": f"k{number % 2}",
            }
            for number in range(size)
        ]
        write(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def pair_options(preferred):
    """Options of a short run on ``preferred``; keywords add or replace, None removes."""

    def options(**changed):
        chosen = (
            SCRATCH
            | {
                "dataset_name": preferred,
                "max_steps": 40,
                "logging_steps": 5,
                "save_steps": 20,
                "per_device_train_batch_size": 16,
                "train_sampling_strategy": "group_by_length",
                "learning_rate": 1e-2,
                "max_length": 64,
                "disable_dropout": True,
            }
            | changed
        )
        return {name: value for name, value in chosen.items() if value is not None}

    return options


def on_top_of(model, **changed):
    return dict.fromkeys(SCRATCH) | {"model_name_or_path": model} | changed


@pytest.fixture(scope="session")
def pair_run(finished, pair_options, tmp_path_factory):
    return finished("reward_model", pair_options(output_dir=tmp_path_factory.mktemp("pairs") / "out"))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2", "roberta"):
        getattr(tiny, name)().save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return root


def rewarded(folder, rows, answer):
    model, tokenizer = load_classifier(str(folder))
    texts = [row["prompt"] + row[answer] for row in rows]
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].numpy()


def test_it_learns_and_its_folder_is_complete(pair_run):
    losses = pair_run.losses
    assert losses[0] == pytest.approx(np.log(2), abs=0.2)
    assert losses[-1] < 0.5 * losses[0]
    assert verify(pair_run.folder) == []
    manifest = pair_run.manifest
    assert set(manifest["files"]) >= {"config.json", "model.safetensors", "tokenizer.json", "pairs.json"}
    assert (pair_run.folder / "reward_scores.png").read_bytes().startswith(b"\x89PNG")
    assert (manifest["stage"], [(part["split"], part["rows"]) for part in manifest["data"]]) == (
        "reward",
        [("train", 120), ("test", 45)],
    )
    assert not (pair_run.folder / "checkpoints").exists()


def test_the_report_is_that_of_the_saved_model(pair_run, preferred):
    rows = json_lines(preferred / "test.jsonl")
    chosen, rejected = (rewarded(pair_run.folder, rows, answer) for answer in ("chosen", "rejected"))
    metrics = pair_run.manifest["metrics"]
    assert metrics["accuracy"]["mean"] == pytest.approx((chosen > rejected).mean())
    assert metrics["accuracy"]["low"] > 0.8
    assert metrics["eval_loss"] == pytest.approx(bradley_terry_loss(chosen, rejected), rel=1e-4)
    longer = np.array([np.sign(len(row["chosen"]) - len(row["rejected"])) for row in rows])
    assert metrics["longer_accuracy"]["mean"] == pytest.approx((longer + 1).mean() / 2)
    assert sum(part["num_pairs"] for part in metrics["calibration"]["bins"]) == 45
    assert 0 <= metrics["calibration"]["expected_error"] <= 0.5
    assert json.loads((pair_run.folder / "pairs.json").read_text()) == metrics


def test_it_serves_as_reward_of_ppo(pair_run, preferred):
    rows = json_lines(preferred / "test.jsonl")
    model, tokenizer = load_classifier(str(pair_run.folder))
    assert model.config.num_labels == 1
    args = RewardArguments(reward_funcs=[str(pair_run.folder)])
    reward = load_reward(args, adapter_for(model, tokenizer), torch.device("cpu"))
    scores = [
        reward.scores([row["prompt"] for row in rows], [row[answer] for row in rows], [1] * len(rows)).total
        for answer in ("chosen", "rejected")
    ]
    assert (scores[0] > scores[1]).mean() == pytest.approx(pair_run.manifest["metrics"]["accuracy"]["mean"])
    assert scores[0] == pytest.approx(rewarded(pair_run.folder, rows, "chosen"), abs=1e-4)


def test_two_ranks_train_as_one_and_score_every_pair_once(finished, pair_run, pair_options, tmp_path):
    options = pair_options(output_dir=tmp_path / "out", per_device_train_batch_size=8, per_device_eval_batch_size=4)
    two = finished("reward_model", options, ranks=2)
    # equal but for the order of sums, which 40 Adam steps amplify
    assert two.losses == pytest.approx(pair_run.losses, abs=0.02)
    assert two.manifest["metrics"]["num_pairs"] == 45  # 12 batches of 4, the last one filled up
    assert two.manifest["metrics"]["eval_loss"] == pytest.approx(pair_run.manifest["metrics"]["eval_loss"], abs=0.02)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(called, call_recipe, pair_options, tmp_path, monkeypatch):
    whole = called("reward_model", pair_options(output_dir=tmp_path / "whole", max_steps=6, logging_steps=1))
    part = pair_options(output_dir=tmp_path / "part", max_steps=6, logging_steps=1)
    asked = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", lambda self, accelerator: next(asked))
        stopped = call_recipe("reward_model", part)
    assert stopped.returncode == EXIT_TRY_AGAIN
    assert not (tmp_path / "part" / "model.safetensors").exists()
    again = called("reward_model", part | {"resume": True})
    assert again.losses == whole.losses
    assert len(again.losses) == 6


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_language_model_gets_a_head_of_one_reward(base, called, pair_options, models, preferred, tmp_path):
    run = called("reward_model", pair_options(output_dir=tmp_path / "out", **on_top_of(models / base)))
    assert run.losses[-1] < 0.5 * run.losses[0]
    rows = json_lines(preferred / "test.jsonl")
    right = rewarded(run.folder, rows, "chosen") > rewarded(run.folder, rows, "rejected")
    assert run.manifest["metrics"]["accuracy"]["mean"] == pytest.approx(right.mean())


@pytest.mark.parametrize("base", ["llama", "roberta"])
def test_the_adapter_on_its_base_is_the_saved_model(base, called, pair_options, models, preferred, tmp_path):
    options = pair_options(output_dir=tmp_path / "out", use_peft=True, **on_top_of(models / base, learning_rate=2e-2))
    run = called("reward_model", options)
    assert run.losses[-1] < run.losses[0]
    rows = json_lines(preferred / "test.jsonl")
    merged = rewarded(run.folder, rows, "chosen")
    model = AutoModelForSequenceClassification.from_pretrained(
        models / base, num_labels=1, ignore_mismatched_sizes=True, pad_token_id=0
    )
    model = PeftModel.from_pretrained(model, run.folder / "adapter").eval()
    batch = load_classifier(str(run.folder))[1](
        [row["prompt"] + row["chosen"] for row in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert merged == pytest.approx(model(**batch).logits[:, 0].numpy(), abs=1e-4)
        with model.disable_adapter():
            assert merged != pytest.approx(model(**batch).logits[:, 0].numpy(), abs=1e-2)


def test_the_adapter_stays_out_where_only_the_merged_model_is_wanted(called, pair_options, models, tmp_path):
    options = pair_options(output_dir=tmp_path / "out", max_steps=1, **on_top_of(models / "llama"))
    run = called("reward_model", options | {"use_peft": True, "merge_adapter": True})
    assert not (run.folder / "adapter").exists()
    assert verify(run.folder) == []


def test_margins_groups_and_a_second_set(called, pair_options, preferred, tmp_path):
    second = {"eval_dataset_name": preferred, "eval_split": "test", "eval_group_column": "kind"}
    run = called("reward_model", pair_options(output_dir=tmp_path / "out", max_steps=5, margin_column="gap", **second))
    rows = json_lines(preferred / "test.jsonl")
    chosen, rejected = (rewarded(run.folder, rows, answer) for answer in ("chosen", "rejected"))
    with_margin = bradley_terry_loss(chosen, rejected, [row["gap"] for row in rows])
    metrics = run.manifest["metrics"]
    assert metrics["eval_loss"] == pytest.approx(with_margin, rel=1e-4)
    assert metrics["train_loss_first"] > 0.8  # log 2 is what it costs without margins
    assert metrics["eval"]["accuracy"] == metrics["accuracy"]
    assert [group["num_rows"] for group in metrics["eval"]["accuracy_by_group"].values()] == [23, 22]


def test_rankings_become_pairs(called, pair_options, preferred, tmp_path):
    rows = json_lines(preferred / "train.jsonl")[:12]
    rankings = [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], " w5"], "ranks": [1, 3, 2]}
        for row in rows
    ]
    path = write(tmp_path / "rankings.jsonl", rankings)
    run = called("reward_model", pair_options(output_dir=tmp_path / "out", max_steps=1, dataset_name=path))
    assert sum(part["rows"] for part in run.manifest["data"]) == 36


def test_answers_alone_and_what_is_cut(call_recipe, pair_options, tmp_path):
    options = pair_options(output_dir=tmp_path / "out", max_steps=1, max_length=8, reward_text="response")
    process = call_recipe("reward_model", options)
    assert process.returncode == 0, process.stderr
    assert "train texts: 240, cut to their last 8 tokens: " in process.stdout
    assert "expected calibration error" in process.stdout


@pytest.mark.parametrize(
    ("rows", "changed", "words"),
    [
        ([{"prompt": "p", "chosen": "same", "rejected": "same"}], {}, ("no usable pair", "two equal answers")),
        ([{"prompt": "p", "chosen": "one"}], {}, ("rejected_column: ", "prompt, chosen")),
        ([{"chosen": "one", "rejected": "two"}], {}, ("dialogues do not end with an answer",)),
        ([{"prompt": "p", "completions": ["a"], "ranks": [1]}], {}, ("fewer than two answers",)),
        ([{"prompt": "p", "completions": ["a", "b"], "ranks": [1]}], {}, ("ranks_column: ", "same length")),
        (None, {"label_smoothing_factor": 0.1}, ("label_smoothing_factor: ", "pairs")),
        (None, {"center_rewards_coefficient": -1}, ("center_rewards_coefficient: -1",)),
        (None, {"reward_text": "prompt"}, ("reward_text: 'prompt'", "query_response or response")),
        (None, {"load_in_4bit": True}, ("load_in_4bit: ",)),
        (None, {"use_peft": True}, ("use_peft: ", "from_scratch")),
        (None, {"eval_dataset_name": "./absent.jsonl"}, ("eval_dataset_name: ", "absent.jsonl")),
    ],
)
def test_bad_input(rows, changed, words, call_recipe, pair_options, tmp_path):
    if rows:
        changed = {"dataset_name": write(tmp_path / "rows.jsonl", rows)}
    process = call_recipe("reward_model", pair_options(output_dir=tmp_path / "out", **changed))
    assert_refused(process, *words)
    assert not (tmp_path / "out").exists()


def test_targets_that_match_nothing_are_listed(call_recipe, pair_options, models, tmp_path):
    options = pair_options(output_dir=tmp_path / "out", use_peft=True, **on_top_of(models / "llama"))
    process = call_recipe("reward_model", options | {"lora_target_modules": "attention"})
    assert_refused(process, "lora_target_modules: ", "q_proj")


def test_pairs_that_are_alike_once_cut_are_refused(call_recipe, pair_options, tmp_path):
    long = " ".join(["w5"] * 40)
    rows = [{"prompt": f"w{n}", "chosen": f" w7 {long}", "rejected": f" w8 {long}"} for n in range(9)]
    options = pair_options(output_dir=tmp_path / "out", dataset_name=write(tmp_path / "rows.jsonl", rows))
    assert_refused(call_recipe("reward_model", options), "max_length: ", "are equal", "raise it")
