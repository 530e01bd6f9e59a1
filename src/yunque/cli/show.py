"""``yunque show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yunque import artifacts, errors


def show(
    folder: Annotated[Path, typer.Argument(help="A model folder written by yunque.", metavar="FOLDER")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Recheck the hashes of all files.")] = False,
) -> None:
    """Print what a model folder is and the chain of its parents."""
    problems = artifacts.verify(folder) if verify else None
    print(artifacts.to_json(folder, problems) if as_json else artifacts.describe(folder))
    if problems:
        raise errors.CheckFailed(f"{folder}: {'; '.join(problems)}")
    if verify and not as_json:
        print("  verified          all files are as they were saved")
