"""The launch profiles: where they are, which there are, and the one a user names."""

from __future__ import annotations

from pathlib import Path

from yunque.errors import InputError
from yunque.packaged import packaged_folder

_FOLDERS = (Path("launch"), packaged_folder("launch"))
"""Beside the user, or of this installation."""


def profiles() -> dict[str, Path]:
    """Files of ``launch/`` by name."""
    found = {path.stem: path for folder in reversed(_FOLDERS) for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def find_profile(name: str) -> Path:
    """The profile of ``launch/`` with that name, or the YAML file of that path.

    Raises:
        InputError: there is neither.
    """
    known = profiles()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    choices = ", ".join([*known, "or the path of a YAML file"]) if known else "the path of a YAML file"
    raise InputError(f"profile: there is no {name}; take {choices}")
