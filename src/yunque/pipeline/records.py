"""What is known of each step of a run: one small file per step, so that jobs of several nodes can write at once."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from yunque.artifacts import fsync

_FOLDER = ".steps"


@dataclass(frozen=True)
class Record:
    """The last start of a step: what decided its result, and, once it has ended well, the result's identity."""

    fingerprint: str
    command: list[str]
    started: str  # ISO 8601, UTC
    seconds: float = 0.0  # of all starts with this fingerprint
    result: str | None = None


def read_record(run: Path, step: str) -> Record | None:
    """The record of a step; None when it never started or the file was damaged by a crash."""
    try:
        return Record(**json.loads(_path(run, step).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_record(run: Path, step: str, record: Record) -> None:
    """Replace the record of a step, all or nothing."""
    path = _path(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    fsync(staged)
    os.replace(staged, path)
    fsync(path.parent)


def lock_path(run: Path, step: str) -> Path:
    """The file whose lock the process that works on a step holds."""
    return _path(run, step).with_suffix(".lock")


def _path(run: Path, step: str) -> Path:
    return run / _FOLDER / f"{step}.json"
