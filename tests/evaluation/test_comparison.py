import io
import json

import evaluated
import numpy as np
import pytest
from rich.console import Console

from yunque.errors import InputError
from yunque.evaluation.comparison import Options, as_json, compare, print_comparison
from yunque.evaluation.evaluations import read_evaluation
from yunque.evaluation.gates import parse_gate

ROWS = 40


def opened(folder, name, **options):
    return read_evaluation(evaluated.write(folder / name, **options), name)


@pytest.fixture
def pair(tmp_path):
    toxicity = np.linspace(0, 0.9, ROWS)
    rouge = [None if row < 4 else 0.5 for row in range(ROWS)]
    better = [None if row < 4 else 0.5 + (row % 2) * 0.1 for row in range(ROWS)]
    changed = toxicity.copy()
    changed[5] += 0.1
    changed[7] = 0
    answers = [f"same {row}" for row in range(ROWS)]
    others = [f"new [b]{row}" if row in (5, 7) else text for row, text in enumerate(answers)]
    first = opened(tmp_path, "a", scores={"toxicity": toxicity, "rougeL": rouge}, answers=answers)
    second = opened(tmp_path, "b", scores={"toxicity": changed, "rougeL": better, "extra": toxicity}, answers=others)
    return first, second


def test_differences_wins_and_the_most_changed_answers(pair):
    comparison = compare(*pair[:1], pair[1:])
    [candidate] = comparison.candidates
    assert candidate.rank_by == "toxicity"
    assert candidate.changed == [7, 5]  # the same answers are not changed ones, whatever their scores
    found = as_json(comparison)
    metrics = found["candidates"][0]["metrics"]
    assert list(metrics) == ["toxicity", "rougeL"]
    assert metrics["toxicity"]["difference"]["mean"] == pytest.approx((0.1 - 7 / 39 * 0.9) / ROWS)
    assert [metrics["toxicity"][name] for name in ("wins", "ties", "losses")] == [1, 38, 1]
    assert metrics["rougeL"]["num_pairs"] == 36
    assert metrics["rougeL"]["difference"]["mean"] == pytest.approx(5.0)
    assert found["passed"] is None
    assert any("extra was measured of b only" in note for note in comparison.notes)
    json.dumps(found, allow_nan=False)


def test_several_candidates_each_against_the_first(pair, tmp_path):
    first, second = pair
    third = opened(tmp_path, "c", scores={"toxicity": np.zeros(ROWS), "rougeL": [0.1] * ROWS})
    gates = [parse_gate("toxicity<=+0.05"), parse_gate("rougeL>=-1.0")]
    found = compare(first, [second, third], gates=gates)
    assert [each.evaluation.name for each in found.candidates] == ["b", "c"]
    statuses = [verdict.status for _, verdict in found.verdicts]
    assert statuses == ["passed", "passed", "passed", "failed"]
    assert found.not_proved() == ["c rougeL>=-1.0 (failed)"]


def test_the_printed_table_shows_brackets_of_answers_as_they_are(pair):
    out = io.StringIO()
    print_comparison(Console(file=out, width=120), compare(pair[0], [pair[1]], gates=[parse_gate("toxicity<=+0.05")]))
    shown = out.getvalue()
    for words in ("b against a: 40 pairs", "Toxicity ↓", "new [b]7", "gate toxicity<=+0.05: passed", "note: extra"):
        assert words in shown


def test_other_decoding_other_judges_and_empty_answers_are_said(tmp_path):
    scores = {"toxicity": [0.1, 0.2]}
    judge = {"path": "/judge", "manifest_sha256": "1", "label": "hate"}
    first = opened(tmp_path, "a", scores=scores, toxicity_model=judge)
    other = opened(tmp_path, "b", scores=scores, answers=["", "x"], decoding={"method": "sampling"})
    notes = compare(first, [other]).notes
    assert any("b was decoded with other settings than a" in note for note in notes)
    assert "b: 1 of 2 answers are empty" in notes
    same = opened(tmp_path, "c", scores=scores, toxicity_model=judge | {"path": "/moved"})
    assert compare(first, [same]).candidates
    foreign = opened(tmp_path, "d", scores=scores, toxicity_model=judge | {"label": "toxic"})
    with pytest.raises(InputError, match=r"different classifiers, /judge \(label toxic\)|label hate"):
        compare(first, [foreign])


def test_nothing_to_compare_is_named(tmp_path, pair):
    other = opened(tmp_path, "c", scores={"nll": [0.0] * ROWS})
    with pytest.raises(InputError, match="no metric in common"):
        compare(pair[0], [other])
    with pytest.raises(InputError, match="at least two"):
        compare(pair[0], [])
    with pytest.raises(InputError, match="--rank_by bleu: there is no such metric; there are: toxicity, rougeL"):
        compare(pair[0], [pair[1]], options=Options(rank_by="bleu"))
