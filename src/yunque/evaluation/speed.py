"""Start, memory, latency and throughput of a model folder, measured in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from yunque.errors import InputError
from yunque.evaluation.arguments import EvaluatedModelArguments, EvaluationArguments
from yunque.models.adapter import TokenIds
from yunque.runtime.spec import is_onnx
from yunque.runtime.speed import SpeedRequest

_REPEATS = 3
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher told this process about its ranks, which the measured one is not one of."""


def measure_speed(
    model: EvaluatedModelArguments, args: EvaluationArguments, prompts: Sequence[TokenIds], max_new_tokens: int
) -> dict[str, Any]:
    """Start ``model`` in a process of its own, without torch where it is an ONNX folder, and time its answers.

    Every answer has exactly ``speed_new_tokens`` tokens, whatever the model would like to say, so that all do the same
    work.

    Raises:
        InputError: the process failed.
    """
    name = str(model.model_name_or_path)
    most = max(*args.speed_batch_sizes, args.latency_prompts)
    request = SpeedRequest(
        folder=name,
        prompts=[list(prompt) for prompt in prompts[:most]],
        batch_sizes=args.speed_batch_sizes,
        new_tokens=min(args.speed_new_tokens, max_new_tokens),
        first_token_prompts=args.latency_prompts,
        repeats=_REPEATS,
        threads=torch.get_num_threads(),
        spawned=time.time(),
    )
    module = "yunque.runtime.speed" if is_onnx(name) else "yunque.evaluation.torch_speed"
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps({"request": asdict(request), "model": asdict(model.loading())}),
        env=environment | {"OMP_NUM_THREADS": str(request.threads)},
        capture_output=True,
        text=True,
        start_new_session=True,  # Ctrl-C ends the evaluation after this, not this
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"measure_speed: the process that was to measure {name} failed: {reason}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured
