"""The log of a run: one JSON object a step, always; Accelerate's trackers by option; a progress bar."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm


class RunLog:
    """Writes on the main process only; entered for the time of the training loop."""

    def __init__(self, path: Path, accelerator: Accelerator, *, first_step: int, total_steps: int) -> None:
        self.path, self.accelerator = path, accelerator
        self.first_step, self.total_steps = first_step, total_steps

    def __enter__(self) -> RunLog:
        main = self.accelerator.is_main_process
        if main:
            self._drop_steps_after_checkpoint()
            self._file = self.path.open("a", encoding="utf-8")
        self.accelerator.init_trackers("yunque")
        self._bar = tqdm(total=self.total_steps, initial=self.first_step, unit="step", desc="ppo", disable=not main)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self.accelerator.is_main_process:
            self._file.close()

    def write(self, step: int, statistics: Mapping[str, float]) -> None:
        """Append the statistics of ``step`` (counted from 1)."""
        if not self.accelerator.is_main_process:
            return
        self._file.write(json.dumps({"step": step, **statistics}) + "\n")
        self._file.flush()
        self.accelerator.log(dict(statistics), step=step)
        self._bar.set_postfix(
            reward=f"{statistics['ppo/mean_scores']:.2f}", kl=f"{statistics['objective/kl']:.2f}", refresh=False
        )
        self._bar.update()

    def warn(self, line: str) -> None:
        """Print a line above the progress bar, on stderr."""
        if self.accelerator.is_main_process:
            tqdm.write(f"warning: {line}", file=sys.stderr)

    def _drop_steps_after_checkpoint(self) -> None:
        """A killed run may have logged steps that the resumed one does again."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.first_step]
        if len(kept) < len(lines):
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        record: dict[str, Any] = json.loads(line)
        return record["step"]
    except (ValueError, KeyError):
        return float("inf")  # half a line, cut by a kill


def read_log(path: Path) -> list[dict[str, float]]:
    """Records of a finished run's log, one per step, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarize_log(path: Path) -> dict[str, float]:
    """Throughput (median over steps, samples per second) and peak memory (bytes) of a whole run's log."""
    records = read_log(path)
    return {
        "samples_per_s": statistics.median(record["samples_per_s"] for record in records),
        "peak_memory_bytes": int(max(record["peak_memory_bytes"] for record in records)),
    }
