import json
import random
import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from yunque.errors import InputError
from yunque.metrics.rouge import UnicodeTokenizer, rouge_scores

DIALOGSUM_DEV = Path("/work/shared/data/dialogsum/dev.jsonl")
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def test_scores_worked_by_hand():
    # Longest common subsequence "the cat on the mat", 5 of 6 and of 7 words: F1 10/13. Bigrams: "on the", "the mat".
    scores = rouge_scores(["the cat sat on the mat"], [["the black cat lies on the mat"]], ("rougeL", "rouge2"))
    assert scores["rougeL"] == pytest.approx([10 / 13])
    assert scores["rouge2"] == pytest.approx([2 * 2 / 11])


def test_words_are_stemmed():
    assert rouge_scores(["She was running"], [["she was runs"]])["rougeL"] == pytest.approx([1.0])


def test_best_reference_counts():
    scores = rouge_scores(["a b c d"], [["x y", "a b c d e", "d c"]])
    assert scores["rougeL"] == pytest.approx([8 / 9])


def test_each_row_is_scored_on_its_own():
    scores = rouge_scores(["a b", "", "c"], [["a b"], ["a"], ["d"]], ("rougeL", "rouge1"))
    assert {kind: values.tolist() for kind, values in scores.items()} == {"rougeL": [1, 0, 0], "rouge1": [1, 0, 0]}


def test_tokenizer_equals_rouge_score_on_ascii():
    ours, theirs = UnicodeTokenizer(), DefaultTokenizer(use_stemmer=True)
    rng = random.Random(0)
    letters = string.ascii_letters + string.digits + " " * 12 + "_'-.,!\n\t#\x1f"
    for _ in range(2_000):
        text = "".join(rng.choices(letters, k=rng.randint(0, 60)))
        assert ours.tokenize(text) == theirs.tokenize(text)


def test_letters_outside_ascii_stay():
    assert UnicodeTokenizer().tokenize("El niño no llegó en 2026, ¿verdad?") == [
        *("el", "niño", "no", "llegó", "en", "2026", "verdad")
    ]
    # rouge-score itself sees "ni o" in both and no word at all in Cyrillic
    assert rouge_scores(["niño"], [["nió"]])["rougeL"] == [0]
    assert rouge_scores(["привет мир"], [["привет всем"]])["rougeL"] == pytest.approx([0.5])


def test_composed_and_decomposed_accents_are_equal():
    text = "La canción terminó"
    assert rouge_scores([text], [[unicodedata.normalize("NFD", text)]])["rougeL"] == [1]


@pytest.mark.skipif(not DIALOGSUM_DEV.exists(), reason="needs the shared data")
def test_equals_rouge_score_on_real_summaries():
    rows = [json.loads(line) for line in DIALOGSUM_DEV.read_text(encoding="utf-8").splitlines()[:200]]
    predictions = [row["dialogue"][:250] for row in rows]
    references = [[row["summary"], other["summary"]] for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    expected = [scorer.score_multi(targets, text) for targets, text in zip(references, predictions, strict=True)]
    scores = rouge_scores(predictions, references, KINDS)
    for kind in KINDS:
        np.testing.assert_array_equal(scores[kind], [row[kind].fmeasure for row in expected])
    assert 0.05 < scores["rougeL"].mean() < 0.5


def test_no_rows_no_scores():
    assert rouge_scores([], [])["rougeL"].shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], []), "1 predictions but references for 0 rows"),
        ((["a", "b"], [["a"], []]), "row 1 has no reference"),
        ((["a"], [["a"]], ("rougeX",)), "unknown ROUGE kind 'rougeX'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        rouge_scores(*arguments)
