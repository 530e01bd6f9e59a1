"""A repository of one tiny script, and pipelines of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]

STEP = '''\
"""Writes what it was given into a model folder; --code makes it end so, --wait lets it work until it is stopped."""
import argparse, sys, time
from pathlib import Path
from yunque import artifacts
from yunque.errors import CheckFailed, InputError, run

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir")
    parser.add_argument("--parent", default="")
    parser.add_argument("--text", default="")
    parser.add_argument("--config")
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--wait", type=float, default=0)
    parser.add_argument("--resume", default="false")
    parser.add_argument("--overwrite_output_dir", default="false")
    args = parser.parse_args()
    folder = Path(args.output_dir)
    artifacts.prepare_output_dir(
        folder, overwrite=args.overwrite_output_dir == "true", resume=args.resume == "true", inputs=[]
    )
    with open("calls", "a") as calls:
        print(folder.name, "resume" if args.resume == "true" else "start", file=calls)
    if args.code == 2:
        raise InputError("text: is bad")
    if args.code:
        raise CheckFailed("no good")
    if args.wait and args.resume != "true":
        (folder / "checkpoints").mkdir(exist_ok=True)
        time.sleep(args.wait)
    above = (Path(args.parent) / "text").read_text() if args.parent else ""
    config = Path(args.config).read_text() if args.config else ""
    artifacts.save_model_folder(
        folder, lambda staging: (staging / "text").write_text(above + args.text + config) and None,
        stage="test", parents=[args.parent] if args.parent else [], metrics={"toxicity_after": 0.25},
    )

run(main)
'''


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start in, with ``recipes/step.py`` and this project's own compress/, launch/ and slurm/."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "step.py").write_text(STEP)
    for name in ("compress", "launch", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def step(**options: Any) -> dict[str, Any]:
    """A step that runs the tiny script."""
    return {"run": "recipes/step.py", "options": options}


@pytest.fixture
def write(repository: Path) -> Callable[..., Path]:
    """Write a pipeline file of these steps."""

    def written(steps: dict[str, Any], **more: Any) -> Path:
        path = repository / "pipeline.yaml"
        path.write_text(yaml.safe_dump({"output_dir": "out", "steps": steps} | more, sort_keys=False))
        return path

    return written


@pytest.fixture
def calls(repository: Path) -> Callable[[], list[str]]:
    """What the tiny script was called for since the last question."""

    def since() -> list[str]:
        path = repository / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    return since


def pipeline(*arguments: object) -> subprocess.Popen[str]:
    """The command, started in the current folder."""
    source = {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, "compress/pipeline.py", "--config", "pipeline.yaml", *map(str, arguments)],
        env={key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | source,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
