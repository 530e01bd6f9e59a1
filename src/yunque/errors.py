"""What a user may do wrong, how it is said, and the exit codes every script and command shares."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable
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


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's ``main`` and leave with the project's exit codes, printing user errors as one line.

    Exit codes: 0 done, 1 a check failed, 2 bad input or a full disk, 75 stopped by a signal after saving.
    Only rank 0 prints, since all ranks of a launch meet the same user error. The code also goes into the file that
    ``YUNQUE_EXIT_FILE`` names, since accelerate's launcher makes 1 of every code of a rank.
    """
    code = 0
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it misses an optional kernel
    try:
        main()
    except Exception as error:
        if isinstance(error, Stopped):
            code, label = EXIT_TRY_AGAIN, "stopped"
        elif isinstance(error, CheckFailed):
            code, label = EXIT_CHECK_FAILED, "failed"
        elif isinstance(error, InputError) or is_disk_full(error):
            code, label = EXIT_BAD_INPUT, "error"
        else:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{label}: {' '.join(str(error).split())}", file=sys.stderr)
        _leave_code(code)
    sys.exit(code)


def _leave_code(code: int) -> None:
    """Write ``code`` for who started the launch; of several ranks the first one knows the cause."""
    if path := os.environ.get("YUNQUE_EXIT_FILE"):
        with contextlib.suppress(OSError), open(path, "x", encoding="ascii") as file:
            file.write(str(code))
