"""The jobs of slurm/ on a real Slurm of two virtual nodes: run, stopped, requeued, resumed, cancelled, capped."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import tiny

from yunque.artifacts import sha256_file, verify

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.missing_programs()), reason="Slurm is not installed; .ci/run installs it"),
]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TIMEOUT_S = 600
POLL_S = 0.2
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
TIMING = ("train_wall_s", "train_cpu_s")

STEPS = 240
SAVE_STEPS = 60
OPTIONS = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "logging_steps": 5,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "max_new_tokens": 4,
    "mixed_precision": "no",
}


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster.Cluster() as running:
        yield running


@pytest.fixture
def submit(cluster, site) -> Callable[..., str]:
    """Submit a job by the command that a user types and return its number."""

    def send(*arguments: object, settings: dict[str, Any] | None = None, nodes: int = 2, **environment: str) -> str:
        environment = ENVIRONMENT | {"SITE_ENV": str(site(**(settings or {})))} | environment
        command = [ROOT / "slurm" / "submit.sh", "--parsable", f"--nodes={nodes}", *arguments]
        return cluster.run(*command, **environment)

    return send


@pytest.fixture
def ended(cluster, tmp_path) -> Callable[..., dict[str, str]]:
    """Wait until a job has ended, calling `watch` meanwhile, and return what Slurm says of it."""

    def wait(number: str, watch: Callable[[dict[str, str]], None] = lambda job: None) -> dict[str, str]:
        end = time.monotonic() + TIMEOUT_S
        while (job := cluster.job(number))["JobState"] not in ENDED:
            watch(job)
            assert time.monotonic() < end, output(tmp_path) + cluster.logs()
            time.sleep(POLL_S)
        return job

    return wait


def output(tmp_path: Path) -> str:
    return "".join(path.read_text() for path in sorted((tmp_path / "logs").glob("*.out")))


# --- a recipe ---


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """Options of a short fine-tuning of a tiny T5, as a user gives them."""
    root = tmp_path_factory.mktemp("assets")
    tiny.t5(dropout_rate=0.1).save_pretrained(root / "t5")
    tiny.tokenizer(("Summarize", "the", "following", "conversation.", "Summary:")).save_pretrained(root / "t5")
    numbers = random.Random(0)
    (root / "data").mkdir()
    for split, rows in (("train", 64), ("test", 4)):
        with (root / "data" / f"{split}.jsonl").open("w") as file:
            for row in range(rows):
                words = [f"w{numbers.randrange(8, tiny.VOCABULARY)}" for _ in range(8)]
                file.write(json.dumps({"id": row, "dialogue": " ".join(words), "summary": words[0]}) + "\n")
    options = OPTIONS | {"model_name_or_path": root / "t5", "dataset_name": root / "data"}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return lambda folder: [*given, "--output_dir", str(folder)]


def log(folder: Path) -> list[dict[str, float]]:
    """Lines of a run's log that are whole: the last one may just be written."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Faults:
    """Hits a running job once per start, when the start has logged a few steps of its own; notes what it saw."""

    def __init__(self, folder: Path, faults: list[Callable[[], Any]]) -> None:
        self.folder, self.faults, self.steps_at_fault = folder, faults, []
        self.first_steps: dict[int, float] = {}

    def __call__(self, job: dict[str, str]) -> None:
        start, lines = int(job["Restarts"]), log(self.folder)
        if job["JobState"] != "RUNNING" or not lines or start >= len(self.faults) or start < len(self.steps_at_fault):
            return
        last = lines[-1]["step"]
        known = self.steps_at_fault[-1] if self.steps_at_fault else 0
        if last > known + 10 or (start and last != known and last > self.first_steps.setdefault(start, last) + 10):
            self.faults[start]()
            self.steps_at_fault.append(last)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "yunque.json").read_text())


def outcome(folder: Path) -> dict[str, Any]:
    """What two runs of one seed must agree in: metrics but times, the log, the weights' bytes."""
    assert not verify(folder)
    metrics = {name: value for name, value in manifest(folder)["metrics"].items() if name not in TIMING}
    return {"metrics": metrics, "log": log(folder), "weights": sha256_file(folder / "model.safetensors")}


def test_a_run_that_is_stopped_and_requeued_ends_as_an_undisturbed_one(cluster, submit, ended, arguments, tmp_path):
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    job = ended(submit("finetune", *arguments(calm)))
    assert (job["JobState"], job["ExitCode"], job["NumNodes"]) == ("COMPLETED", "0:0", "2"), output(tmp_path)
    number = submit("finetune", *arguments(hit))
    ends = [
        lambda: cluster.run("scancel", "--batch", "--signal=USR1", number),  # what --signal=B:USR1@120 sends
        lambda: cluster.run("scontrol", "requeue", number),  # an administrator's, a higher job's, a node's failure
    ]
    faults = Faults(hit, ends)
    job = ended(number, faults)
    said = output(tmp_path)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "2"), said
    assert outcome(hit) == outcome(calm)
    assert "the run was stopped after saving; requeued, to go on from the last checkpoint" in said
    for start in range(3):
        nodes = {path.name for path in (tmp_path / "logs" / f"finetune-{number}" / f"start-{start}").glob("node-*")}
        assert nodes == {"node-0", "node-1"}
