"""The jobs of slurm/ on a real Slurm of two virtual nodes: run, stopped, requeued, resumed, cancelled, capped."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import tiny

from yunque.artifacts import sha256_file, verify

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TIMEOUT_S = 900
POLL_S = 0.2
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
TIMING = ("train_wall_s", "train_cpu_s")

STEPS = 120
SAVE_STEPS = 30
OPTIONS = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "logging_steps": 1,
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
    """Hits a running job once per start, after a few steps of that start; `lowest`: the lowest last step seen of it."""

    def __init__(self, folder: Path, faults: list[Callable[[], Any]]) -> None:
        self.folder, self.faults = folder, faults
        self.hit_at: list[int] = []
        self.lowest: dict[int, int] = {}

    def __call__(self, job: dict[str, str]) -> None:
        lines, start = log(self.folder), int(job["Restarts"])
        if job["JobState"] != "RUNNING" or not lines:
            return
        last = lines[-1]["step"]
        self.lowest[start] = min(last, self.lowest.get(start, last))
        if start == len(self.hit_at) < len(self.faults) and last > self.lowest[start] + 10:
            self.faults[start]()
            self.hit_at.append(last)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "yunque.json").read_text())


def outcome(folder: Path) -> dict[str, Any]:
    """What two runs of one seed must agree in: metrics but times, every logged loss, the weights' bytes."""
    assert not verify(folder)
    metrics = {name: value for name, value in manifest(folder)["metrics"].items() if name not in TIMING}
    losses = {line["step"]: line["loss"] for line in log(folder) if "loss" in line}
    return {"metrics": metrics, "losses": losses, "weights": sha256_file(folder / "model.safetensors")}


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
    # each start went on where the one before was stopped; requeue too lets the ranks save, within Slurm's KillWait
    assert 0 < faults.hit_at[0] <= faults.lowest[1] < faults.hit_at[1] < STEPS
    assert faults.hit_at[0] <= faults.lowest[2]
    assert manifest(hit)["hardware"]["world_size"] == 2
    assert "the run was stopped after saving; requeued, to go on from the last checkpoint" in said
    for start in range(3):
        nodes = {path.name for path in (tmp_path / "logs" / f"finetune-{number}" / f"start-{start}").glob("node-*")}
        assert nodes == {"node-0", "node-1"}


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the ranks that write to ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue  # gone
        if str(folder) in words and "yunque.distributed.rehearsal" in words and "--config_file" not in words:
            found.append(int(path.parent.name))
    return found


def kill_rank(folder: Path) -> None:
    ranks = ranks_of(folder)
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)


@pytest.mark.slow
def test_five_faults_lose_nothing(cluster, submit, ended, arguments, tmp_path):
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    assert ended(submit("finetune", *arguments(calm)))["JobState"] == "COMPLETED", output(tmp_path)
    number = submit("finetune", *arguments(hit), settings={"REQUEUE_ON_FAILURE": "yes"})

    def lose_node() -> None:
        cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
        cluster.run("scontrol", "update", "nodename=n2", "state=resume")

    stop = partial(cluster.run, "scancel", "--batch", "--signal=USR1", number)
    requeue = partial(cluster.run, "scontrol", "requeue", number)
    faults = Faults(hit, [partial(kill_rank, hit), stop, lose_node, requeue, partial(kill_rank, hit)])
    job = ended(number, faults)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "5"), output(tmp_path)
    assert outcome(hit) == outcome(calm)
    for start, step in enumerate(faults.hit_at):
        # one interval at most: the save of the last step that asks for one may still have been on its way
        assert faults.lowest[start + 1] >= step - SAVE_STEPS


@pytest.mark.slow
def test_torchrun_starts_dead_ranks_again_inside_the_job(submit, ended, arguments, tmp_path):
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    assert ended(submit("finetune", *arguments(calm)))["JobState"] == "COMPLETED", output(tmp_path)
    number = submit("finetune", *arguments(hit), settings={"MAX_RESTARTS": 1})
    faults = Faults(hit, [partial(kill_rank, hit)])
    job = ended(number, faults)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), output(tmp_path)
    assert len(faults.hit_at) == 1
    assert outcome(hit) == outcome(calm)


# --- what Slurm does to a job, with a stand-in for Python: the launcher's part is real ---

STAND_IN = """\
#!/usr/bin/env -S {python} -S
# Stands for accelerate's launcher and its ranks: stops when asked ("obey"), never ("deaf"), or ends with a code.
import os, signal, sys, time

mode, rank = os.environ["MODE"], sys.argv[sys.argv.index("--machine_rank") + 1]
print("started", rank, os.environ["SLURM_NODEID"], os.environ.get("SLURM_RESTART_COUNT", 0), sys.argv[-4:], flush=True)
if mode == "obey":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if mode in ("obey", "deaf"):
    time.sleep(120)
sys.exit(0 if mode == "done" else int(mode))
"""


