"""Two runs of a pipeline with one seed are equal in all but times; a difference is found and named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pipelines import STEP, step

ROOT = Path(__file__).parents[2]
SHORTER = {
    "finetune": {"max_steps": 10},
    "align": {"max_steps": 4, "batch_size": 16, "save_steps": 4},
    "student": {"num_train_epochs": 0.2},
}
"""Options of pipeline_embedded.yaml that make it a matter of minutes; gates, which so short a run misses, go too."""


def reproducible(config, folder, timeout_s):
    """Run the script from the current folder; its exit code and the lines it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "reproducible.py", "--config", config, "--output_dir", folder],
        env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines() + done.stderr.splitlines()


def test_equal_runs_are_equal_and_not_walked_a_third_time(write, calls):
    code, lines = reproducible(write({"a": step(text="1"), "b": step(parent="{a}")}), "out", 120)
    assert code == 0, lines
    assert calls() == ["a start", "b start"] * 2
    assert lines[-2].endswith("values and files, 0 differ")
    assert lines[-1].endswith("s and had nothing to do")


def test_every_place_where_runs_differ_is_named(write, repository):
    script = repository / "recipes" / "step.py"
    script.write_text(STEP.replace("above + args.text", "f'{time.time():.6f}'").replace("0.25}", "time.time()}"))
    code, lines = reproducible(write({"a": step(text="1")}), "out", 120)
    assert code == 1
    differing = [line.split(": ")[1] for line in lines if line.startswith("differs: ")]
    assert differing == ["a/text", "a/yunque.json.files.text.sha256", "a/yunque.json.metrics.toxicity_after"]


def test_a_pipeline_that_fails_ends_it(write):
    code, lines = reproducible(write({"a": step(code=1)}), "out", 120)
    assert code == 1
    assert lines[-1].endswith("out/first: the pipeline ended with exit code 1")


@pytest.mark.slow
def test_the_embedded_road_in_short_is_reproducible(embedded, tmp_path, monkeypatch):
    content = yaml.safe_load((ROOT / "compress" / "configs" / "pipeline_embedded.yaml").read_text())
    del content["steps"]["prove"]
    for name, entry in content["steps"].items():
        entry["options"] |= SHORTER.get(name, {"max_test_samples": 16} if name.startswith("evaluate_") else {})
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.chdir(ROOT)
    code, lines = reproducible(tmp_path / "short.yaml", tmp_path / "runs", 1_800)
    assert code == 0, "\n".join(lines[-60:])
