"""Where a model was made: versions of the software, the hardware, the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("accelerate", "bitsandbytes", "datasets", "deepspeed", "numpy", "onnx", "onnxruntime", "onnxscript"),
    *("optimum", "peft", "safetensors", "tokenizers", "torch", "transformers", "trl", "yunque"),
)


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages a model depends on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def collect_hardware() -> dict[str, Any]:
    """Processor, memory in bytes, number of ranks, and the GPUs if this process uses torch."""
    torch = sys.modules.get("torch")  # not imported for this: artifacts works without torch
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch else []
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def collect_git_commit() -> str | None:
    """Commit of the checkout this library runs from, with ``-dirty`` when changed; None when installed elsewhere."""
    here = Path(__file__).resolve()
    # An installed copy may lie inside somebody else's repository: only a tracked file names our commit.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *args: str) -> str | None:
    command = ["git", "-C", str(folder), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
