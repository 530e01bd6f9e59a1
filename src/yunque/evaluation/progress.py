"""Finished batches on the disk: a run that was killed goes on with the next one, on any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

_IDENTITY = "run.json"


class Progress:
    """One JSON line per finished batch, in one file per rank, beside the identity of the run that they belong to.

    A line is complete or is not counted, so that a kill at any moment costs at most the batch in work.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._file: BinaryIO | None = None

    def differences(self) -> list[str]:
        """Entries of the identity in which the batches that lie there differ from this run's; none, none."""
        path = self.folder / _IDENTITY
        return differing(json.loads(path.read_text()), self.identity) if path.exists() else []

    def begin(self) -> None:
        """Make the folder, for the first time or again; one rank only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / _IDENTITY, json.dumps(self.identity, indent=2) + "\n")

    def remove(self) -> None:
        """Remove all of it; one rank only."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def records(self) -> dict[int, dict[str, Any]]:
        """Finished batches of all ranks by their number."""
        found: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            complete, _, _ = path.read_bytes().rpartition(b"\n")
            for line in complete.splitlines():
                record = json.loads(line)
                found[record["batch"]] = record
        return found

    def writer(self, rank: int) -> Progress:
        """Open this rank's file for ``append``, without what a kill left of a line; a context manager."""
        path = self.folder / f"rank-{rank:04d}.jsonl"
        self._file = path.open("ab")
        whole = len(path.read_bytes().rpartition(b"\n")[0])
        self._file.truncate(whole + 1 if whole else 0)
        return self

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one finished batch, on the disk when this returns."""
        assert self._file is not None, "open a writer first"
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None


def differing(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys with other values, each with both of them."""
    return [
        f"{key} ({_short(former.get(key))} there, {_short(now.get(key))} here)"
        for key in sorted({*former, *now})
        if former.get(key) != now.get(key)
    ]


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, on the disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
