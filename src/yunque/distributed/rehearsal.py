"""Run a script over gloo on CPU under any launch profile, as one of the ranks that ``accelerate launch`` starts.

    accelerate launch --config_file launch/ddp.yaml --num_processes 2 --main_process_port 0 \
        -m yunque.distributed.rehearsal recipes/ppo_detox.py --max_steps 4

Accelerate itself refuses GPU layouts on a CPU; its shared state, made here before the script starts, stands in.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Prepare the process group of this rank, then run the script named by the first argument as ``__main__``."""
    from accelerate import PartialState

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=True)
    script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)  # as `python script` would
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if not end.code:
            state.destroy_process_group()  # gloo's threads would otherwise now and then abort a rank as it exits
        raise
    state.destroy_process_group()


if __name__ == "__main__":
    main()
