"""Token statistics: by hand on small files, and on the shared dialogues where they are at hand."""

import json

import numpy as np
import pytest

from yunque.data.statistics import (
    StatisticsOptions,
    as_json,
    describe,
    lengths,
    load_tokenizer,
    open_splits,
    plot,
    statistics,
)
from yunque.errors import InputError

DIALOGUE = "one two three four five six seven eight nine ten"
ROWS = [
    {"id": 1, "text": "one two three", "answer": "one", "label": "good", "score": "0.5"},
    {"id": 2, "text": "one two three four five", "answer": "", "label": "bad", "score": "1"},
    {"id": 3, "text": "one", "answer": "two two", "label": "good", "score": "2"},
]


@pytest.fixture
def look(t5_like):
    def at(*paths, **options):
        return statistics(open_splits([str(path) for path in paths]), t5_like, StatisticsOptions(**options))[0]

    return at


def test_lengths_by_hand():
    counts = np.array([10, -1, 20, 30, 100])
    found = lengths(counts, [25, 200])
    assert (found.rows, found.missing, found.tokens, found.mean, found.median, found.max) == (4, 1, 160, 40, 25, 100)
    assert found.p95 == pytest.approx(89.5)
    assert (found.cuts[0].rows, found.cuts[0].share_rows) == (2, 0.5)
    assert (found.cuts[0].tokens_lost, found.cuts[0].share_tokens) == (80, 0.5)
    assert found.cuts[1].tokens_lost == 0


def test_a_text_of_just_the_limit_is_not_cut():
    assert lengths(np.array([5]), [5, 4]).cuts[0].rows == 0


def test_fields_are_the_columns_of_texts(look, write_jsonl):
    split = look(write_jsonl("a.jsonl", ROWS), label="label").splits[0]
    assert list(split.fields) == ["text", "answer"]  # no id, no numbers in texts, not the label
    assert split.rows == 3
    assert split.fields["text"].tokens == 4 + 6 + 2  # with the end token each
    assert (split.fields["answer"].rows, split.fields["answer"].missing) == (2, 1)


def test_classes_are_counted_apart(look, write_jsonl):
    classes = look(write_jsonl("a.jsonl", ROWS), label="label").splits[0].classes
    assert {label: fields["text"].tokens for label, fields in classes.items()} == {"good": 6, "bad": 6}
    assert list(classes) == ["good", "bad"]  # the commonest first


def test_templates_are_compared_by_tokens(look, write_jsonl):
    path = write_jsonl("a.jsonl", ROWS)
    templates = ["{text}", "Summarize : {text} Summary : {answer}"]
    short, long = (look(path, templates=templates, limits=[6]).splits[0].templates[name] for name in templates)
    assert short.tokens == 12
    assert long.tokens == 12 + 3 * 4 + 3
    assert (short.cuts[0].rows, long.cuts[0].rows) == (0, 3)


def test_text_in_a_template_is_the_first_field(look, write_jsonl):
    path = write_jsonl("a.jsonl", [{"dialogue": DIALOGUE, "summary": "one"}])
    assert look(path, templates=["{text}"]).splits[0].templates["{text}"].tokens == 11


def test_duplicates_between_and_within_splits(look, write_jsonl):
    near = DIALOGUE.replace("ten", "two")
    write_jsonl(
        "data/train.jsonl", [{"text": DIALOGUE}, {"text": " ".join(reversed(DIALOGUE.split()))}, {"text": "one"}]
    )
    write_jsonl(
        "data/test.jsonl",
        [{"text": f"  {DIALOGUE.upper()}\n"}, {"text": near}, {"text": "four four"}, {"text": "four FOUR"}],
    )
    folder = write_jsonl("data/readme.txt", []).parent
    found = {(one.split, one.other): one for one in look(folder, near_threshold=0.7).overlaps}
    both = found["test", "train"]
    assert (both.exact, both.near, both.share) == (1, 1, 0.5)  # 5 of 7 shingles are common: 0.71
    assert found["test", "test"].exact == 1
    assert found["train", "train"].exact == 0
    assert {(one.split, one.other): one.near for one in look(folder, near_threshold=0.72).overlaps}[
        "test", "train"
    ] == 0
    assert {(one.split, one.other): one.near for one in look(folder, near_threshold=0).overlaps}[
        "test", "train"
    ] is None


