"""`yunque doctor`: what it finds on this machine, and on machines that lack something."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from yunque.distributed import doctor, node_meeting, node_speed
from yunque.distributed.doctor import GIB, Options, examine

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("yunque")
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture(autouse=True)
def _outside_of_a_job(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


@pytest.fixture
def found(tmp_path):
    """Checks by name after examining without measurements."""
    return lambda: {check.name: check for check in examine(Options(tmp_path, quick=True))}


def test_this_machine_is_measured_and_printed_as_json(tmp_path):
    command = [COMMAND, "doctor", "--json", "--output_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert done.returncode == ("fail" in {check["status"] for check in report["checks"]}), done.stderr
    assert {"python", "versions", "gpus", "disk", "clock", "slurm", "/dev/shm", "ulimit nofile"} <= checks.keys()
    assert checks["disk"]["values"]["write_bytes_per_s"] > 1e5
    assert any(check["values"].get("bus_bytes_per_s", 0) > 1e5 for check in checks.values())
    assert not list(tmp_path.iterdir())


def test_a_failed_check_is_exit_1_with_its_fix(tmp_path):
    (tmp_path / "file").touch()
    command = [COMMAND, "doctor", "--quick", "--output_dir", tmp_path / "file"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert re.search(r"fail  disk .*file is not a folder to write to\n +fix: give another --output_dir\n", done.stdout)
    assert re.fullmatch(r"failed: node \S+: disk\n", done.stderr)


def test_the_base_install_is_enough(tmp_path):
    code = f"""
import sys
sys.modules |= {{"torch": None, "accelerate": None, "transformers": None}}
from pathlib import Path
from yunque.distributed.doctor import Options, describe, examine
print(describe(examine(Options(Path({str(tmp_path)!r})))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"ok +gpus +(none|\d+ by nvidia-smi)\n", done.stdout)
    assert " 0 fail" in done.stdout
    assert "all-reduce" not in done.stdout


def test_tested_versions_are_those_of_the_constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = dict(line.split("==") for line in lines if "==" in line)
    assert {name: constraints[name] for name in doctor.TESTED} == doctor.TESTED


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        ("5.23.7", "ok", "packages as tested"),
        ("5.24.0", "warn", "transformers 5.24.0 (tested 5.23.0)"),
        ("4.57.6", "fail", "transformers 4.57.6 < 5.0"),
    ],
)
def test_versions_that_differ_are_named(found, monkeypatch, version, status, words):
    has = doctor.TESTED | {"transformers": version}
    monkeypatch.setattr(doctor, "_version", has.get)
    monkeypatch.setattr(doctor, "_minima", lambda: {"transformers": "5.0"})
    assert found()["versions"].status == status
    assert words in found()["versions"].found


def test_minimum_versions_are_the_package_s_own():
    minima = doctor._minima()
    assert minima.keys() >= doctor.TESTED.keys()
    assert all((0,) < doctor._numbers(minima[name]) <= doctor._numbers(doctor.TESTED[name]) for name in doctor.TESTED)


def test_a_missing_torch_is_a_warning(found, monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"numpy": "2.4.6"}.get)
    assert found()["training"].status == "warn"


@pytest.mark.parametrize(("free", "status"), [(1 * GIB, "fail"), (9 * GIB, "warn"), (99 * GIB, "ok")])
def test_a_disk_that_is_nearly_full(found, monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=99 * GIB, free=free))
    assert found()["disk"].status == status
    assert f"{free / GIB:.0f} GiB free" in found()["disk"].found


def test_small_shared_memory_and_few_files(found, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=GIB // 16, free=99 * GIB))
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (1024, 1024))
    checks = found()
    assert (checks["/dev/shm"].status, checks["/dev/shm"].found) == ("warn", "0.1 GiB")
    assert (checks["ulimit nofile"].status, checks["ulimit nofile"].found) == ("warn", "1024")
    assert "raise it to 4096" in checks["ulimit nofile"].fix


@pytest.mark.parametrize(("state", "status"), [(0, "ok"), (doctor._TIME_ERROR, "warn")])
def test_the_kernel_knows_whether_the_clock_is_synchronised(found, monkeypatch, state, status):
    assert doctor._kernel_clock()[0] in range(6)
    monkeypatch.setattr(doctor, "_kernel_clock", lambda: (state, 0.0123))
    assert found()["clock"].status == status
    assert ("12.3 ms" in found()["clock"].found) == (status == "ok")


def test_a_check_that_breaks_is_a_line_of_the_report(found, monkeypatch):
    monkeypatch.setattr(doctor, "_kernel_clock", lambda: 1 / 0)
    assert found()["clock"].found == "ZeroDivisionError: division by zero"
    assert found()["slurm"].status == "ok"


# --- GPUs: a torch that says it has them ---


