"""What every training recipe does first."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from yunque.artifacts import check_output_dir
from yunque.distributed.arguments import RunArguments
from yunque.distributed.layouts import Task, check_layout

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

    from yunque.models.arguments import ModelArguments, PromptTuningArguments

_engine: list[Any] = []
"""DeepSpeed's plugin, which transformers asks while a model is loaded, but keeps by a weak reference only."""


def start_run(
    args: RunArguments,
    inputs: Iterable[str | None],
    task: Task,
    model: ModelArguments | None = None,
    prompt: PromptTuningArguments | None = None,
) -> Console:
    """Check the launch profile and the output folder, join the other ranks, seed; the console speaks on one rank only.

    Raises:
        InputError: the profile does not carry ``task`` on what ``model`` and ``prompt`` say, ``output_dir`` holds a
            former run, or is one of ``inputs``.
    """
    check_layout(task, model, prompt)
    named = [name for name in inputs if name is not None]
    check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=args.resume, inputs=named)

    from accelerate import PartialState
    from accelerate.utils import set_seed
    from rich.console import Console

    state = PartialState()
    set_seed(args.seed)
    return Console(quiet=not state.is_main_process, soft_wrap=True)


def start_accelerator(args: RunArguments) -> Accelerator:
    """Accelerate with the trackers of the run, for recipes whose trainer does not make its own."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    return Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # "auto" of a profile is for Trainers
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(logging_dir=f"{args.output_dir}/tensorboard"),
    )


def split_while_loading(args: RunArguments) -> None:
    """Let ZeRO-3 split weights as they are read: otherwise every rank would hold the whole model until training."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    if plugin.is_zero3_init_enabled():
        plugin.set_mixed_precision(precision(args))
        plugin.set_deepspeed_weakref()
        _engine[:] = [plugin]


def precision(args: RunArguments) -> str:
    """Autocast precision: the run's option, else the launch profile's."""
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
