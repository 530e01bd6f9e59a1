"""How fast a node's disk, copies to its GPUs and collectives are."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
COPY_BYTES = 256 * MIB
REPEATS = 5
_REDUCE_TIMEOUT_S = 180
_WORKER = "yunque.distributed.node_speed"


def write_speed(folder: Path, num_bytes: int = COPY_BYTES) -> float:
    """Bytes per second of one file written to ``folder`` and forced to the disk; the file is removed.

    Raises:
        OSError: the folder cannot be written, or is full.
    """
    block = os.urandom(4 * MIB)  # a disk that compresses must not look fast
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".yunque-doctor-") as file:
        start = time.perf_counter()
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_bytes / (time.perf_counter() - start)


def copy_speeds(device: int) -> tuple[float, float]:
    """Bytes per second from pinned host memory to GPU ``device`` and back, medians of several copies."""
    import torch

    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{device}")

    def speed(target: Any, source: Any) -> float:
        times = []
        for _ in range(REPEATS + 1):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return COPY_BYTES / statistics.median(times[1:])  # the first one sets up

    return speed(there, host), speed(host, there)


def all_reduce_speed(ranks: int, backend: str) -> float:
    """Bus bandwidth of an all-reduce between ``ranks`` local processes in bytes per second.

    It is 2 (n - 1) / n of the bytes per second that each of the n ranks reduces, which compares with a link's speed
    whatever n is (NVIDIA's nccl-tests, PERFORMANCE.md). Processes of their own, since a collective that hangs must not
    take the caller with it.

    Raises:
        RuntimeError: the collective failed or did not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", _WORKER, folder, backend, str(ranks)]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        workers = [
            subprocess.Popen(
                [*command, str(rank)],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        return _first_answer(workers)


def _first_answer(workers: list[subprocess.Popen[str]]) -> float:
    end, answers = time.monotonic() + _REDUCE_TIMEOUT_S, []
    try:
        for worker in workers:
            output, errors = worker.communicate(timeout=max(end - time.monotonic(), 1))
            if worker.returncode:
                raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else f"exit {worker.returncode}")
            answers.append(json.loads(output.splitlines()[-1]))
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no end within {_REDUCE_TIMEOUT_S} s") from error
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return answers[0]


def _reduce(folder: str, backend: str, ranks: int, rank: int) -> None:
    import torch
    from torch import distributed

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    num_bytes = (256 if backend == "nccl" else 16) * MIB
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, init_method=f"file://{folder}/meet", world_size=ranks, rank=rank)
    numbers = torch.zeros(num_bytes // 4, device=device)
    times = []
    for _ in range(REPEATS + 1):
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(numbers)
        if backend == "nccl":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    bandwidth = 2 * (ranks - 1) / ranks * num_bytes / statistics.median(times[1:])
    sys.stdout.write(f"{json.dumps(bandwidth)}\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    _reduce(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
