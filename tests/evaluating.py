"""`yunque evaluate` as tests call it: options, what it writes, its own processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import warm

ROOT = Path(__file__).parents[1]


def options(**given):
    """Options as a user types them; True is a flag, a list several values, None leaves an option out."""
    parts = []
    for name, value in given.items():
        if value is None:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        parts += [f"--{name}", *map(str, values)]
    return parts


def result(folder):
    return json.loads((folder / "evaluation.json").read_text())


def generations(folder):
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def start(arguments, *, ranks=1, code=None):
    """`python -m yunque ...` as its own processes; with ``code``, that in place of the module."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "launch/ddp.yaml", "--num_processes", str(ranks)]
    launcher += ["--main_process_port", "0"]
    program = ["-m", "yunque"] if code is None else ["-c", code]
    command = [warm.python(), *(launcher if ranks > 1 else []), *program, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | warm.ON_CPU, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
