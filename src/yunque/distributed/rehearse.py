"""Rehearse a launch profile on CPU: run a script on N ranks and in one plain process, and compare them."""

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
from yunque.packaged import find_script

_log = logging.getLogger(__name__)

RANK_BYTES = 700 * 2**20
"""A rank that has imported torch, transformers and TRL and loaded a tiny model (measured on CPU, Linux)."""

TOLERANCE = {"no": 1e-4, "bf16": 3e-2}
"""Largest difference of a loss, relative to it, that rounding explains, by precision.

float32 sums in another order differ by some 1e-6 a step, which a few steps of Adam amplify. bfloat16 keeps 8 bits: one
rounding is 4e-3, and averaged gradients are rounded after another sum. Of the cells of bench/layout_table.py, all
weights of a T5 differ by 1.6e-2 to 2.3e-2 in bfloat16 (PPO under fsdp2 and zero3, ORPO under zero3) and by less than
1e-6 in float32; DPO's 2.6e-2 (BART, zero3) has not been repeated in float32.
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
        find_script(self.script)


@dataclass
class Report:
    """What a rehearsal found.

    ``plain`` is one process without engine and profile, if it has run. start_difference is the largest distance of the
    start logits from its own that the ranks' start checks found. Of the ``answers`` that an RL script sampled,
    ``same_answers`` were the plain process's; in place of the others, its own were learnt from.
    """

    profile: str
    ranks: int
    nodes: int
    per_rank: list[dict[str, Any]]
    losses: list[float]
    start_difference: float | None = None
    plain: dict[str, Any] | None = None
    plain_losses: list[float] = field(default_factory=list)
    largest_difference: float | None = None
    equal: bool | None = None
    answers: int = 0
    same_answers: int = 0

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(vars(self), indent=2) + "\n"

    def __str__(self) -> str:
        names = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_peak_bytes")
        header = ("rank", "parameters", "gradients", "optimizer", "activations", "sent and received")
        rows: list[Sequence[str]] = [header]
        for record in [*self.per_rank, *([self.plain] if self.plain else [])]:
            traffic = record["communication_bytes"]
            sent = ", ".join(f"{name} {size:,}" for name, size in traffic.items()) or "-"
            label = "plain" if record is self.plain else str(record["rank"])
            rows.append((label, *(f"{record[name]:,}" for name in names), sent))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines = [f"{self.profile}: {self.ranks} ranks on {self.nodes} nodes, bytes of each rank", *lines]
        if self.start_difference is not None:
            lines.append(f"logits at start equal a plain process's (relative difference {self.start_difference:.1e})")
        if self.answers:
            others = self.answers - self.same_answers
            lines.append(
                f"answers: {self.same_answers} of {self.answers} as one plain process samples them; losses are of its "
                f"answers{f', in place of the {others} that rounding made others' if others else ''}"
            )
        if self.equal is not None:
            lines.append(self.verdict())
        return "\n".join(lines)

    def verdict(self) -> str:
        """Whether the losses are a plain process's, in a line."""
        if not self.losses:
            return "no backward pass was counted: there is nothing to compare"
        verdict = "equal" if self.equal else "DIFFER from"
        return (
            f"losses of {len(self.losses)} backward passes {verdict} those of one plain process "
            f"(largest relative difference {self.largest_difference:.1e})"
        )


def rehearse(wanted: Rehearsal, *, compare: bool = True) -> Report:
    """Run the script in one plain process, unless not ``compare``, and on all ranks.

    Each run writes into a folder that goes away with it; that of all ranks is kept where ``--output_dir`` is given.

    Raises:
        InputError: more ranks than memory allows.
        Stopped: the script was stopped by a signal.
        SystemExit: the script failed, with its exit code; it has said why.
    """
    refuse_beyond_memory(wanted.ranks, RANK_BYTES, "to start")
    with tempfile.TemporaryDirectory(prefix="yunque-rehearsal-") as name:
        folder = Path(name)
        plain = None
        if compare:
            plain = _run_plain(wanted, folder / "plain")
            refuse_beyond_memory(wanted.ranks, plain["memory_bytes"], "by what one held")
        records = _run_ranks(wanted, folder / "ranks", compare=compare)
        same, answers = _answers(folder / "ranks")
    starts = [difference for record in records for difference in record.pop("start_differences")]
    losses = [sum(values) / len(values) for values in zip(*(record.pop("losses") for record in records), strict=True)]
    report = Report(
        wanted.profile.stem, wanted.ranks, wanted.nodes, records, losses, max(starts, default=None),
        answers=answers, same_answers=same,
    )  # fmt: skip
    if plain:
        report.plain, report.plain_losses = plain, plain.pop("losses")
        report.largest_difference = largest_difference(losses, report.plain_losses)
        report.equal = bool(losses) and report.largest_difference <= TOLERANCE[_precision(wanted)]
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


