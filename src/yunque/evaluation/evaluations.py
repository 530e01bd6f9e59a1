"""Reading what ``yunque evaluate`` writes: the settings of an evaluation and its rows, checked, and pairs of rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from yunque.artifacts import MANIFEST, Ancestor, Manifest, lineage, read_manifest, sha256_file
from yunque.errors import InputError
from yunque.evaluation.scores import score_kind

EVALUATION = "evaluation.json"
GENERATIONS = "generations.jsonl"
_PARTS = ".parts"  # of an evaluation that is not finished


class NoAnswers(InputError):
    """A model answered nothing at all."""


@dataclass(frozen=True)
class Evaluation:
    """One model's answers: ``scores`` by metric, in shown units, of shape [num_rows]; NaN where a row has none."""

    name: str
    folder: Path
    settings: dict[str, Any]
    ids: list[str]
    prompts: list[str]
    references: list[list[str]]
    answers: list[str]
    scores: dict[str, np.ndarray]

    def take(self, rows: Sequence[int]) -> Evaluation:
        """The evaluation of these rows, in this order."""
        return replace(
            self,
            ids=[self.ids[row] for row in rows],
            prompts=[self.prompts[row] for row in rows],
            references=[self.references[row] for row in rows],
            answers=[self.answers[row] for row in rows],
            scores={name: values[list(rows)] for name, values in self.scores.items()},
        )

    @property
    def model_path(self) -> str:
        """Folder or hub id of the evaluated model."""
        return str(self.settings["model"].get("path") or self.folder)

    def manifest(self) -> Manifest | None:
        """The evaluated model's manifest, where its folder is here and has one."""
        try:
            return read_manifest(self.model_path)
        except InputError:
            return None

    def road(self) -> list[Ancestor]:
        """The evaluated model and its ancestors, the base first; one entry where no manifest is found here."""
        try:
            return lineage(self.model_path)[::-1]
        except InputError as error:
            problem = None if not Path(self.model_path).is_absolute() else str(error)
            return [Ancestor(self.model_path, None, problem)]

    def changed_since(self) -> bool:
        """Whether the model folder has another manifest today than when it was evaluated."""
        manifest = Path(self.model_path) / MANIFEST
        known = self.settings["model"].get("manifest_sha256")
        return bool(known) and manifest.is_file() and sha256_file(manifest) != known


def open_evaluations(places: Sequence[str]) -> list[Evaluation]:
    """Read the evaluations at ``places``, each ``FOLDER`` or ``NAME=FOLDER``; their names differ.

    Raises:
        InputError: as ``read_evaluation``; two names that are equal.
    """
    found = []
    for place in places:
        name, equals, folder = place.partition("=")
        if equals and not Path(place).exists():
            if not name or not folder:
                raise InputError(f"{place}: give NAME=FOLDER")
            found.append((name, read_evaluation(folder)))
        else:
            found.append(("", read_evaluation(place)))
    given = [name for name, _ in found if name]
    if len(set(given)) < len(given):
        raise InputError(f"two models are named {max(given, key=given.count)}; give each a name of its own")
    names = _short_names([name or evaluation.model_path for name, evaluation in found])
    return [replace(evaluation, name=name) for name, (_, evaluation) in zip(names, found, strict=True)]


def read_evaluation(folder: str | Path, name: str = "") -> Evaluation:
    """Read the evaluation in ``folder``, or the one in its ``evaluation`` folder when it is a model folder.

    Raises:
        InputError: no evaluation there, files that are cut or malformed, no rows, an id twice, an empty answer to
            every prompt, scores that are not finite.
    """
    path = _find(Path(folder))
    settings = _read_settings(path / EVALUATION)
    rows = _read_rows(path / GENERATIONS)
    ids = [str(row["id"]) for row in rows]
    if len(set(ids)) < len(ids):
        raise InputError(f"{path / GENERATIONS}: id {max(ids, key=ids.count)} stands there more than once")
    answers = [row["answer"] for row in rows]
    if not any(answer.strip() for answer in answers):
        raise NoAnswers(f"{path / GENERATIONS}: all {len(rows)} answers are empty; there is nothing to compare")
    return Evaluation(
        name or str(folder), path, settings, ids, [row["prompt"] for row in rows],
        [_references(row) for row in rows], answers, _scores(rows, path / GENERATIONS),
    )  # fmt: skip


