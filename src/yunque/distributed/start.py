"""What every training recipe does first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from yunque.artifacts import check_output_dir
from yunque.distributed.arguments import RunArguments

if TYPE_CHECKING:
    from rich.console import Console


def start_run(args: RunArguments, inputs: Iterable[str | None]) -> tuple[Accelerator, Console]:
    """Check the output folder, start Accelerate with its trackers, seed; the console speaks on the main process only.

    Raises:
        InputError: ``output_dir`` holds a former run, or is one of ``inputs``.
    """
    from rich.console import Console

    named = [name for name in inputs if name is not None]
    check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=args.resume, inputs=named)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(logging_dir=f"{args.output_dir}/tensorboard"),
    )
    set_seed(args.seed)
    return accelerator, Console(quiet=not accelerator.is_main_process)
