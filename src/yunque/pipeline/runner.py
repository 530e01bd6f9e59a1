"""Do the steps of a pipeline that are not done, one after another."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Literal

from yunque.artifacts import MANIFEST
from yunque.distributed.profiles import find_profile
from yunque.errors import EXIT_BAD_INPUT, EXIT_TRY_AGAIN, CheckFailed, InputError, Stopped
from yunque.packaged import find_file
from yunque.pipeline.description import Pipeline, Step
from yunque.pipeline.identity import folder_identity, step_fingerprint
from yunque.pipeline.records import Record, lock_path, read_record, write_record

State = Literal["done", "stopped", "changed", "new"]
_SIGNAL_AGAIN_S = 5.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Status:
    """How far a step is: ``stopped`` can go on, ``changed`` must start again, ``new`` has not begun."""

    state: State
    fingerprint: str | None  # None while a step it needs is not done
    record: Record | None


class Runner:
    """Runs the steps of one pipeline; ``say`` gets a line at every turn."""

    def __init__(self, pipeline: Pipeline, say: Callable[[str], None] = print) -> None:
        self.pipeline = pipeline
        self._say = say

    def statuses(self, last: str | None = None) -> dict[str, Status]:
        """How far every step (up to ``last``) is; one that waits for another is ``changed``, or ``new`` before."""
        found: dict[str, Status] = {}
        results: dict[str, str] = {}
        for step in self.pipeline.steps:
            record = read_record(self.pipeline.output_dir, step.name)
            needs = self.pipeline.needs(step)
            fingerprint = None
            if all(name in results for name in needs):
                fingerprint = step_fingerprint(self.pipeline, step, {name: results[name] for name in needs})
            state = self._state(step, record, fingerprint)
            if state == "done" and record is not None and record.result is not None:
                results[step.name] = record.result
            found[step.name] = Status(state, fingerprint, record)
            if step.name == last:
                break
        return found

    def _state(self, step: Step, record: Record | None, fingerprint: str | None) -> State:
        if record is None:
            return "new"
        if record.fingerprint != fingerprint:
            return "changed"
        if record.result is None:
            return "stopped"
        return "done" if folder_identity(self.pipeline.folder(step.name)) == record.result else "changed"

    def run(self) -> int:
        """Do all that is not done; return how many steps that were.

        Raises:
            InputError, CheckFailed, Stopped: as the step that ended so.
        """
        return sum(self.run_step(step.name) for step in self.pipeline.steps)

    def run_step(self, name: str) -> bool:
        """Do a step unless it is done, and say which; the steps it needs must be done.

        Raises:
            InputError: a step it needs is not done, another process is at it, or the step met bad input.
            CheckFailed: the step failed.
            Stopped: a signal came, and the step has saved.
        """
        step = self.pipeline.step(name)
        with self._lock(step) as lock:
            statuses = self.statuses(last=name)
            status = statuses[name]
            missing = [need for need in self.pipeline.needs(step) if statuses[need].state != "done"]
            if missing or status.fingerprint is None:
                raise InputError(f"--step {name}: needs {', '.join(missing)} first; run that step, or all")
            if status.state == "done":
                self._say(f"{name}: done before")
                return False
            self._do(step, status, status.fingerprint, lock)
        return True

    def _do(self, step: Step, status: Status, fingerprint: str, lock: int) -> None:
        command = command_of(self.pipeline, step, status.state)
        if not step.takes_folder:
            shutil.rmtree(self.pipeline.folder(step.name), ignore_errors=True)
            self.pipeline.folder(step.name).mkdir(parents=True)
        before = status.record.seconds if status.record and status.state == "stopped" else 0.0
        record = Record(fingerprint, command, datetime.now(UTC).isoformat(timespec="seconds"), before)
        write_record(self.pipeline.output_dir, step.name, record)
        self._say(f"{step.name}: {'goes on' if status.state == 'stopped' else 'starts'}: {' '.join(command)}")
        begin = time.monotonic()
        try:
            code, asked = _call(command, grouped=step.profile is not None, lock=lock)
        finally:
            record = replace(record, seconds=before + time.monotonic() - begin)
            write_record(self.pipeline.output_dir, step.name, record)
        result = self._result(step) if code == 0 else None
        if code == EXIT_TRY_AGAIN or (asked and code == 0 and result is None):
            raise Stopped(f"step {step.name} was stopped; the same command goes on with it")
        if code == EXIT_BAD_INPUT:
            raise InputError(f"step {step.name}: its command did not accept its input, as it says above")
        if code:
            raise CheckFailed(f"step {step.name}: its command ended with exit code {code}, as it says above")
        if result is None:
            raise CheckFailed(f"step {step.name}: its command ended well, but left no finished folder")
        write_record(self.pipeline.output_dir, step.name, replace(record, result=result))
        self._say(f"{step.name}: done in {record.seconds:.0f} s")

    def _result(self, step: Step) -> str | None:
        """The identity of what a step has made: of a script that makes models, only with the manifest, written last."""
        folder = self.pipeline.folder(step.name)
        if step.makes_model and not (folder / MANIFEST).is_file():
            return None
        return folder_identity(folder)

    @contextmanager
    def _lock(self, step: Step) -> Iterator[int]:
        """Hold the step's lock; its descriptor, which the step's process inherits, should it outlive this one."""
        path = lock_path(self.pipeline.output_dir, step.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"step {step.name}: another process works on it; wait for it") from error
            yield file.fileno()


def command_of(pipeline: Pipeline, step: Step, state: State) -> list[str]:
    """The command of a step: its script, alone or under the launcher of its profile, and its options.

    Inside a Slurm job a profile is launched on the job's nodes by ``slurm/launch.sh``; on a machine without GPUs its
    ranks meet over gloo. A step that was stopped goes on, one whose inputs changed starts again.
    """
    options = pipeline.fill(step, step.options)
    if step.takes_folder:
        options.setdefault("output_dir", str(pipeline.folder(step.name)))
        # With both a finished folder is replaced: the step may have been killed just before it was recorded.
        options |= {"resume": True} if state == "stopped" else {}
        options |= {"overwrite_output_dir": True} if state != "new" else {}
    words = [*map(str, pipeline.fill(step, step.arguments)), *_words(options, repeat=not step.takes_folder)]
    if step.run.startswith("yunque "):
        return [sys.executable, "-m", "yunque", step.run.removeprefix("yunque "), *words]
    script = str(find_file(step.run))
    if step.profile is None:
        return [sys.executable, script, *words]
    if "SLURM_JOB_ID" in os.environ:
        return ["slurm/launch.sh", "--profile", step.profile, script, *words]
    profile = str(find_profile(step.profile))
    rehearsal = [] if shutil.which("nvidia-smi") else ["-m", "yunque.distributed.rehearsal"]
    return [
        *(sys.executable, "-m", "yunque.distributed.launch", "--config_file", profile),
        *("--num_processes", str(step.processes), "--main_process_port", "0", *rehearsal, script, *words),
    ]


def _words(options: dict[str, Any], *, repeat: bool) -> list[str]:
    """``--name value`` of every option; lists as ``--name a b``, or as ``--name a --name b`` under ``repeat``."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        for number, entry in enumerate(values):
            words += [*([f"--{name}"] if number == 0 or repeat else []), _text(entry)]
    return words


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _call(command: Sequence[str], *, grouped: bool, lock: int) -> tuple[int, bool]:
    """Run ``command``; return its exit code and whether a signal to this process asked it to save and stop.

    A launcher (``grouped``) does not die of the signal itself but lets its ranks, which get it too, end first. Slurm's
    USR1 reaches ``slurm/launch.sh`` as it is, since there it means the end of the job's time.
    """
    asked: list[int] = []
    launcher = grouped and not command[0].startswith("slurm/")

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    def deafen() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    environment = os.environ | ({"PET_SIGNALS_TO_HANDLE": "SIGINT"} if launcher else {})
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    former = {number: signal.signal(number, ask) for number in numbers}
    try:
        process = subprocess.Popen(
            command,
            start_new_session=True,
            env=environment,
            preexec_fn=deafen if launcher else None,
            pass_fds=[lock],
        )
        last = 0.0
        while (code := process.poll()) is None:
            if asked and time.monotonic() - last > _SIGNAL_AGAIN_S:  # while ranks load they do not listen
                last = time.monotonic()
                _pass_on(process, asked[-1], whole_group=launcher, as_it_is=command[0].startswith("slurm/"))
            time.sleep(_POLL_S)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if asked and code < 0:
        code = EXIT_TRY_AGAIN  # it had not begun to listen: nothing is lost
    return code, bool(asked)


def _pass_on(process: subprocess.Popen[bytes], number: int, *, whole_group: bool, as_it_is: bool) -> None:
    wanted = number if as_it_is and number == signal.SIGUSR1 else signal.SIGTERM
    try:
        if whole_group:
            os.killpg(process.pid, wanted)
        else:
            process.send_signal(wanted)
    except ProcessLookupError:
        pass
