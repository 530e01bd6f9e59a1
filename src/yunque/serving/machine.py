"""What this process may use of the machine: cores and memory, by its affinity and its control group."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that the process may run on, at most its group's quota."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = (_read("cpu.max") or "max").split()
    if quota[0] != "max":
        count = min(count, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, count)


def free_bytes() -> int:
    """Memory that can be had without swapping: the machine's, at most what its group leaves."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = 4 << 30
    most, used = _read("memory.max"), _read("memory.current")
    if most and used and most != "max":
        free = min(free, int(most) - int(used))
    return max(0, free)


def resident_bytes() -> int:
    """Memory of this process."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def give_back() -> None:
    """Return freed memory to the machine, where the C library can."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _read(name: str) -> str | None:
    try:
        return (_GROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return None
