"""The table of layouts: made from cells, and of one cell as it is measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURED = {"start_difference": 1e-2, "answers": 0, "same_answers": 0, "losses": 2}
CELLS = [
    {"profile": "zero3", "recipe": "finetune", "family": "t5", "equal": True, "largest_difference": 2e-3, **MEASURED},
    {"profile": "fsdp2", "recipe": "finetune", "family": "t5", "equal": False, "largest_difference": 0.2, **MEASURED},
    {"profile": "tp", "recipe": "finetune", "family": "t5", "refused": "launch profile tp: no plan"},
    {"profile": "tp", "recipe": "dpo", "family": "t5", "refused": None},
]


def layout_table(*words):
    command = [sys.executable, "bench/layout_table.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_gets_what_was_equal_what_differed_and_what_was_refused(tmp_path):
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in CELLS))
    page = tmp_path / "page.md"
    marks = ("<!-- bench/layout_table.py: begin -->", "<!-- bench/layout_table.py: end -->")
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    layout_table(tmp_path / "cells.jsonl", "--write", page)
    text = page.read_text()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in text.splitlines() if line.startswith("| ")}  # fmt: skip
    names = [name.strip("`") for name in rows["recipe, family"]]
    finetune = dict(zip(names, rows["finetune, t5"], strict=True))
    assert finetune["zero3"] == "1e-02; 2 2e-03"
    assert finetune["fsdp2"] == "1e-02; 2 DIFFER 2e-01"
    assert finetune["ddp"] == "-"
    assert finetune["tp"] == "no [a]"
    assert dict(zip(names, rows["dpo, t5"], strict=True))["tp"] == "no [b]"
    assert "a. launch profile tp: no plan\nb. failed" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


@pytest.mark.slow
@pytest.mark.distributed
def test_a_cell_is_measured_and_not_again(embedded, tmp_path):
    words = (tmp_path / "cells.jsonl", "--recipes", "finetune", "--families", "llama", "--profiles", "ddp")
    (cell,) = map(json.loads, layout_table(*words).splitlines())
    assert cell["losses"] == 2
    assert cell["largest_difference"] < 1e-2
    assert layout_table(*words) == ""
