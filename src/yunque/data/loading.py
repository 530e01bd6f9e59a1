"""Load a hub id, a local folder or one file into rows with the same columns, whatever they came from."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from yunque.artifacts import sha256_file
from yunque.data.arguments import DataArguments, SourceArguments
from yunque.data.chat import ASSISTANT, conversation_row, is_conversation, read_messages
from yunque.data.tables import parse_csv, parse_json, read_table
from yunque.errors import InputError, is_disk_full

TEXT_FORMATS = (".jsonl", ".json", ".csv")
TABLE_FORMATS = (".parquet", ".arrow")
FORMATS = (*TEXT_FORMATS, *TABLE_FORMATS)
_SAVED_ROWS, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_PART = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
VALIDATION_NAMES = ("validation", "dev", "valid", "val")
ROW = "row"
HUB_TIMEOUT_S = 5
SAMPLE_SEED = 0  # not the run's seed: runs with different seeds are compared on the same rows


@dataclass(frozen=True)
class RawSplit:
    """One split as it was read: rows keyed by the file's own columns."""

    name: str
    split: str
    columns: list[str]
    rows: list[dict[str, Any]]
    sha256: str


@dataclass
class LoadedData:
    """Train and test rows, where they came from (for the manifest), and how many unusable rows each split lost."""

    train: datasets.Dataset
    test: datasets.Dataset
    sources: list[dict[str, Any]]
    dropped_empty: dict[str, int]

    def __str__(self) -> str:
        """One line for the user."""
        rows = ", ".join(f"{source['split']} {source['rows']:,} rows" for source in self.sources)
        dropped = ", ".join(f"{count:,} in {split}" for split, count in self.dropped_empty.items() if count)
        return f"data {self.sources[0]['name']}: {rows}" + (
            f"; dropped rows without text or answer: {dropped}" if dropped else ""
        )


@dataclass
class LoadedSplit:
    """The rows of one split, where they came from (for the manifest), and how many unusable rows were dropped."""

    rows: datasets.Dataset
    source: dict[str, Any]
    dropped_empty: int


Reader = Callable[[], RawSplit]
Normalise = Callable[[RawSplit], list[dict[str, Any]]]
KeyOf = Callable[[Mapping[str, Any]], str]


def load_splits(args: DataArguments, seed: int, *, keep_columns: bool = False) -> LoadedData:
    """Load train and test rows with the columns "id", "text", "references" and, by ``group_column``, "group".

    ``keep_columns`` adds "row": all of the file's own columns as JSON, which keeps values of any type.

    Raises:
        InputError: nothing readable under ``dataset_name``, a missing split or column, no usable row.
    """
    return load_pair(args, seed, functools.partial(_summary_rows, args, keep_columns))


def load_pair(args: SourceArguments, seed: int, normalise: Normalise, *, together: KeyOf | None = None) -> LoadedData:
    """Load the train and the test split, hold one out by ``seed`` where there is none, and draw the samples asked for.

    Rows with the same key by ``together`` are held out together, or not at all.

    Raises:
        InputError: as ``load_splits``.
    """
    readers = open_source(args)
    train_name = find_split(args, readers, "train_split")
    test_name = _test_split(args, readers, train_name)
    raw = readers[train_name]()
    train = _usable_rows(raw, normalise)
    dropped = {train_name: len(raw.rows) - len(train)}
    if test_name is None:
        train, test = _hold_out(train, args.test_size, seed, together)
        splits = [(raw, f"{train_name} less test", train), (raw, f"{train_name}: test, seed {seed}", test)]
    else:
        raw_test = readers[test_name]()
        test = _usable_rows(raw_test, normalise)
        dropped[test_name] = len(raw_test.rows) - len(test)
        splits = [(raw, train_name, train), (raw_test, test_name, test)]
    limits = (args.max_train_samples, args.max_test_samples)
    kept = [sample_rows(rows, limit) for (_, _, rows), limit in zip(splits, limits, strict=True)]
    sources = [
        {"name": part.name, "split": label, "rows": len(rows), "sha256": part.sha256}
        for (part, label, _), rows in zip(splits, kept, strict=True)
    ]
    # In memory: no cache files, so a read-only home and two processes at once need no care.
    return LoadedData(datasets.Dataset.from_list(kept[0]), datasets.Dataset.from_list(kept[1]), sources, dropped)


def load_one(args: SourceArguments, split_option: str, normalise: Normalise) -> LoadedSplit:
    """Load all usable rows of the split that the argument ``split_option`` names.

    Raises:
        InputError: as ``load_splits``.
    """
    readers = open_source(args)
    raw = readers[find_split(args, readers, split_option)]()
    rows = _usable_rows(raw, normalise)
    source = {"name": raw.name, "split": raw.split, "rows": len(rows), "sha256": raw.sha256}
    return LoadedSplit(datasets.Dataset.from_list(rows), source, len(raw.rows) - len(rows))


