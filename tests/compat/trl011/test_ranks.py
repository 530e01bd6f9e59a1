import json
import runpy
import subprocess
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.mark.distributed
def test_two_ranks_do_what_one_does(tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "launch/ddp.yaml", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "--mixed_precision", "no", "-m", "yunque.distributed.rehearsal"]
    process = subprocess.run(
        [warm.python(), *launcher, str(SCRIPT), str(tmp_path / "curves.json")],
        cwd=ROOT, env=warm.environment(ROOT / "tests"), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    curves = json.loads((tmp_path / "curves.json").read_text())
    run = runpy.run_path(str(SCRIPT))["run"]
    for family, curve in curves.items():
        for step, wanted in zip(curve, run(family, ranks=1), strict=True):
            assert step.keys() == wanted.keys()
            for name in wanted:
                assert step[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-4), (family, name)
        assert curve[0]["weights"] != curve[1]["weights"]
