"""``yunque doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from yunque import errors


def doctor(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where runs will write.")] = Path("outputs"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what is measured: disk, copies, all-reduce.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, on one line.")] = False,
) -> None:
    """Check this node before training on it; `srun --ntasks-per-node=1 yunque doctor` checks every node of a job."""
    from yunque.distributed import doctor as checks

    found = checks.examine(checks.Options(output_dir, quick))
    print(json.dumps(checks.as_json(found)) if as_json else checks.describe(found))
    if failed := [check.name for check in found if check.status == "fail"]:
        raise errors.CheckFailed(f"node {checks.node_name()}: {', '.join(failed)}")