def _run_plain(wanted: Rehearsal, folder: Path) -> dict[str, Any]:
    """Run the script as one process that no launcher has started; its record."""
    profile = {
        rehearsal.PLAIN: "1",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_MIXED_PRECISION": _precision(wanted),
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment = _environment(wanted, folder, _data_ranks(wanted), own_output=True) | profile
    _wait([_start(["-m", rehearsal.__name__, str(find_script(wanted.script)), *wanted.arguments], environment)])
    (record,) = _records(folder, 1)
    del record["start_differences"]  # it has nothing to differ from
    return record


def _run_ranks(wanted: Rehearsal, folder: Path, *, compare: bool) -> list[dict[str, Any]]:
    """Start a launcher per node and wait for all; the ranks' records."""
    port = free_port(wanted.port)
    if wanted.port not in (0, port):
        _log.warning("port %d is in use; taking %d", wanted.port, port)
    own_output = not any(part.split("=")[0] == "--output_dir" for part in wanted.arguments)
    environment = _environment(wanted, folder, int(compare), own_output=own_output)
    options = ["--config_file", str(wanted.profile), *wanted.launch_options, *_sizes(wanted)]
    options += ["--num_processes", str(wanted.ranks), "--num_machines", str(wanted.nodes)]
    options += ["--main_process_port", str(port), *(["--main_process_ip", "127.0.0.1"] if wanted.nodes > 1 else [])]
    script = ["-m", rehearsal.__name__, str(find_script(wanted.script)), *wanted.arguments]
    command = ["-m", "yunque.distributed.launch", *options, "--machine_rank"]
    _wait([_start([*command, str(node), *script], environment) for node in range(wanted.nodes)])
    return _records(folder, wanted.ranks)


def _environment(wanted: Rehearsal, folder: Path, fold: int, *, own_output: bool) -> dict[str, str]:
    """Variables of a run that keeps its records in ``folder``, and where ``own_output`` its output too."""
    folder.mkdir()
    environment = os.environ | {rehearsal.RECORDS: str(folder), rehearsal.FOLD: str(fold)}
    if fold:
        environment[rehearsal.ANSWERS] = str(folder.parent / "answers.jsonl")
    if own_output:
        environment[rehearsal.OUTPUT] = str(folder / "out")
    environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *command], env=environment)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> None:
    codes = [process.wait() for process in started]
    if EXIT_TRY_AGAIN in codes:
        raise Stopped("the rehearsed script was")
    if any(codes):
        raise SystemExit(EXIT_BAD_INPUT if EXIT_BAD_INPUT in codes else 1)


def _records(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def _answers(folder: Path) -> tuple[int, int]:
    """How many answers the ranks sampled as the plain process did, and how many in all."""
    lines = [line for path in folder.glob("answers-*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    counts = [json.loads(line) for line in lines]
    return sum(same for same, _ in counts), sum(count for _, count in counts)


def _sizes(wanted: Rehearsal) -> list[str]:
    """Options that fit the sizes of a tensor-parallel profile to the number of ranks."""
    width, groups = _tensor_parallel(wanted)
    if wanted.ranks == 1:
        return ["--parallelism_config_tp_size", "1", "--parallelism_config_dp_shard_size", "1"]
    if groups > 1:
        return ["--parallelism_config_dp_shard_size", str(wanted.ranks // width)]
    return ["--parallelism_config_tp_size", str(wanted.ranks)] if width > 1 else []


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
