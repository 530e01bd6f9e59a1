"""The scripts of slurm/ with settings for tests, beside stand-ins for Slurm's programs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SRUN = """\
#!/usr/bin/env bash
# Runs the step's command once per node, in turn, as srun does at the same time.
echo "srun $*" >>"$CALLS"
while [[ $1 == --* ]]; do
  [[ $1 != --nodes=* ]] || nodes=${1#*=}
  shift
done
for ((node = 0; node < nodes; node++)); do
  SLURM_NODEID=$node "$@" || exit
done
"""
SCONTROL = """\
#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
case "$1 $2" in
  'show hostnames') for ((node = 1; node <= ${NODES:-2}; node++)); do echo "no-such-host$node"; done ;;
  'show node') echo 'NodeName=no-such-host1 CPUTot=2'; echo '   NodeAddr=127.0.0.1 NodeHostName=no-such-host1' ;;
esac
"""
RECORD = """\
#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
"""


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    """Write a site.env: the repository's with some settings replaced."""

    def write(**settings: object) -> Path:
        chosen = {"PYTHON": sys.executable, "LOG_DIR": tmp_path / "logs"} | settings
        text = (ROOT / "slurm" / "site.env").read_text()
        for name, value in chosen.items():
            array = isinstance(value, list | tuple)
            text += f"{name}={'(' + shlex.join(map(str, value)) + ')' if array else shlex.quote(str(value))}\n"
        path = tmp_path / "site.env"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of stand-ins for srun, scontrol, scancel, sbatch and apptainer; what they are asked is in `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": RECORD, "sbatch": RECORD}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "calls").touch()
    return folder


@pytest.fixture
def script(tmp_path: Path, site: Callable[..., Path], programs: Path) -> Callable[..., Any]:
    """Run a script of slurm/: script("launch.sh", "recipes/finetune.py", job=7); without `job` outside of a job."""

    def run(
        name: str,
        *arguments: object,
        settings: dict[str, object] | None = None,
        job: int | None = None,
        root: Path = ROOT,
        **more: object,
    ) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "OMP"))}
        environment |= {"PATH": f"{programs}:{environment['PATH']}", "CALLS": str(tmp_path / "calls")}
        environment |= {"SITE_ENV": str(site(**(settings or {})))}
        if job is not None:
            more = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": 2} | more
        environment |= {key: str(value) for key, value in more.items() if value is not None}
        return subprocess.run(
            [root / "slurm" / name, *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run
