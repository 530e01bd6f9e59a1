"""The PPO recipe with its weights split over two ranks, from the command a user types to a folder that loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM

from yunque.artifacts import verify

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
def test_a_sharded_run_ends_in_a_folder_that_loads(ppo_options, finished, tmp_path):
    options = ppo_options(max_steps=2, output_dir=tmp_path / "zero3")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "launch/zero3.yaml", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "-m", "yunque.distributed.rehearsal", "recipes/ppo_detox.py"]
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    assert verify(tmp_path / "zero3") == []
    one = finished("ppo_detox", options | {"output_dir": tmp_path / "one"})
    ours, theirs = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (tmp_path / "zero3", one.folder))
    for (name, weight), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert weight.detach().numpy() == pytest.approx(expected.detach().numpy(), rel=1e-3, abs=1e-4), name
