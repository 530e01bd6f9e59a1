from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from yunque.data import loading
from yunque.data.arguments import DataArguments
from yunque.data.loading import load_splits
from yunque.errors import InputError

TRAIN = [
    {
        "id": f"train_{n}",
        "dialogue": f"#Person1#: Hi {n}.\n#Person2#: ¿Qué?",
        "summary": f"They greet {n}.",
        "topic": "chat",
    }
    for n in range(20)
]
VALIDATION = [
    {"id": f"dev_{n}", "dialogue": f"#Person1#: Bye {n}.", "summary": f"One leaves {n}.", "topic": "farewell"}
    for n in range(4)
]
TEST = [
    {"id": f"test_{n}", "dialogue": f"#Person1#: So {n}?", "summary": f"A question {n}.", "topic": "doubt"}
    for n in range(6)
]


def args_for(name, **values) -> DataArguments:
    return DataArguments(dataset_name=str(name), **values)


@pytest.fixture
def hub(monkeypatch):
    """knkarthick/dialogsum as the hub has it, without a network."""

    def load_dataset(name, config=None):
        if name != "knkarthick/dialogsum":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.")
        if config is not None:
            raise ValueError(f"BuilderConfig '{config}' not found. Available: ['default']")
        splits = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(loading, "_check_hub_answers", lambda missing: None)


@pytest.fixture
def folder(write_jsonl, tmp_path) -> Path:
    write_jsonl("sum/train.jsonl.gz", TRAIN)
    write_jsonl("sum/dev.jsonl", VALIDATION)
    write_jsonl("sum/test.jsonl", TEST)
    (tmp_path / "sum" / "README.md").write_text("not data")
    return tmp_path / "sum"


def write_csv(path: Path, rows) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_hub_id_and_local_folder_give_the_same_rows(hub, folder):
    for values in ({}, {"test_split": "validation"}, {"group_column": "topic", "max_train_samples": 7}):
        remote, local = (
            load_splits(args_for("knkarthick/dialogsum", **values), 3),
            load_splits(args_for(folder, **values), 3),
        )
        assert remote.train.to_list() == local.train.to_list()
        assert remote.test.to_list() == local.test.to_list()
    assert local.train.column_names == ["id", "text", "references", "group"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "array.json", "d.csv", "d.csv.gz"])
def test_every_format_reads_alike(name, tmp_path, write_jsonl):
    if ".csv" in name:
        path = write_csv(tmp_path / name, TRAIN)
    elif name == "array.json":
        path = tmp_path / name
        path.write_text(json.dumps(TRAIN, indent=1))
    else:
        path = write_jsonl(name, TRAIN)
    loaded = load_splits(args_for(path, test_size=0.2), 0)
    rows = sorted([*loaded.train, *loaded.test], key=lambda row: int(row["id"].split("_")[1]))
    assert rows == [{"id": row["id"], "text": row["dialogue"], "references": [row["summary"]]} for row in TRAIN]


def test_sources_hash_the_file_as_it_lies(folder):
    sources = load_splits(args_for(folder), 0).sources
    digest = hashlib.sha256((folder / "train.jsonl.gz").read_bytes()).hexdigest()
    assert sources[0] == {"name": str(folder), "split": "train", "rows": 20, "sha256": digest}
    assert (sources[1]["split"], sources[1]["rows"]) == ("test", 6)


def test_hub_source_has_a_hash_of_its_rows(hub):
    first, again = (load_splits(args_for("knkarthick/dialogsum"), 0).sources for _ in range(2))
    assert first == again
    assert first[0]["name"] == "knkarthick/dialogsum"
    assert len({source["sha256"] for source in first}) == 2


def test_held_out_split_depends_on_the_seed_alone(write_jsonl):
    path = write_jsonl("d.jsonl", TRAIN)
    first, again, other = (load_splits(args_for(path, test_size=0.25), seed) for seed in (1, 1, 2))
    assert first.test["id"][:] == again.test["id"][:]
    assert first.test["id"][:] != other.test["id"][:]
    assert (len(first.train), len(first.test)) == (15, 5)
    assert set(first.train["id"]).isdisjoint(first.test["id"])


def test_split_names_fall_back_test_then_validation(folder):
    assert load_splits(args_for(folder), 0).test["id"][0] == "test_0"
    assert load_splits(args_for(folder, test_split="validation"), 0).test["id"][0] == "dev_0"
    (folder / "test.jsonl").unlink()
    assert load_splits(args_for(folder), 0).test["id"][0] == "dev_0"
    (folder / "dev.jsonl").unlink()
    assert len(load_splits(args_for(folder, test_size=0.1), 0).test) == 2


