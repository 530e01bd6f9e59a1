"""Files of finished work: one JSON line per prompt and step, kept as long as what it was made of stays the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from yunque.errors import InputError

_KEY, _INPUT = "key", "input"


def content_hash(*parts: Any) -> str:
    """Short hash of what a line was made of: texts, numbers, names, lists of them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """An append-only JSONL file of one step, which a person may read and edit between runs.

    Each line has "key" (prompt and round), "input" (hash of what it was made of) and the step's own fields. A later
    line replaces an earlier one of its key; a line whose "input" no longer fits is made anew. An edited field is kept
    as it is, and what follows from it is redone, since its hash covers it. A line cut off by a crash is dropped.

    Raises:
        InputError: a line inside the file is no JSON object with "key", "input" and the fields of the step as texts,
            numbers or null.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path, self.fields = path, tuple(fields)
        self._records: dict[str, dict[str, Any]] = {}
        self.dropped_bytes = 0
        if path.exists():
            self._read()

    def get(self, key: str, made_of: str) -> dict[str, Any] | None:
        """The record of ``key`` if it was made of this input."""
        record = self._records.get(key)
        return record if record is not None and record[_INPUT] == made_of else None

    def append(self, key: str, made_of: str, record: dict[str, Any]) -> None:
        """Write one record to the end of the file and to the disk."""
        line = {_KEY: key, _INPUT: made_of, **record}
        self._records[key] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(line))
            file.flush()
            os.fsync(file.fileno())

    def compact(self, keys: Iterable[str]) -> None:
        """Rewrite the file, all or nothing: ``keys`` in this order, then other keys; older lines of a key go."""
        order = dict.fromkeys([*keys, *self._records])
        lines = [_line(self._records[key]) for key in order]
        text = "".join(lines)
        if self.path.exists() and self.path.read_text(encoding="utf-8") == text:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staging = self.path.with_name(f".{self.path.name}")
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, self.path)

    def _read(self) -> None:
        data = self.path.read_bytes()
        kept = 0
        for number, raw in enumerate(data.splitlines(keepends=True), 1):  # of bytes: splits at \n and \r only
            last = kept + len(raw) == len(data)
            if raw.strip():
                try:
                    record = json.loads(raw.decode("utf-8"))
                except ValueError as error:
                    if last and not raw.endswith(b"\n"):
                        break
                    raise InputError(
                        f"{self.path}, line {number}: not valid JSON: {error}; mend or delete it"
                    ) from error
                self._check(record, number)
                self._records[record[_KEY]] = record
            kept += len(raw)
        self.dropped_bytes = len(data) - kept
        if self.dropped_bytes:
            os.truncate(self.path, kept)
        elif data and not data.endswith(b"\n"):  # an editor that writes no last newline
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def _check(self, record: Any, number: int) -> None:
        names = (_KEY, _INPUT, *self.fields)
        if not isinstance(record, dict) or any(name not in record for name in names):
            raise InputError(f"{self.path}, line {number}: needs the fields {', '.join(names)}; mend or delete it")
        wrong = [name for name in names if not isinstance(record[name], str | int | float | None)]
        if wrong or not isinstance(record[_KEY], str):
            raise InputError(f"{self.path}, line {number}: {(wrong or [_KEY])[0]} is no text; mend or delete the line")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
