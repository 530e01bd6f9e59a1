"""Writing result files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from yunque.artifacts import follow_umask
from yunque.errors import InputError


def check_writable(path: Path) -> None:
    """Check, before the work, that a file can be written at ``path``.

    Raises:
        InputError: a folder lies there, or its own folder is missing or read-only.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{path}: there is no folder {parent}; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {parent} is not writable; give another place")


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it there, so that no reader sees half of it."""
    handle, staged = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        follow_umask(Path(staged))
        os.replace(staged, path)
    except BaseException:
        os.unlink(staged)
        raise
