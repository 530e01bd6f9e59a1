"""What tells one content of a folder, file or set of options from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from yunque import artifacts
from yunque.distributed.profiles import find_profile
from yunque.packaged import find_config
from yunque.pipeline.description import Pipeline, Step


def digest(value: Any) -> str:
    """SHA-256 of ``value`` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def folder_identity(folder: Path) -> str | None:
    """What a folder holds: by a manifest's hashes (sizes are checked), else by every file; None if unfinished."""
    if (folder / artifacts.MANIFEST).is_file():
        files = artifacts.read_manifest(folder).files
        for name, file in files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                return None
        return digest({name: file["sha256"] for name, file in files.items()})
    files_there = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files_there:
        return None
    return digest({path.relative_to(folder).as_posix(): artifacts.sha256_file(path) for path in files_there})


def step_fingerprint(pipeline: Pipeline, step: Step, inputs: dict[str, str]) -> str:
    """What decides the result of ``step``: its script, options, profile, the files they name, and ``inputs``.

    ``inputs`` are the identities of the folders of earlier steps, which stand for their paths: a run that was moved,
    or a step that was made again with the same result, redoes nothing.
    """
    options = pipeline.fill(
        step, {"arguments": step.arguments, "options": step.options}, inputs | {step.name: "output"}
    )
    profile = find_profile(step.profile) if step.profile else None
    own = pipeline.fill(step, {"arguments": step.arguments, "options": step.options})
    return digest(
        {
            "run": step.run,
            "options": options,
            "processes": step.processes,
            "profile": artifacts.sha256_file(profile) if profile else None,
            "files": {name: _stamp(Path(name)) for name in sorted(set(_paths(own)))
                      if not _inside(Path(name), pipeline.output_dir)},
        }
    )  # fmt: skip


def _paths(value: Any) -> Iterator[str]:
    """Files and folders that options name, and those that a YAML file among them names."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _paths(entry)
            if key == "config" and isinstance(entry, str):
                yield from _paths(yaml.safe_load(find_config(entry).read_text(encoding="utf-8")))
    elif isinstance(value, list):
        for entry in value:
            yield from _paths(entry)
    elif isinstance(value, str) and 0 < len(value) < 4096 and "\n" not in value and Path(value).exists():
        yield value


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _stamp(path: Path) -> Any:
    """A file's hash, a model folder's identity, else the names, sizes and times of a folder's files."""
    if path.is_file():
        return artifacts.sha256_file(path)
    if (path / artifacts.MANIFEST).is_file():
        return folder_identity(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