@pytest.fixture
def stand_in(tmp_path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def started(cluster, tmp_path) -> Callable[[int], None]:
    """Wait until both nodes have started their part for the n-th time."""

    def wait(start: int) -> None:
        end = time.monotonic() + TIMEOUT_S
        while sum(f" {start} [" in line for line in output(tmp_path).splitlines()) < 2:
            assert time.monotonic() < end, output(tmp_path) + cluster.logs()
            time.sleep(POLL_S)

    return wait


def test_every_node_knows_its_number_and_the_run_s_code_is_the_job_s(submit, ended, stand_in, tmp_path):
    job = ended(submit("finetune", "--max_steps", 3, settings={"PYTHON": stand_in}, MODE="2"))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    lines = sorted(line for line in output(tmp_path).splitlines() if "started" in line)
    assert [line[: len("0: started 0 0 0")] for line in lines] == ["0: started 0 0 0", "1: started 1 1 0"]


def test_a_stopped_job_comes_back_as_often_as_the_site_allows(cluster, submit, ended, started, stand_in, tmp_path):
    number = submit("finetune", settings={"PYTHON": stand_in, "MAX_REQUEUES": 1}, MODE="obey")
    for start in (0, 1):
        started(start)
        cluster.run("scancel", "--batch", "--signal=USR1", number)
    job = ended(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "1"), output(tmp_path)
    assert "not requeued again after 1 times" in output(tmp_path)
    assert "'recipes/finetune.py', '--resume']" in output(tmp_path)


def test_a_cancelled_job_saves_and_stays_away(cluster, submit, ended, started, stand_in, tmp_path):
    number = submit("finetune", settings={"PYTHON": stand_in}, MODE="obey")
    started(0)
    cluster.run("scancel", number)
    job = ended(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), output(tmp_path)
    assert (tmp_path / "logs" / f"finetune-{number}" / "start-0" / "exit_code").read_text() == "75\n"
    assert "requeued" not in output(tmp_path)


def test_ranks_that_never_listen_are_requeued_before_slurm_kills_them(
    cluster, submit, ended, started, stand_in, tmp_path
):
    number = submit("finetune", settings={"PYTHON": stand_in, "STOP_GRACE_S": 2}, MODE="deaf")
    started(0)
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    started(1)
    assert "the ranks did not stop within 2 s; requeued" in output(tmp_path)
    cluster.run("scancel", "--signal=KILL", number)
    assert ended(number)["Restarts"] == "1"


def test_a_job_that_a_higher_one_preempts_saves_and_comes_back(cluster, submit, ended, started, stand_in, tmp_path):
    settings = {"PYTHON": stand_in}
    number = submit("--exclusive", "finetune", settings=settings, MODE="obey")
    started(0)
    higher = ended(submit("--partition=high", "--exclusive", "ppo_detox", settings=settings, MODE="done"))
    assert higher["JobState"] == "COMPLETED"
    started(1)
    assert "the run was stopped after saving" in output(tmp_path)
    cluster.run("scancel", number)
    assert ended(number)["JobState"] == "CANCELLED"


def test_an_array_is_a_run_per_seed(cluster, submit, stand_in, tmp_path):
    options = ["--array=0-1", "ppo_detox", "--output_dir", tmp_path / "runs"]
    submit(*options, settings={"PYTHON": stand_in}, nodes=1, MODE="done")
    end = time.monotonic() + TIMEOUT_S
    while output(tmp_path).count("started") < 2 and time.monotonic() < end:
        time.sleep(POLL_S)
    for seed in (0, 1):
        assert f"'--seed', '{seed}', '--output_dir', '{tmp_path}/runs/seed-{seed}']" in output(tmp_path)


def test_the_doctor_reports_every_node_and_compares_them(cluster, tmp_path):
    command = [Path(sys.executable).with_name("yunque"), "doctor", "--quick", "--json", "--output_dir", tmp_path]
    # a file per task: srun mixes, and with --label cuts, lines beyond 1024 bytes
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/doctor-%t.json", *command]
    cluster.run(*step, **ENVIRONMENT)
    reports = [json.loads((tmp_path / f"doctor-{task}.json").read_text()) for task in range(2)]
    assert sorted(report["node"] for report in reports) == ["n1", "n2"]
    for report in reports:
        checks = {check["name"]: check for check in report["checks"]}
        assert checks["slurm"]["found"].endswith("2 nodes, 0 GPUs here")
        assert checks["shared folder"]["status"] == "ok"
        assert abs(checks["clocks apart"]["values"]["lead_s"]) < 1
