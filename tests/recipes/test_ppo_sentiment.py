"""recipes/ppo_sentiment.py from the command line to two model folders and their comparison."""

from __future__ import annotations

import csv
import json
import random
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from runs import assert_refused
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from yunque import arguments
from yunque.artifacts import verify

RECIPE = Path(__file__).parents[2] / "recipes" / "ppo_sentiment.py"
STEPS = 6


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A tiny classifier with the labels of the hub's and firm opinions."""
    folder = tmp_path_factory.mktemp("classifier")
    model = tiny.roberta(labels=("NEGATIVE", "POSITIVE"))
    with torch.no_grad():
        head = model.classifier.out_proj
        head.weight[1] *= 10
        head.weight[0] = -head.weight[1]  # as training leaves it: what speaks for one label speaks against the other
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """20 train and 41 test reviews as CSV; one of each is too short."""
    folder, numbers = tmp_path_factory.mktemp("reviews"), random.Random(0)
    for split, rows in (("train", 20), ("test", 41)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(rows):
                words = 40 if row == 3 else 70
                text = " ".join(f"w{numbers.randrange(8, tiny.VOCABULARY)}" for _ in range(words))
                writer.writerow([text, row % 2])
    return folder


@pytest.fixture(scope="session")
def options(assets, classifier, reviews):
    """Options of a short run; keywords add or replace."""

    def choose(**changed):
        return {
            "model_name_or_path": assets.llama,
            "reward_model_name_or_path": classifier,
            "dataset_name": reviews,
            "sentiment": "positive",
            "max_steps": STEPS,
            "save_steps": 2,
            "batch_size": 8,
            "mini_batch_size": 4,
            "learning_rate": 1e-3,
            "min_new_tokens": 4,
            "max_new_tokens": 16,
            "max_new_tokens_low": 4,
            "mixed_precision": "no",
        } | changed

    return choose


@pytest.fixture(scope="session")
def positive_run(finished, options, new_folder):
    return finished("ppo_sentiment", options(output_dir=new_folder()), cold=True)


@pytest.fixture(scope="session")
def negative_run(finished, options, new_folder, positive_run):
    changed = {"sentiment": "negative", "output_dir": new_folder(), "compare_with": positive_run.folder}
    return finished("ppo_sentiment", options(**changed))


@pytest.fixture(params=["positive_run", "negative_run"])
def any_run(request):
    return request.getfixturevalue(request.param)


def by_prompt(run):
    return sorted(run.answers, key=lambda row: row["prompt"])


# --- what a finished run leaves ---


def test_folder_is_complete_and_says_where_it_comes_from(any_run, reviews):
    manifest = any_run.manifest
    assert verify(any_run.folder) == []
    files = {"before_after.csv", "before_after.jsonl", "reward.png", "kl.png", "loss.png", "sentiment.png"}
    assert files | {"model.safetensors", "tokenizer.json"} <= set(manifest["files"])
    assert (manifest["stage"], manifest["prompt_template"]) == ("ppo", None)
    parents = [any_run.options["model_name_or_path"], any_run.options["reward_model_name_or_path"]]
    assert [parent["path"] for parent in manifest["parents"]] == [str(path) for path in parents]
    assert [(part["split"], part["rows"]) for part in manifest["data"]] == [("train", 20), ("test", 41)]
    config = manifest["config"]
    assert (config["sentiment"], config["min_text_chars"]) == (any_run.options["sentiment"], 201)
    assert not {"reward_label", "toxicity_label"} & set(config)  # not options here: the config is a YAML file's


def test_metrics_are_named_after_the_sentiment(any_run):
    metrics, rows = any_run.manifest["metrics"], any_run.answers
    for name in ("sentiment", "reward"):
        for side in ("before", "after"):
            assert metrics[f"{name}_{side}"] == pytest.approx(np.mean([row[f"{name}_{side}"] for row in rows]))
        change = metrics[f"{name}_change"]
        assert change["mean"] == pytest.approx(metrics[f"{name}_after"] - metrics[f"{name}_before"])
        assert change["low"] <= change["mean"] <= change["high"]
    assert metrics["num_prompts"] == len(rows) == 40
    assert metrics["kl_final"] != 0
    assert {"distinct_1_after", "distinct_2_after", "response_words_change", "samples_per_s"} <= set(metrics)
    assert not [name for name in metrics if "toxicity" in name or "rouge" in name]


def test_reward_is_the_logit_of_the_direction_and_sentiment_the_probability_of_positive(any_run, classifier):
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    column = {"positive": 1, "negative": 0}[any_run.options["sentiment"]]
    for row in any_run.answers:
        for side in ("before", "after"):
            text = row["query"] + row[f"response_{side}"]
            with torch.no_grad():
                logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
            assert row[f"reward_{side}"] == pytest.approx(logits[column].item(), abs=1e-4)
            assert row[f"sentiment_{side}"] == pytest.approx(logits.softmax(0)[1].item(), abs=1e-4)


def test_response_goes_on_after_a_space_and_is_of_4_to_16_tokens(any_run):
    for row in any_run.answers:
        for side in ("before", "after"):
            response = row[f"response_{side}"]
            assert response.startswith(" ")
            assert 4 - 2 <= len(response.split()) <= 16  # <pad> and <unk> are tokens without text
    lengths = [line["tokens/responses_len_mean"] for line in any_run.log]
    assert all(4 <= length < 16 for length in lengths)  # the sampler's limits; their maximum without it
    assert max(lengths) > 4


def test_prompts_open_the_reviews_and_are_the_same_in_both_directions(positive_run, negative_run, reviews):
    texts = [row["text"] for row in csv.DictReader((reviews / "test.csv").open(newline=""))]
    queries = [row["query"] for row in by_prompt(positive_run)]
    for query, text in zip(queries, [text for text in texts if len(text) > 200], strict=True):
        assert text.startswith(query)
        assert 2 <= len(query.split()) <= 8
    assert len({len(query.split()) for query in queries}) > 2
    assert [row["query"] for row in by_prompt(negative_run)] == queries
    before = [[row["response_before"] for row in by_prompt(run)] for run in (positive_run, negative_run)]
    assert before[0] == before[1]


def test_policies_are_compared_on_the_same_prompts(positive_run, negative_run):
    metrics = negative_run.manifest["metrics"]["policies"]
    ours, theirs = by_prompt(positive_run), by_prompt(negative_run)
    gaps = np.array([row["sentiment_after"] for row in ours]) - [row["sentiment_after"] for row in theirs]
    assert metrics["sentiment_difference"]["mean"] == pytest.approx(gaps.mean())
    assert metrics["sentiment_base"] == pytest.approx(np.mean([row["sentiment_before"] for row in ours]))
    assert metrics["kl_positive"] == positive_run.manifest["metrics"]["kl_final"]
    assert metrics["kl_negative"] == negative_run.manifest["metrics"]["kl_final"]
    with (negative_run.folder / "positive_negative.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sentiment_positive"]) - float(row["sentiment_negative"]) for row in rows] == pytest.approx(
        sorted(gaps, reverse=True)
    )
    assert rows[0]["response_positive"] == ours[int(rows[0]["prompt"])]["response_after"]
    assert "policies" not in positive_run.manifest["metrics"]


