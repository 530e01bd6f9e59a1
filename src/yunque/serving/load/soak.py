"""A soak: steady traffic below capacity while memory and slots are watched, and what must hold after it."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from yunque.errors import InputError
from yunque.serving.load.client import Client, Outcome
from yunque.serving.load.traffic import Window

_EDGE = 0.1  # of the measured time: memory at its begin and at its end are medians over so much


@dataclass(frozen=True)
class Sample:
    """The server at one moment of ``time.perf_counter``; None where it does not say."""

    moment_s: float
    rss_bytes: float | None
    running: float | None
    queued: float | None


@dataclass
class Watch:
    """Samples a server each second while it is under load."""

    client: Client
    pid: int | None = None
    every_s: float = 1.0
    samples: list[Sample] = field(default_factory=list)

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self.samples.append(await self.sample())
            await asyncio.sleep(self.every_s)

    async def sample(self) -> Sample:
        """One look at ``/metrics`` and at the process."""
        try:
            status, body = await self.client.get("/metrics")
            text = body.decode() if status == 200 else ""
        except OSError:
            text = ""
        rss = metric(text, "process_resident_memory_bytes") if self.pid is None else rss_bytes(self.pid)
        return Sample(time.perf_counter(), rss, metric(text, "yunque_running"), metric(text, "yunque_queued"))

    async def settled(self, within_s: float) -> Sample:
        """The first sample without a running or queued text, or the last one of that time."""
        end = time.perf_counter() + within_s
        while True:
            sample = await self.sample()
            if (sample.running == 0 and sample.queued == 0) or time.perf_counter() > end:
                return sample
            await asyncio.sleep(0.1)


@dataclass(frozen=True)
class Check:
    """Something that must hold after a soak."""

    name: str
    passed: bool
    detail: str


def metric(text: str, name: str) -> float | None:
    """Sum over all labels of a metric in Prometheus' text format."""
    found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found)) if found else None


def rss_bytes(pid: int) -> float | None:
    """Resident bytes of a process of this machine; None once it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def cpu_s(pid: int) -> float:
    """Seconds of CPU time that a process has used, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_growth(samples: Sequence[Sample], window: Window) -> float | None:
    """Share by which memory grew: median over the last tenth of the window beside that over its first tenth."""
    edge = (window.end_s - window.start_s) * _EDGE
    ends = [
        [each.rss_bytes for each in samples if each.rss_bytes and low <= each.moment_s < low + edge]
        for low in (window.start_s, window.end_s - edge)
    ]
    return median(ends[1]) / median(ends[0]) - 1 if all(ends) else None


def checks(outcomes: Sequence[Outcome], growth: float | None, after: Sample, max_growth: float) -> list[Check]:
    """What a soak must show; what the server does not tell has not been shown."""
    errors = Counter(each.rejected or each.failed for each in outcomes if not each.ok)
    shown = ", ".join(f"{count} x {reason}" for reason, count in errors.most_common())
    free = after.running == 0 and after.queued == 0
    return [
        Check("no error", bool(outcomes) and not errors, shown or f"{len(outcomes)} requests answered"),
        Check(
            f"memory growth under {100 * max_growth:g} %",
            growth is not None and growth < max_growth,
            "not measured: give --server_pid" if growth is None else f"{100 * growth:+.2f} %",
        ),
        Check(
            "no leaked slots",
            free,
            "not told by /metrics"
            if after.running is None or after.queued is None
            else f"afterwards {after.running:g} running, {after.queued:g} queued",
        ),
    ]


def check_pid(pid: int | None) -> None:
    """Check that a process is there before an hour is spent on it.

    Raises:
        InputError: no process of this number.
    """
    if pid is not None and rss_bytes(pid) is None:
        raise InputError(f"--server_pid {pid}: no such process on this machine")
