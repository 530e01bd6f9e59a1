"""Run a script over gloo on CPU under any launch profile, as one of the ranks that the launcher starts.

    python -m yunque.distributed.launch --config_file launch/zero3.yaml --num_processes 2 --main_process_port 0 \
        -m yunque.distributed.rehearsal recipes/finetune.py --max_steps 4

Everything that stands in for GPUs is here: what accelerate and DeepSpeed look at to find devices and their backend.
``yunque rehearse`` starts it, with a folder in YUNQUE_REHEARSAL to which every rank writes what it held and computed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

RECORDS = "YUNQUE_REHEARSAL"
"""Variable with the folder for the ranks' records; nothing is counted without it."""

FOLD = "YUNQUE_REHEARSAL_FOLD"
"""Variable with the number of ranks whose batches a rank takes on, itself included; 0 where nothing is compared."""


OUTPUT = "YUNQUE_REHEARSAL_OUTPUT"
"""Variable with the folder that the script writes into instead of its own."""


def main() -> None:
    """Prepare the process group of this rank, then run the script named by the first argument as ``__main__``."""
    stand_in_for_gpus()
    script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)  # as `python script` would
    clean = False
    try:
        with ExitStack() as stack:
            if folder := os.environ.get(RECORDS):
                _record(Path(folder), stack)
            runpy.run_path(script, run_name="__main__")
        clean = True
    except SystemExit as end:
        clean = not end.code
        raise
    finally:
        if clean:  # gloo's threads would otherwise now and then abort a rank as it exits
            import torch

            if torch.distributed.is_initialized():  # Accelerate's end_training does the same
                torch.distributed.destroy_process_group()


def stand_in_for_gpus() -> None:
    """Let accelerate take gloo on CPU for the GPUs of a profile, then join the process group."""
    os.environ |= {
        "ACCELERATE_BYPASS_DEVICE_MAP": "true",  # DDP takes no device ids on a CPU
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_CPU": "false",  # with which accelerate refuses FSDP and DeepSpeed
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from accelerate import DistributedType, PartialState

    # transformers' TrainingArguments forget the state and ask again, so the answer itself must be ours.
    PartialState._prepare_backend = lambda *args, **options: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _prepare_deepspeed()
    PartialState()


def _prepare_deepspeed() -> None:
    """Fit DeepSpeed to small models and bare machines.

    ZeRO-3 leaves parameters below 100,000 elements whole, and tiny models have no others; and its collectives in shared
    memory want a compiler.
    """
    import deepspeed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    DeepSpeedZeroConfig.model_fields["param_persistence_threshold"].default = 0
    DeepSpeedZeroConfig.model_rebuild(force=True)


def _record(folder: Path, stack: ExitStack) -> None:
    """While ``stack`` is open, count what this rank holds and sends and note its losses; then write them down."""
    import resource

    from accelerate import Accelerator

    from yunque.distributed.accounting import Meter

    losses: list[float] = []
    backward = Accelerator.backward

    @wraps(backward)
    def noted(accelerator: Any, loss: Any, **options: Any) -> None:
        losses.append(float(loss.detach()))
        backward(accelerator, loss, **options)

    Accelerator.backward = noted
    fold = int(os.environ.get(FOLD, "0"))
    if fold:
        _drop_dropout()
    _fit_arguments(max(fold, 1), os.environ.get(OUTPUT))
    meter = Meter()

    def write() -> None:
        record = meter.report() | {"losses": losses}
        record["memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB
        (folder / f"rank-{record['rank']}.json").write_text(json.dumps(record), encoding="utf-8")

    stack.callback(write)
    stack.enter_context(meter)


def _drop_dropout() -> None:
    """Compute without dropout: ranks would draw other numbers than one rank does."""
    from torch.nn import functional

    attention = functional.scaled_dot_product_attention

    @wraps(attention)
    def without(*args: Any, **options: Any) -> Any:
        return attention(*args, **options | {"dropout_p": 0.0})

    functional.dropout = lambda input, *args, **options: input
    functional.scaled_dot_product_attention = without


def _fit_arguments(ranks: int, output: str | None) -> None:
    """Let one rank take the rows of ``ranks`` (batches per device become as many times larger), and write elsewhere."""
    from yunque import arguments

    parse: Callable[..., tuple[Any, ...]] = arguments.parse

    def fitted(*groups: type, **options: Any) -> tuple[Any, ...]:
        parsed = parse(*groups, **options)
        for group in parsed:
            if hasattr(group, "per_device_train_batch_size"):
                group.per_device_train_batch_size *= ranks
            if output and hasattr(group, "output_dir"):
                group.output_dir = output
        return parsed

    arguments.parse = fitted


if __name__ == "__main__":
    main()
