"""How soon a folder answers, how fast, and in how much memory: measured in a process that does nothing else.

``python -m yunque.runtime.speed`` reads a request as JSON from its input and writes what it measured as JSON: so an
ONNX folder is measured as it is deployed, without torch.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from yunque import runtime
from yunque.errors import InputError, run

Answer = Callable[[Sequence[Sequence[int]], int], None]
"""Answers prompts with exactly so many tokens each."""


@dataclass(frozen=True)
class SpeedRequest:
    """What to measure; ``spawned`` is the time (since 1970) at which the process was asked for."""

    folder: str
    prompts: list[list[int]]
    batch_sizes: list[int]
    new_tokens: int
    first_token_prompts: int
    repeats: int
    threads: int
    spawned: float


def measure(request: SpeedRequest, load: Callable[[], Answer], peak_bytes: Callable[[], int]) -> dict[str, Any]:
    """Load once, then answer: times in seconds (medians of ``repeats`` after a warm-up), tokens/s by batch size."""
    begin = time.perf_counter()
    answer = load()
    load_s = time.perf_counter() - begin
    start_s = time.time() - request.spawned
    loaded = _memory("VmRSS")
    prompts = request.prompts
    _timed(answer, [prompts[0]], 1)
    firsts = [_timed(answer, [prompt], 1)[0] for prompt in prompts[: request.first_token_prompts]]
    by_wall, by_cpu = {}, {}
    for size in request.batch_sizes:
        batch = [prompts[row % len(prompts)] for row in range(size)]
        answer(batch, min(2, request.new_tokens))  # buffers of this size are made
        times = [_timed(answer, batch, request.new_tokens) for _ in range(request.repeats)]
        wall, cpu = (median(column) for column in zip(*times, strict=True))
        by_wall[str(size)] = size * request.new_tokens / wall
        by_cpu[str(size)] = size * request.new_tokens / max(cpu, 1e-9)
    return {
        "start_s": start_s,
        "load_s": load_s,
        "loaded_memory_bytes": loaded,
        "peak_memory_bytes": peak_bytes(),
        "first_token_s": median(firsts) if firsts else None,
        "tokens_per_s": by_wall,
        "tokens_per_cpu_s": by_cpu,
        "new_tokens": request.new_tokens,
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "repeats": request.repeats,
        "threads": request.threads,
    }


def _timed(answer: Answer, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    answer(prompts, new_tokens)
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_memory_bytes() -> int:
    """Most memory that this process has had resident.

    Not ``ru_maxrss``: Linux lets that begin at what the parent held when it started this process.
    """
    return _memory("VmHWM")


def _memory(field: str) -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_request() -> tuple[SpeedRequest, dict[str, Any]]:
    """The request on the standard input, and what else stands in it."""
    given = json.load(sys.stdin)
    return SpeedRequest(**given.pop("request")), given


def main() -> None:
    """Measure an ONNX folder."""
    request, _ = read_request()

    def load() -> Answer:
        model = runtime.load(request.folder, threads=request.threads)
        if isinstance(model, runtime.Classifier):
            raise InputError(f"{request.folder} is a classifier; give a language model")

        def answer(prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
            rows = [list(prompt) for prompt in prompts]
            model.generate(rows, max_new_tokens=new_tokens, eos_token_ids=(), batch_size=len(rows))

        return answer

    sys.stdout.write(json.dumps(measure(request, load, peak_memory_bytes)) + "\n")


if __name__ == "__main__":
    run(main)
