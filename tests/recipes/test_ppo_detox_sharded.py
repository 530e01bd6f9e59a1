"""The PPO recipe with its weights split over two ranks, from the command a user types to a folder that loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import warm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from yunque.artifacts import verify
from yunque.distributed.profiles import find_profile
from yunque.distributed.rehearse import Rehearsal, rehearse
from yunque.models.loading import keep_head_untied, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def untied(tmp_path):
    """A T5 whose head is no embedding, as FLAN-T5's, in a folder with the words of the test data's tokenizer."""

    def write(tokenizer_folder):
        model = tiny.t5()
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
        keep_head_untied(model)
        save_model(model, AutoTokenizer.from_pretrained(tokenizer_folder), tmp_path / "untied")
        return tmp_path / "untied"

    return write


@pytest.mark.distributed
def test_a_sharded_run_ends_in_a_folder_that_loads(ppo_options, finished, untied, assets, tmp_path):
    options = ppo_options(max_steps=2, output_dir=tmp_path / "zero3", model_name_or_path=untied(assets.t5))
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
    assert ours.lm_head.weight is not ours.shared.weight
    config = json.loads((tmp_path / "zero3" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


BROKEN = """
import contextlib, runpy, sys
from yunque.models import copying
copying.tied_by_whole_weights = contextlib.nullcontext
sys.argv[0] = "recipes/ppo_detox.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.distributed
def test_a_layout_that_changes_the_model_ends_the_run_in_one_line(
    ppo_options, untied, assets, tmp_path, monkeypatch, capfd
):
    for name, value in warm.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", warm.python())
    monkeypatch.chdir(ROOT)
    (tmp_path / "broken.py").write_text(BROKEN)
    options = ppo_options(max_steps=1, output_dir=tmp_path / "out", model_name_or_path=untied(assets.t5))
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as left:
        rehearse(Rehearsal(find_profile("zero3"), str(tmp_path / "broken.py"), arguments), compare=False)
    assert left.value.code == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("failed: "))
    assert line.startswith("failed: launch profile: the model computes other logits than one plain process does")
    assert "lm_head.weight" in line
