"""Steps run once, again when something they depend on changed, and go on after a stop."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipelines import pipeline, step

from yunque.errors import CheckFailed, InputError
from yunque.pipeline.description import read_pipeline
from yunque.pipeline.runner import Runner, command_of

ROAD = {"a": step(text="1"), "b": step(parent="{a}", text="2"), "c": step(parent="{a}", text="3")}


@pytest.fixture
def run(write):
    """Run the pipeline of these steps in this process; return how many were done."""

    def done(steps, **more):
        return Runner(read_pipeline(write(steps, **more)), lambda line: None).run()

    return done


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """Steps are processes: they find the library that the tests run."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_every_step_runs_once_and_a_change_redoes_what_depends_on_it(run, calls):
    assert run(ROAD) == 3
    assert calls() == ["a start", "b start", "c start"]
    assert Path("out/b/text").read_text() == "12"
    assert run(ROAD) == 0
    assert calls() == []
    assert run(ROAD | {"c": step(parent="{a}", text="4")}) == 1
    assert calls() == ["c start"]
    assert Path("out/c/text").read_text() == "14"
    assert run(ROAD | {"a": step(text="5"), "c": step(parent="{a}", text="4")}) == 3
    assert Path("out/b/text").read_text() == "52"


def test_a_step_made_again_with_the_same_result_redoes_nothing_else(run, calls):
    run(ROAD)
    calls()
    shutil.rmtree("out/a")
    assert run(ROAD) == 1
    assert calls() == ["a start"]


def test_a_damaged_folder_a_changed_config_and_changed_data_are_seen(run, calls, repository):
    (repository / "rows.jsonl").write_text("1")
    (repository / "c.yaml").write_text("dataset_name: rows.jsonl")
    steps = {"a": step(config="c.yaml"), "b": step(text="x")}
    run(steps)
    calls()
    Path("out/b/text").write_text("longer than it was")
    assert run(steps) == 1
    assert calls() == ["b start"]
    (repository / "rows.jsonl").write_text("2")  # named in the config, not in the pipeline
    assert run(steps) == 1
    assert calls() == ["a start"]
    (repository / "c.yaml").write_text("dataset_name: rows.jsonl # new")
    assert run(steps) == 1
    assert run(steps, variables={"unused": 1}) == 0


def test_a_step_that_fails_stops_the_run_with_its_kind_of_error(run, calls):
    with pytest.raises(InputError, match="step a: its command did not accept its input"):
        run({"a": step(code=2), "b": step()})
    with pytest.raises(CheckFailed, match=r"step a: .* exit code 1"):
        run({"a": step(code=1), "b": step()})
    assert calls() == ["a start", "a start"]
    assert run({"a": step(code=0), "b": step()}) == 2


def test_a_step_that_leaves_no_folder_has_failed(run, repository):
    (repository / "recipes" / "nothing.py").write_text("")
    with pytest.raises(CheckFailed, match="left no finished folder"):
        run({"a": {"run": "recipes/nothing.py"}})


def test_one_step_wants_those_it_needs_and_no_other_process_at_it(write):
    runner = Runner(read_pipeline(write(ROAD)), lambda line: None)
    with pytest.raises(InputError, match="needs a first"):
        runner.run_step("b")
    assert runner.run_step("a")
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, time; f = open('out/.steps/b.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
         "print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="another process works on it"):
        runner.run_step("b")
    holder.kill()
    holder.wait()
    assert runner.run_step("b")
    with pytest.raises(InputError, match=r"no such step; the file has a, b, c"):
        runner.run_step("d")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_a_run_that_was_stopped_or_killed_goes_on_with_the_step_it_was_at(write, calls, number, code):
    write({"a": step(text="1"), "b": step(parent="{a}", text="2", wait=30)})
    process = pipeline()
    until = time.monotonic() + 30
    while not Path("out/b/checkpoints").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    if code == 75:
        err = process.stderr.read()
        assert err.splitlines()[-1] == "stopped: step b was stopped; the same command goes on with it"
    else:
        _, err = pipeline().communicate(timeout=30)  # the step lives on, and is not started twice
        assert err.strip() == "error: step b: another process works on it; wait for it"
        subprocess.run(["pkill", "-9", "-f", "recipes/step.py.*--wait"], check=True)
    assert calls() == ["a start", "b start"]
    process = pipeline()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert calls() == ["b resume"]
    assert Path("out/b/text").read_text() == "12"
    lines = out.splitlines()
    assert lines[0] == "a: done before"
    assert lines[1].startswith("b: goes on: ")
    assert lines[-1].split()[:2] == ["b", "done"]
    assert lines[-1].endswith("out/b  toxicity_after 0.250")


def test_the_second_run_says_that_there_is_nothing_to_do(write):
    write({"a": step(text="1")})
    assert "done in" in pipeline().communicate(timeout=30)[0]
    out, _ = pipeline().communicate(timeout=30)
    assert "nothing to do: every step is done" in out
    write({"a": step(text="2")})
    assert pipeline("--status").communicate(timeout=30)[0].split()[:2] == ["a", "changed"]
    assert Path("out/a/text").read_text() == "1"


def test_bad_input_is_one_line(write):
    write({"a": step(text="1")})
    for arguments, message in [
        (["--step", "b"], "error: --step b: no such step; the file has a"),
        (["--set", "seed"], "error: --set seed: give NAME=VALUE"),
        (["--set", "seed=1"], "error: --set seed: the file has no such variable; it has none"),
    ]:
        process = pipeline(*arguments)
        assert process.communicate(timeout=30)[1].splitlines() == [message]
        assert process.returncode == 2


def test_commands(write, monkeypatch):
    steps = {
        "a": step(text="1", code=0, flag=True, list=[1, 2], map={"x": 1}) | {"profile": "ddp", "processes": 3},
        "e": {"run": "yunque evaluate", "arguments": ["{a}"], "options": {"seed": 1}},
        "c": {
            "run": "yunque compare",
            "arguments": ["{a}", "x={e}"],
            "options": {"json": "{output}/c.json", "gate": ["x<1", "y<2"]},
        },
    }
    read = read_pipeline(write(steps))

    def words(name, state="new"):
        return command_of(read, read.step(name), state)[1:]

    monkeypatch.setattr(shutil, "which", lambda name: None)
    launched = words("a", "stopped")
    assert launched[:8] == [
        *("-m", "yunque.distributed.launch", "--config_file", "launch/ddp.yaml"),
        *("--num_processes", "3", "--main_process_port", "0"),
    ]
    assert launched[8:11] == ["-m", "yunque.distributed.rehearsal", "recipes/step.py"]
    assert launched[11:] == [
        *("--text", "1", "--code", "0", "--flag", "true", "--list", "1", "2", "--map", json.dumps({"x": 1})),
        *("--output_dir", "out/a", "--resume", "true", "--overwrite_output_dir", "true"),
    ]
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "yunque.distributed.rehearsal" not in words("a")
    assert words("e") == ["-m", "yunque", "evaluate", "out/a", "--seed", "1", "--output_dir", "out/e"]
    assert words("c", "changed") == [
        *("-m", "yunque", "compare", "out/a", "x=out/e"),
        *("--json", "out/c/c.json", "--gate", "x<1", "--gate", "y<2"),
    ]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert command_of(read, read.step("a"), "new")[:4] == ["slurm/launch.sh", "--profile", "ddp", "recipes/step.py"]
