"""The scripts of slurm/ without Slurm: what they would run, what they refuse, and what they do when a step ends."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = ("compress", "finetune", "ppo_detox")
CONFIG = "recipes/configs/finetune_flan_t5_base.yaml"
RECIPE = "recipes/finetune.py"


def commands(output):
    """Command lines of a dry run as lists of words, by what they begin with: sbatch, srun, `node 0`, `node 1`."""
    found = {}
    for line in output.splitlines():
        if line.startswith("node "):
            name, _, line = line.partition(": ")
            found[name] = shlex.split(line)
        elif not line.startswith("#"):
            found[line.split(" ")[0]] = shlex.split(line)
    return found


def option(command, name):
    return command[command.index(name) + 1]


# --- what would run ---


def test_submit_shows_what_every_node_would_run(script):
    options = ["--nodes=2", "--gpus-per-node", 4, "finetune", "--profile", "ddp", "--config", CONFIG]
    done = script("submit.sh", "--dry-run", *options, settings={"SBATCH_OPTIONS": ["--partition=gpu", "--account=me"]})
    assert done.returncode == 0, done.stderr
    shown = commands(done.stdout)
    assert shown["sbatch"][1:6] == ["--partition=gpu", "--account=me", "--nodes=2", "--gpus-per-node", "4"]
    assert shown["sbatch"][-5:] == ["slurm/finetune.sbatch", "--profile", "ddp", "--config", CONFIG]
    assert "--ntasks-per-node=1" in shown["srun"]
    assert "--kill-on-bad-exit=1" in shown["srun"]
    for node in (0, 1):
        command = shown[f"node {node}"]
        assert command[1:3] == ["-m", "yunque.distributed.launch"]
        assert option(command, "--machine_rank") == str(node)
        assert (option(command, "--num_machines"), option(command, "--num_processes")) == ("2", "8")
        assert option(command, "--config_file") == "launch/ddp.yaml"
        assert command[-3:] == [RECIPE, "--config", CONFIG]


@pytest.mark.parametrize("job", JOBS)
def test_a_job_s_header_asks_for_a_task_per_node_a_warning_and_another_start(job):
    text = (ROOT / "slurm" / f"{job}.sbatch").read_text()
    for option in ("ntasks-per-node=1", "requeue", "open-mode=append", "signal=B:USR1@120", f"job-name={job}"):
        assert f"#SBATCH --{option}\n" in text


def test_a_job_s_step_has_its_rendezvous_port_and_gpus_from_slurm(script, tmp_path):
    environment = {"SLURM_GPUS_ON_NODE": 8, "SLURM_CPUS_PER_TASK": 64, "SLURM_RESTART_COUNT": 3}
    done = script("launch.sh", RECIPE, "--dry-run", "--max_steps", 3, job=20007, **environment)
    assert done.returncode == 0, done.stderr
    command = commands(done.stdout)["node 1"]
    assert option(command, "--num_processes") == "16"
    assert option(command, "--main_process_ip") == "127.0.0.1"  # the name does not resolve: NodeAddr
    assert option(command, "--main_process_port") == "12007"
    assert option(command, "--log_dir") == f"{tmp_path}/logs/finetune-20007/start-3/node-1"
    assert command[-4:] == [RECIPE, "--max_steps", "3", "--resume"]  # it is not the first start
    assert "yunque.distributed.rehearsal" not in command


def test_a_taken_port_is_passed_over(script):
    with _server_on_a_job_s_port() as server:
        port = server.getsockname()[1]
        done = script("launch.sh", RECIPE, "--dry-run", job=port - 12000)
    assert int(option(commands(done.stdout)["node 0"], "--main_process_port")) > port


def _server_on_a_job_s_port():
    for port in range(12000, 32000):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", port))
    raise AssertionError("no free port")


def test_without_gpus_the_same_profile_runs_over_gloo(script):
    done = script("launch.sh", RECIPE, "--dry-run", job=7, settings={"PROCESSES_PER_NODE": 3})
    command = commands(done.stdout)["node 0"]
    assert option(command, "--num_processes") == "6"
    assert command[-3:] == ["-m", "yunque.distributed.rehearsal", RECIPE]


def test_typed_gpus_and_more_options_for_accelerate(script):
    more = ["--accelerate", "--mixed_precision no", "--profile=ddp"]
    done = script("launch.sh", RECIPE, "--dry-run", *more, job=7, SLURM_GPUS_PER_NODE="h100:4")
    command = commands(done.stdout)["node 0"]
    assert option(command, "--num_processes") == "8"
    assert command[-3:] == ["--mixed_precision", "no", RECIPE]


def test_an_array_s_task_is_a_seed_with_a_folder_of_its_own(script):
    options = ["recipes/ppo_detox.py", "--dry-run", "--output_dir", "runs/x", "--max_steps", 5]
    done = script("launch.sh", *options, job=7, SLURM_ARRAY_TASK_ID=4)
    arguments = commands(done.stdout)["node 0"]
    assert arguments[-6:] == ["--max_steps", "5", "--seed", "4", "--output_dir", "runs/x/seed-4"]
    shown = script("submit.sh", "--array=0-4", "ppo_detox", "--dry-run", "--output_dir=runs/x")
    assert commands(shown.stdout)["node 0"][-4:] == ["--seed", "SEED", "--output_dir", "runs/x/seed-SEED"]


def test_containers_stand_between_srun_and_the_node(script):
    image = {"CONTAINER_IMAGE": "/images/yunque.sif", "CONTAINER_MOUNTS": "/data:/data", "PYTHON": "python3"}
    apptainer = script("launch.sh", RECIPE, "--dry-run", job=7, settings=image | {"CONTAINER": "apptainer"})
    step = commands(apptainer.stdout)["srun"]
    inside = ["apptainer", "exec", "--bind", f"{ROOT}:{ROOT},/data:/data", "--pwd", str(ROOT), "/images/yunque.sif"]
    start = step.index("apptainer")
    assert step[start : start + 8] == [*inside, "slurm/node.sh"]
    with_gpus = {"SLURM_GPUS_ON_NODE": 2, "settings": image | {"CONTAINER": "apptainer"}}
    assert "--nv" in commands(script("launch.sh", RECIPE, "--dry-run", job=7, **with_gpus).stdout)["srun"]
    pyxis = script("launch.sh", RECIPE, "--dry-run", job=7, settings=image | {"CONTAINER": "pyxis"})
    assert "--container-image=/images/yunque.sif" in commands(pyxis.stdout)["srun"]


def test_compress_runs_the_script_that_it_is_given(script, tmp_path):
    for folder in ("slurm", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / "repository" / folder)
    (tmp_path / "repository" / "compress").mkdir()
    (tmp_path / "repository" / "compress" / "shrink.py").touch()
    for name in ("shrink", "compress/shrink.py"):
        done = script("submit.sh", "compress", name, "--scheme", "int 8", "--dry-run", root=tmp_path / "repository")
        assert commands(done.stdout)["node 0"][-3:] == ["compress/shrink.py", "--scheme", "int 8"]
    wrong = script("submit.sh", "compress", "srink", root=tmp_path / "repository")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: compress/srink.py: no such script; compress/ holds shrink\n",
    )


# --- what is refused, before anything is submitted ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", "--profile", "fsdp9"], "--profile fsdp9: no such profile; give one of cpu, ddp"),
        (["finetune", "--config", "none.yaml"], "--config none.yaml: no such file"),
        (["fintune"], "fintune: no such job; give one of compress, finetune, ppo_detox"),
        (["--partition", "gpu"], "no job named"),
        (["compress"], "name a script of compress/"),
        (["compress", "shrink"], "compress/shrink.py: no such script; compress/ holds"),
        (["--nodes=two", "finetune"], "--nodes: 'two'"),
        (["--array=0-2", "finetune"], "--array: its runs need folders of their own"),
        (["--array=0-2", "finetune", "--output_dir", "x", "--seed", "1"], "--seed: in an array"),
        (["--nodes=2", "finetune", "--profile", "cpu", "--dry-run"], "--profile cpu: is one process"),
        (["finetune", "--profile"], "--profile: give its value"),
    ],
)
def test_submit_refuses_in_one_line(script, tmp_path, arguments, words):
    done = script("submit.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "calls").read_text() == ""


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SLURM_JOB_NODELIST": None}, "SLURM_JOB_NODELIST is not set: but SLURM_JOB_ID is, half of a Slurm job"),
        ({"SLURM_JOB_NUM_NODES": None}, "SLURM_JOB_NUM_NODES is not set"),
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID is not set: but SLURM_JOB_NODELIST is"),
        ({"SLURM_JOB_NUM_NODES": 3}, "SLURM_JOB_NUM_NODES is 3, but SLURM_JOB_NODELIST (n[1-2]) names 2 nodes"),
        ({"SLURM_GPUS_ON_NODE": "many"}, "SLURM_GPUS_ON_NODE: 'many'"),
    ],
)
def test_half_a_job_is_refused(script, environment, words):
    done = script("launch.sh", RECIPE, job=7, **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_outside_of_a_job_the_way_in_is_named(script):
    done = script("launch.sh", RECIPE)
    assert done.returncode == 2
    assert "this is no Slurm job; submit with slurm/submit.sh, or add --dry-run" in done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"CONTAINER": "docker"}, "CONTAINER=docker: no such way"),
        ({"CONTAINER": "pyxis"}, "needs a CONTAINER_IMAGE"),
        ({"MAX_REQUEUES": "often"}, "MAX_REQUEUES=often is not a whole number"),
        ({"PROCESSES_PER_NODE": 0}, "PROCESSES_PER_NODE=0"),
        ({"REQUEUE_ON_FAILURE": 1}, "REQUEUE_ON_FAILURE=1 is neither yes nor no"),
    ],
)
def test_a_wrong_setting_is_refused(script, settings, words):
    done = script("submit.sh", "finetune", settings=settings)
    assert done.returncode == 2
    assert f"site.env: {words}" in done.stderr.replace("CONTAINER=pyxis ", "")
    assert script("submit.sh", "finetune", SITE_ENV="/none/site.env").stderr.startswith("error: SITE_ENV: /none/")


def test_a_node_with_fewer_gpus_is_named(script):
    environment = {"GPUS_PER_NODE": 8, "SLURM_GPUS_ON_NODE": 7, "SLURMD_NODENAME": "gpu13", "SLURM_NODEID": 1}
    done = script("node.sh", RECIPE, **environment)
    assert done.returncode == 2
    assert "node gpu13: 7 GPUs where the first node has 8" in done.stderr


# --- what is submitted ---


def test_sbatch_gets_the_site_s_options_then_the_user_s(script, tmp_path):
    done = script("submit.sh", "-N", 2, "finetune", "--seed", 3, settings={"SBATCH_OPTIONS": ["--partition=gpu"]})
    assert done.returncode == 0, done.stderr
    output = f"--chdir={ROOT} --output={tmp_path}/logs/%x-%j.out"
    expected = f"sbatch --partition=gpu -N 2 {output} slurm/finetune.sbatch --seed 3\n"
    assert (tmp_path / "calls").read_text() == expected
    assert (tmp_path / "logs").is_dir()  # Slurm does not make it, and loses the output


# --- how a step ends ---


@pytest.fixture
def python(tmp_path):
    """A stand-in for Python that writes its node and arguments, then runs some lines of bash."""

    def write(lines):
        path = tmp_path / "python"
        path.write_text(f'#!/usr/bin/env bash\necho "node $SLURM_NODEID $OMP_NUM_THREADS"\n{lines}\n')
        path.chmod(0o755)
        return path

    return write


def calls(tmp_path):
    lines = (tmp_path / "calls").read_text().splitlines()
    return [line for line in lines if not line.startswith(("srun", "scontrol show"))]


SRUN_ALL = """\
#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" || true
wait $first
"""


@pytest.mark.parametrize(
    ("lines", "environment", "code", "asked", "words"),
    [
        ("exit 0", {}, 0, [], ""),
        ("exit 75", {}, 75, ["scontrol requeue 7"], "stopped after saving; requeued"),
        ("exit 75", {"SLURM_RESTART_COUNT": 2}, 75, [], "not requeued again after 2 times (MAX_REQUEUES)"),
        ("exit 2", {}, 2, [], ""),
        ("exit 1", {}, 1, [], "the run failed (exit code 1)"),
    ],
    ids=["done", "stopped", "cap", "bad input", "failed"],
)
def test_the_job_s_exit_code_is_the_run_s(script, tmp_path, python, lines, environment, code, asked, words):
    settings = {"PYTHON": python(lines), "MAX_REQUEUES": 2}
    done = script("launch.sh", RECIPE, job=7, settings=settings, **environment)
    assert done.returncode == code, done.stderr
    assert calls(tmp_path) == asked
    assert words in done.stderr
    assert done.stdout.startswith("node 0 ")


def test_a_crash_is_requeued_where_the_site_says_so(script, tmp_path, python):
    settings = {"PYTHON": python("exit 1"), "REQUEUE_ON_FAILURE": "yes"}
    assert script("launch.sh", RECIPE, job=7, settings=settings).returncode == 75
    assert calls(tmp_path) == ["scontrol requeue 7"]


def test_what_a_former_start_left_is_not_taken_for_this_one_s(script, tmp_path, python):
    former = tmp_path / "logs" / "finetune-7" / "start-0" / "exit_code"
    former.parent.mkdir(parents=True)
    former.write_text("75")
    done = script("launch.sh", RECIPE, job=7, settings={"PYTHON": python("exit 1")})
    assert (done.returncode, calls(tmp_path)) == (1, [])


def test_the_node_that_ends_first_tells_the_code(script, tmp_path, python):
    # Slurm kills the other launchers and reports the highest code
    (tmp_path / "bin" / "srun").write_text(SRUN_ALL)
    lines = "((SLURM_NODEID)) || { sleep 0.5; exit 137; }; exit 75"
    done = script("launch.sh", RECIPE, job=7, settings={"PYTHON": python(lines)})
    assert (done.returncode, calls(tmp_path)) == (75, ["scontrol requeue 7"])


def test_ranks_that_do_not_listen_are_asked_again_and_requeued_when_the_time_is_up(script, tmp_path, python):
    # $PPID of the stand-in srun is the batch shell, which Slurm signals
    text = "#!/usr/bin/env bash\nkill -USR1 $PPID\nsleep 7 & wait\n"
    (tmp_path / "bin" / "srun").write_text(text)
    done = script("launch.sh", RECIPE, job=7, settings={"PYTHON": python(""), "STOP_GRACE_S": 6})
    assert done.returncode == 75
    assert "the ranks did not stop within 6 s; requeued" in done.stderr
    assert calls(tmp_path) == ["scancel --signal=USR1 7", "scancel --signal=USR1 7", "scontrol requeue 7"]


def test_a_cancelled_job_does_not_come_back(script, tmp_path, python):
    (tmp_path / "bin" / "srun").write_text("#!/usr/bin/env bash\nkill -TERM $PPID\nsleep 0.3\nexit 75\n")
    done = script("launch.sh", RECIPE, job=7, settings={"PYTHON": python("")})
    assert (done.returncode, calls(tmp_path)) == (75, [])


def test_launchers_outlive_the_signals_that_their_ranks_answer(script, python):
    lines = "kill -USR1 $$; kill -TERM $$; echo alive $PET_SIGNALS_TO_HANDLE"
    done = script("launch.sh", RECIPE, job=7, settings={"PYTHON": python(lines)})
    assert done.stdout.count("alive SIGINT") == 2


def test_threads_are_the_task_s_cores_shared_by_its_processes(script, python):
    settings = {"PYTHON": python("echo cpus $SRUN_CPUS_PER_TASK"), "PROCESSES_PER_NODE": 2}
    done = script("launch.sh", RECIPE, job=7, settings=settings, SLURM_CPUS_PER_TASK=12)
    assert "node 0 6\ncpus 12" in done.stdout


# --- the scripts themselves ---


def _written_commands():
    """Command lines of submit.sh that the guide and the scripts' headers give."""
    files = [ROOT / "docs" / "slurm.md", *sorted((ROOT / "slurm").glob("*.s*"))]
    lines = [line for path in files for line in path.read_text().replace("\\\n", " ").splitlines()]
    found = (re.match(r"(?:#  |    )? *(?:python \S+ )?slurm/submit.sh ([^\[#]+)(#.*)?$", line) for line in lines)
    return [match[1].strip() for match in found if match]


def test_commands_of_the_guide_and_the_headers_are_valid(script):
    commands = _written_commands()
    assert len(commands) >= 8
    for command in commands:
        done = script("submit.sh", "--dry-run", *shlex.split(command), settings={"PROFILE": "ddp"})
        if " compress " in command and not (ROOT / "compress").is_dir():
            assert "no such script" in done.stderr
        else:
            assert done.returncode == 0, (command, done.stderr)


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    files = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / "slurm" / "site.env"]
    done = subprocess.run([program, "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(files) == 10
    assert all(os.access(path, os.X_OK) for path in files if path.suffix == ".sh" and path.stem != "lib")
