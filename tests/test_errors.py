"""Exit codes and the one-line messages of user errors."""

import contextlib
import errno
import signal
import subprocess
import sys

import pytest
import warm

from yunque import errors
from yunque.distributed.profiles import find_profile


def leave(error: BaseException | None) -> int:
    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as exit_:
        errors.run(main)
    return exit_.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (errors.CheckFailed("rougeL fell"), 1, "failed: rougeL fell\n"),
        (errors.InputError("--seed: give\n  a number"), 2, "error: --seed: give a number\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (errors.Stopped("saved at step 3"), 75, "stopped: saved at step 3\n"),
    ],
)
def test_exit_code_and_one_line(error, code, line, capsys):
    assert leave(error) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_outside_training_stops_at_once_whatever_catches_exceptions(number, capsys):
    def main() -> None:
        with contextlib.suppress(Exception):
            signal.raise_signal(number)
        raise AssertionError("the signal was swallowed")

    former = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        errors.run(main)
    assert exit_.value.code == 75
    assert capsys.readouterr().err.startswith(f"stopped: by {number.name}; start again, with --resume")
    assert signal.getsignal(number) is former


@pytest.mark.parametrize("local", ["0", "1"])
def test_another_rank_lets_rank_0_speak_first(local, capsys, monkeypatch):
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", local)
    assert leave(errors.InputError("--seed: give a number")) == 2
    assert capsys.readouterr().err == "error of rank 3: --seed: give a number\n"
    assert waited == [5.0 if local == "0" else 10.0]  # a launcher ends it within that time where rank 0 met the same
    assert leave(errors.Stopped("saved at step 3")) == 75
    assert capsys.readouterr().err == ""
    assert len(waited) == 1


MET_BY_BOTH = """
import os, sys, time
from yunque.errors import InputError, run
def main():
    if os.environ["RANK"] == "0":
        time.sleep(5)  # the other one is done long before
    raise InputError("--seed: give a number")
run(main)
"""


@pytest.mark.distributed
def test_the_line_reaches_the_user_whichever_rank_meets_the_error_first(tmp_path):
    (tmp_path / "script.py").write_text(MET_BY_BOTH)
    launch = [sys.executable, "-m", "yunque.distributed.launch", "--config_file", find_profile("ddp")]
    launch += ["--num_processes", "2", "--main_process_port", "0", tmp_path / "script.py"]
    done = subprocess.run(launch, capture_output=True, text=True, env=warm.environment(**warm.ON_CPU))
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "--seed" in line] == ["error: --seed: give a number"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), OSError(errno.EACCES, "Permission denied"), KeyError(1)])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        errors.run(lambda: (_ for _ in ()).throw(error))


def test_disk_full_is_known_in_the_words_of_torch_and_safetensors():
    assert errors.is_disk_full(RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"))
    assert errors.is_disk_full(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert errors.is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not errors.is_disk_full(OSError(errno.EACCES, "Permission denied"))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("torch.nn", "error: torch is not installed, which this needs; pip install 'yunque[train]'\n"),
        ("sklearn", "error: sklearn is not installed, which this needs; pip install 'yunque[train]'\n"),
        ("onnxscript", "error: onnxscript is not installed, which this needs; pip install 'yunque[compress]'\n"),
    ],
)
def test_a_missing_extra_is_named(module, line, capsys):
    assert leave(ModuleNotFoundError(f"No module named {module!r}", name=module)) == 2
    assert capsys.readouterr().err == line


def test_another_missing_module_is_a_defect():
    def main() -> None:
        raise ModuleNotFoundError("No module named 'yunque.absent'", name="yunque.absent")

    with pytest.raises(ModuleNotFoundError):
        errors.run(main)
