"""A constitution: principles by which a model criticises, revises and compares answers, read from a YAML file."""

from __future__ import annotations

import hashlib
import json
import string
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from yunque.errors import InputError

_OPTION = "constitution"
_PREFERENCE_END = "\nReply with A or B only.\n\nAnswer:"


@dataclass(frozen=True)
class Principle:
    """One rule: how to ask for a critique, for a revision, and for the better of two answers; 1 is first priority."""

    id: str
    priority: int
    critique_request: str
    revision_request: str
    preference_question: str


@dataclass(frozen=True)
class Frames:
    """The texts around prompt, answer and request, in the language of the constitution; names in braces are filled."""

    answer: str = "{prompt}"
    critique: str = "Question: {prompt}\n\nAnswer: {answer}\n\n{request}\n\nCritique:"
    revision: str = "Question: {prompt}\n\nAnswer: {answer}\n\nCritique: {critique}\n\n{request}\n\nRevised answer:"
    preference: str = "Question: {prompt}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n{question}" + _PREFERENCE_END


_NEEDED = {
    "answer": {"prompt"},
    "critique": {"prompt", "answer", "request"},
    "revision": {"prompt", "answer", "critique", "request"},
    "preference": {"prompt", "first", "second", "question"},
}


@dataclass(frozen=True)
class Constitution:
    """Principles in order of priority, the frames, and the hash of both (not of comments or layout)."""

    principles: tuple[Principle, ...]
    frames: Frames
    sha256: str

    @property
    def levels(self) -> list[list[Principle]]:
        """Principles grouped by priority, the first priority first."""
        priorities = sorted({principle.priority for principle in self.principles})
        return [[one for one in self.principles if one.priority == priority] for priority in priorities]

    def draw(self, generator: np.random.Generator, number: int) -> list[Principle]:
        """The first ``number`` principles by priority; those of equal priority come in random order."""
        ordered = [level[place] for level in self.levels for place in generator.permutation(len(level))]
        return ordered[:number]


def fill(frame: str, **texts: str) -> str:
    """Put texts into a frame's named braces; braces inside the texts are left alone."""
    return "".join(literal + ("" if name is None else texts[name]) for literal, name in _parts(frame))


def read_constitution(path: str | Path) -> Constitution:
    """Read a YAML file with ``principles`` (id, priority, critique_request, ...) and, if wanted, ``frames``.

    Raises:
        InputError: not readable, not YAML, no principles, a field missing, unknown or empty, an id twice, a priority
            below 1, a frame without one of its names.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{_OPTION}: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{_OPTION}: {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{_OPTION}: {path} holds no mapping; give principles: [...]")
    _refuse_unknown(content, {"principles", "frames"}, str(path))
    rows = content.get("principles")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{_OPTION}: {path} has no principles; list at least one under principles:")
    principles = tuple(sorted((_principle(row, number, path) for number, row in enumerate(rows, 1)), key=_priority))
    ids = [principle.id for principle in principles]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise InputError(f"{_OPTION}: {path} uses the id {', '.join(twice)} for two principles; give each its own")
    frames = _frames({} if content.get("frames") is None else content["frames"], path)
    record = {"principles": [asdict(principle) for principle in principles], "frames": asdict(frames)}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return Constitution(principles, frames, digest)


def _priority(principle: Principle) -> int:
    return principle.priority


def _principle(row: Any, number: int, path: str | Path) -> Principle:
    if not isinstance(row, dict):
        raise InputError(f"{_OPTION}: {path}, principle {number} is no mapping; give it {', '.join(_names(Principle))}")
    where = f"{path}, principle {row.get('id', number)}"
    _refuse_unknown(row, set(_names(Principle)), where)
    for name in _names(Principle):
        value = row.get(name)
        if name == "priority":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{_OPTION}: {where}: priority {value} is not a rank; give 1 (first), 2, ...")
        elif not isinstance(value, str) or not value.strip():
            raise InputError(f"{_OPTION}: {where}: {name} is missing or no text; write it")
    return Principle(**{name: row[name] if name == "priority" else row[name].strip() for name in _names(Principle)})


def _frames(values: Any, path: str | Path) -> Frames:
    if not isinstance(values, dict):
        raise InputError(f"{_OPTION}: {path}: frames is no mapping; give {', '.join(_names(Frames))} or leave it out")
    _refuse_unknown(values, set(_names(Frames)), f"{path}, frames")
    for name, value in values.items():
        where = f"{_OPTION}: {path}, frame {name}"
        try:
            found = {field for _, field in _parts(value) if field is not None}
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}; write a lone brace twice") from error
        if found != _NEEDED[name]:
            needed = ", ".join(f"{{{field}}}" for field in sorted(_NEEDED[name]))
            raise InputError(f"{where}: needs {needed} and no other names in braces")
    return Frames(**values)


def _parts(frame: str) -> list[tuple[str, str | None]]:
    return [(literal, name) for literal, name, _, _ in string.Formatter().parse(frame)]


def _refuse_unknown(row: dict[Any, Any], known: set[str], where: str) -> None:
    unknown = sorted(str(name) for name in row if name not in known)
    if unknown:
        raise InputError(f"{_OPTION}: {where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]
