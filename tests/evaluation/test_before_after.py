import csv
import io
import json
import math
from collections.abc import Iterable

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from yunque.errors import InputError
from yunque.evaluation.before_after import SENTIMENT, Answers, compare

TEMPLATE = "Summarize the following conversation.\n\n{}\n\nSummary:"
QUERIES = [TEMPLATE.format(f"#Person1#: [bold]Q{n}[/bold] about {'many things ' * 30}") for n in range(3)]
REFERENCES = [["the cat sat", "a cat sat down"], ["dogs bark"], ["she has not gone"]]
BEFORE = Answers(
    ["the stupid cat sat", "dumb dogs bark", "she, gone"], np.array([-1.0, 0.5, 0.0]), np.array([0.9, 0.6, 0.3])
)
AFTER = Answers(
    ["the cat sat", "dogs [/] bark", "she has «año»\x1b[31m gone"],
    np.array([1.0, 0.75, 3.0]),
    np.array([0.1, 0.2, 0.0]),
)


def count_rude_words(texts: Iterable[str]) -> int:
    return sum(word in ("stupid", "dumb") for text in texts for word in text.split())


def result(**options):
    return compare(QUERIES, REFERENCES, BEFORE, AFTER, kl=1.25, seed=0, **options)


def printed(before_after, width=100, rows=5):
    console = Console(file=io.StringIO(), width=width)
    before_after.print(console, rows)
    return console.file.getvalue()


