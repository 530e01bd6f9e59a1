"""The proof that `docs/compare.md` reports, with the command a user types."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_gates_pass_ppo_and_its_sound_copy_and_reject_both_damaged_ones(embedded, tmp_path):
    command = [sys.executable, "bench/gate_proof.py", "--output_dir", str(tmp_path), "--seeds", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1_800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = json.loads((tmp_path / "gate_proof.json").read_text())
    assert result["passed"] == {"ppo": True, "bfloat16": True, "noised": False, "rude": False}