@pytest.fixture
def gpus(monkeypatch):
    """Make torch see GPUs of these memory sizes in GiB, `used` of each taken; Slurm gave `asked`."""
    torch = pytest.importorskip("torch")

    def make(*sizes, used=0.0, asked=None, bf16=True):
        devices = [SimpleNamespace(name="H100", total_memory=size * GIB) for size in sizes]
        cuda = SimpleNamespace(
            is_available=lambda: bool(sizes),
            device_count=lambda: len(sizes),
            get_device_properties=devices.__getitem__,
            mem_get_info=lambda index: ((1 - used) * sizes[index] * GIB, sizes[index] * GIB),
            is_bf16_supported=lambda including_emulation: bf16,
            nccl=SimpleNamespace(version=lambda: (2, 27, 5)),
        )
        monkeypatch.setattr(torch, "cuda", cuda)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        monkeypatch.setattr(doctor, "_nvidia_smi", lambda: ["580.95"] * len(sizes))
        if asked is not None:
            monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(asked))

    return make


def test_healthy_gpus(found, gpus):
    gpus(80, 80)
    checks = found()
    assert checks["gpus"].found.startswith("2 x H100, 80 GiB, CUDA ")
    assert checks["gpus"].found.endswith("driver 580.95")
    assert checks["nccl"].found == "2.27.5"
    assert {checks[name].status for name in ("gpus", "gpu memory", "bf16", "nccl")} == {"ok"}


@pytest.mark.parametrize(
    ("sizes", "options", "name", "status", "words"),
    [
        ((80,), {"asked": 2}, "gpus", "fail", "Slurm gave 2"),
        ((), {"asked": 2}, "gpus", "fail", "sees none"),
        ((80, 40), {}, "gpus", "warn", "H100, 40 GiB and H100, 80 GiB"),
        ((80,), {"used": 0.5}, "gpu memory", "warn", "in use on [0]: 50%"),
        ((80,), {"bf16": False}, "bf16", "warn", "no"),
    ],
)
def test_gpus_that_are_not_as_they_should_be(found, gpus, sizes, options, name, status, words):
    gpus(*sizes, **options)
    check = found()[name]
    assert (check.status, words in check.found) == (status, True), check


def test_slow_copies_and_broken_collectives(gpus, monkeypatch, tmp_path):
    gpus(80, 80)

    def hang(ranks, backend):
        raise RuntimeError(f"{backend} between {ranks}: no end within 180 s")

    monkeypatch.setattr(node_speed, "copy_speeds", lambda device: (1e9, 25e9 * (device + 1)))
    monkeypatch.setattr(node_speed, "all_reduce_speed", hang)
    checks = {check.name: check for check in examine(Options(tmp_path))}
    assert (checks["copies gpu 1"].status, checks["copies gpu 1"].found) == (
        "warn",
        "1.0 GB/s to the GPU, 50.0 GB/s back",
    )
    assert (checks["all-reduce (nccl)"].status, checks["all-reduce (nccl)"].found) == (
        "fail",
        "nccl between 2: no end within 180 s",
    )


@pytest.mark.gpu
def test_copies_of_a_real_gpu_are_measured():
    assert min(node_speed.copy_speeds(0)) > 1e8


def test_a_collective_that_cannot_start_says_why():
    with pytest.raises(RuntimeError, match=r"(?i)nccl|cuda|backend"):
        node_speed.all_reduce_speed(1, "no-such-backend")


# --- Slurm ---


@pytest.mark.parametrize("missing", JOB)
def test_half_of_a_job_s_variables_is_a_failure(found, monkeypatch, missing):
    for name in JOB.keys() - {missing}:
        monkeypatch.setenv(name, JOB[name])
    check = found()["slurm"]
    assert (check.status, f"{missing} not set" in check.found) == ("fail", True)


CLIENT = """
import sys, time
real = time.time
time.time = lambda: real() + 5
from pathlib import Path
from yunque.distributed import node_meeting
node_meeting.meet("127.0.0.1", int(sys.argv[1]), 1, 2, Path(sys.argv[2]), "n2")
"""


@pytest.mark.parametrize("shared", [True, False])
def test_nodes_compare_their_clocks_and_folders(tmp_path, shared):
    (tmp_path / "other").mkdir()
    port = _free_port()
    seen = []
    first = threading.Thread(target=lambda: seen.extend(node_meeting.meet("127.0.0.1", port, 0, 2, tmp_path, "n1")))
    first.start()
    command = [sys.executable, "-c", CLIENT, str(port), str(tmp_path if shared else tmp_path / "other")]
    subprocess.run(command, timeout=60, check=True)
    first.join(timeout=60)
    assert [(one.node, one.shares_folder) for one in seen] == [("n2", shared)]
    assert seen[0].lead_s == pytest.approx(5, abs=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_node_that_does_not_come_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(node_meeting, "_TIMEOUT_S", 0.2)
    with pytest.raises(TimeoutError, match="2 of 3 nodes did not come"):
        node_meeting.meet("127.0.0.1", _free_port(), 0, 3, tmp_path, "n1")


def _free_port():
    with node_meeting.socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