@pytest.mark.parametrize(("sentiment", "sign"), [("positive", 1), ("negative", -1)])
def test_sentiment_moves_where_it_should(sentiment, sign, called, options, tmp_path):
    changed = {"batch_size": 64, "mini_batch_size": 32, "ppo_epochs": 4, "max_steps": 12}
    changed |= {"learning_rate": 1e-2, "init_kl_coef": 0.02}  # a random model has nothing to lose
    run = called("ppo_sentiment", options(output_dir=tmp_path / "out", sentiment=sentiment, **changed))
    change = run.manifest["metrics"]["sentiment_change"]
    assert min(sign * change["low"], sign * change["high"]) > 0


def test_report_shows_both_tables(call_recipe, options, positive_run, tmp_path):
    changed = {"sentiment": "negative", "compare_with": positive_run.folder, "max_steps": 1}
    process = call_recipe("ppo_sentiment", options(output_dir=tmp_path / "out", **changed))
    assert process.returncode == 0, process.stderr
    for words in ("Before and after on 40 prompts", "Positive sentiment", "gained most reward", "differ most", "Base"):
        assert words in process.stdout


# --- resumed ---


def test_killed_run_resumes_to_the_same_end(called, options, positive_run, tmp_path, without_timing):
    folder = tmp_path / "out"
    shutil.copytree(positive_run.folder, folder)
    (folder / "yunque.json").unlink()
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:06d}")  # as a kill before the last checkpoint leaves it
    resumed = called("ppo_sentiment", options(output_dir=folder, resume=True))
    assert [without_timing(line) for line in resumed.log] == [without_timing(line) for line in positive_run.log]
    assert without_timing(resumed.manifest["metrics"]) == without_timing(positive_run.manifest["metrics"])
    assert resumed.answers == positive_run.answers


def test_comparison_may_be_asked_for_when_a_run_is_resumed(called, options, negative_run, positive_run, tmp_path):
    """Two runs of opposite directions, the first of which had nothing to be compared with."""
    shutil.copytree(positive_run.folder, tmp_path / "out")
    (tmp_path / "out" / "yunque.json").unlink()
    changed = {"output_dir": tmp_path / "out", "resume": True, "compare_with": negative_run.folder}
    run = called("ppo_sentiment", options(**changed))
    ours, theirs = (one.manifest["metrics"]["policies"] for one in (run, negative_run))
    assert ours["sentiment_difference"] == theirs["sentiment_difference"]