def test_samples_are_the_same_for_every_seed_and_in_file_order(folder):
    samples = [load_splits(args_for(folder, max_train_samples=8, max_test_samples=3), seed) for seed in (0, 1)]
    assert samples[0].train["id"][:] == samples[1].train["id"][:]
    numbers = [int(name.split("_")[1]) for name in samples[0].train["id"]]
    assert numbers == sorted(numbers)
    assert numbers != list(range(8))  # files may be sorted by label: the head is no sample
    assert (samples[0].sources[0]["rows"], len(samples[0].test)) == (8, 3)


def test_numbered_references_and_fname(write_jsonl, tmp_path):
    write_jsonl("d/train.jsonl", [{"fname": "train_0", "dialogue": "A.", "summary": "a", "topic": "t"}])
    row = {"fname": "test_0", "dialogue": "B.", "topic1": "u", "topic2": "v"}
    row |= {"summary10": "ten", "summary2": "two", "summary1": "one", "summary3": None, "summary_long": "no"}
    write_jsonl("d/test.jsonl", [row])
    loaded = load_splits(args_for(tmp_path / "d", group_column="topic"), 0)
    assert loaded.train[0] == {"id": "train_0", "text": "A.", "references": ["a"], "group": "t"}
    assert loaded.test[0] == {"id": "test_0", "text": "B.", "references": ["one", "two", "ten"], "group": "u"}


def test_rows_without_text_or_answer_are_dropped_and_counted(write_jsonl, tmp_path):
    rows = [
        {"dialogue": "kept", "summary": "yes"},
        {"dialogue": None, "summary": "no"},
        {"dialogue": float("nan"), "summary": "no"},
        {"dialogue": " \n", "summary": "no"},
        {"summary": "no"},
        {"dialogue": "no", "summary": ""},
        {"dialogue": "NA", "summary": "the words NA and None are text"},
    ]
    write_jsonl("d/train.jsonl", rows)
    write_jsonl("d/test.jsonl", rows[:1])
    loaded = load_splits(args_for(tmp_path / "d"), 0)
    assert loaded.train["text"][:] == ["kept", "NA"]
    assert loaded.train["id"][:] == ["0", "6"]  # the row's number where there is no id
    assert loaded.dropped_empty == {"train": 5, "test": 0}
    assert "dropped rows without text or answer: 5 in train" in str(loaded)
    assert "\n" not in str(loaded)


