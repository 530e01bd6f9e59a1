"""What a user may do wrong, how it is said, and the exit codes every script and command shares."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_CHECK_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal after saving

_DISK_FULL = (
    *("no space left on device", "os error 28"),  # the system, safetensors
    *("pytorchstreamwriter failed writing", "unexpected pos", "iostream error"),  # torch, by file name and by file
)


class InputError(ValueError):
    """Bad configuration, data, model folder or request: one line naming the field and the fix."""


class CheckFailed(RuntimeError):
    """A gate or a check did not pass: the work was done, its result is not acceptable."""


class Stopped(Exception):
    """A signal asked the run to stop, and it has saved its state."""


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error`` means "no space left": torch and safetensors wrap the errno in their own exceptions."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return any(words in text for words in _DISK_FULL)


def disk_full(folder: object, error: BaseException) -> InputError:
    """Say which folder's disk was full, whatever the library that met it first made of it."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return InputError(
        f"--output_dir {folder}: the disk is full ({reason}); free space there, or give a folder on another disk"
    )


_FIRST_SPEAKS_S = 5.0
"""Of a node's first rank; twice as long of the others, which its launcher ends when the first has gone."""

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""Modules whose distribution has another name."""


def missing_extra(module: str | None) -> str | None:
    """Which extra to install for a third-party module that an import has missed; None if no extra brings it."""
    from importlib import metadata

    package = (module or "").partition(".")[0]
    wanted = _DISTRIBUTIONS.get(package, package).replace("_", "-").lower()
    try:
        requirements = metadata.requires("yunque") or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in requirements:  # such as: torch>=2.9; extra == "train"
        found = re.fullmatch(r"""([\w.-]+)[^;]*;\s*extra == ["'](train|compress)["']""", requirement)
        if found and found[1].lower() == wanted:
            return f"{package} is not installed, which this needs; pip install 'yunque[{found[2]}]'"
    return None


class _SignalStop(KeyboardInterrupt):
    """A signal outside training: like Ctrl-C it passes through every ``except Exception``."""


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    raise _SignalStop(f"by {signal.Signals(number).name}; start again, with --resume where the run has checkpoints")


@contextmanager
def _stopping_at_once() -> Iterator[None]:
    """Let the signals that schedulers send end the script as stopped, wherever nothing else handles them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {
        number: signal.signal(number, _stop_at_once) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's ``main`` and leave with the project's exit codes, printing user errors as one line.

    Exit codes: 0 done, 1 a check failed, 2 bad input or a full disk, 75 stopped by a signal: in training after saving,
    before and after it at once, since nothing is lost. All ranks of a launch mostly meet the same user error, which the
    first says. Another one waits some seconds to be ended with it, and prints only if it is not: nobody else met that.
    """
    code = 0
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it misses an optional kernel
    try:
        with _stopping_at_once():
            main()
    except (Exception, _SignalStop) as error:
        if isinstance(error, Stopped | _SignalStop):
            code, label = EXIT_TRY_AGAIN, "stopped"
        elif isinstance(error, CheckFailed):
            code, label = EXIT_CHECK_FAILED, "failed"
        elif isinstance(error, InputError) or is_disk_full(error):
            code, label = EXIT_BAD_INPUT, "error"
        elif isinstance(error, ModuleNotFoundError) and (fix := missing_extra(error.name)):
            code, label, error = EXIT_BAD_INPUT, "error", InputError(fix)
        else:
            raise
        first = os.environ.get("RANK", "0") == "0"
        if code != EXIT_TRY_AGAIN and not first:  # were this rank to leave at once, the launcher might end rank 0 first
            time.sleep(_FIRST_SPEAKS_S * (1 if os.environ.get("LOCAL_RANK") == "0" else 2))
        if code != EXIT_TRY_AGAIN or first:
            label = label if first else f"{label} of rank {os.environ['RANK']}"
            print(f"{label}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(code)
