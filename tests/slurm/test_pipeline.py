"""A pipeline as a chain of jobs: what would be submitted; on a real Slurm, with a job killed in the middle."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import pytest
import slurm_cluster
import tiny
import yaml
from runs import write_dialogues

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 400


@pytest.fixture
def config(tmp_path):
    """Write a pipeline file; its steps begin from a tiny T5 and dialogues in the test's folder."""
    import random

    tiny.t5().save_pretrained(tmp_path / "t5")
    tiny.tokenizer(("Summarize", "the", "following", "conversation.", "Summary:")).save_pretrained(tmp_path / "t5")
    for split, rows in (("train", 64), ("test", 6)):
        write_dialogues(tmp_path / "data" / f"{split}.jsonl", rows, random.Random(rows))
    finetune = {
        "run": "recipes/finetune.py",
        "profile": "ddp",
        "slurm": ["--nodes=2", "--comment=two words"],
        "options": {
            "model_name_or_path": str(tmp_path / "t5"),
            "dataset_name": str(tmp_path / "data"),
            **{"max_steps": 120, "save_steps": 20, "logging_steps": 1, "mixed_precision": "no", "max_new_tokens": 4},
        },
    }
    steps = {
        "finetune": finetune,
        "onnx": {"run": "compress/to_onnx.py", "options": {"model_name_or_path": "{finetune}", "parity_tokens": 4}},
        "evaluate": {
            "run": "yunque evaluate",
            "arguments": ["{onnx}"],
            "options": {"dataset_name": str(tmp_path / "data"), "max_new_tokens": 4, "reference_loss": False},
        },
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "steps": steps}, sort_keys=False))
    return path


def test_dry_run_shows_a_chain_of_jobs(script, config):
    done = script(
        "pipeline.sh", "--dry-run", "--partition=p", "--", "--config", config, settings={"SBATCH_OPTIONS": ["-A", "me"]}
    )
    assert done.returncode == 0, done.stderr
    first, second, third = map(shlex.split, done.stdout.splitlines())
    assert first[:7] == ["sbatch", "--parsable", "-A", "me", "--partition=p", "--nodes=2", "--comment=two words"]
    assert "--job-name=finetune" in first
    assert not [word for word in first if word.startswith("--dependency")]
    assert first[-5:] == ["slurm/pipeline_step.sh", "--config", str(config), "--step", "finetune"]
    assert {"--dependency=afterok:JOB_OF_finetune", "--kill-on-invalid-dep=yes"} < set(second)
    assert "--dependency=afterok:JOB_OF_onnx" in third


def test_mistakes_end_before_anything_is_submitted(script, config, tmp_path):
    for arguments, message in [
        (["--dry-run"], "error: no pipeline named; slurm/pipeline.sh -- --config FILE"),
        (["--", "--config", "none.yaml"], "error: --config none.yaml: No such file or directory"),
        (["--", "--config", config, "--set", "x=1"], "error: --set x: the file has no such variable; it has none"),
    ]:
        done = script("pipeline.sh", *arguments)
        assert (done.returncode, done.stderr.splitlines()) == (2, [message])
    assert (tmp_path / "calls").read_text() == ""


@pytest.mark.slurm
@pytest.mark.slow
def test_a_chain_whose_first_job_is_killed_in_the_middle_is_walked_to_its_end(config, site, tmp_path):
    with slurm_cluster.Cluster() as cluster:
        environment = {"SITE_ENV": str(site()), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

        def submit():
            return cluster.run(ROOT / "slurm" / "pipeline.sh", "--", "--config", config, **environment)

        jobs = {line.split()[1]: line.split()[0] for line in submit().splitlines()}
        assert [*jobs] == ["finetune", "onnx", "evaluate"]
        end = time.monotonic() + TIMEOUT_S
        log = tmp_path / "out" / "finetune" / "log.jsonl"
        killed_at = 0
        while (state := cluster.job(jobs["evaluate"])["JobState"]) == "PENDING" or state == "RUNNING":
            steps = len(log.read_text().splitlines()) if log.exists() else 0
            if not killed_at and steps >= 50:
                killed_at = steps
                cluster.run("scontrol", "requeue", jobs["finetune"])
            output = "".join(path.read_text() for path in (tmp_path / "logs").glob("*.out"))
            assert time.monotonic() < end, output + cluster.logs()
            time.sleep(0.3)
        output = "".join(path.read_text() for path in sorted((tmp_path / "logs").glob("*.out")))
        assert state == "COMPLETED", output + cluster.logs()
        assert killed_at
        assert int(cluster.job(jobs["finetune"])["Restarts"]) == 1
        assert "finetune: goes on: " in output
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        trained = [line["step"] for line in lines if "learning_rate" in line]
        assert trained == [*range(1, 121)]  # one curve: what the killed start had logged and not saved was cut off
        assert len((tmp_path / "out" / "evaluate" / "generations.jsonl").read_text().splitlines()) == 6
        assert submit() == "nothing to submit: every step is done"
