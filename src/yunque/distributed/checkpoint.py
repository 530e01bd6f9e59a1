"""Checkpoints of every engine in one format: complete or absent, checked when read, written while training goes on.

A checkpoint is a folder of JSON and of safetensors shards, one per rank; nothing in it is unpickled. Weights and
optimizer state lie there under the names of the bare model's parameters, with the place of each shard in its whole
tensor, so that any engine on any number of ranks reads what any other wrote.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from yunque.artifacts import fsync
from yunque.distributed import checkpoint_files as files
from yunque.distributed.checkpoint_files import Score
from yunque.distributed.stopping import StopSignal
from yunque.distributed.training_state import Training, capture, random_state, restore, set_random_state
from yunque.errors import InputError
from yunque.models.placement import tensor_parallel

__all__ = ["Checkpoints", "Found", "Score", "StopSignal", "Training"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files are all as its index says, and the state the run put into it."""

    path: Path
    step: int
    engine: str
    ranks: int
    state: dict[str, Any]


class Checkpoints:
    """The last few checkpoints of a run and its best one; entered while training, so that none is left half written."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, keep: int, asynchronous: bool = False) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        # torch's copy of what it writes in the background fails on tensor-parallel weights of ranks after the first
        self.asynchronous = asynchronous and tensor_parallel() is None
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        # A group of its own, on the CPU: the background thread's messages must not mix with training's.
        self._group = dist.new_group(backend="gloo") if self.ranks > 1 else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()

    # --- saving ---

    def save(
        self,
        step: int,
        training: Training,
        state: Mapping[str, Any],
        *,
        texts: Mapping[str, str] | None = None,
        score: Score | None = None,
    ) -> None:
        """Save as ``step-NNNNNN``, on every rank at once; checkpoints beyond ``keep`` go, never the best.

        ``texts`` are files beside the state. When the run saves asynchronously this returns once the state is copied;
        what then goes wrong is raised by the next call, ``wait``, or on leaving the context.

        Raises:
            OSError: the disk is full or failing.
            InputError: the ranks do not share the folder's file system.
        """
        self.wait()
        staging = self.folder / files.PARTIAL
        self._everywhere(lambda: self._start(staging))
        self._everywhere(lambda: self._check_shared(staging))
        captured = capture(training, rank=self.rank, ranks=self.ranks)
        own = {f"rng-{self.rank:05}.json": json.dumps(random_state())}
        if self.accelerator.is_main_process:
            own |= {files.STATE: json.dumps({"run": dict(state), "training": captured.numbers}), **(texts or {})}
        writer = _writer(staging)
        options: dict[str, Any] = {"process_group": self._group, "no_dist": self._group is None}
        if not self.asynchronous:
            self._finish(step, own, score, lambda: dcp.save(captured.tensors, storage_writer=writer, **options))
            return
        writing: Any = dcp.async_save(captured.tensors, storage_writer=writer, **options)
        self._pending = self._thread.submit(self._finish, step, own, score, writing.result)

    def wait(self) -> None:
        """Return when the last checkpoint lies on the disk.

        Raises:
            OSError: it does not, since the disk is full or failing.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _start(self, staging: Path) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)  # left by a killed save
            staging.mkdir(parents=True)

    def _check_shared(self, staging: Path) -> None:
        if not staging.is_dir():
            raise InputError(
                f"--output_dir {self.folder.parent}: rank {self.rank} does not see what rank 0 writes there; "
                "give a folder on a file system that all nodes share"
            )

    def _finish(self, step: int, own: Mapping[str, str], score: Score | None, write: Callable[[], Any]) -> None:
        """Write and hash this rank's files; once all ranks have, the index makes a checkpoint of them."""
        staging = self.folder / files.PARTIAL
        try:
            try:
                write()
            except CheckpointException as error:
                raise _cause(error) from error
            described = self._everywhere(lambda: self._write_own(staging, own))
            self._everywhere(lambda: self._commit(step, described, score))
        except BaseException:
            if self.accelerator.is_main_process:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _write_own(self, staging: Path, own: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        for name, text in own.items():
            (staging / name).write_text(text, encoding="utf-8")
        shards = [path.name for path in staging.glob(f"shard-{self.rank + 1:05}-*")]
        return files.describe(staging, [*own, *shards])

    def _commit(self, step: int, described: list[dict[str, dict[str, Any]]], score: Score | None) -> None:
        if not self.accelerator.is_main_process:
            return
        staging, final, former = (self.folder / files.PARTIAL, files.folder_of(self.folder, step), self.folder / ".old")
        listed = {name: file for part in described for name, file in part.items()}
        files.write_index(staging, files.Index(step, engine_of(self.accelerator), self.ranks, listed))
        shutil.rmtree(former, ignore_errors=True)
        if final.exists():  # damaged, so that the run went on from an earlier one
            final.rename(former)
        staging.rename(final)
        fsync(self.folder)
        shutil.rmtree(former, ignore_errors=True)
        best = files.read_best(self.folder, up_to=step)
        if score is not None and (best is None or score.beats(best)):
            files.write_json(
                self.folder / files.BEST,
                {"step": step, "metric": score.metric, "value": score.value, "path": final.name},
            )
        for old in files.to_prune(self.folder, newest=step, keep=self.keep):
            shutil.rmtree(old)

    # --- going on ---

    def newest(self) -> Found | None:
        """The newest checkpoint that is sound, or None where there is none; damaged ones are named on stderr.

        Raises:
            InputError: there are checkpoints and every one is damaged.
        """
        steps = self._everywhere(lambda: files.steps_in(self.folder))[0]
        for step in reversed(steps):
            path = files.folder_of(self.folder, step)
            found = self._problems(path)
            if not found:
                return _found(path)
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            self._say(f"{path} is damaged: {found[0]}{more}; the one before it is used")
        if steps:
            raise InputError(
                f"resume: every checkpoint in {self.folder} is damaged; start afresh with --overwrite_output_dir"
            )
        return None

    def best(self, up_to: int) -> tuple[Found, str, float] | None:
        """The best checkpoint of the first ``up_to`` steps with its metric and value; None where none was rated.

        Raises:
            InputError: it is damaged.
        """
        self.wait()
        known = self._everywhere(lambda: files.read_best(self.folder, up_to=up_to))[0]
        if known is None:
            return None
        path = files.folder_of(self.folder, known["step"])
        if problems := self._problems(path):
            raise InputError(f"load_best_model_at_end: {path} is damaged: {problems[0]}; leave the option out")
        return _found(path), known["metric"], known["value"]

    def _problems(self, path: Path) -> list[str]:
        parts = self._everywhere(partial(files.problems, path, rank=self.rank, ranks=self.ranks))
        return list(dict.fromkeys(problem for part in parts for problem in part))

    def load(self, found: Found, training: Training) -> None:
        """Load a checkpoint into what the accelerator has prepared, on any engine and number of ranks.

        Raises:
            InputError: it is of another model; the message names the first weight that differs.
        """
        content = json.loads((found.path / files.STATE).read_text(encoding="utf-8"))
        try:
            restore(training, found.path, content["training"])
        except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
            raise InputError(f"resume: {found.path} does not fit this run: {error}") from error
        self.set_random_state(found)
        if self.accelerator.is_main_process:
            (self.folder / files.STOPPED).unlink(missing_ok=True)
        engine = engine_of(self.accelerator)
        if (found.engine, found.ranks) != (engine, self.ranks):
            self._say(
                f"{found.path} was saved by {found.ranks} rank(s) of {found.engine};"
                f" it is resharded to {self.ranks} rank(s) of {engine}"
            )

    def set_random_state(self, found: Found) -> None:
        """Set this rank's generators as they were; a rank that was not there begins a stream of its own."""
        path = found.path / f"rng-{self.rank:05}.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        set_random_state(known, seed=(found.step, self.rank))

    def mark_stopped(self, step: int, total_steps: int) -> None:
        """Leave ``stopped.json`` for launchers that turn exit code 75 into another; going on removes it."""
        self.wait()
        if self.accelerator.is_main_process:
            files.write_json(self.folder / files.STOPPED, {"step": step, "total_steps": total_steps, "exit_code": 75})

    # --- among ranks ---

    def _everywhere(self, work: Callable[[], _T]) -> list[_T]:
        """Do ``work`` on every rank and return all results; where it fails on one, it fails on all."""
        result: _T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        outcomes: list[Any] = [(result, failure)]
        if self._group is not None:
            outcomes = [None] * self.ranks
            dist.all_gather_object(outcomes, (result, failure), group=self._group)
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return [outcome for outcome, _ in outcomes]

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            print(f"resume: {line}", file=sys.stderr)  # noqa: T201


def engine_of(accelerator: Accelerator) -> str:
    """What holds weights and optimizer state: single, ddp, fsdp2, zero1, zero2, zero3 or tp."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return "fsdp2"
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and parallel.tp_enabled:
        return "tp"
    return "ddp" if accelerator.num_processes > 1 else "single"


def _found(path: Path) -> Found:
    index, content = files.read_index(path), json.loads((path / files.STATE).read_text(encoding="utf-8"))
    return Found(path, index.step, index.engine, index.ranks, content["run"])


def _writer(folder: Path) -> HuggingFaceStorageWriter:
    """Shards with their offsets, one file per rank: torch's format without pickles."""
    return HuggingFaceStorageWriter(str(folder), save_distributed=True)


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's own exception: torch's says neither OSError nor Exception."""
    reasons = [reason for reason, _ in error.failures.values()]
    return next((reason for reason in reasons if isinstance(reason, OSError)), reasons[0])
