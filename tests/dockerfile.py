"""Runs a Dockerfile's own steps without an engine: each stage is a folder whose absolute paths stand under it.

Stages are built one after another in the same place, ``root``, and moved away when done, so that what one stage made at
an absolute path is at that path in the next one too, as in an image.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = {
    *(
        "ARG",
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "USER",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    ),
}


@dataclass
class Image:
    """What the last stage says of how it runs; paths are those of the image."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0"
    stop_signal: str = "SIGTERM"
    ports: list[int] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    bases: list[str] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Where a path of the image is on this machine."""
        return self.root / Path(self.workdir, path).as_posix().lstrip("/")

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        """``base`` with the image's variables; absolute folders of PATH that the image has are those under root."""
        found = base | self.env
        parts = [part for part in found["PATH"].split(":") if part]
        found["PATH"] = ":".join(str(self.place(part)) if self.place(part).exists() else part for part in parts)
        return found


def read(path: Path) -> list[tuple[str, str]]:
    """Instructions with their text, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not re.match(r"\s*(#|$)", line)]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [tuple(line.split(None, 1)) for line in whole.splitlines()]
    unknown = {word for word, _ in found} - INSTRUCTIONS
    assert not unknown, f"the reader does not know {unknown}"
    return found


def build(path: Path, context: Path, place: Path, base: dict[str, str]) -> Image:
    """Run all steps; ``base`` is the environment that stands for the base image's."""
    image = Image(place / "root")
    stages: dict[str, Path] = {}
    name, arguments = "", {}
    for word, text in read(path):
        for argument, value in arguments.items():
            text = text.replace(f"${{{argument}}}", value)
        if word == "ARG":
            argument, _, value = text.partition("=")
            arguments[argument] = value
        elif word == "FROM":
            if image.root.exists():
                stages[name] = image.root.rename(place / f"stage-{name}")
            base_name, _, name = text.partition(" AS ")
            image = Image(place / "root", bases=[*image.bases, base_name])
            image.root.mkdir(parents=True)
        else:
            _step(image, word, text, context, stages, base)
    return image


def _step(image: Image, word: str, text: str, context: Path, stages: dict[str, Path], base: dict[str, str]) -> None:
    if word == "WORKDIR":
        image.workdir = text
        image.place(".").mkdir(parents=True, exist_ok=True)
    elif word == "COPY":
        _copy(image, text.split(), context, stages)
    elif word == "RUN":
        image.steps.append(text)
        # A first part of a path that the image has is meant, not this machine's.
        names = "|".join(each.name for each in image.root.iterdir()) + "|opt"
        command = re.sub(rf"(?<![\w.])/(?=({names})\b)", f"{image.root}/", text)
        subprocess.run(["sh", "-ec", command], cwd=image.place("."), env=image.environment(base), check=True)
    elif word == "ENV":
        for variable, value in re.findall(r"(\w+)=(\S+)", text):
            image.env[variable] = value.replace(f"${variable}", base.get(variable, ""))
    elif word == "USER":
        image.user = text
    elif word == "EXPOSE":
        image.ports.append(int(text))
    elif word == "STOPSIGNAL":
        image.stop_signal = text
    elif word == "HEALTHCHECK":
        image.healthcheck = json.loads(text.partition("CMD ")[2])
    elif word == "ENTRYPOINT":
        image.entrypoint = json.loads(text)
    else:
        image.command = json.loads(text)


def _copy(image: Image, words: list[str], context: Path, stages: dict[str, Path]) -> None:
    options = [word for word in words if word.startswith("--")]
    *sources, target = [word for word in words if not word.startswith("--")]
    stage = next((option.partition("--from=")[2] for option in options), None)
    for source in sources:
        found = stages[stage] / source.lstrip("/") if stage else context / source
        place = image.place(target) / found.name if len(sources) > 1 else image.place(target)
        if found.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info") if stage is None else None
            shutil.copytree(found, place, symlinks=True, dirs_exist_ok=True, ignore=ignored)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found, place)


def clean_environment(python: str, place: Path) -> dict[str, str]:
    """The environment of a base image that has only ``python``; pip's own settings of this machine stay."""
    place.mkdir(parents=True)
    (place / "python").symlink_to(python)
    kept = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "LANG"))}
    return kept | {"PATH": f"{place}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/tmp")}
