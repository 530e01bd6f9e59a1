"""Two policies of opposite directions: the comparison, and which folders it accepts."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from yunque.artifacts import save_model_folder
from yunque.errors import InputError
from yunque.evaluation.before_after import SENTIMENT, Answers, compare
from yunque.evaluation.policies import check_same_prompts, compare_policies, read_former_run

QUERIES = ["This movie", "This movie", "I saw"]  # short openings repeat
SAME = {"max_new_tokens": 16}


def answers(name, probabilities):
    probabilities = np.array(probabilities)
    return Answers([f"{name} {row}" for row in range(len(probabilities))], probabilities * 2 - 1, probabilities)


BASE = answers("base", [0.5, 0.4, 0.6])
POSITIVE = answers("positive", [0.9, 0.8, 0.6])
NEGATIVE = answers("negative", [0.3, 0.1, 0.6])


@pytest.fixture
def models(tmp_path):
    """A policy and a classifier with manifests of their own."""
    folders = [tmp_path / "model", tmp_path / "classifier"]
    for folder in folders:
        save_model_folder(
            folder, lambda staging: (staging / "config.json").write_text("{}"), stage="finetune", parents=[]
        )
    return [str(folder) for folder in folders]


@pytest.fixture
def finished(tmp_path, models):
    """Write the folder of a run towards positive; keywords change its config."""

    def write(**config):
        result = compare(QUERIES, None, BASE, POSITIVE, kl=3.5, seed=0, measure=SENTIMENT)
        folder = tmp_path / "positive"
        save_model_folder(
            folder,
            result.write,
            stage="ppo",
            parents=models,
            config={"sentiment": "positive", "max_new_tokens": 16} | config,
            metrics=result.metrics,
        )
        return str(folder)

    return write


def read(folder, models, *, direction="negative", same=SAME):
    return read_former_run(
        folder, "compare_with", SENTIMENT, towards=("sentiment", direction), same=same, parents=models
    )


def both():
    policies = {"positive": (POSITIVE, 3.5), "negative": (NEGATIVE, 2.5)}
    return compare_policies(QUERIES, BASE, policies, measure=SENTIMENT, seed=0)


def test_answers_come_back_in_the_order_of_the_prompts(finished, models):
    former = read(finished(), models)
    assert (former.name, former.queries, former.kl) == ("positive", QUERIES, 3.5)
    assert former.answers.texts == POSITIVE.texts  # though the file is sorted by gain of reward
    assert former.answers.probabilities.tolist() == POSITIVE.probabilities.tolist()
    check_same_prompts(former, QUERIES, "compare_with")


def test_comparison_worked_by_hand():
    metrics = both().metrics
    expected = {"sentiment_base": 0.5, "sentiment_positive": 2.3 / 3, "sentiment_negative": 1 / 3}
    expected |= {"kl_base": 0.0, "kl_positive": 3.5, "kl_negative": 2.5}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["sentiment_difference"]["mean"] == pytest.approx(1.3 / 3)
    assert metrics["win_rate"]["mean"] == pytest.approx(2.5 / 3)  # the third prompt is a draw
    for name in ("sentiment_difference", "win_rate"):
        assert metrics[name]["low"] < metrics[name]["mean"] < metrics[name]["high"]
    json.dumps(metrics, allow_nan=False)


def test_interval_of_the_difference_is_paired():
    spread = np.linspace(0.1, 0.9, 40)
    pair = {"positive": (answers("a", spread), 0.0), "negative": (answers("b", spread - 0.05), 0.0)}
    metrics = compare_policies(["q"] * 40, answers("c", spread), pair, measure=SENTIMENT, seed=0).metrics
    difference = metrics["sentiment_difference"]
    assert (difference["low"], difference["high"]) == pytest.approx((0.05, 0.05))


def test_files_put_the_largest_differences_first(tmp_path):
    jsonl, table = both().write(tmp_path)
    assert [path.name for path in (jsonl, table)] == ["positive_negative.jsonl", "positive_negative.csv"]
    rows = [json.loads(line) for line in jsonl.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [1, 0, 2]
    assert rows[0] == {
        "query": "This movie",
        "response_base": "base 1",
        "response_positive": "positive 1",
        "response_negative": "negative 1",
        "sentiment_base": 0.4,
        "sentiment_positive": 0.8,
        "sentiment_negative": 0.1,
        "prompt": 1,
    }
    with table.open(encoding="utf-8", newline="") as file:
        assert [row["response_negative"] for row in csv.DictReader(file)] == ["negative 1", "negative 0", "negative 2"]


def test_print_shows_scores_of_all_three_and_the_answers():
    console = Console(file=io.StringIO(), width=100)
    both().print(console)
    text = console.file.getvalue()
    for words in ("0.500", "0.767", "0.333", "+0.433", "positive 1", "negative 1", "+0.80", "→ +0.10", " 0.833 ["):
        assert words in text


def refused(words, call):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).startswith("compare_with: ")
    assert [word for word in words if word not in str(caught.value)] == []


def test_folders_that_are_no_such_run(tmp_path, finished, models):
    refused(["absent", "no such folder"], lambda: read(str(tmp_path / "absent"), models))
    refused(["no yunque.json"], lambda: read(str(tmp_path), models))
    refused(["is not a run with --sentiment"], lambda: read(models[0], models))
    folder = finished()
    refused(["went towards positive too", "other direction"], lambda: read(folder, models, direction="positive"))
    refused(["max_new_tokens 16", "this run has 8"], lambda: read(folder, models, same={"max_new_tokens": 8}))
    refused(["classifier", "same models"], lambda: read(folder, [models[0], "hub/other"]))


def test_parent_that_has_changed_since(finished, models):
    folder = finished()
    save_model_folder(
        models[1], lambda staging: (staging / "config.json").write_text("{ }"), stage="finetune", parents=[]
    )
    refused([models[1], "has changed since"], lambda: read(folder, models))


@pytest.mark.parametrize("damage", ["missing", "half", "other columns", "not json"])
def test_damaged_answers(damage, tmp_path, finished, models):
    folder = finished()
    path = tmp_path / "positive" / "before_after.jsonl"
    text = path.read_text(encoding="utf-8")
    if damage == "missing":
        path.unlink()
    else:
        path.write_text({"half": text[:-40], "other columns": '{"prompt": 0}\n', "not json": "[]\n"}[damage])
    refused(["answers in", "cannot be read"], lambda: read(folder, models))


def test_other_prompts(finished, models):
    former = read(finished(), models)
    words = ["other prompts", "3, of which 2", "this run's 3"]
    refused(words, lambda: check_same_prompts(former, ["This movie", "This film", "I saw"], "compare_with"))
    refused(["this run's 4"], lambda: check_same_prompts(former, [*QUERIES, "More"], "compare_with"))
