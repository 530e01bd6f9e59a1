"""``accelerate launch`` with the exit code of the script it ran: 2, 75 and the others arrive, where accelerate says 1.

python -m yunque.distributed.launch --config_file launch/fsdp2.yaml --num_processes 8 recipes/finetune.py --config ...

SLURM requeues a job by that code. All options are accelerate's own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from yunque.errors import EXIT_BAD_INPUT, EXIT_CHECK_FAILED, EXIT_TRY_AGAIN


def main(argv: Sequence[str] | None = None) -> None:
    """Launch as accelerate does; leave with the code of the first rank that failed, if it is one of ours, else 1."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(argv))
    except ChildFailedError as error:  # of torchrun, which has logged which rank and where
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:  # of one process, started without torchrun
        code = error.returncode
    else:
        return
    sys.exit(code if code in (EXIT_BAD_INPUT, EXIT_TRY_AGAIN) else EXIT_CHECK_FAILED)


if __name__ == "__main__":
    main()