def test_only_fields_of_both_splits_are_compared(look, write_jsonl):
    write_jsonl("data/train.jsonl", [{"text": DIALOGUE, "summary": "one"}])
    folder = write_jsonl("data/test.jsonl", [{"text": DIALOGUE, "summary1": "one"}]).parent
    assert [one.field for one in look(folder).overlaps if one.split != one.other] == ["text"]


def test_two_files_are_two_splits(look, write_jsonl):
    one, two = write_jsonl("one.jsonl", ROWS), write_jsonl("two.jsonl.gz", ROWS[:2])
    result = look(one, two)
    assert [(split.split, split.rows) for split in result.splits] == [("one", 3), ("two", 2)]
    assert {(row.split, row.other, row.field): row.exact for row in result.overlaps}["two", "one", "text"] == 2


def test_csv_is_read_too(look, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"one two",1\none,2\n')
    assert {name: one.tokens for name, one in look(path).splits[0].fields.items()} == {"text": 5}


def test_shown_and_as_json_are_the_same_numbers(look, write_jsonl):
    result = look(write_jsonl("a.jsonl", ROWS), label="label", templates=["{text}"], limits=[4])
    record = json.loads(json.dumps(as_json(result)))
    assert record["splits"][0]["fields"]["text"]["cuts"][0]["tokens_lost"] == 2
    shown = describe(result)
    for words in ("a.jsonl): 3 rows", "good: text", "'{text}'", ">4 (tokens lost)", "33.3% (16.7%)", "duplicates"):
        assert words in shown


def test_the_plot_is_a_png(t5_like, write_jsonl, tmp_path):
    _, counts = statistics(open_splits([str(write_jsonl("a.jsonl", ROWS))]), t5_like, StatisticsOptions())
    plot(counts, [3], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="--plot"):
        plot(counts, [3], tmp_path / "none" / "plot.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fields": ["txt"]}, "--field: no column 'txt'"),
        ({"label": "class"}, "--label: no column 'class'"),
        ({"templates": ["{dialogue}"]}, "--template: no column 'dialogue'"),
        ({"templates": ["Summarize"]}, "names no column"),
        ({"templates": ["{text"]}, "--template"),
        ({"limits": [0]}, "--limit: 0"),
        ({"near_threshold": 2}, "--near: 2"),
        ({"fields": ["list"]}, "holds a list"),
    ],
)
def test_bad_options(look, write_jsonl, options, words):
    path = write_jsonl("a.jsonl", [row | {"list": [1]} for row in ROWS])
    with pytest.raises(InputError) as error:
        look(path, **options)
    assert words in str(error.value)


def test_a_column_that_is_no_class_is_refused(look, write_jsonl):
    path = write_jsonl("a.jsonl", [{"text": "one", "label": f"l{number}"} for number in range(60)])
    with pytest.raises(InputError, match="60 values"):
        look(path, label="label")


def test_a_file_of_numbers_has_no_field(look, write_jsonl):
    with pytest.raises(InputError, match="no column of texts among n"):
        look(write_jsonl("a.jsonl", [{"n": "1"}]))


def test_a_file_given_twice_is_refused(look, write_jsonl):
    path = write_jsonl("a.jsonl", ROWS)
    with pytest.raises(InputError, match="given twice"):
        look(path, path, path)


def test_no_such_tokenizer():
    with pytest.raises(InputError, match="--tokenizer: no such folder"):
        load_tokenizer("./nowhere")


def test_shared_dialogues(shared_data, shared_models):
    tokenizer = load_tokenizer(str(shared_models / "stories260K"))
    raws = open_splits([str(shared_data / "dialogsum" / name) for name in ("dev.jsonl", "test.jsonl")])
    result, _ = statistics(raws, tokenizer, StatisticsOptions(fields=["dialogue"]))
    dev = result.splits[0].fields["dialogue"]
    texts = [row["dialogue"] for row in raws[0].rows]
    counts = sorted(len(tokenizer(text)["input_ids"]) for text in texts)
    assert dev.rows == 500
    assert dev.max == counts[-1]
    assert dev.mean == pytest.approx(sum(counts) / 500)
    assert dev.cuts[0].rows == sum(count > 512 for count in counts)
    assert dev.cuts[0].tokens_lost == sum(count - 512 for count in counts if count > 512)
    [between] = [one for one in result.overlaps if one.split != one.other]
    assert (between.split, between.other, between.exact) == ("test", "dev", 6)
