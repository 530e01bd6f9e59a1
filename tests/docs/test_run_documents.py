"""Every command of a document ran as it stands now, or is on the list of those that cannot run here."""

import json
import re

import documents
import pytest
import run_documents
from documents import PAGES, ROOT

pages = [documents.read(path) for path in PAGES]
every_command = [command for page in pages for command in run_documents.commands(page)]
record = json.loads(run_documents.RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", pages, ids=lambda page: page.name)
def test_commands_ran_or_are_left_out(page):
    wanted = {command for command in run_documents.commands(page) if run_documents.reason(command) is None}
    new, gone = wanted - record.get(page.name, {}).keys(), record.get(page.name, {}).keys() - wanted
    assert not new | gone, f"python tests/run_documents.py {page.name}: not run: {sorted(new)}; gone: {sorted(gone)}"


def test_the_record_has_no_other_pages():
    assert record.keys() <= {page.name for page in pages}


def test_tables_have_nothing_without_use():
    patterns = [*run_documents.SHORTER, *run_documents.EXITS]
    patterns += [pattern for those in run_documents.LEFT_OUT.values() for pattern in those]
    unused = [pattern for pattern in patterns if not any(re.search(pattern, each) for each in every_command)]
    unused += [text for text in run_documents.FIXTURES if not any(text in each for each in every_command)]
    assert not unused


@pytest.mark.parametrize(
    ("command", "short"),
    [
        ("python compress/distill.py --seed 1", "python compress/distill.py --seed 1 {}"),
        ("python compress/pipeline.py --config FILE --status", "python compress/pipeline.py --config FILE --status"),
        ("python recipes/ppo_detox.py", "python recipes/ppo_detox.py"),  # the tutorial's, whole
    ],
)
def test_long_commands_are_shortened(command, short):
    options = run_documents.SHORTER[r"compress/distill\.py"]
    assert run_documents.shortened(command) == short.format(options)


@pytest.mark.parametrize(
    ("command", "is_run"),
    [
        ("yunque show outputs/ppo_detox", True),
        ("yunque compare a=... b=...", False),
        ("slurm/submit.sh --nodes=2 finetune", False),
        ("slurm/submit.sh --dry-run --nodes=2 finetune --config recipes/configs/finetune_flan_t5_base.yaml", True),
        ("python recipes/dpo.py --config recipes/configs/dpo_qwen2.5_1.5b_hh.yaml", False),
    ],
)
def test_what_is_left_out(command, is_run):
    assert (run_documents.reason(command) is None) == is_run


def test_commands_are_found_in_their_order(tmp_path):
    text = "# A\n\n    export A=1\n    yunque show F \\\n      --json   # or ...\n    cp a b\n    make demo\n\n"
    text += "```bash\n# a comment\nyunque show F --json\n```\n\n    score = reward\n"
    (tmp_path / "page.md").write_text(text)
    found = run_documents.commands(documents.read(tmp_path / "page.md"))
    assert found == [
        "export A=1; yunque show F --json", "export A=1; cp a b", "export A=1; make demo", "yunque show F --json",
    ]  # fmt: skip


def test_the_tutorial_goes_first():
    first, second, *_ = run_documents.in_order(pages)
    assert first.name == run_documents.TUTORIAL
    assert (ROOT / second.name).parent == ROOT
