"""Rehearse a launch profile on CPU: run a script on N ranks and on one, and compare what they held and computed."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from yunque.distributed import rehearsal
from yunque.errors import EXIT_BAD_INPUT, EXIT_TRY_AGAIN, InputError, Stopped

_log = logging.getLogger(__name__)

RANK_BYTES = 700 * 2**20
"""A rank that has imported torch, transformers and TRL and loaded a tiny model (measured on CPU, Linux)."""

TOLERANCE = {"no": 1e-4, "bf16": 1e-2}
"""Largest difference of a loss, relative to it, that rounding explains, by precision.

float32 sums in another order differ by some 1e-6 a step, which a few steps of Adam amplify. bfloat16 keeps 8 bits: one
rounding is 4e-3, and averaged gradients are rounded after another sum.
"""


@dataclass(frozen=True)
class Rehearsal:
    """What to rehearse: a profile's file, the script with its arguments, ranks in all, nodes they are spread over."""

    profile: Path
    script: str
    arguments: Sequence[str] = ()
    ranks: int = 2
    nodes: int = 1
    port: int = 0  # 0 is any free one
    launch_options: Sequence[str] = ()  # of accelerate launch

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.ranks < 1:
            raise InputError(f"--ranks {self.ranks}: give 1 or more")
        if self.nodes < 1 or self.ranks % self.nodes:
            raise InputError(f"--nodes {self.nodes}: {self.ranks} ranks do not divide over them")
        if not Path(self.script).is_file():
            raise InputError(f"script: {self.script} is no file; give a recipe, such as recipes/finetune.py")


@dataclass
class Report:
    """What a rehearsal found; ``one_rank_losses`` is empty where one rank has not run."""

    profile: str
    ranks: int
    nodes: int
    per_rank: list[dict[str, Any]]
    losses: list[float]
    one_rank: dict[str, Any] | None = None
    one_rank_losses: list[float] = field(default_factory=list)
    largest_difference: float | None = None
    equal: bool | None = None

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(vars(self), indent=2) + "\n"

    def __str__(self) -> str:
        names = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_peak_bytes")
        header = ("rank", "parameters", "gradients", "optimizer", "activations", "sent and received")
        rows: list[Sequence[str]] = [header]
        for record in [*self.per_rank, *([self.one_rank] if self.one_rank else [])]:
            traffic = record["communication_bytes"]
            sent = ", ".join(f"{name} {size:,}" for name, size in traffic.items()) or "-"
            label = "alone" if record is self.one_rank else str(record["rank"])
            rows.append((label, *(f"{record[name]:,}" for name in names), sent))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines = [f"{self.profile}: {self.ranks} ranks on {self.nodes} nodes, bytes of each rank", *lines]
        if self.equal is not None:
            verdict = "equal those of one rank" if self.equal else "DIFFER from those of one rank"
            lines.append(
                f"losses of {len(self.losses)} backward passes {verdict} "
                f"(largest relative difference {self.largest_difference:.1e})"
            )
        return "\n".join(lines)


def rehearse(wanted: Rehearsal, *, compare: bool = True) -> Report:
    """Run the script on one rank, unless not ``compare``, and on all.

    Each run writes into a folder that goes away with it; that of all ranks is kept where ``--output_dir`` is given.

    Raises:
        InputError: more ranks than memory allows.
        Stopped: the script was stopped by a signal.
        SystemExit: the script failed, with its exit code; it has said why.
    """
    refuse_beyond_memory(wanted.ranks, RANK_BYTES, "to start")
    with tempfile.TemporaryDirectory(prefix="yunque-rehearsal-") as folder:
        alone = None
        if compare:
            (alone,) = _launch(wanted, Path(folder) / "one", ranks=1, nodes=1, fold=_data_ranks(wanted))
            refuse_beyond_memory(wanted.ranks, alone["memory_bytes"], "by what one held")
        records = _launch(wanted, Path(folder) / "all", ranks=wanted.ranks, nodes=wanted.nodes, fold=int(compare))
    losses = [sum(values) / len(values) for values in zip(*(record.pop("losses") for record in records), strict=True)]
    report = Report(wanted.profile.stem, wanted.ranks, wanted.nodes, records, losses)
    if alone:
        report.one_rank, report.one_rank_losses = alone, alone.pop("losses")
        report.largest_difference = largest_difference(losses, report.one_rank_losses)
        report.equal = report.largest_difference <= TOLERANCE[_precision(wanted)]
    return report


