"""The stand-in for cold interpreters that other tests start their processes with."""

import os
import signal
import subprocess
import sys

import pytest
import warm

LOOK = "import os, sys; print(*sys.argv[1:], 'torch' in sys.modules, 'yunque' in sys.modules, os.environ.get('RANK'))"
RANKS = """
import os, subprocess, sys, time
code = "import sys; print('torch' in sys.modules, hash('a'))"
for rank in "01":
    subprocess.run([sys.executable, "-u", "-c", code], env=os.environ | {"RANK": rank}, check=True)
"""
STAY = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def start(*words, stdout=subprocess.PIPE, **more):
    return subprocess.Popen(
        [warm.python(), *words], env=warm.environment(**more), stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def said(*words, **more):
    process = start(*words, **more)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return output.split()


def test_it_is_warm_and_knows_its_arguments_and_variables():
    assert said("-c", LOOK, "a", "b", RANK="1") == ["a", "b", "True", "False", "1"]


@pytest.mark.parametrize("variable", ["HF_HOME", "OMP_NUM_THREADS", "PYTHONHASHSEED"])
def test_what_imports_would_read_starts_cold(variable):
    assert said("-c", LOOK, **{variable: "3"}) == ["False", "False", "None"]


def test_its_own_processes_are_warm_too_with_other_hash_seeds():
    (first, one), (second, other) = zip(*[iter(said("-c", RANKS))] * 2, strict=True)
    assert (first, second) == ("True", "True")
    assert one != other


def test_scripts_and_modules_find_what_an_interpreter_finds(tmp_path):
    (tmp_path / "neighbour.py").write_text("import sys; print(__name__, sys.argv[1:])")
    (tmp_path / "script.py").write_text("import __main__, neighbour; print(__main__.__file__ == __file__, __name__)")
    found = [said(tmp_path / "script.py", "x"), said("-m", "neighbour", "x", PYTHONPATH=str(tmp_path))]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for output, command in zip(found, ([tmp_path / "script.py"], ["-m", "neighbour"]), strict=True):
        cold = subprocess.run([sys.executable, *command, "x"], env=environment, capture_output=True, text=True)
        assert output == cold.stdout.split()


@pytest.mark.parametrize(
    ("code", "left", "words"),
    [
        ("import sys; sys.exit(75)", 75, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV, ""),
    ],
)
def test_it_ends_as_its_process_does(code, left, words):
    process = start("-c", code)
    assert words in process.communicate(timeout=100)[1]
    assert process.returncode == left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_process(number):
    process = start("-c", STAY)
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.send_signal(number)
    assert process.wait(timeout=60) == -number
    assert process.communicate(timeout=60) == ("", "")  # ends when the other side has closed them
