"""``yunque rehearse``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from yunque import errors

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What is no option of ours is one of the script's."""


def rehearse(
    context: typer.Context,
    profile: Annotated[str, typer.Argument(help="Name of a file in launch/, or the path of a YAML file.")],
    script: Annotated[str, typer.Argument(help="Recipe or other script; its arguments follow.")],
    ranks: Annotated[int, typer.Option(help="CPU processes, in all.")] = 2,
    nodes: Annotated[int, typer.Option(help="Launchers, which meet as nodes of a cluster do.")] = 1,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    no_compare: Annotated[bool, typer.Option("--no-compare", help="Run no plain process to compare with.")] = False,
    port: Annotated[int, typer.Option(help="Port to meet at; a free one if it is taken or 0.")] = 0,
    launch: Annotated[str, typer.Option(help="Further options of accelerate launch, in quotes.")] = "",
) -> None:
    """Run a script under a launch profile on CPU processes; say what each rank held and whether losses are right.

    They are compared with those of one plain process, without any engine, which takes the rows of all ranks into its
    batches. Both runs go without dropout.
    """
    from yunque.distributed import rehearse as library
    from yunque.distributed.profiles import find_profile

    wanted = library.Rehearsal(find_profile(profile), script, context.args, ranks, nodes, port, shlex.split(launch))
    report = library.rehearse(wanted, compare=not no_compare)
    if as_json is not None:
        as_json.write_text(report.to_json(), encoding="utf-8")
    print(report)
    if report.equal is False:
        raise errors.CheckFailed(f"{wanted.profile.stem}: {report.verdict()}")
