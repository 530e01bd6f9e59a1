"""Real processes, killed and moved from outside: bench/faults.py met once, and torchrun's own restart of dead ranks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import warm

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


def may_mount(folder):
    """Whether a file system of fixed size can be had here."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    return mount.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def table_of(recipe, faults, folder):
    """What the harness found: fault -> (survived, end)."""
    done = subprocess.run(
        [warm.python(), "bench/faults.py", "--times", "1", "--recipes", recipe, "--folder", str(folder / "runs"),
         "--faults", *faults],
        cwd=ROOT, env=warm.environment(GLOO_SOCKET_IFNAME="lo"), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith(f"| {recipe}")]
    assert len(rows) == len(faults), done.stdout + done.stderr[-3000:]
    return {fault: (survived, end) for _, fault, survived, end, _ in rows}


@pytest.mark.distributed
def test_killed_runs_and_full_disks_lose_nothing(tmp_path):
    faults = ["kill_rank", "kill_all_mid_save", *(["full_disk"] if may_mount(tmp_path) else [])]
    table = table_of("ppo_detox", faults, tmp_path)
    assert table == dict.fromkeys(faults, ("1/1", "bit-equal"))


@pytest.mark.distributed
def test_a_run_goes_on_on_one_rank_and_on_two_again_and_from_zero_to_fsdp_and_back(tmp_path):
    table = table_of("finetune", ["two_one_two", "zero_fsdp_zero"], tmp_path)
    assert [survived for survived, _ in table.values()] == ["1/1", "1/1"], table


def ranks_of(launcher):
    """Process ids of the ranks that a launcher has started."""
    try:
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]
    except FileNotFoundError:
        pytest.skip("no ps here")


def steps_in(log):
    return log.read_bytes().count(b"\n") if log.is_file() else 0


@pytest.mark.distributed
def test_torchrun_starts_dead_ranks_again_and_they_go_on(tmp_path):
    tiny.t5().save_pretrained(tmp_path / "t5")
    tiny.tokenizer(("Summarize", "the", "following", "conversation.", "Summary:")).save_pretrained(tmp_path / "t5")
    numbers = random.Random(0)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        with (tmp_path / "data" / f"{split}.jsonl").open("w") as file:
            for row in range(8):
                words = " ".join(f"w{numbers.randrange(8, tiny.VOCABULARY)}" for _ in range(9))
                file.write(json.dumps({"id": row, "dialogue": words, "summary": words[:12]}) + "\n")
    folder = tmp_path / "out"
    options = ["--model_name_or_path", tmp_path / "t5", "--dataset_name", tmp_path / "data", "--output_dir", folder]
    options += ["--max_steps", "120", "--save_steps", "20", "--logging_steps", "1", "--mixed_precision", "no"]
    options += ["--per_device_train_batch_size", "2", "--max_new_tokens", "4"]
    environment = warm.environment(GLOO_SOCKET_IFNAME="lo", PYTHON_EXEC=warm.python())
    launcher = subprocess.Popen(
        [sys.executable, "-m", "yunque.distributed.launch", "--config_file", "launch/ddp.yaml", "--num_processes", "2",
         "--main_process_port", "0", "--max_restarts", "1", "-m", "yunque.distributed.rehearsal",
         "recipes/finetune.py", *map(str, options)],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    limit = time.monotonic() + TIMEOUT_S
    while steps_in(folder / "log.jsonl") < 25:
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    errors = launcher.communicate(timeout=TIMEOUT_S)[1]
    assert launcher.returncode == 0, errors[-3000:]
    manifest = json.loads((folder / "yunque.json").read_text())
    assert manifest["metrics"]["train_steps"] == 120
    assert manifest["config"]["resume"] is True  # nobody has typed it
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 121))
