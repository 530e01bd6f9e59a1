"""Every launch profile is read by Accelerate's own loader and says what it is for."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

PROFILES = sorted((Path(__file__).parents[1] / "launch").glob("*.yaml"))


def test_the_profiles_of_the_readme_are_there():
    assert {"cpu", "ddp"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_accelerate_accepts_profile(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {name: config.to_dict()[name] for name in wanted} == wanted


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profile_begins_with_its_purpose_and_command(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header
    assert len(header[0]) > 20
    assert any(f"accelerate launch --config_file launch/{path.name}" in line for line in header)
