"""Model folders: atomic save, the manifest ``yunque.json`` with hashes and parents, verification and lineage.

A folder with a manifest is complete: the manifest is written last, after every file it lists lies on the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from yunque import provenance
from yunque.errors import InputError, disk_full, is_disk_full

MANIFEST = "yunque.json"
SCHEMA = 1
CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"

_STAGING = ".staging"
_RUN_ENTRIES = (CHECKPOINTS, LOG, "tensorboard")
"""What a run writes into its output folder before it is finished; never listed in the manifest."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a model folder is, where it comes from and what it holds (the fields of ``yunque.json``)."""

    schema: int = SCHEMA  # raised when a reader of this one could not read it
    stage: str  # what made it, such as finetune, ppo, prune
    created: str  # ISO 8601, UTC
    parents: list[dict[str, Any]]  # path (or hub id), manifest_sha256 or None
    base_model: str | None  # where the chain of parents begins
    tokenizer_sha256: str | None  # of tokenizer.json
    data: list[dict[str, Any]]  # name, split, rows, sha256
    prompt_template: str | None  # what the model was trained on, {text} where the text goes
    seed: int | None
    config: dict[str, Any]  # every option of the run
    versions: dict[str, str]  # Python, yunque and what it stands on
    hardware: dict[str, Any]  # platform, processor, memory, GPUs, ranks
    git_commit: str | None  # of yunque's checkout, with -dirty when changed
    metrics: dict[str, Any]  # what the step measured
    files: dict[str, dict[str, Any]]  # name relative to the folder, "/" separated: bytes, sha256


class Ancestor(NamedTuple):
    """One model of a lineage; ``problem`` says why the chain cannot be followed or trusted here."""

    path: str
    manifest: Manifest | None
    problem: str | None


# --- saving -----------------------------------------------------------------------------------------------------------