def open_source(args: SourceArguments) -> dict[str, Reader]:
    """Find the splits under ``dataset_name``: a local file or folder of that name, else a hub id.

    Raises:
        InputError: neither is there, or the folder holds no data file.
    """
    name = args.dataset_name
    if not name:
        raise InputError("dataset_name: give a hub id, a folder, or a .jsonl, .json or .csv file")
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path):  # unlike Path.exists, false rather than an exception for a path one may not look at
        if _looks_like_path(name):
            raise InputError(f"dataset_name: '{name}': no such file or folder")
        return _open_hub(name, args.dataset_config)
    if args.dataset_config is not None:
        raise InputError(f"dataset_config: '{args.dataset_config}' is for hub ids, but '{name}' is local; leave it out")
    if path.is_dir():
        return _open_folder(name, path)
    if _split_name(path) is None:
        raise InputError(f"dataset_name: '{name}' is not a {', '.join(FORMATS)} file (.gz may follow)")
    return {"train": functools.partial(read_files, [path], name, "train")}


def find_split(args: SourceArguments, splits: Iterable[str], option: str) -> str:
    """Return the split that the argument ``option`` names ("validation" and "dev" stand for each other).

    Raises:
        InputError: there is no such split.
    """
    wanted = getattr(args, option)
    names = list(splits)
    found = match_split(wanted, names)
    if found is None:
        raise InputError(f"{option}: '{args.dataset_name}' has no split '{wanted}'; it has {', '.join(sorted(names))}")
    return found


def match_split(wanted: str, names: Sequence[str]) -> str | None:
    """Which of ``names`` is the split ``wanted`` ("validation" and "dev" stand for each other), if any."""
    if wanted in names:
        return wanted
    aliases = VALIDATION_NAMES if wanted in VALIDATION_NAMES else ()
    return next((alias for alias in aliases if alias in names), None)


def read_files(paths: Sequence[Path], name: str, split: str) -> RawSplit:
    """Read the files of one split, in this order.

    Raises:
        InputError: as ``read_file``.
    """
    parts = [read_file(path, name, split) for path in paths]
    if len(parts) == 1:
        return parts[0]
    columns = list(dict.fromkeys(column for part in parts for column in part.columns))
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return RawSplit(name, split, columns, [row for part in parts for row in part.rows], digest)


def read_file(path: Path, name: str, split: str) -> RawSplit:
    """Read a JSON-lines, JSON (array) or CSV file, gzip or not, as UTF-8, or a Parquet or Arrow file.

    Texts are read here rather than by the ``datasets`` builders: those write a cache, hide line numbers in their
    errors, and take the texts "NA" and "None" for missing ones.

    Raises:
        InputError: not readable, damaged gzip, not UTF-8, a bad line (by number), no rows.
    """
    where = f"dataset_name: '{path}'"
    if path.suffix in TABLE_FORMATS:
        columns, rows = read_table(path, where)
        return RawSplit(name, split, columns, rows, sha256_file(path))
    try:
        data = path.read_bytes()
        content = gzip.decompress(data) if path.suffix == ".gz" else data
        text = content.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{where} is a damaged gzip file ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}); convert it with iconv") from error
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from error
    if path.name.removesuffix(".gz").endswith(".csv"):
        columns, rows = parse_csv(text, where)
    else:
        columns, rows = parse_json(text, where)
    if not rows:
        raise InputError(f"{where} has no rows")
    return RawSplit(name, split, columns, rows, hashlib.sha256(data).hexdigest())


def text_of(value: Any, where: str) -> str | None:
    """Return ``value`` as text, or None where it is missing (None, NaN, blank).

    Raises:
        InputError: a list or a record, which is no text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list | tuple | dict):
        raise InputError(f"{where} holds a {type(value).__name__}, not text; name a column of texts")
    # A lone half of a surrogate pair, which JSON can spell, has no UTF-8 and would break every later writer.
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return text if text.strip() else None


def require_column(raw: RawSplit, column: str, option: str, *, numbered: bool = False) -> list[str]:
    """Return ``[column]``, or with ``numbered`` where it is absent ``[column1, column2, ...]``.

    Raises:
        InputError: neither is there; the columns that are there are listed.
    """
    if column in raw.columns:
        return [column]
    found = (
        [name for name in raw.columns if name.startswith(column) and name[len(column) :].isdigit()] if numbered else []
    )
    if not found:
        raise InputError(
            f"{option}: no column '{column}' in split '{raw.split}' of '{raw.name}'; it has {', '.join(raw.columns)}"
        )
    return sorted(found, key=lambda name: int(name[len(column) :]))


def row_as_json(raw: RawSplit, row: Mapping[str, Any]) -> str:
    """All of the file's columns of one row, which keeps values of any type."""
    return json.dumps({name: row.get(name) for name in raw.columns}, default=str)


