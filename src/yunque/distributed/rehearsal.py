"""Run a script over gloo on CPU under any launch profile, as one of the ranks that the launcher starts.

    python -m yunque.distributed.launch --config_file launch/zero3.yaml --num_processes 2 --main_process_port 0 \
        -m yunque.distributed.rehearsal recipes/finetune.py --max_steps 4

Everything that stands in for GPUs is here: what accelerate and DeepSpeed look at to find devices and their backend.
``yunque rehearse`` starts it, with a folder in YUNQUE_REHEARSAL to which every rank writes what it held and computed;
and once without any launcher, as the plain process that the ranks are compared with.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

RECORDS = "YUNQUE_REHEARSAL"
"""Variable with the folder for the ranks' records; nothing is counted without it."""

FOLD = "YUNQUE_REHEARSAL_FOLD"
"""Variable with the number of ranks whose batches a rank takes on, itself included; 0 where nothing is compared."""

OUTPUT = "YUNQUE_REHEARSAL_OUTPUT"
"""Variable with the folder that the script writes into instead of its own."""

PLAIN = "YUNQUE_REHEARSAL_PLAIN"
"""Variable that makes this the plain process: no launch profile, no process group."""

ANSWERS = "YUNQUE_REHEARSAL_ANSWERS"
"""Variable with the file of answers that the plain process sampled, and that ranks are to learn from too."""

Answer = TypeVar("Answer")


def main() -> None:
    """Prepare the process group of this rank, then run the script named by the first argument as ``__main__``."""
    if PLAIN not in os.environ:
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

    from yunque.distributed.accounting import Meter

    losses, starts = _note_losses(), _note_starts()
    fold = int(os.environ.get(FOLD, "0"))
    if fold:
        _drop_dropout()
    _fit_arguments(max(fold, 1), os.environ.get(OUTPUT))
    meter = Meter()

    def write() -> None:
        record = meter.report() | {"losses": losses, "start_differences": starts}
        record["memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB
        (folder / f"rank-{record['rank']}.json").write_text(json.dumps(record), encoding="utf-8")

    stack.callback(write)
    stack.enter_context(meter)


def _note_losses() -> list[float]:
    """Losses of all backward passes from here on: Accelerate's, and those that go to DeepSpeed's engine without it."""
    from accelerate import Accelerator

    losses: list[float] = []
    inside: list[bool] = []

    def note(kind: Any) -> None:
        backward = kind.backward

        @wraps(backward)
        def noted(engine: Any, loss: Any, *args: Any, **options: Any) -> Any:
            if not inside:
                losses.append(float(loss.detach()))
            inside.append(True)
            try:
                return backward(engine, loss, *args, **options)
            finally:
                inside.pop()

        kind.backward = noted

    note(Accelerator)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed import DeepSpeedEngine

        note(DeepSpeedEngine)
    return losses


def _note_starts() -> list[float]:
    """Distances of the start logits from a plain process's, as the start check finds them from here on."""
    from yunque.models import start_check

    found: list[float] = []
    check = start_check.check_start

    @wraps(check)
    def noted(*args: Any, **options: Any) -> float:
        found.append(check(*args, **options))
        return found[-1]

    start_check.check_start = noted
    return found


def replay(samples: Sequence[int], answers: list[Answer]) -> list[Answer]:
    """In a rehearsal, the answers that the plain process sampled under these numbers; else ``answers`` as they are.

    Ranks sample too, but where rounding makes an answer another one, so would be the losses. How many were the same is
    written beside the ranks' records. Answers are dataclasses; what is no part of their equality is not handed on.
    """
    path = os.environ.get(ANSWERS)
    if path is None:
        return answers
    if PLAIN in os.environ:
        with Path(path).open("a", encoding="utf-8") as file:
            for sample, answer in zip(samples, answers, strict=True):
                kept = {part.name: getattr(answer, part.name) for part in fields(answer) if part.compare}  # type: ignore[arg-type]
                file.write(json.dumps([sample, kept]) + "\n")
        return answers
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    known = {sample: type(answers[0])(**kept) for sample, kept in map(json.loads, lines)} if answers else {}
    pairs = [(answer, known[sample]) for sample, answer in zip(samples, answers, strict=True)]
    rows = [answer if answer == other else other for answer, other in pairs]
    same = sum(answer == other for answer, other in pairs)
    with (Path(os.environ[RECORDS]) / f"answers-{os.environ['RANK']}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([same, len(rows)]) + "\n")
    return rows


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
