"""Every pipeline file is read, and every step's script accepts the options it gets."""

import runpy
import sys
from pathlib import Path

import pytest
import runs

from yunque.evaluation.gates import parse_gate
from yunque.pipeline.description import read_pipeline
from yunque.pipeline.runner import command_of

CONFIGS = sorted((runs.ROOT / "compress" / "configs").glob("pipeline_*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_step_is_accepted_by_its_script(config, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    pipeline = read_pipeline(config.relative_to(runs.ROOT))
    assert "serve/smoke.py" in [step.run for step in pipeline.steps]
    gates = []
    for step in pipeline.steps:
        command = command_of(pipeline, step, "new")
        if step.run == "yunque compare":
            gates += [parse_gate(gate) for gate in step.options.get("gate", [])]
        if not step.makes_model:
            continue
        words = command[command.index(step.run) :]
        monkeypatch.setattr(sys, "argv", words)
        # a script imports these once its arguments are checked
        for name in ("loading", "inference"):
            monkeypatch.setitem(sys.modules, f"yunque.models.{name}", None)
        for name in ("export.folder", "export.source"):
            monkeypatch.setitem(sys.modules, f"yunque.{name}", None)
        with pytest.raises(ImportError, match=r"yunque\.(models|export)\."):
            runpy.run_path(str(Path(step.run)))["main"]()
    assert gates


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_file_begins_with_its_purpose_and_command(config):
    header = config.read_text().split("output_dir:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "compress/pipeline.py" in header
    assert config.name in header
