"""Checkpoint folders on the disk: complete or absent, each with an index by which damage is found."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from yunque.artifacts import fsync, sha256_bytes, sha256_file, sync_and_describe

INDEX = "index.json"
STATE = "state.json"
BEST = "best.json"
STOPPED = "stopped.json"
PARTIAL = ".partial"

_SCHEMA = 1
_PREFIX = "step-"


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds: the step it was saved after, who saved it, size and SHA-256 of every file."""

    step: int
    engine: str
    ranks: int
    files: dict[str, dict[str, Any]]  # name: bytes, sha256
    schema: int = _SCHEMA


@dataclass(frozen=True)
class Score:
    """How good the model of a checkpoint is."""

    metric: str
    value: float
    higher_is_better: bool = True

    def beats(self, other: Mapping[str, Any]) -> bool:
        """Whether this is better than what a former ``best.json`` says."""
        if other.get("metric") != self.metric:
            return True
        difference = self.value - other["value"]
        return difference > 0 if self.higher_is_better else difference < 0


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return folder / f"{_PREFIX}{step:06d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of all checkpoint folders, sound or damaged, in order."""
    names = (path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*"))
    return sorted(int(name) for name in names if name.isdecimal())


def describe(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files that now lie on the disk."""
    return {name: sync_and_describe(folder / name) for name in names}


def write_index(folder: Path, index: Index) -> None:
    """Write the index, with a digest of its own, as the last file of a checkpoint."""
    content = asdict(index)
    write_json(folder / INDEX, {**content, "digest": _digest(content)})
    fsync(folder)


def read_index(folder: Path) -> Index:
    """Read the index of a checkpoint.

    Raises:
        ValueError: it is missing, damaged or of another schema.
    """
    try:
        content = json.loads((folder / INDEX).read_bytes())
        digest = content.pop("digest")
    except FileNotFoundError as error:
        raise ValueError(f"{INDEX} is missing") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{INDEX} is damaged") from error
    if digest != _digest(content) or content.keys() != {field.name for field in fields(Index)}:
        raise ValueError(f"{INDEX} is damaged")
    if content["schema"] != _SCHEMA:
        raise ValueError(f"{INDEX} has schema {content['schema']}; this version of yunque reads {_SCHEMA}")
    return Index(**content)


def problems(folder: Path, *, rank: int = 0, ranks: int = 1) -> list[str]:
    """What is wrong with a checkpoint, one line per fault; each of ``ranks`` reads its share of the files."""
    try:
        index = read_index(folder)
    except ValueError as error:
        return [str(error)]
    found = []
    for name in sorted(index.files)[rank::ranks]:
        path, expected = folder / name, index.files[name]
        try:
            if (size := path.stat().st_size) != expected["bytes"]:
                found.append(f"{name} has {size} bytes instead of {expected['bytes']}")
            elif sha256_file(path) != expected["sha256"]:
                found.append(f"{name} has other content (sha256 differs)")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a crash leaves the former file or the new one."""
    partial = path.with_name(f".{path.name}")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        fsync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_best(folder: Path, *, up_to: int) -> dict[str, Any] | None:
    """``best.json`` where it points at a checkpoint that exists and that this run has passed."""
    try:
        best = json.loads((folder / BEST).read_text(encoding="utf-8"))
        known = best["step"] <= up_to and folder_of(folder, best["step"]).is_dir()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return best if known else None


def to_prune(folder: Path, *, newest: int, keep: int) -> list[Path]:
    """Checkpoints to remove after ``newest`` was saved: all but the last ``keep`` and the best.

    Later steps are of a run that went on from an earlier checkpoint, since they were damaged.
    """
    steps = steps_in(folder)
    kept = {step for step in steps if step <= newest}
    kept = set(sorted(kept)[-keep:])
    best = read_best(folder, up_to=newest)
    if best:
        kept.add(best["step"])
    return [folder_of(folder, step) for step in steps if step not in kept]


def _digest(content: Mapping[str, Any]) -> str:
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())
