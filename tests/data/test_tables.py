"""Parquet and Arrow files, and folders of save_to_disk, are read as text files are."""

import datasets
import pytest

from yunque.data import loading
from yunque.data.arguments import DataArguments
from yunque.errors import InputError

ROWS = [{"dialogue": f"text {number}", "summary": f"answer {number}", "id": str(number)} for number in range(12)]


def save_dataset(rows, folder):
    rows.save_to_disk(folder)


def save_dataset_dict(rows, folder):
    datasets.DatasetDict(train=rows.select(range(8)), validation=rows.select(range(8, 12))).save_to_disk(folder)


def save_parts(rows, folder):
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        part = rows.select(range(number * 4, number * 4 + 4))
        part.to_parquet(folder / "data" / f"train-{number:05}-of-00002.parquet")
    rows.select(range(8, 12)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")


def save_split_folders(rows, folder):
    for split, part in (("train", rows.select(range(8))), ("validation", rows.select(range(8, 12)))):
        (folder / split).mkdir(parents=True)
        part.to_parquet(folder / split / "0000.parquet")


def save_parquet(rows, folder):
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")


def save_arrow(rows, folder):
    rows.save_to_disk(folder / "saved")
    next((folder / "saved").glob("*.arrow")).rename(folder / "train.arrow")


@pytest.mark.parametrize(
    ("save", "held_out"),
    [
        (save_dataset, 3),
        (save_dataset_dict, 4),
        (save_parts, 4),
        (save_split_folders, 4),
        (save_parquet, 3),
        (save_arrow, 3),
    ],
)
def test_tables_are_read_as_texts_are(save, held_out, tmp_path):
    save(datasets.Dataset.from_list(ROWS), tmp_path / "data")
    args = DataArguments(
        dataset_name=str(tmp_path / "data"), text_column="dialogue", target_column="summary", test_size=0.25
    )
    data = loading.load_splits(args, seed=0)
    assert (len(data.train), len(data.test)) == (12 - held_out, held_out)
    assert sorted([*data.train["text"], *data.test["text"]]) == sorted(row["dialogue"] for row in ROWS)


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow"])
def test_damaged_tables_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"no table")
    with pytest.raises(InputError, match=rf"dataset_name: '.*{name}' cannot be read as"):
        loading.load_splits(DataArguments(dataset_name=str(tmp_path / name)), seed=0)
