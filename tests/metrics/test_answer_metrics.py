"""Metrics of answers against their reference libraries, on 200 rows, and what they say of odd answers."""

import json
import random
import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from yunque.errors import InputError
from yunque.metrics.bleu import corpus_bleu, sentence_bleu
from yunque.metrics.formats import compliance, json_schema, pattern
from yunque.metrics.refusals import refusals
from yunque.metrics.repetition import distinct_share, repetition
from yunque.metrics.rouge import rouge_scores
from yunque.metrics.short_answers import exact_match, normalize_answer, token_f1
from yunque.metrics.summary import summarize
from yunque.metrics.voting import majority, vote_key

DIALOGSUM = Path(__file__).parents[2] / ".." / "shared" / "data" / "dialogsum" / "test.jsonl"
ROWS = 200


@pytest.fixture(scope="module")
def rows():
    """Predictions with one to three references each: DialogSum's where it is at hand, else sentences of our own."""
    if DIALOGSUM.exists():
        lines = [json.loads(line) for line in DIALOGSUM.read_text().splitlines()[:ROWS]]
        three = [[row[f"summary{number}"] for number in (1, 2, 3)] for row in lines]
    else:
        words = re.split(
            " ", "the a man woman runs running asks asked , . meets Mary's plan 12 dollars for to buy buying"
        )
        draw = random.Random(0)
        three = [[" ".join(draw.choices(words, k=draw.randint(4, 25))) for _ in range(3)] for _ in range(ROWS)]
    predictions = [row[2] for row in three]
    return predictions, [row[: 1 + number % 2] for number, row in enumerate(three)]


def test_rouge_is_rouge_score_s(rows):
    predictions, references = rows
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = RougeScorer(kinds, use_stemmer=True)
    ours = rouge_scores(predictions, references, kinds)
    for number, (prediction, targets) in enumerate(zip(predictions, references, strict=True)):
        theirs = scorer.score_multi(targets, prediction)
        assert [ours[kind][number] for kind in kinds] == [theirs[kind].fmeasure for kind in kinds]


def test_bleu_is_sacrebleu_s(rows):
    predictions, references = rows
    ours = sentence_bleu(predictions, references)
    theirs = [sacrebleu.sentence_bleu(*pair).score for pair in zip(predictions, references, strict=True)]
    assert ours.tolist() == theirs
    streams = [[targets[0] for targets in references], [[*targets, None][1] for targets in references]]
    assert corpus_bleu(predictions, references) == sacrebleu.corpus_bleu(predictions, streams).score
    assert 0 < corpus_bleu(predictions, references) < 100


