import json

import evaluated
import numpy as np
import pytest

from yunque.errors import InputError
from yunque.evaluation.evaluations import align, open_evaluations, read_evaluation

SCORES = {"toxicity": [0.1, 0.2, 0.3], "rougeL": [0.5, None, 0.25]}


def test_scores_are_read_in_shown_units_and_missing_ones_stay_missing(tmp_path):
    evaluation = read_evaluation(evaluated.write(tmp_path / "a", SCORES, references=["r", None, "s"]))
    np.testing.assert_allclose(evaluation.scores["toxicity"], [0.1, 0.2, 0.3])
    np.testing.assert_allclose(evaluation.scores["rougeL"], [50, np.nan, 25])  # points of 100
    assert evaluation.references == [["r"], [], ["s"]]


def test_a_model_folder_stands_for_the_evaluation_in_it(tmp_path):
    evaluated.write(tmp_path / "ppo" / "evaluation", SCORES)
    assert read_evaluation(tmp_path / "ppo").folder == tmp_path / "ppo" / "evaluation"


def test_rows_are_paired_by_id_whatever_their_order(tmp_path):
    first = read_evaluation(evaluated.write(tmp_path / "a", SCORES))
    turned = {name: values[::-1] for name, values in SCORES.items()}
    other = read_evaluation(evaluated.write(tmp_path / "b", turned, ids=["2", "1", "0"]))
    aligned = align(first, other)
    assert aligned.ids == first.ids
    np.testing.assert_allclose(aligned.scores["toxicity"], first.scores["toxicity"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"prompts": ["Sum up:\n\ntext 0\n\nSummary:", "other", "another"]},
            "b and a have different prompts: 2 of 3 differ, first that of id 1; evaluate both with the same data",
        ),
        ({"ids": ["0", "1", "7"]}, "different rows: 1 only in a, 1 only in b, 2 in both"),
    ],
)
def test_other_prompts_or_rows_are_one_clear_line(tmp_path, options, words):
    first, other = open_evaluations(
        [str(evaluated.write(tmp_path / "a", SCORES)), str(evaluated.write(tmp_path / "b", SCORES, **options))]
    )
    with pytest.raises(InputError, match=words) as caught:
        align(first, other)
    assert "\n" not in str(caught.value)
    if "prompts" in options:
        assert align(first, other, same_prompts=False).prompts == options["prompts"]


def _no_rows(folder):
    (folder / "generations.jsonl").write_text("")


def _half_a_line(folder):
    path = folder / "generations.jsonl"
    path.write_text(path.read_text()[:-20])


def _nan(folder):
    path = folder / "generations.jsonl"
    path.write_text(path.read_text().replace("0.2}", "NaN}"))


def _twice(folder):
    path = folder / "generations.jsonl"
    path.write_text(path.read_text() * 2)


def _no_answer(folder):
    path = folder / "generations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"answer": " "}) + "\n" for row in rows))


def _no_result(folder):
    (folder / "evaluation.json").unlink()


def _unfinished(folder):
    _no_result(folder)
    (folder / ".parts").mkdir()


def _model_folder(folder):
    _no_result(folder)
    (folder / "config.json").write_text("{}")


def _other_json(folder):
    (folder / "evaluation.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_rows, "no rows in it"),
        (_half_a_line, "generations.jsonl:3: not valid JSON"),
        (_nan, "the toxicity of id 1 is nan, not a finite number"),
        (_twice, "id 0 stands there more than once"),
        (_no_answer, "all 3 answers are empty"),
        (_no_result, "holds no evaluation.json; run yunque evaluate MODEL"),
        (_unfinished, "unfinished evaluation; finish it with yunque evaluate ... --resume"),
        (_model_folder, "a model folder without an evaluation; run yunque evaluate .*/a .*/a/evaluation"),
        (_other_json, "the field model is missing"),
    ],
)
def test_what_is_no_evaluation_is_named(tmp_path, damage, words):
    folder = evaluated.write(tmp_path / "a", SCORES)
    damage(folder)
    with pytest.raises(InputError, match=words):
        read_evaluation(folder)


def test_names_tell_the_models_apart(tmp_path):
    places = [evaluated.write(tmp_path / run / "evaluation", SCORES) for run in ("one", "two")]
    for place, run in zip(places, ("one", "two"), strict=True):
        settings = json.loads((place / "evaluation.json").read_text())
        settings["model"]["path"] = f"/runs/{run}/model"
        (place / "evaluation.json").write_text(json.dumps(settings))
    assert [each.name for each in open_evaluations([str(place) for place in places])] == ["one/model", "two/model"]
    named = open_evaluations([f"sft={places[0]}", str(places[1])])
    assert [each.name for each in named] == ["sft", "model"]
    with pytest.raises(InputError, match="two models are named x"):
        open_evaluations([f"x={places[0]}", f"x={places[1]}"])
    with pytest.raises(InputError, match="nowhere: no such folder"):
        open_evaluations([str(places[0]), "nowhere"])
