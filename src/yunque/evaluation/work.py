"""What the steps of an evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from yunque.evaluation.arguments import EvaluatedModelArguments, EvaluationArguments, HeldOutArguments
from yunque.evaluation.divergence import AlignedPolicy
from yunque.evaluation.judging import ToxicityJudge
from yunque.evaluation.prompting import EvaluationPrompts
from yunque.metrics.formats import Check


@dataclass
class Work:
    """An evaluation that is going on: what was asked for, and what was made of it."""

    model: EvaluatedModelArguments
    data: HeldOutArguments
    args: EvaluationArguments
    argv: Sequence[str]
    accelerator: Accelerator
    console: Console
    prompts: EvaluationPrompts
    batches: list[list[int]]
    checks: list[Check]
    judge: ToxicityJudge | None
    aligned: AlignedPolicy | None
    described: dict[str, Any]
