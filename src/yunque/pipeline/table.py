"""A pipeline's steps for people, and for the script that submits them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from yunque import artifacts
from yunque.errors import InputError
from yunque.pipeline.description import Pipeline
from yunque.pipeline.runner import Status

_SHOWN = ("toxicity_after", "toxicity", "rougeL_after", "rougeL", "accuracy")


def status_table(pipeline: Pipeline, statuses: Mapping[str, Status]) -> str:
    """One line per step: its name, how far it is, its seconds, its folder and, where it has them, main metrics."""
    width = max(len(step.name) for step in pipeline.steps)
    lines = []
    for step in pipeline.steps:
        status = statuses[step.name]
        seconds = f"{status.record.seconds:8.0f} s" if status.record else " " * 10
        found = f"{pipeline.folder(step.name)}{_metrics(pipeline, step.name)}"
        lines.append(f"{step.name:{width}}  {status.state:7} {seconds}  {found}")
    return "\n".join(lines)


def _metrics(pipeline: Pipeline, name: str) -> str:
    try:
        metrics = artifacts.read_manifest(pipeline.folder(name)).metrics
    except InputError:
        return ""
    shown = {key: metrics[key] for key in _SHOWN if isinstance(metrics.get(key), int | float)}
    return "".join(f"  {key} {value:.3f}" for key, value in shown.items())


def slurm_lines(pipeline: Pipeline, statuses: Mapping[str, Status]) -> list[str]:
    """Steps that are not done, one line each: name, the steps it waits for, sbatch's options; separated by tabs."""
    waiting = [step for step in pipeline.steps if statuses[step.name].state != "done"]
    names = {step.name for step in waiting}
    return [
        "\t".join(
            [step.name, " ".join(need for need in pipeline.needs(step) if need in names) or "-", shlex.join(step.slurm)]
        )
        for step in waiting
    ]
