"""Read tables: Parquet and Arrow files, the texts of JSON and CSV files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from yunque.errors import InputError


def read_table(path: Path, where: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and the rows of a Parquet or Arrow file; ``where`` begins messages.

    Raises:
        InputError: not readable, damaged, no rows.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path) if path.suffix == ".parquet" else _read_arrow(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{where} cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from error
    if not table.num_rows:
        raise InputError(f"{where} has no rows")
    return list(table.column_names), table.to_pylist()


def _read_arrow(path: Path) -> Any:
    """Arrow has two formats under one suffix; ``datasets`` writes the stream."""
    import pyarrow
    from pyarrow import ipc

    with path.open("rb") as file:
        try:
            return ipc.open_stream(file).read_all()
        except pyarrow.ArrowInvalid:
            file.seek(0)
            return ipc.open_file(file).read_all()


def parse_json(text: str, where: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and the rows of JSON lines, or of one JSON list; ``where`` begins messages.

    Raises:
        InputError: not JSON, or of anything but objects.
    """
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON: {error}") from error
        numbered: Iterable[tuple[str, Any]] = ((f"item {number}", value) for number, value in enumerate(values, 1))
    else:
        numbered = _json_lines(text, where)
    rows: list[dict[str, Any]] = []
    columns: dict[str, None] = {}  # a set that keeps the order
    for place, row in numbered:
        if not isinstance(row, dict):
            raise InputError(f"{where}, {place}: not a JSON object with columns as keys")
        columns.update(dict.fromkeys(row))
        rows.append(row)
    return list(columns), rows


def _json_lines(text: str, where: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: texts may hold U+2028 and its like
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}, line {number}: not valid JSON: {error}") from error


def parse_csv(text: str, where: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and the rows of CSV with a header; ``where`` begins messages.

    Raises:
        InputError: no CSV, a column named twice, or a row of another length.
    """
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    rows: list[dict[str, Any]] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not columns:
                columns = cells
                if len(set(columns)) < len(columns):
                    raise InputError(f"{where}: the header names a column twice: {', '.join(columns)}")
            elif len(cells) != len(columns):
                raise InputError(
                    f"{where}, line {reader.line_num}: {len(cells)} values, but the header has {len(columns)} columns"
                )
            else:
                rows.append(dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: not valid CSV: {error}") from error
    return columns, rows