def align(first: Evaluation, other: Evaluation, *, same_prompts: bool = True) -> Evaluation:
    """The rows of ``other`` in the order of ``first``, paired by id.

    Raises:
        InputError: rows that only one of them has, or, with ``same_prompts``, prompts that differ.
    """
    row_of = {key: row for row, key in enumerate(other.ids)}
    only = [key for key in first.ids if key not in row_of]
    extra = len(other.ids) - (len(first.ids) - len(only))
    if only or extra:
        raise InputError(
            f"{other.name} and {first.name} were evaluated on different rows: {len(only)} only in {first.name}, {extra}"
            f" only in {other.name}, {len(first.ids) - len(only)} in both; evaluate both on the same data and split"
        )
    aligned = other.take([row_of[key] for key in first.ids])
    differing = [row for row, prompt in enumerate(first.prompts) if prompt != aligned.prompts[row]]
    if differing and same_prompts:
        raise InputError(
            f"{other.name} and {first.name} have different prompts: {len(differing)} of {len(first.ids)} differ, first"
            f" that of id {first.ids[differing[0]]}; evaluate both with the same data and prompt options"
        )
    return aligned


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give folders written by yunque evaluate")
    for place in (folder, folder / "evaluation"):
        if (place / EVALUATION).is_file():
            if (place / GENERATIONS).is_file():
                return place
            raise InputError(f"{place}: holds {EVALUATION} but no {GENERATIONS}; run yunque evaluate again")
    if (folder / _PARTS).is_dir():
        raise InputError(f"{folder}: holds an unfinished evaluation; finish it with yunque evaluate ... --resume")
    model = any((folder / name).is_file() for name in (MANIFEST, "config.json", "adapter_config.json"))
    what = "a model folder without an evaluation" if model else f"holds no {EVALUATION}"
    evaluate = f"yunque evaluate {folder if model else 'MODEL'} --dataset_name ... --output_dir {folder}"
    raise InputError(f"{folder}: {what}; run {evaluate}{'/evaluation' if model else ''}")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise InputError(f"{path}: not an evaluation: the field model is missing; run yunque evaluate again")
    return settings


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # splitlines would cut at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not valid JSON: {error}") from error
        if not (
            isinstance(row, dict)
            and "id" in row
            and all(isinstance(row.get(key), str) for key in ("prompt", "answer"))
            and isinstance(row.setdefault("scores", {}), dict)
        ):
            raise InputError(f"{path}:{number}: expected an object with id, prompt, answer and scores")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return rows


def _references(row: Mapping[str, Any]) -> list[str]:
    given = row.get("references", row.get("reference"))
    if given is None:
        return []
    return [str(text) for text in given] if isinstance(given, list) else [str(given)]


def _scores(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[str, np.ndarray]:
    """The scores by metric, in the units that are shown; a score that a row lacks, or that is null, is NaN."""
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    columns = {}
    for name in names:
        values = np.full(len(rows), math.nan)
        for number, row in enumerate(rows):
            value = row["scores"].get(name)
            if value is None:
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(
                    f"{path}: the {name} of id {row['id']} is {value!r}, not a finite number; evaluate again"
                )
            values[number] = value
        if not np.isnan(values).all():
            columns[name] = values * score_kind(name).per_stored
    return columns


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths that tell them apart, as few as do."""
    parts = [[part for part in Path(path).parts if part != "/"] or [path] for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({chr(ord('A') + number)})" for number, name in enumerate(names)]


def settings_value(settings: Mapping[str, Any], *keys: str) -> Any:
    """The value at ``settings[keys[0]][keys[1]]...``, or None."""
    value: Any = settings
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
