"""Scripts, configurations and profiles: from a checkout, from any folder, and from a wheel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from yunque import packaged
from yunque.cli import app
from yunque.errors import InputError
from yunque.rl.feedback_arguments import FeedbackArguments

ROOT = Path(__file__).parents[1]


def files_of(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", packaged.SCRIPTS)
def test_a_script_is_found_by_its_command_and_path(name):
    path = packaged.find_script(name)
    assert path == packaged.find_script(packaged.SCRIPTS[name]) == ROOT / packaged.SCRIPTS[name]


def test_every_script_is_a_command():
    files = [path for folder in ("recipes", "compress") for path in (ROOT / folder).glob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in files} == set(packaged.SCRIPTS.values())
    assert set(packaged.SCRIPTS) <= {command.name for command in app.registered_commands}


@pytest.mark.parametrize(
    "name", ["ppo_detox_flan_t5_base", "quantize_embedded.yaml", "recipes/configs/orpo_hh_stories_local.yaml"]
)
def test_a_configuration_is_found_by_its_name(name):
    assert packaged.find_config(name).name == Path(name).with_suffix(".yaml").name
    assert yaml.safe_load(packaged.find_config(name).read_text())


def test_the_user_s_own_file_comes_first(tmp_path):
    own = tmp_path / "recipes" / "finetune.py"
    own.parent.mkdir()
    own.touch()
    assert packaged.find_script("finetune").resolve() == own
    assert packaged.find_script("dpo") == ROOT / "recipes" / "dpo.py"
    (tmp_path / "ppo_detox_embedded").touch()
    assert packaged.find_config("ppo_detox_embedded") == Path("ppo_detox_embedded")


def test_files_that_a_packaged_configuration_names_are_found():
    config = packaged.find_config("constitutional_stories260k")
    args = FeedbackArguments(
        **{name: yaml.safe_load(config.read_text())[name] for name in ("constitution", "dataset_name")}
    )
    assert (args.constitution, args.dataset_name) == tuple(
        str(ROOT / "recipes" / "constitutions" / name) for name in ("english.yaml", "red_team_english.jsonl")
    )
    assert FeedbackArguments(dataset_name="org/prompts").dataset_name == "org/prompts"


def test_what_is_nowhere_is_said():
    with pytest.raises(InputError, match="script: ppo is no file; give a recipe"):
        packaged.find_script("ppo")
    assert packaged.find_config("nothing") == Path("nothing")
    assert packaged.find_file("recipes/nothing.py") == Path("recipes/nothing.py")


def test_init_copies_everything_that_runs(tmp_path):
    done = CliRunner().invoke(app, ["init", "mine"])
    assert done.exit_code == 0, done.output
    for folder in packaged.FOLDERS:
        assert files_of(tmp_path / "mine" / folder) == files_of(ROOT / folder) != set()
    assert os.access(tmp_path / "mine" / "slurm" / "submit.sh", os.X_OK)
    again = CliRunner().invoke(app, ["init", "mine"])
    assert isinstance(again.exception, InputError)
    assert "mine: has recipes/ already" in str(again.exception)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with the installed wheel, built from the tracked files."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if name.partition("/")[0] in ("src", *packaged.FOLDERS) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", target]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, source], check=True, env=os.environ | {"PYTHONPATH": ""}
    )
    return target


def run(wheel, *words):
    environment = os.environ | {"PYTHONPATH": str(wheel), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_what_runs(wheel):
    for folder in packaged.FOLDERS:
        assert files_of(wheel / "yunque" / folder) == files_of(ROOT / folder) != set()
    assert (wheel / "yunque" / "py.typed").is_file()


def test_the_wheel_trains_in_any_folder(wheel):
    found = run(wheel, "-c", "from yunque import packaged; print(packaged.find_script('dpo'))")
    assert found.stdout == f"{wheel / 'yunque' / 'recipes' / 'dpo.py'}\n"
    line = "error: unknown argument --model; --help lists the known ones"
    for words in (("-m", "yunque", "dpo"), ("-m", "yunque.recipes.dpo")):
        refused = run(wheel, *words, "--model", "nothing")
        assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"{line}\n")
    launched = run(wheel, "-m", "yunque", "dpo", "--profile", "ddp", "--num_processes=2", "--model", "nothing")
    assert launched.returncode == 2
    assert [text for text in launched.stderr.splitlines() if text.startswith("error")] == [line]