def test_run_is_not_resumed_in_the_other_direction(call_recipe, options, positive_run, tmp_path):
    shutil.copytree(positive_run.folder / "checkpoints", tmp_path / "out" / "checkpoints")
    changed = {"output_dir": tmp_path / "out", "resume": True, "sentiment": "negative"}
    process = call_recipe("ppo_sentiment", options(**changed))
    assert process.returncode == 2
    assert "sentiment: the checkpoint" in process.stderr.splitlines()[-1]


# --- wrong uses: exit code 2, one line ---


BAD = [
    ({"sentiment": "happy"}, ("--sentiment", "'happy'", "positive", "negative")),
    ({"reward_label": "POSITIVE"}, ("unknown argument --reward_label",)),
    ({"positive_label": "GOOD"}, ("positive_label: ", "'GOOD'", "NEGATIVE, POSITIVE")),
    ({"sentiment": "negative", "negative_label": "BAD"}, ("negative_label: ", "'BAD'", "NEGATIVE, POSITIVE")),
    ({"sentiment": "negative", "positive_label": "GOOD"}, ("positive_label: ", "'GOOD'")),
    ({"max_new_tokens_low": 17}, ("max_new_tokens_low: 17", "max_new_tokens (16)")),
    ({"prompt_tokens_low": 9}, ("prompt_tokens_low: 9", "prompt_tokens_high=8")),
    ({"min_text_chars": 999}, ("min_text_chars=999", "no row of 20 is left")),
    ({"text_column": "review"}, ("text_column: ", "'review'", "text, label")),
]


@pytest.mark.parametrize(("changed", "words"), BAD, ids=["_".join(changed) for changed, _ in BAD])
def test_bad_options(changed, words, call_recipe, options, tmp_path):
    assert_refused(call_recipe("ppo_sentiment", options(output_dir=tmp_path / "out", **changed)), *words, alone=True)
    assert not (tmp_path / "out").exists()


def test_encoder_decoder_model(call_recipe, options, assets, tmp_path):
    process = call_recipe("ppo_sentiment", options(output_dir=tmp_path / "out", model_name_or_path=assets.t5))
    assert_refused(process, "model_name_or_path: ", "encoder-decoder", "decoder-only", alone=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ("went towards positive too", "other direction")),
        ({"sentiment": "negative", "compare_with": "classifier"}, ("no yunque.json",)),
        ({"sentiment": "negative", "prompt_tokens_high": 5}, ("other prompts",)),
        ({"sentiment": "negative", "max_test_samples": 5}, ("other prompts",)),
        ({"sentiment": "negative", "temperature": 0.7}, ("temperature 1.0", "0.7")),
    ],
    ids=["same_direction", "no_run", "other_lengths", "fewer_prompts", "other_decoding"],
)
def test_folders_that_cannot_be_compared(changed, words, call_recipe, options, positive_run, classifier, tmp_path):
    chosen = {"compare_with": positive_run.folder, "output_dir": tmp_path / "out"} | changed
    chosen["compare_with"] = classifier if chosen["compare_with"] == "classifier" else chosen["compare_with"]
    assert_refused(call_recipe("ppo_sentiment", options(**chosen)), "compare_with: ", *words, alone=True)
    assert not (tmp_path / "out").exists()


def test_compared_folder_is_not_overwritten(call_recipe, options, positive_run):
    chosen = {"compare_with": positive_run.folder, "output_dir": positive_run.folder, "sentiment": "negative"}
    process = call_recipe("ppo_sentiment", options(**chosen, overwrite_output_dir=True))
    assert_refused(process, "--output_dir ", "is also an input", alone=True)
    assert verify(positive_run.folder) == []


def test_without_a_config_it_is_the_notebook(monkeypatch):
    seen = {}

    def parse(*groups, **options):
        seen.update({name: value for group in inner(*groups, **options) for name, value in vars(group).items()})
        raise KeyboardInterrupt

    inner = arguments.parse
    monkeypatch.setattr(arguments, "parse", parse)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--sentiment", "negative"])
    with pytest.raises(KeyboardInterrupt):
        runpy.run_path(str(RECIPE), run_name="__main__")
    wanted = {"model_name_or_path": "lvwerra/gpt2-imdb", "dataset_name": "stanfordnlp/imdb", "min_text_chars": 201}
    wanted |= {"reward_model_name_or_path": "lvwerra/distilbert-imdb", "reward_label": "NEGATIVE"}
    wanted |= {"toxicity_label": "POSITIVE", "prompt_tokens_low": 2, "prompt_tokens_high": 8}
    wanted |= {"min_new_tokens": 4, "max_new_tokens": 16, "max_new_tokens_low": 4}
    assert {name: seen[name] for name in wanted} == wanted
    json.dumps(seen)