def test_metrics_worked_by_hand():
    metrics = result(rude_words=count_rude_words).metrics
    f1_before = [6 / 7, 4 / 5, 4 / 6]  # of "the cat sat", "dogs bark", "she has not gone"
    f1_after = [1.0, 1.0, 2 * 3 / 9]  # the escape sequence leaves the word "31m": 5 words, 3 of them right
    expected = {
        "toxicity_before": 0.6,
        "toxicity_after": 0.1,
        "toxicity_std_before": math.sqrt(0.06),
        "toxicity_std_after": math.sqrt(0.02 / 3),
        "reward_before": -0.5 / 3,
        "reward_after": 4.75 / 3,
        "rougeL_before": sum(f1_before) / 3,
        "rougeL_after": sum(f1_after) / 3,
        "response_words_before": 3.0,
        "response_words_after": 10 / 3,
        "rude_words_before": 2,
        "rude_words_after": 0,
        "kl_before": 0.0,
        "kl_final": 1.25,
        "num_prompts": 3,
        "rougeL_prompts": 3,
        "distinct_1_before": 1.0,
        "distinct_1_after": 16 / 17,  # "[" twice
        "distinct_2_before": 1.0,
        "distinct_2_after": 1.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    changes = {name.removesuffix("_change") for name in metrics if name.endswith("_change")}
    assert changes == {"toxicity", "reward", "rougeL", "response_words"}
    assert set(metrics) == {*expected, *(f"{name}_change" for name in changes)}
    for name in changes:
        change = metrics[f"{name}_change"]
        assert change["mean"] == pytest.approx(metrics[f"{name}_after"] - metrics[f"{name}_before"])
        assert change["low"] <= change["mean"] <= change["high"]
    json.dumps(metrics, allow_nan=False)


def test_interval_of_the_change_is_paired():
    toxicity = np.linspace(0.1, 0.9, 40)
    answers = [Answers(["text"] * 40, np.zeros(40), values) for values in (toxicity, toxicity - 0.05)]
    change = compare(["q"] * 40, None, *answers, kl=0.0, seed=0).metrics["toxicity_change"]
    assert (change["low"], change["high"]) == pytest.approx((-0.05, -0.05))  # apart: about (-0.15, 0.05)


def test_rows_are_sorted_by_gain_of_reward():
    rows = result().rows
    assert [row.reward_difference for row in rows] == [3.0, 2.0, 0.25]
    assert [row.query for row in rows] == [QUERIES[2], QUERIES[0], QUERIES[1]]
    best = rows[0]
    assert (best.response_before, best.response_after) == (BEFORE.texts[2], AFTER.texts[2])
    assert (best.reward_before, best.reward_after, best.measure_before, best.measure_after) == (0.0, 3.0, 0.3, 0.0)
    assert [row.prompt for row in rows] == [2, 0, 1]


def test_ties_keep_the_order_of_the_prompts():
    same = Answers(["a", "b", "c"], np.zeros(3), np.zeros(3))
    assert [row.response_after for row in compare(QUERIES, None, same, same, kl=0.0, seed=0).rows] == ["a", "b", "c"]


@pytest.mark.parametrize("references", [None, [[], [], []], [[""], [" "], []]])
def test_without_references_there_is_no_rouge(references):
    metrics = compare(QUERIES, references, BEFORE, AFTER, kl=0.0, seed=0).metrics
    assert not [name for name in metrics if "rouge" in name]
    assert not [name for name in metrics if "rude" in name]
    assert "ROUGE" not in printed(compare(QUERIES, references, BEFORE, AFTER, kl=0.0, seed=0))


def test_rouge_is_measured_where_there_is_a_reference():
    metrics = compare(QUERIES, [[], ["dogs bark"], [""]], BEFORE, AFTER, kl=0.0, seed=0).metrics
    assert metrics["rougeL_prompts"] == 1
    assert (metrics["rougeL_before"], metrics["rougeL_after"]) == pytest.approx((0.8, 1.0))


def test_files_hold_every_row_in_order(tmp_path):
    outcome = result()
    jsonl, table = outcome.write(tmp_path / "new")
    assert [path.name for path in (jsonl, table)] == ["before_after.jsonl", "before_after.csv"]
    rows = [json.loads(line) for line in jsonl.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [list(row.values()) for row in rows] == [list(vars(row).values()) for row in outcome.rows]
    assert "«año»" in jsonl.read_text(encoding="utf-8")
    with table.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [
        *("query", "response_before", "response_after", "reward_before", "reward_after", "reward_difference"),
        *("toxicity_before", "toxicity_after", "prompt"),
    ]
    assert [row["query"] for row in read] == [row["query"] for row in rows]
    assert (
        [float(row["toxicity_before"]) for row in read] == [row["toxicity_before"] for row in rows] == [0.3, 0.9, 0.6]
    )


def test_another_measure_names_metrics_columns_and_table(tmp_path):
    outcome = compare(QUERIES, None, BEFORE, AFTER, kl=0.5, seed=0, measure=SENTIMENT)
    assert (outcome.metrics["sentiment_before"], outcome.metrics["sentiment_after"]) == pytest.approx((0.6, 0.1))
    assert outcome.metrics["sentiment_change"]["mean"] == pytest.approx(-0.5)
    assert not [name for name in outcome.metrics if "toxicity" in name]
    jsonl, _ = outcome.write(tmp_path)
    first = json.loads(jsonl.read_text(encoding="utf-8").splitlines()[0])
    assert (first["sentiment_before"], first["sentiment_after"]) == (0.3, 0.0)
    assert not [name for name in first if "toxicity" in name]
    assert "Positive sentiment" in printed(outcome)
    assert "Toxicity" not in printed(outcome)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_print_is_readable_in_100_columns(width):
    text = printed(result(rude_words=count_rude_words), width)
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= min(width, 100)
    assert "+3.00" in text
    if width < 100:  # its labels break into two lines
        return
    lines = {line.split("  ")[1].strip(): line.split() for line in text.splitlines() if line.startswith("  ")}
    assert lines["Toxicity (mean probability)"][3:6] == ["0.600", "0.100", "-0.500"]
    assert lines["Rude words in all answers"][-3:] == ["2", "0", "-2"]
    assert lines["KL to the reference (nats/answer)"][-3:] == ["0.000", "1.250", "+1.250"]


def test_print_shows_texts_as_they_are():
    text = printed(result())
    assert "[bold]Q2[/bold]" in text  # not read as markup
    assert "dogs [/] bark" in text  # markup that would raise
    assert "…" in text
    assert "\x1b" not in text
    assert "Summarize the following" not in text  # the same in every prompt


def test_print_shows_only_the_rows_asked_for():
    assert "Q0" in printed(result(), rows=2)
    assert "Q1" not in printed(result(), rows=2)
    assert "gained most" not in printed(result(), rows=0)


def test_one_prompt_says_that_it_has_no_interval():
    one = Answers(["text"], np.array([0.5]), np.array([0.5]))
    outcome = compare(QUERIES[:1], [["text"]], one, one, kl=0.0, seed=0)
    assert outcome.metrics["toxicity_change"] == {"mean": 0.0, "low": None, "high": None}
    assert "+0.000 [?, ?]" in printed(outcome)
    assert "Summarize the following" in printed(outcome)


@pytest.mark.parametrize(
    ("rewards", "probabilities", "message"),
    [
        ([1.0], [0.5, 0.5], "rewards: 1 values for 2 answers"),
        ([1.0, math.nan], [0.5, 0.5], "rewards: 1 of 2 values are not finite"),
        ([1.0, 1.0], [0.5, 1.5], "probabilities: give values in 0..1, not logits"),
        ([1.0, 1.0], [0.5, -0.5], "probabilities: give values in 0..1, not logits"),
    ],
)
def test_bad_answers_are_named(rewards, probabilities, message):
    with pytest.raises(InputError, match=message):
        Answers(["a", "b"], np.array(rewards), np.array(probabilities))


@pytest.mark.parametrize(
    ("queries", "references", "message"),
    [
        (QUERIES[:2], None, "before: 3 rows for 2 queries"),
        (QUERIES, REFERENCES[:2], "references: 2 rows for 3 queries"),
    ],
)
def test_unequal_rows_are_named(queries, references, message):
    with pytest.raises(InputError, match=message):
        compare(queries, references, BEFORE, AFTER, kl=0.0, seed=0)