def group_columns(args: SourceArguments, raw: RawSplit) -> list[str]:
    """Return the column that holds the group, or nothing where none was asked for.

    Raises:
        InputError: the column is not there.
    """
    if args.group_column is None:
        return []
    return require_column(raw, args.group_column, "group_column", numbered=True)[:1]


def sample_rows(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """Draw ``limit`` of ``rows``, the same for every run, in their order; all of them without a limit."""
    if limit is None or limit >= len(rows):
        return rows
    # At random, since files may be sorted by label or topic; in file order, so that a sample reads like its file.
    chosen = np.random.default_rng(SAMPLE_SEED).permutation(len(rows))[:limit]
    return [rows[number] for number in np.sort(chosen).tolist()]


def _summary_rows(args: DataArguments, keep_columns: bool, raw: RawSplit) -> list[dict[str, Any]]:
    groups = group_columns(args, raw)
    if (column := conversation_column(args, raw)) is not None:
        return _conversation_rows(args, keep_columns, raw, column, groups)
    require_column(raw, args.text_column, "text_column")
    targets = require_column(raw, args.target_column, "target_column", numbered=True)
    id_column = next((column for column in ("id", "fname") if column in raw.columns), None)
    rows = []
    for number, row in enumerate(raw.rows):
        text = text_of(row.get(args.text_column), f"text_column: '{args.text_column}'")
        values = [value for column in targets for value in _as_list(row.get(column))]
        texts = (text_of(value, f"target_column: '{args.target_column}'") for value in values)
        references = [reference for reference in texts if reference is not None]
        if text is None or not references:
            continue
        identity = None if id_column is None else text_of(row.get(id_column), f"column '{id_column}'")
        kept: dict[str, Any] = {"id": identity or str(number), "text": text, "references": references}
        for column in groups:
            kept["group"] = text_of(row.get(column), f"group_column: '{column}'") or ""
        if keep_columns:
            kept[ROW] = row_as_json(raw, row)
        rows.append(kept)
    return rows


def conversation_column(args: DataArguments, raw: RawSplit) -> str | None:
    """Return the column of conversations, if any: text_column or, where that is missing, one of the usual names."""
    names = [args.text_column] if args.text_column in raw.columns else ["messages", "conversations", "prompt"]
    return next((name for name in names if any(is_conversation(row.get(name)) for row in raw.rows[:100])), None)


def _conversation_rows(
    args: DataArguments, keep_columns: bool, raw: RawSplit, column: str, groups: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of conversations: the last answer's turns are the reference, those before them the prompt."""
    targets = [name for name in (args.target_column, "completion") if name in raw.columns and name != column]
    rows = []
    for number, row in enumerate(raw.rows):
        where = f"text_column: '{column}', row {number + 1} of split '{raw.split}' of '{raw.name}'"
        if not is_conversation(row.get(column)):
            continue
        prompt = read_messages(row[column], where)
        answer: list[dict[str, Any]] = []
        train_all = not targets or prompt[-1]["role"] == ASSISTANT  # which ends with its answer, whatever stands beside
        if train_all:
            prompt, answer = prompt[:-1], prompt[-1:]
        elif is_conversation(target := row.get(targets[0])):
            answer = read_messages(target, where)
        elif (text := text_of(target, f"target_column: '{targets[0]}'")) is not None:
            answer = [{"role": ASSISTANT, "content": text}]
        if not answer or not prompt or answer[-1]["role"] != ASSISTANT:
            raise InputError(f"{where}: does not end with an answer of the assistant to a message before it")
        kept = {"id": str(row.get("id") or number), **conversation_row(prompt, answer, train_all=train_all)}
        for name in groups:
            kept["group"] = text_of(row.get(name), f"group_column: '{name}'") or ""
        if keep_columns:
            kept[ROW] = row_as_json(raw, row)
        rows.append(kept)
    return rows


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _usable_rows(raw: RawSplit, normalise: Normalise) -> list[dict[str, Any]]:
    rows = normalise(raw)
    if not rows:
        raise InputError(
            f"dataset_name: none of the {len(raw.rows)} rows of split '{raw.split}' of '{raw.name}' has both a text"
            " and an answer; check text_column and the column of answers"
        )
    return rows


def _test_split(args: SourceArguments, splits: Iterable[str], train_name: str) -> str | None:
    names = [name for name in splits if name != train_name]
    if args.test_split is not None:
        return find_split(args, names, "test_split")
    return match_split("test", names) or match_split("validation", names)


def _hold_out(
    rows: list[dict[str, Any]], share: float, seed: int, together: KeyOf | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    keys = [str(number) if together is None else together(row) for number, row in enumerate(rows)]
    numbers: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        numbers.setdefault(key, []).append(number)
    if len(numbers) < 2:
        what = "one row" if len(rows) < 2 else "rows that all belong together"
        raise InputError(f"dataset_name: {what} cannot be split into train and test; add rows or name a test_split")
    groups = list(numbers.values())
    num_test = min(max(1, round(len(rows) * share)), len(rows) - 1)
    test: set[int] = set()
    for group in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if not test or len(test) + len(groups[group]) <= num_test:
            test.update(groups[group])
    train = [row for number, row in enumerate(rows) if number not in test]
    return train, [rows[number] for number in sorted(test)]


def _looks_like_path(name: str) -> bool:
    # "owner/name" is how hub ids look too; everything else that a path shows is none.
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or _split_name(Path(name)) is not None


def _split_name(path: Path) -> str | None:
    stem = path.name.removesuffix(".gz")
    formats = FORMATS if stem == path.name else TEXT_FORMATS
    return next((stem.removesuffix(suffix) for suffix in formats if stem.endswith(suffix)), None)


def _open_folder(name: str, folder: Path) -> dict[str, Reader]:
    try:
        if (folder / _SAVED_SPLITS).is_file() or (folder / _SAVED_ROWS).is_file():
            return _open_saved(name, folder)
        files = _files_of_splits(name, folder)
        if not files and (folder / "data").is_dir():  # how repositories of the hub look
            files = _files_of_splits(name, folder / "data")
        if not files:  # a folder for each split
            inner = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
            files = {split: sorted(filter(_split_name, path.iterdir())) for split, path in inner.items()}
            files = {split: paths for split, paths in files.items() if paths}
    except OSError as error:
        raise InputError(f"dataset_name: folder '{name}' cannot be read: {error.strerror}") from error
    if not files:
        raise InputError(f"dataset_name: folder '{name}' holds no {', '.join(FORMATS)} file (.gz may follow)")
    return {split: functools.partial(read_files, paths, name, split) for split, paths in files.items()}


def _files_of_splits(name: str, folder: Path) -> dict[str, list[Path]]:
    """Find the files of every split: one, or numbered parts such as ``train-00000-of-00002.parquet``."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        stem = _split_name(path)
        if not stem or stem.startswith(".") or not path.is_file():
            continue
        part = _PART.fullmatch(stem)
        split = part["split"] if part else stem
        if split in found and not (part and _PART.fullmatch(_split_name(found[split][0]) or "")):
            raise InputError(f"dataset_name: '{name}' holds two files for split '{split}'; give one of them as a file")
        found.setdefault(split, []).append(path)
    return found


def _open_saved(name: str, folder: Path) -> dict[str, Reader]:
    """Open what ``save_to_disk`` of a Dataset or a DatasetDict has written."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library and Arrow raise unrelated types for what is damaged
        raise InputError(f"dataset_name: '{name}', a folder of save_to_disk, cannot be read: {error}") from error
    splits = saved if isinstance(saved, dict) else {"train": saved}
    return {str(split): functools.partial(_from_hub, name, str(split), rows) for split, rows in splits.items()}


def _open_hub(name: str, config: str | None) -> dict[str, Reader]:
    missing = f"dataset_name: '{name}' is neither a local file or folder nor reachable on the hub"
    _check_hub_answers(missing)
    try:
        found = datasets.load_dataset(name, config)
    except Exception as error:  # the hub, its client and the builders raise a dozen unrelated types
        if is_disk_full(error):
            raise
        if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
            raise InputError(f"dataset_config: '{name}' has no configuration '{config}' ({error})") from error
        if isinstance(error, PermissionError):
            raise InputError(
                f"dataset_name: '{name}' cannot be cached ({error}); set HF_HOME to a folder you may write to"
            ) from error
        raise InputError(f"{missing} ({error.__cause__ or error})") from error
    return {split: functools.partial(_from_hub, name, split, rows) for split, rows in found.items()}


def _check_hub_answers(missing: str) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:  # load_dataset then looks into its cache only
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # whatever the reason, there was no answer; load_dataset would retry for half a minute
        raise InputError(f"{missing} ({error}); to use a copy in the cache set HF_HUB_OFFLINE=1") from error


def _from_hub(name: str, split: str, rows: Iterable[Mapping[str, Any]]) -> RawSplit:
    table = [dict(row) for row in rows]
    if not table:
        raise InputError(f"dataset_name: split '{split}' of '{name}' has no rows")
    digest = hashlib.sha256()  # of the rows: what the hub stores them in may change while they stay the same
    for row in table:
        digest.update(json.dumps(row, default=str, sort_keys=True).encode() + b"\n")
    return RawSplit(name, split, list(table[0]), table, digest.hexdigest())