def largest_difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Largest difference of two traces relative to the expected loss or, where that is small, to 1."""
    if len(losses) != len(expected):
        return float("inf")
    pairs = zip(losses, expected, strict=True)
    return max((abs(found - wanted) / max(1.0, abs(wanted)) for found, wanted in pairs), default=0.0)


def refuse_beyond_memory(ranks: int, rank_bytes: int, how: str) -> None:
    """Check that ``ranks`` of ``rank_bytes`` each fit into the memory that is free.

    Raises:
        InputError: they do not.
    """
    free = available_bytes()
    if ranks * rank_bytes > free:
        most = max(1, free // rank_bytes)
        raise InputError(
            f"--ranks {ranks}: needs about {ranks * rank_bytes / 2**30:.1f} GiB ({rank_bytes / 2**30:.2f} GiB a rank "
            f"{how}), and {free / 2**30:.1f} GiB are free; take {most} or fewer"
        )


def available_bytes() -> int:
    """Memory that new processes can have without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def free_port(wanted: int = 0) -> int:
    """``wanted`` if nobody listens there, else one that the system chooses."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise InputError("--port: no port of 127.0.0.1 is free")


def _launch(wanted: Rehearsal, folder: Path, *, ranks: int, nodes: int, fold: int) -> list[dict[str, Any]]:
    """Start a launcher per node and wait for all; the ranks' records."""
    folder.mkdir()
    port = free_port(wanted.port)
    if wanted.port not in (0, port):
        _log.warning("port %d is in use; taking %d", wanted.port, port)
    environment = os.environ | {rehearsal.RECORDS: str(folder), rehearsal.FOLD: str(fold)}
    if folder.name != "all" or not any(part.split("=")[0] == "--output_dir" for part in wanted.arguments):
        environment[rehearsal.OUTPUT] = str(folder / "out")
    environment.setdefault("OMP_NUM_THREADS", "1")
    options = ["--config_file", str(wanted.profile), *wanted.launch_options, *_sizes(wanted, ranks)]
    options += ["--num_processes", str(ranks), "--num_machines", str(nodes), "--main_process_port", str(port)]
    options += ["--main_process_ip", "127.0.0.1"] if nodes > 1 else []
    script = ["-m", rehearsal.__name__, wanted.script, *wanted.arguments]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "yunque.distributed.launch", *options, "--machine_rank", str(node), *script],
            env=environment,
        )
        for node in range(nodes)
    ]
    codes = [process.wait() for process in started]
    if EXIT_TRY_AGAIN in codes:
        raise Stopped("the rehearsed script was")
    if any(codes):
        raise SystemExit(EXIT_BAD_INPUT if EXIT_BAD_INPUT in codes else 1)
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def _sizes(wanted: Rehearsal, ranks: int) -> list[str]:
    """Options that fit the sizes of a tensor-parallel profile to the number of ranks."""
    width, groups = _tensor_parallel(wanted)
    if ranks == 1:
        return ["--parallelism_config_tp_size", "1", "--parallelism_config_dp_shard_size", "1"]
    if groups > 1:
        return ["--parallelism_config_dp_shard_size", str(ranks // width)]
    return ["--parallelism_config_tp_size", str(ranks)] if width > 1 else []


def _data_ranks(wanted: Rehearsal) -> int:
    """Ranks that work on different rows."""
    width, groups = _tensor_parallel(wanted)
    return wanted.ranks // width if groups > 1 else 1 if width > 1 else wanted.ranks


def _tensor_parallel(wanted: Rehearsal) -> tuple[int, int]:
    sizes = _content(wanted).get("parallelism_config") or {}
    return sizes.get("parallelism_config_tp_size", 1), sizes.get("parallelism_config_dp_shard_size", 1)


def _precision(wanted: Rehearsal) -> str:
    """The run's precision: the last that an option says, else the profile's."""
    chosen = str(_content(wanted).get("mixed_precision", "no"))
    for name, value in pairwise([*wanted.launch_options, *wanted.arguments]):
        chosen = value if name == "--mixed_precision" else chosen
    return chosen if chosen in TOLERANCE else "bf16"


def _content(wanted: Rehearsal) -> dict[str, Any]:
    return yaml.safe_load(wanted.profile.read_text(encoding="utf-8"))
