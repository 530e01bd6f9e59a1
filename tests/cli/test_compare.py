"""`yunque compare` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import evaluated
import pytest

COMMAND = Path(sys.executable).with_name("yunque")


def run(*args):
    command = [COMMAND, "compare", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def folders(tmp_path):
    rows = 200
    aligned = evaluated.toxicity(rows, 0.05, seed=0)
    for name, scores in {
        "base": evaluated.toxicity(rows, 0.5, seed=1),
        "ppo": aligned,
        "int8": aligned * 0.999,
        "noised": evaluated.toxicity(rows, 0.5, seed=2),
    }.items():
        evaluated.write(tmp_path / name, {"toxicity": scores, "rougeL": [0.3] * rows})
    return tmp_path


def test_a_proved_gate_is_exit_0_and_one_that_is_not_exit_1(folders):
    gates = ["--gate", "toxicity<=+0.01", "--gate", "rougeL>=-1.0", "--gate", "recovery>=0.95"]
    files = ["--html", folders / "report.html", "--json", folders / "numbers.json"]
    done = run(folders / "ppo", folders / "int8", "--base", folders / "base", *gates, *files)
    assert done.returncode == 0, done.stderr
    assert "gate recovery>=0.95: passed: recovery 1.0" in done.stdout
    numbers = json.loads((folders / "numbers.json").read_text())
    assert numbers["passed"] is True
    assert [gate["status"] for gate in numbers["candidates"][0]["gates"]] == ["passed"] * 3
    assert (folders / "report.html").read_text().startswith("<!doctype html>")

    done = run(folders / "ppo", folders / "int8", folders / "noised", *gates[:4], *files)
    assert done.returncode == 1
    assert done.stderr == "failed: 1 of 4 gates not proved: noised toxicity<=+0.01 (failed)\n"
    assert json.loads((folders / "numbers.json").read_text())["passed"] is False


def test_compare_imports_no_torch(folders):
    code = "import sys, yunque.evaluation.comparison, yunque.evaluation.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["ppo"], "at least two evaluations"),
        (["ppo", "nowhere"], "nowhere: no such folder"),
        (["ppo", "int8", "--gate", "bleu>=-1.0"], "do not both have bleu; there are: toxicity, rougeL"),
        (["ppo", "int8", "--gate", "recovery>=0.9"], "give --base FOLDER"),
        (["ppo", "int8", "--html", "no/report.html"], "no/report.html: there is no folder"),
        (["ppo", "int8", "--json", "ppo"], "ppo: is a folder; give a file"),
        (["ppo", "int8", "--resamples", "5"], "resamples must be at least 100"),
        (["ppo", "int8", "--gates", "x"], "--gates"),
    ],
)
def test_bad_usage_is_one_line_exit_2_and_writes_nothing(folders, monkeypatch, args, words):
    monkeypatch.chdir(folders)
    before = sorted(folders.rglob("*"))
    done = run(*args)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(folders.rglob("*")) == before