def save_model_folder(
    folder: str | Path,
    write: Callable[[Path], None],
    *,
    stage: str,
    parents: Sequence[str],
    data: Sequence[Mapping[str, Any]] = (),
    prompt_template: str | None = None,
    seed: int | None = None,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> Manifest:
    """Save what ``write(staging)`` puts into a staging folder as the model folder ``folder``, all or nothing.

    The files of the folder's former manifest are replaced; other files in it (log, checkpoints) stay. When anything
    fails before the files are complete on the disk, the folder is as it was. Without ``base_model``, the base model
    of the first parent is taken. Call it on one rank only.

    Raises:
        InputError: ``folder`` cannot be a writable folder.
        OSError: the disk is full or failing; whatever ``write`` raises passes through as well.
    """
    folder = Path(folder)
    created_folder = not folder.exists()
    _make_folder(folder)
    staging = folder / _STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed save
        staging.mkdir()
        write(staging)
        files = {name: sync_and_describe(staging / name) for name in _file_names(staging)}
        manifest = Manifest(
            stage=stage,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            parents=[_parent(name) for name in parents],
            base_model=base_model or (_base_model(parents[0]) if parents else None),
            tokenizer_sha256=files["tokenizer.json"]["sha256"] if "tokenizer.json" in files else None,
            data=jsonable(data),
            prompt_template=prompt_template,
            seed=seed,
            config=jsonable(config or {}),
            versions=provenance.collect_versions(),
            hardware=provenance.collect_hardware(),
            git_commit=provenance.collect_git_commit(),
            metrics=jsonable(metrics or {}),
            files=files,
        )
        # The manifest takes its room on the disk now: from here on there are only renames.
        (staging / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        fsync(staging / MANIFEST)
        _commit(staging, folder, files)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if created_folder and not any(folder.iterdir()):
            folder.rmdir()
        if is_disk_full(error):
            raise disk_full(folder, error) from error
        raise
    return manifest


def _commit(staging: Path, folder: Path, names: Iterable[str]) -> None:
    """Move the staged files into ``folder``: the former manifest goes first, the new one comes last."""
    targets = [folder / name for name in names]
    folders = {folder, *(target.parent for target in targets)}
    for parent in folders:
        parent.mkdir(parents=True, exist_ok=True)
    former = _listed_files(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    fsync(folder)  # no crash may bring the former manifest back beside new files
    for name, target in zip(names, targets, strict=True):
        os.replace(staging / name, target)
    _remove_files(folder, set(former) - set(names))
    for parent in folders:
        fsync(parent)
    os.replace(staging / MANIFEST, folder / MANIFEST)
    fsync(folder)
    shutil.rmtree(staging, ignore_errors=True)


def check_output_dir(output_dir: str | Path, *, overwrite: bool, resume: bool, inputs: Sequence[str] = ()) -> None:
    """Check that a run may write into ``output_dir``, changing nothing; ``inputs`` are the model folders it reads.

    Raises:
        InputError: a file, a read-only place, one of the inputs, a finished run without ``overwrite``, an unfinished
            run without ``overwrite`` or ``resume``.
    """
    folder = Path(output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--output_dir {folder}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {folder}: {existing} is not writable; give another folder")
    for name in inputs:
        if folder.exists() and Path(name).exists() and folder.samefile(name):
            raise InputError(f"--output_dir {folder}: is also an input of this run; give another folder")
    if (folder / MANIFEST).exists():
        if not overwrite:
            raise InputError(
                f"--output_dir {folder}: holds a finished run; give another folder or --overwrite_output_dir"
            )
    elif _holds_unfinished_run(folder) and not (overwrite or resume):
        raise InputError(
            f"--output_dir {folder}: holds an unfinished run; continue it with --resume "
            "or start again with --overwrite_output_dir"
        )


def prepare_output_dir(output_dir: str | Path, *, overwrite: bool, resume: bool, inputs: Sequence[str] = ()) -> Path:
    """Create ``output_dir``, removing what a former run left there (never unrelated files) under ``overwrite``.

    With both ``overwrite`` and ``resume`` an unfinished run is continued and a finished one is replaced.

    Raises:
        InputError: as ``check_output_dir``.
    """
    check_output_dir(output_dir, overwrite=overwrite, resume=resume, inputs=inputs)
    folder = Path(output_dir)
    _make_folder(folder)
    shutil.rmtree(folder / _STAGING, ignore_errors=True)
    finished = (folder / MANIFEST).exists()
    if finished or (overwrite and not resume):
        listed = _listed_files(folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        _remove_files(folder, listed)
        for name in _RUN_ENTRIES:
            _remove(folder / name)
    return folder


def _holds_unfinished_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _RUN_ENTRIES)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder}: is a file or lies under one; give a folder") from error
    except PermissionError as error:
        raise InputError(f"{folder}: cannot be created: {error.strerror}") from error


def _file_names(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)  # a copied folder's manifest is not this one's


def sync_and_describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file that now lies on the disk, readable by whom the umask says."""
    follow_umask(path)
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def follow_umask(path: Path) -> None:
    """Give a file the mode of one that ``open`` makes: safetensors and ``mkstemp`` keep theirs to the owner (0600)."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed_files(folder: Path) -> list[str]:
    try:
        return list(read_manifest(folder).files)
    except InputError:
        return []


def _remove_files(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        path.unlink()
        for parent in Path(name).parents[:-1]:
            if not any((folder / parent).iterdir()):
                (folder / parent).rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- parents ----------------------------------------------------------------------------------------------------------


def _parent(name: str) -> dict[str, Any]:
    folder = Path(name)
    if not folder.is_dir():
        return {"path": name, "manifest_sha256": None}  # a hub id
    manifest = folder / MANIFEST
    return {
        "path": str(folder.resolve()),
        "manifest_sha256": sha256_file(manifest) if manifest.is_file() else None,
    }


def _base_model(parent: str) -> str | None:
    """The base model a child of ``parent`` inherits: a parent without a manifest is itself the beginning."""
    if not (Path(parent) / MANIFEST).is_file():
        return parent
    try:
        return read_manifest(parent).base_model
    except InputError:
        return None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a model folder.

    Raises:
        InputError: no such folder, no manifest, not JSON, an unknown schema, a field that is missing or malformed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: holds no {MANIFEST}: not a finished model folder of yunque") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        schema = content.get("schema") if isinstance(content, dict) else None
        raise InputError(f"{path}: unknown schema {schema}; this version of yunque reads schema {SCHEMA}")
    _check_fields(path, content)
    return Manifest(**{field.name: content[field.name] for field in fields(Manifest)})


def manifest_of(model: str) -> Manifest | None:
    """The manifest of a local model folder, if it has one.

    Raises:
        InputError: as ``read_manifest``, of a manifest that is there.
    """
    return read_manifest(model) if (Path(model) / MANIFEST).is_file() else None


def _check_fields(path: Path, content: Mapping[str, Any]) -> None:
    for name, hint in get_type_hints(Manifest).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if name not in content or not isinstance(content[name], tuple(get_origin(kind) or kind for kind in kinds)):
            raise InputError(f"{path}: field {name} is missing or malformed")
    for parent in content["parents"]:
        if not isinstance(parent, dict) or not isinstance(parent.get("path"), str):
            raise InputError(f"{path}: field parents is malformed")
    for name, file in content["files"].items():
        # Listed files get removed when a run is overwritten: a foreign manifest must not reach outside its folder.
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        if not inside or not isinstance(file, dict) or not {"bytes", "sha256"} <= file.keys():
            raise InputError(f"{path}: field files is malformed at {name!r}")


def verify(folder: str | Path) -> list[str]:
    """Recheck every listed file of a model folder; one line per file that is missing or differs.

    Raises:
        InputError: as ``read_manifest``.
    """
    folder = Path(folder)
    problems = []
    for name, expected in read_manifest(folder).files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected["bytes"]:
            problems.append(f"{name} has {size} bytes instead of {expected['bytes']}")
        elif sha256_file(path) != expected["sha256"]:
            problems.append(f"{name} has other content (sha256 differs)")
    return problems


def lineage(folder: str | Path) -> list[Ancestor]:
    """The folder and all its ancestors found on this machine, each once, every child before its parents.

    Raises:
        InputError: as ``read_manifest``, for ``folder`` itself; an ancestor's trouble is its ``problem``.
    """
    found = [Ancestor(str(folder), read_manifest(folder), None)]
    seen = {str(Path(folder).resolve())}
    for child in found:  # grows while it is walked
        for parent in child.manifest.parents if child.manifest else ():
            if parent["path"] not in seen:
                seen.add(parent["path"])
                found.append(_ancestor(parent["path"], parent.get("manifest_sha256")))
    return found


def trained_prompt(model: str) -> tuple[str | None, dict[str, Any]]:
    """Prompt template and options of the nearest run in the lineage of ``model`` that had prompts."""
    if manifest_of(model) is None:
        return None, {}
    for ancestor in lineage(model):
        if ancestor.manifest is not None and "prompt_template" in ancestor.manifest.config:
            return ancestor.manifest.prompt_template, ancestor.manifest.config
    return read_manifest(model).prompt_template, {}


def _ancestor(path: str, manifest_sha256: str | None) -> Ancestor:
    if not Path(path).is_dir():
        is_local = manifest_sha256 is not None or Path(path).is_absolute()
        return Ancestor(path, None, "not found on this machine" if is_local else None)
    if manifest_sha256 is None:
        return Ancestor(path, None, None)
    try:
        manifest = read_manifest(path)
    except InputError as error:
        return Ancestor(path, None, str(error))
    changed = sha256_file(Path(path) / MANIFEST) != manifest_sha256
    return Ancestor(path, manifest, "has changed since this model was made from it" if changed else None)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(content: bytes) -> str:
    """Hex SHA-256 of ``content``."""
    return hashlib.sha256(content).hexdigest()


# --- showing ----------------------------------------------------------------------------------------------------------


def to_json(folder: str | Path, problems: Sequence[str] | None = None) -> str:
    """The manifest as JSON with ``lineage`` and, when verified, ``problems`` added."""
    ancestors = lineage(folder)
    chain = [
        {"path": path, "stage": manifest.stage if manifest else None, "problem": problem}
        for path, manifest, problem in ancestors
    ]
    content = {**asdict(read_manifest(folder)), "lineage": chain}
    if problems is not None:
        content["problems"] = list(problems)
    return json.dumps(content, indent=2)


def describe(folder: str | Path) -> str:
    """The manifest and its chain of parents for a person to read."""
    manifest = read_manifest(folder)
    lines = [str(folder)]
    for name in ("stage", "created", "base_model", "tokenizer_sha256", "prompt_template", "seed", "git_commit"):
        value = getattr(manifest, name)
        lines.append(
            f"  {name:<17} {json.dumps(value) if name == 'prompt_template' else '-' if value is None else value}"
        )
    for name in ("data", "metrics", "config", "versions", "hardware"):
        lines += [f"  {name}", *(f"    {line}" for line in _rows(getattr(manifest, name)))]
    total = sum(file["bytes"] for file in manifest.files.values())
    lines.append(f"  files             {len(manifest.files)} files, {total:,} bytes")
    width = max(map(len, manifest.files), default=0)
    lines += [f"    {name:<{width}} {file['bytes']:>15,}  {file['sha256']}" for name, file in manifest.files.items()]
    lines.append("  lineage")
    for path, ancestor, problem in lineage(folder):
        lines.append(f"    {path} ({ancestor.stage if ancestor else 'no manifest'}){f': {problem}' if problem else ''}")
    return "\n".join(lines)


def _rows(values: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[str]:
    if not isinstance(values, Mapping):
        return [", ".join(f"{key} {value}" for key, value in row.items()) for row in values] or ["-"]
    width = max(map(len, values), default=0)
    return [f"{key:<{width}} {json.dumps(value)}" for key, value in values.items()] or ["-"]


def jsonable(value: Any) -> Any:
    """``value`` in JSON's own types; numbers that are not finite become null, since JSON knows none."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [jsonable(item) for item in value]
    return str(value)
