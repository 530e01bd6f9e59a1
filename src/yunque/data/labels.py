"""Labelled texts for a classifier: each row a text and the position of its label."""

from __future__ import annotations

import functools
from typing import Any

from yunque.data.arguments import LabelledDataArguments
from yunque.data.loading import (
    LoadedData,
    LoadedSplit,
    RawSplit,
    group_columns,
    load_one,
    load_pair,
    require_column,
    text_of,
)
from yunque.errors import InputError

SHOWN_VALUES = 10


def load_labelled_splits(args: LabelledDataArguments, seed: int) -> LoadedData:
    """Load train and test rows with "text", "label" (position in ``label_names``) and, by ``group_column``, "group".

    Raises:
        InputError: as ``load_splits``, and a label value that stands for none of ``label_names``.
    """
    return load_pair(args, seed, functools.partial(_labelled_rows, args))


def load_labelled_split(args: LabelledDataArguments, split_option: str = "train_split") -> LoadedSplit:
    """Load the one split that ``split_option`` of ``args`` names, whole.

    For test suites that come as one file. Rows as ``load_labelled_splits``.

    Raises:
        InputError: as ``load_labelled_splits``.
    """
    return load_one(args, split_option, functools.partial(_labelled_rows, args))


def _labelled_rows(args: LabelledDataArguments, raw: RawSplit) -> list[dict[str, Any]]:
    require_column(raw, args.text_column, "text_column")
    require_column(raw, args.label_column, "label_column")
    groups = group_columns(args, raw)
    positions = _positions(args)
    rows = []
    unknown: set[str] = set()
    for row in raw.rows:
        text = text_of(row.get(args.text_column), f"text_column: '{args.text_column}'")
        value = text_of(_whole(row.get(args.label_column)), f"label_column: '{args.label_column}'")
        if text is None or value is None:
            continue
        label = positions.get(value.strip())
        if label is None:
            unknown.add(value.strip())
            continue
        kept: dict[str, Any] = {"text": text, "label": label}
        for column in groups:
            kept["group"] = text_of(row.get(column), f"group_column: '{column}'") or ""
        rows.append(kept)
    if unknown:
        shown = sorted(unknown)[:SHOWN_VALUES] + (["..."] if len(unknown) > SHOWN_VALUES else [])
        raise InputError(
            f"label_values: column '{args.label_column}' of '{raw.name}' holds {', '.join(shown)}, known are"
            f" {', '.join(positions)}; set label_values to what stands for each of {', '.join(args.label_names)}"
        )
    return rows


def _positions(args: LabelledDataArguments) -> dict[str, int]:
    if args.label_values is not None:
        return {value: position for position, value in enumerate(args.label_values)}
    by_position = {str(position): position for position in range(len(args.label_names))}
    return by_position | {name: position for position, name in enumerate(args.label_names)}


def _whole(value: Any) -> Any:
    # A column of numbers with gaps becomes floats in many tools: 1.0 is the label 1.
    return int(value) if isinstance(value, float) and value.is_integer() else value