def test_awkward_text_survives(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(
        b"\xef\xbb\xbf"
        + '{"dialogue": "one\u2028line \\ud83d", "summary": 5}\r\n\r\n{"dialogue": "b", "summary": "c"}'.encode()
    )
    loaded = load_splits(args_for(tmp_path / "d.jsonl", test_size=0.5), 0)
    rows = {row["text"]: row["references"] for row in [*loaded.train, *loaded.test]}
    assert rows == {"one\u2028line ?": ["5"], "b": ["c"]}


def test_long_csv_cells_are_read(tmp_path):
    rows = [{"dialogue": "x" * 200_000, "summary": "a"}, {"dialogue": 'q"\n,', "summary": "b"}]
    loaded = load_splits(args_for(write_csv(tmp_path / "d.csv", rows), test_size=0.5), 0)
    assert {len(row["text"]) for row in [*loaded.train, *loaded.test]} == {200_000, 4}


BAD_FILES = {
    "json line": ("d.jsonl", b'{"dialogue": "a", "summary": "b"}\n{"dialogue": \n', "line 2: not valid JSON"),
    "no object": ("d.jsonl", b'{"dialogue": "a", "summary": "b"}\n3\n', "line 2: not a JSON object"),
    "array": ("d.json", b'[{"dialogue": "a"', "not valid JSON"),
    "csv cells": ("d.csv", b"dialogue,summary\na,b\na,b,c\n", "line 3: 3 values, but the header has 2 columns"),
    "csv quote": ("d.csv", b'dialogue,summary\na,"b\n', "not valid CSV"),
    "csv header": ("d.csv", b"dialogue,dialogue\na,b\n", "names a column twice"),
    "csv header only": ("d.csv", b"dialogue,summary\n", "has no rows"),
    "empty": ("d.jsonl", b"", "has no rows"),
    "no gzip": ("d.jsonl.gz", b"plain", "damaged gzip"),
    "cut gzip": ("d.jsonl.gz", gzip.compress(b'{"dialogue": "a"}' * 99)[:-12], "damaged gzip"),
    "latin-1": ("d.csv", "dialogue,summary\nniño,b\n".encode("latin-1"), "not UTF-8"),
    "wrong column": ("d.jsonl", b'{"text": "a", "summary": "b"}\n', "text_column: no column 'dialogue'"),
    "wrong target": ("d.jsonl", b'{"dialogue": "a", "answer": "b"}\n', "it has dialogue, answer"),
    "no text": ("d.jsonl", b'{"dialogue": ["a"], "summary": "b"}\n', "text_column: 'dialogue' holds a list"),
    "all empty": ("d.jsonl", b'{"dialogue": "", "summary": "b"}\n' * 3, "none of the 3 rows"),
    "one row": ("d.jsonl", b'{"dialogue": "a", "summary": "b"}\n', "one row cannot be split"),
    "format": ("d.txt", b"text", "is not a .jsonl, .json, .csv, .parquet, .arrow file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_one_clear_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_splits(args_for(tmp_path / name), 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_group_column_lists_the_columns(folder):
    with pytest.raises(InputError, match=r"group_column: no column 'speaker'.* it has id, dialogue, summary, topic"):
        load_splits(args_for(folder, group_column="speaker"), 0)


def test_missing_splits_list_what_there_is(folder, write_jsonl):
    with pytest.raises(InputError, match=r"train_split: .* has no split 'tarin'; it has dev, test, train"):
        load_splits(args_for(folder, train_split="tarin"), 0)
    with pytest.raises(InputError, match=r"test_split: .* has no split 'final'"):
        load_splits(args_for(folder, test_split="final"), 0)
    write_jsonl("sum/train.json", TRAIN)
    with pytest.raises(InputError, match="two files for split 'train'"):
        load_splits(args_for(folder), 0)


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/no/such/folder", "~/no_such_yunque", "a/b/c", "m.csv.gz"]
)
def test_missing_path_is_no_hub_id(name):
    with pytest.raises(InputError, match=r"dataset_name: .*no such file"):
        load_splits(args_for(name), 0)


def test_no_name_and_empty_folder(tmp_path):
    with pytest.raises(InputError, match="dataset_name: give a hub id"):
        load_splits(DataArguments(), 0)
    with pytest.raises(InputError, match=r"dataset_name: folder .* holds no"):
        load_splits(args_for(tmp_path), 0)


def test_unknown_hub_id_says_both(hub):
    expected = "'owner/none' is neither a local file or folder nor reachable on the hub .*doesn't exist"
    with pytest.raises(InputError, match=f"^dataset_name: {expected}"):
        load_splits(args_for("owner/none"), 0)


def test_configuration_is_checked(hub, folder):
    with pytest.raises(InputError, match=r"dataset_config: .* has no configuration 'xl'.*Available"):
        load_splits(args_for("knkarthick/dialogsum", dataset_config="xl"), 0)
    with pytest.raises(InputError, match="dataset_config: 'xl' is for hub ids"):
        load_splits(args_for(folder, dataset_config="xl"), 0)


def test_full_disk_while_caching_is_not_mistaken_for_a_wrong_id(hub, monkeypatch):
    def load_dataset(name, config):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match="No space left"):
        load_splits(args_for("knkarthick/dialogsum"), 0)


def test_unreachable_hub_fails_in_seconds_with_one_line():
    code = (
        "from yunque.errors import run\n"
        "from yunque.data.arguments import DataArguments\n"
        "from yunque.data.loading import load_splits\n"
        "run(lambda: load_splits(DataArguments(dataset_name='knkarthick/dialogsum'), 0))"
    )
    # A port nobody listens on stands for a machine without a network.
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: dataset_name: 'knkarthick/dialogsum' is neither a local file or folder nor")
    assert done.stderr.count("\n") == 1


def test_local_data_needs_no_writable_home(folder):
    code = (
        "from yunque.data.arguments import DataArguments\n"
        "from yunque.data.loading import load_splits\n"
        f"print(len(load_splits(DataArguments(dataset_name={str(folder)!r}), 0).train))"
    )
    env = os.environ | {"HOME": "/proc/no_home", "HF_HOME": "/proc/no_home/hf"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "20"), done.stderr


def test_dialogsum_as_published(shared_data):
    loaded = load_splits(args_for(shared_data / "dialogsum", group_column="topic"), 0)
    assert (len(loaded.train), len(loaded.test)) == (12_460, 200)
    assert loaded.train[0]["id"] == "train_0"
    assert {len(row["references"]) for row in loaded.test} == {3}
    assert loaded.dropped_empty == {"train": 0, "test": 0}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("dialogsum/dev.jsonl", 500),
        ("hate-davidson-tweets/labeled_data.csv.gz", 24_283),
        ("hatecheck/hatecheck_es.csv", 3_745),
        ("imdb/test.csv.gz", 2_500),
        ("instructions/xquad_es.jsonl.gz", 1_190),
    ],
)
def test_published_files_are_read_whole(name, rows, shared_data):
    assert len(loading.read_file(shared_data / name, name, "train").rows) == rows


@pytest.mark.network
def test_dialogsum_from_the_hub():
    loaded = load_splits(args_for("knkarthick/dialogsum", group_column="topic"), 0)
    assert (len(loaded.train), len(loaded.test)) == (12_460, 1_500)
    assert loaded.train[0]["id"] == "train_0"
