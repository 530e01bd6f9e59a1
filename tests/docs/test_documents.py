"""Documents say what is there: links lead somewhere, programs take the commands, and each command is run by a test."""

import re

import documents
import interfaces
import pytest
import yaml
from documents import PAGES, ROOT

RUN_BY = {
    "bench/compare.py": "tests/bench",
    "bench/faults.py": "tests/distributed/test_faults.py",
    "bench/hacking_watch.py": "tests/run_documents.py",
    "compress/to_onnx.py": "tests/export/test_folder.py",
    "make check-base": ".ci/run",
    "make check-release": ".ci/release",
    "make demo": ".ci/run",
    "make docs": "tests/docs/test_reference.py",
    "make docs-run": "tests/run_documents.py",
    "make lint": ".ci/run",
    "make setup": ".ci/run",
    "make test": ".ci/run",
    "make test-slow": "Makefile",
    "make test-slurm": ".ci/run",
    "pytest": ".ci/run",
    "serve/examples/pal.py": "tests/serving/test_examples.py",
    "serve/examples/react.py": "tests/serving/test_examples.py",
    "serve/loadtest.py": "tests/serving/test_load.py",
    "serve/server.py": "tests/serving/test_server.py",
    "slurm/pipeline.sh": "tests/slurm/test_pipeline.py",
    "slurm/submit.sh": "tests/slurm/test_scripts.py",
    "tests/slurm_cluster.py": "tests/slurm/test_cluster.py",
    "yunque": "tests/test_cli.py",
    "yunque chat": "tests/cli/test_generate.py",
    "yunque data": "tests/data/test_statistics.py",
    "yunque dpo": "tests/test_packaged.py",
    "yunque doctor": "tests/distributed/test_doctor.py",
    "yunque evaluate": "tests/evaluation/test_evaluate.py",
    "yunque matrix": "tests/evaluation/test_matrix.py",
    "yunque export": "tests/cli/test_scripts.py",
    "yunque generate": "tests/cli/test_generate.py",
    "yunque init": "tests/test_packaged.py",
    "yunque ppo-detox": "tests/cli/test_scripts.py",
    "yunque rehearse": "tests/recipes/test_rehearsed.py",
    "yunque serve": "tests/serving",
    "yunque show": "tests/test_cli.py",
}
"""What runs a command, where no test has its name."""

BY_HAND = {
    "bench/demo_robustness.py": "an hour",
    "bench/interval_coverage.py": "minutes",
    "bench/ppo_step.py": "minutes, and a second library",
    "bench/qlora_memory.py": "minutes",
    "bench/sensitivity.py": "minutes",
    "bench/serve_generation.py": "minutes, and other libraries",
    "bench/serve_load.py": "minutes",
}
"""Benchmarks: documents give their numbers with the date."""

pages = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def wrong(findings):
    return "\n".join(str(finding) for finding in findings)


@pages
def test_links_and_anchors_lead_somewhere(path):
    page, findings = documents.read(path), []
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists():
            findings.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in documents.read(target).anchors:
            findings.append(f"{link}: no such heading")
    assert not findings, wrong(findings)


@pages
def test_files_that_are_named_are_there(path):
    findings = [name for name in documents.read(path).paths if not (ROOT / name).exists()]
    assert not findings, wrong(findings)


@pages
def test_commands_are_what_the_programs_take(path):
    findings = []
    for where, words in documents.read(path).commands:
        try:
            interfaces.check(words)
        except interfaces.Unknown as error:
            findings.append(f"{where}: {' '.join(words)}\n    {error}")
    assert not findings, wrong(findings)


