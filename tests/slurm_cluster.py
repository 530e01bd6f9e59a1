"""A real Slurm of virtual nodes on this machine, for tests: every daemon is a child of the process that starts it.

    python tests/slurm_cluster.py COMMAND...        # start it, run COMMAND with it, stop it

Needs Debian's slurmctld, slurmd, slurm-client and munge, no root. All files lie in one folder, all traffic is on
127.0.0.1 on free ports. The nodes n1, n2 ... are this host: their names do not resolve, and they share its cores.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
REQUEUE_WAIT_S = 5  # the life of a job's credential, for which a requeued job waits; Slurm's default is 120
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)

CONFIGURATION = """\
ClusterName=yunque
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={wait}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=3
ReturnToService=2
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """Nodes n1, n2 ... with partition `low`, which `high` preempts; use it in a `with` block."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        if missing := missing_programs():
            raise RuntimeError(f"{', '.join(missing)}: not found; apt-get install slurmctld slurmd slurm-client munge")
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        port, *ports = _free_ports(len(self.nodes) + 1)
        host, cpus = socket.gethostname().partition(".")[0], os.cpu_count()
        text = CONFIGURATION.format(
            folder=self.folder, host=host, port=port, user=getpass.getuser(), wait=REQUEUE_WAIT_S
        )
        for node, node_port in zip(self.nodes, ports, strict=True):
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={cpus} State=UNKNOWN\n"
            )
        (self.folder / "slurm.conf").write_text(text)
        try:
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1:
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            _wait_for(lambda: not self.run("squeue", "--noheader", check=False), STOP_TIMEOUT_S)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._left_over():  # steps of a job that would not die
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: object, check: bool = True, **environment: str) -> str:
        """Standard output of a command that speaks to this cluster; it must succeed when checked."""
        done = subprocess.run(
            [*map(str, command)], env=self.environment | environment, capture_output=True, text=True, check=False
        )
        assert not (check and done.returncode), f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, as long as it remembers it (5 minutes)."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "".join(f"\n--- {path}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))

    def _start_daemons(self) -> None:
        paths = [f"--{name}={self.folder}/munge.{end}" for name, end in (("socket", "socket"), ("key-file", "key"))]
        paths += [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", *paths)  # --force: it dislikes folders below /tmp
        _wait_for((self.folder / "munge.socket").exists, START_TIMEOUT_S)
        self._start("slurmctld", "-D", "-c", "-i")
        for node in self.nodes:
            (self.folder / f"spool.{node}").mkdir()
            self._start("slurmd", "-D", "-N", node)
        idle = ("sinfo", "--noheader", "--Node", "--partition=low", "--states=idle", "--format=%N")
        if not _wait_for(lambda: self.run(*idle, check=False).split() == self.nodes, START_TIMEOUT_S):
            raise RuntimeError(f"the nodes did not become idle{self.logs()}")

    def _start(self, program: str, *arguments: str) -> None:
        # /usr/sbin is not on every user's path; jobs inherit what slurmd has, so it gets no more than it needs
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        environment = {"PATH": path, "HOME": str(Path.home()), "SLURM_CONF": self.environment["SLURM_CONF"]}
        with (self.folder / f"{program}.out.log").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    preexec_fn=_die_with_parent,
                )
            )

    def _left_over(self) -> list[int]:
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
            except OSError:
                continue  # gone, or another user's
        return found


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_for(condition, timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.2)
    return bool(done)


if __name__ == "__main__":
    with Cluster() as cluster:
        code = subprocess.run(sys.argv[1:], env=cluster.environment, check=False).returncode
    sys.exit(code)
