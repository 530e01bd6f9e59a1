"""Read Parquet and Arrow files."""

from __future__ import annotations

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