def squad(text):
    """Normalisation of the official SQuAD scripts, in their order: lower, punctuation, articles, spaces."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def test_exact_match_and_f1_are_squad_s(rows):
    predictions, references = rows
    predictions = [targets[0].upper() if number % 5 == 0 else text
                   for number, (text, targets) in enumerate(zip(predictions, references, strict=True))]  # fmt: skip
    matches, f1 = exact_match(predictions, references), token_f1(predictions, references)
    for number, (prediction, targets) in enumerate(zip(predictions, references, strict=True)):
        best = 0.0
        for target in targets:
            given, wanted = squad(prediction).split(), squad(target).split()
            common = sum((Counter(given) & Counter(wanted)).values())
            if common:
                precision, recall = common / len(given), common / len(wanted)
                best = max(best, 2 * precision * recall / (precision + recall))
        assert f1[number] == pytest.approx(best, abs=1e-12)
        assert matches[number] == (squad(prediction) in [squad(target) for target in targets])
    assert 0.15 < matches.mean() < 0.5


def test_empty_answers_have_defined_scores():
    assert sentence_bleu([""], [["a word"]]).tolist() == [0.0]
    assert corpus_bleu([""], [["a word"]]) == 0.0
    assert token_f1(["", "the", "x"], [["a word"], ["an"], ["the"]]).tolist() == [0.0, 1.0, 0.0]
    assert exact_match(["", "The!"], [["a word"], ["a"]]).tolist() == [0.0, 1.0]
    assert repetition([""]).tolist() == [0.0]
    assert distinct_share(["", "one"], 2).tolist() == [1.0, 1.0]


def test_bleu_refuses_rows_without_references():
    with pytest.raises(InputError, match="row 1 has no reference"):
        sentence_bleu(["a", "b"], [["a"], []])
    with pytest.raises(InputError, match="2 predictions but references for 1"):
        corpus_bleu(["a", "b"], [["a"]])


def test_repetition_counts_what_comes_again():
    looped = "one two three four one two three four"  # five 4-grams, the last stood there before
    assert repetition([looped, "one two three four five"]).tolist() == pytest.approx([0.2, 0.0])
    assert distinct_share(["a a a b"], 1).tolist() == [0.5]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m really sorry but I am not able to do this", True),
        ("As an AI language model, I have no opinion.", True),
        ("I cannot summarize this conversation.", True),
        ("Lo siento, pero no puedo ayudar con eso.", True),
        ("No me es posible responder a esa pregunta.", True),
        ("Como modelo de lenguaje, no opino.", True),
        ("Disculpe, no podría hacer eso.", True),
        ("Tom is sorry that he cannot come to the party.", False),
        ("Tom is sorry that he is late and Ann forgives him.", False),
        ("Ann cannot come to the party.", False),
        ("Lo siento mucho, dice Ana, y se va.", False),
        ("Como siempre, Pedro no puede venir.", False),
        ("x" * 300 + " I'm sorry, but I can't help with that.", False),
        ("", False),
    ],
)
def test_refusals_are_found_in_both_languages(text, refused):
    assert refusals([text]).tolist() == [float(refused)]


def test_format_is_a_schema_and_a_pattern(tmp_path):
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "required": ["answer"], "properties": {"answer": {"type": "integer"}}}')
    check = json_schema(str(path))
    texts = [
        '{"answer": 3}',
        '{"answer": "3"}',
        "{}",
        "answer: 3",
        '{"answer": 3} so',
        '{"answer": NaN}',
        "[" * 100_000,
    ]
    assert compliance(texts, [check]).tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert compliance(texts[:2], [check, pattern(r".*\d\}")]).tolist() == [1, 0]
    path.write_text('{"type": "objct"}')
    with pytest.raises(InputError, match=r"format_schema: .*no valid JSON schema"):
        json_schema(str(path))


def test_bad_formats_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"format_schema: .* no readable JSON"):
        json_schema(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"format_pattern: '\(' is no regular expression"):
        pattern("(")
    assert compliance(["a\nb", "ab c"], [pattern("a.b")]).tolist() == [1, 0]


def test_the_majority_wins_and_ties_go_to_the_first():
    texts = ["It is 12.", "the answer: 7", "So 7!", "no number", "12"]
    number = re.compile(r"(\d+)")
    keys = [vote_key(text, number) for text in texts]
    assert keys == ["12", "7", "7", None, "12"]
    assert majority(keys) == (0, 0.4)
    assert majority(["b", "a", "a"]) == (1, pytest.approx(2 / 3))
    assert majority([None, None]) == (0, 0.0)
    assert vote_key("The Cat!") == vote_key("cat") == "cat"
    assert vote_key("...") is None
    assert normalize_answer("An  apple, the tree") == "apple tree"


def test_summaries_say_mean_interval_spread_and_quantiles():
    values = np.arange(101) / 100
    summary = summarize(values)
    assert (summary["rows"], summary["min"], summary["max"]) == (101, 0.0, 1.0)
    assert summary["mean"] == pytest.approx(0.5)
    assert summary["std"] == values.std()
    assert summary["quantiles"] == {str(q): pytest.approx(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
    assert summary["low"] < 0.5 < summary["high"]
    assert summarize([3.0])["low"] is None
    with pytest.raises(InputError, match="not finite"):
        summarize([1.0, float("nan")])
