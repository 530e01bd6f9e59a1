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
    ran = record.get(page.name, {})
    new, gone = wanted - ran.keys(), ran.keys() - wanted
    assert not new | gone, f"python tests/run_documents.py {page.name}: not run: {sorted(new)}; gone: {sorted(gone)}"
    if waiting := [command for command, how in ran.items() if how is None]:
        pytest.xfail(f"{len(waiting)} commands wait for their first run: {'; '.join(waiting)}")


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


class Scripted:
    """Stands in for the scratch copy: commands end with the given codes."""

    def __init__(self, codes):
        self.codes, self.ran, self.began_empty = codes, [], None

    def begin(self, *, empty):
        self.began_empty = empty

    def prepare(self, command):
        if command not in self.codes:
            raise RuntimeError("no such fixture")

    def run(self, command):
        self.ran.append(command)
        return self.codes[command], ""

    def end(self, page):
        pass


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(run_documents, "RECORD", tmp_path / "record.json")
    (tmp_path / "page.md").write_text("# A\n\n    yunque show A\n    yunque show B\n    yunque show C ...\n")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    return documents.read(tmp_path / "page.md")


def test_the_record_keeps_what_did_not_fail(page):
    record = {"page.md": {"yunque show B": {}, "yunque show GONE": {}}, "other.md": {"make": {}}, "empty.md": {}}
    scratch = Scripted({"yunque show A": 0, "yunque show B": 2})
    assert run_documents.run_page(scratch, page, record, "") == 1
    assert scratch.ran == ["yunque show A", "yunque show B"]
    assert record["page.md"].keys() == {"yunque show A"}
    assert json.loads(run_documents.RECORD.read_text()) == {"page.md": record["page.md"], "other.md": {"make": {}}}


def test_only_some_are_run_and_the_others_stay_on_record(page):
    record = {"page.md": {"yunque show A": {"seconds": 7}}}
    scratch = Scripted({"yunque show B": 0})
    assert run_documents.run_page(scratch, page, record, "show B") == 0
    assert record["page.md"]["yunque show A"] == {"seconds": 7}
    assert record["page.md"].keys() == {"yunque show A", "yunque show B"}
    assert run_documents.run_page(scratch, page, record, "show A") == 1  # its fixture cannot be made
    assert record["page.md"].keys() == {"yunque show B"}


def test_the_tutorial_goes_first():
    first, second, *_ = run_documents.in_order(pages)
    assert first.name == run_documents.TUTORIAL
    assert (ROOT / second.name).parent == ROOT