def is_mapping(text):
    """Whether a block without a language is an experiment's YAML."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    return isinstance(content, dict) and text[0].isalpha() and all(re.fullmatch(r"\w+", str(key)) for key in content)


@pages
def test_yaml_and_python_are_what_the_library_takes(path):
    findings = []
    for block in documents.read(path).blocks:
        is_yaml = block.language in ("yaml", "yml") or (not block.language and is_mapping(block.text))
        check = interfaces.check_yaml if is_yaml else interfaces.check_python if block.language == "python" else None
        try:
            if check:
                check(block.text)
        except interfaces.Unknown as error:
            findings.append(f"{block.line}: {error}")
    assert not findings, wrong(findings)


def name_of(words):
    """Script or subcommand of a command, as the table has it."""
    program, *rest = words
    program = program.rpartition("/")[2] if program.startswith(".venv/") else program
    if program in ("srun", "sbatch"):
        rest = [word for word in rest if not word.startswith("-")]
        return name_of(rest) if rest and documents.starts_command(rest[0]) else None
    scripts = [word for word in rest if word.partition("/")[0] in documents.FOLDERS and word.endswith(".py")]
    if program in ("python", "accelerate"):
        if "yunque" in rest:
            return name_of(rest[rest.index("yunque") :])
        return scripts[0] if scripts else None
    if program in ("yunque", "make"):
        return " ".join([program, *[word for word in rest if not word.startswith("-")][:1]])
    return program


def runner(name):
    """What runs the command of that name; None if nothing does."""
    if name in RUN_BY:
        return RUN_BY[name] if (ROOT / RUN_BY[name]).exists() else None
    stem = name.split()[-1].rpartition("/")[2].removesuffix(".py")
    found = [*(ROOT / "tests").rglob(f"test_{stem}*.py"), *(ROOT / "tests").rglob(f"test_*{stem}.py")]
    return found[0] if found else BY_HAND.get(name)


@pages
def test_every_command_is_run_by_something(path):
    names = {name_of(words) for _, words in documents.read(path).commands} - {None}
    findings = [name for name in sorted(names) if runner(name) is None]
    assert not findings, wrong(findings)


# --- the checks themselves ---


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python recipes/absent.py", "there is no recipes/absent.py"),
        ("python recipes/finetune.py --learning_rat 1", "learning_rat"),
        ("python recipes/finetune.py --learning_rate much", "learning_rate"),
        ("python recipes/ppo_detox.py --config recipes/configs/absent.yaml", "absent.yaml"),
        ("accelerate launch --config_file launch/absent.yaml recipes/finetune.py", "launch/absent.yaml"),
        ("accelerate launch --config_file launch/ddp.yaml recipes/finetune.py --absent 1", "absent"),
        ("yunque absent", "yunque knows no absent"),
        ("yunque show FOLDER --absent", "show knows no --absent"),
        ("yunque evaluate FOLDER --dataset_name x.json --absent 1", "absent"),
        ("yunque evaluate FOLDER ... --absent 1", "absent"),
        ("yunque rehearse fsdp2 recipes/finetune.py --ranks 2 --absent 1", "absent"),
        ("make absent", "make knows no absent"),
        ("slurm/submit.sh --nodes=2 finetune --profile absent", "launch/absent.yaml"),
        ("python bench/faults.py --absent", "bench/faults.py knows no --absent"),
    ],
)
def test_a_command_that_its_program_refuses_is_found(command, words):
    with pytest.raises(interfaces.Unknown, match=re.escape(words)):
        interfaces.check(documents.split(command)[0])


def test_pages_are_taken_apart(tmp_path):
    text = "# A `b`: c\n\nSee [x](#y-z) and `yunque show --json`.\n\n"
    text += "    make demo  # this\n    A=1 yunque show F \\\n      --json\n"
    (tmp_path / "page.md").write_text(text + "\n## Y z\n\n```python\nx = 1\n```\n- item\n\n      not code\n")
    page = documents.read(tmp_path / "page.md")
    assert page.anchors == {"a-b-c", "y-z"}
    assert page.links == ["#y-z"]
    assert [block.language for block in page.blocks][:2] == ["", "python"]
    assert documents.lines_of(page.blocks[0].text)[1].split() == ["A=1", "yunque", "show", "F", "--json"]
    assert documents.split("A=1 yunque show F --json | head; make demo > x") == [
        ["yunque", "show", "F", "--json"], ["head"], ["make", "demo"],
    ]  # fmt: skip
