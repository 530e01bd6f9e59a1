from __future__ import annotations

import datasets
import pytest

from yunque.data import loading
from yunque.data.arguments import LabelledDataArguments
from yunque.data.labels import load_labelled_split, load_labelled_splits
from yunque.errors import InputError


def args_for(name, **values) -> LabelledDataArguments:
    return LabelledDataArguments(dataset_name=str(name), **values)


@pytest.mark.parametrize("values", [["nothate", "hate"], ["0", "1"], [0, 1], [0.0, 1.0], [" 0 ", "hate"]])
def test_labels_by_name_or_position(values, write_jsonl):
    path = write_jsonl("d.jsonl", [{"text": f"t{value}", "label": value} for value in values])
    loaded = load_labelled_split(args_for(path))
    assert loaded.rows.to_list() == [{"text": f"t{value}", "label": number} for number, value in enumerate(values)]
    assert (loaded.source["split"], loaded.source["rows"], loaded.dropped_empty) == ("train", 2, 0)


def test_label_values_stand_for_names_in_their_order(write_jsonl):
    rows = [{"case": "a", "gold": "hateful", "kind": "slur"}, {"case": "b", "gold": "non-hateful", "kind": "plain"}]
    columns = {"text_column": "case", "label_column": "gold", "group_column": "kind"}
    args = args_for(write_jsonl("d.jsonl", rows), label_values=["non-hateful", "hateful"], **columns)
    assert load_labelled_split(args).rows.to_list() == [
        {"text": "a", "label": 1, "group": "slur"},
        {"text": "b", "label": 0, "group": "plain"},
    ]


def test_unknown_label_values_are_listed(write_jsonl):
    path = write_jsonl("d.jsonl", [{"text": "t", "label": value} for value in (0, 2, "offensive")])
    with pytest.raises(
        InputError, match=r"label_values: column 'label' .* holds 2, offensive, known are 0, 1, nothate, hate"
    ):
        load_labelled_splits(args_for(path), 0)


def test_wrong_label_column_lists_the_columns(write_jsonl):
    with pytest.raises(InputError, match=r"label_column: no column 'gold'.* it has text, label"):
        load_labelled_splits(args_for(write_jsonl("d.jsonl", [{"text": "t", "label": 0}]), label_column="gold"), 0)


def test_rows_without_text_or_label_are_counted(write_jsonl, tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(10)] + [
        {"text": "", "label": 0},
        {"text": "t", "label": None},
    ]
    loaded = load_labelled_splits(args_for(write_jsonl("d.jsonl", rows)), 0)
    assert (len(loaded.train), len(loaded.test), loaded.dropped_empty) == (9, 1, {"train": 2})
    assert load_labelled_split(args_for(tmp_path / "d.jsonl")).dropped_empty == 2


def test_hub_class_labels(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict(train=rows, test=rows))
    monkeypatch.setattr(loading, "_check_hub_answers", lambda missing: None)
    loaded = load_labelled_splits(args_for("owner/reviews"), 0)
    assert loaded.train["label"][:] == [0, 1]


def test_hate_data_as_published(shared_data):
    loaded = load_labelled_splits(args_for(shared_data / "hate-dynamically-generated"), 0)
    assert (len(loaded.train), sum(loaded.train["label"])) == (32_883, 17_711)
    assert (len(loaded.test), sum(loaded.test["label"])) == (2_616, 1_439)


def test_hatecheck_as_published(shared_data):
    rows = load_labelled_split(
        args_for(
            shared_data / "hatecheck" / "hatecheck_en.csv",
            text_column="test_case",
            label_column="label_gold",
            label_values=["non-hateful", "hateful"],
            group_column="functionality",
        )
    ).rows
    assert len(rows) == 3_728
    assert len(set(rows["group"])) == 29
    assert sum(rows["label"]) == 2_563
